"""Training steps on a CUDA device as CUDA graphs: captured once, replayed from then on.

A step of a small model is some dozens of kernels that take microseconds each; Python and autograd
need ten times as long to launch them. A graph launches them all at once, and computes the same to
the last bit: the same kernels on the same memory.

That memory must stay where it is: the live model's weights do (states are copied into them), the
optimizer's state does (`StepGraphs.settle`), and each step's batch is copied to the place that the
graph reads. Python code runs while a step is captured and then no more. So what it decides must not
hang on anything but shapes; steps for which that cannot be relied on stay as they are
(`StepGraphs.refused`).
"""

import contextlib
import pickle
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_ray.engine.segments import Values
from rlhf_ray.errors import StageError, in_one_line
from rlhf_ray.operations import OptimizerName

Step = Callable[[Values, Tensor], Tensor]
"""(values at the boundary, targets) of a batch -> its loss, detached; the weights have moved."""

WATCHED_AFTER = 1
"""Steps of a kind before the one that is watched, and then captured: libraries get loaded."""

MAX_GRAPHS = 256
"""Kept at once; beyond that all are dropped, and captured anew as they are needed."""

_SLOTS: Mapping[OptimizerName, tuple[str, ...]] = {
    "adam": ("step", "exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class _Graph:
    graph: torch.cuda.CUDAGraph
    values: Values
    targets: Tensor
    loss: Tensor
    held: object  # the loss function, whose tensors the graph reads

    def step(self, values: Values, targets: Tensor) -> Tensor:
        for name, value in values.items():
            self.values[name].copy_(value)
        self.targets.copy_(targets)
        self.graph.replay()
        return self.loss.clone()


class StepGraphs:
    """The graphs of one live model. Not thread-safe; all on one stream, which is not the default.

    Attributes:
        refused: kinds of steps that are not captured -> why.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.refused: dict[object, str] = {}
        self.clear()

    def clear(self) -> None:
        """Drops all graphs, and the memory that they use."""
        self._graphs: dict[object, _Graph] = {}
        self._met: dict[object, int] = {}
        self._places: dict[object, tuple[Values, Tensor]] = {}
        self._states: dict[tuple[nn.Parameter, str], Tensor] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def settle(
        self,
        optimizer: torch.optim.Optimizer,
        name: OptimizerName,
        parameters: Mapping[str, nn.Parameter],
    ) -> None:
        """Moves an optimizer's state to the places where graphs look for it; zeros where it is new.

        Zeros are what the optimizers here start from.
        """
        for parameter in parameters.values():
            state = optimizer.state[parameter]
            for slot in _SLOTS[name]:
                if (parameter, slot) not in self._states:
                    new = torch.zeros((), device=parameter.device)
                    place = new if slot == "step" else torch.zeros_like(parameter)
                    self._states[parameter, slot] = place.detach()
                place = self._states[parameter, slot]
                place.copy_(state[slot]) if slot in state else place.zero_()
                state[slot] = place

    def steps(
        self, kind: object, step: Step, optimizer: torch.optim.Optimizer, loss: object
    ) -> Step:
        """A step that is replayed as soon as it can be.

        Args:
            kind: hashable; steps of one kind do the same, but for their batch.
            step: as it is carried out otherwise.
            optimizer: that it uses; settled.
            loss: that it uses.
        """
        last: tuple[object, _Graph] | None = None

        def run(values: Values, targets: Tensor) -> Tensor:
            nonlocal last
            form = _form(values, targets)
            if last is not None and last[0] == form:
                return last[1].step(values, targets)
            key = kind, form
            met = self._met.get(key, 0)
            if met > WATCHED_AFTER and key not in self._graphs and key not in self.refused:
                self._capture(key, step, optimizer, loss, values, targets)
            if key in self._graphs:
                last = form, self._graphs[key]
                return last[1].step(values, targets)
            if met == WATCHED_AFTER:
                found = self._watched(key, step, loss, values, targets)
            else:
                found = step(values, targets)
            self._met[key] = met + 1  # not where it raised
            return found

        return run

    def _watched(
        self, key: object, step: Step, loss: object, values: Values, targets: Tensor
    ) -> Tensor:
        """Carries out a step, and sees whether anything speaks against its capture."""
        modules = [*self._model.modules(), *(loss.modules() if isinstance(loss, nn.Module) else ())]
        states, drawn = [_plain_state(module) for module in modules], _random_state()
        written = _written(loss)
        with _waits() as waits:
            found = step(values, targets)
        if waits:
            self.refused[key] = "it waits for the device"
        elif drawn != _random_state():
            self.refused[key] = "it draws random numbers on the CPU"
        elif states != [_plain_state(module) for module in modules] or written != _written(loss):
            self.refused[key] = "a module keeps account of its calls"
        return found

    def _capture(
        self,
        key: object,
        step: Step,
        optimizer: torch.optim.Optimizer,
        loss: object,
        values: Values,
        targets: Tensor,
    ) -> None:
        """Captures a step, which carries nothing out; says in `refused` if it cannot be done."""
        if len(self._graphs) >= MAX_GRAPHS:
            self._graphs.clear()
        form = _form(values, targets)
        if form not in self._places:
            # one place for all kinds: the values of a batch are copied there just before a replay
            copies = {name: value.clone() for name, value in values.items()}
            self._places[form] = copies, targets.clone()
        placed, wanted = self._places[form]
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with (
                _capturable(optimizer),
                torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"),
            ):
                found = step(placed, wanted)
        except torch.OutOfMemoryError:
            raise
        except torch.AcceleratorError as error:
            # the process is not to be relied on: its random numbers are those of the capture
            raise StageError(
                "a training step must be captured as a CUDA graph, got "
                f"{in_one_line(error)} Switch that off with --no-cuda-graphs."
            ) from error
        except Exception as error:  # whatever a model's code raises
            self.refused[key] = in_one_line(error)
            return
        self._graphs[key] = _Graph(
            graph=graph, values=placed, targets=wanted, loss=found, held=loss
        )


def _form(values: Values, targets: Tensor) -> tuple[object, ...]:
    """What a graph takes for granted of a batch."""
    named = (*values.items(), ("", targets))
    return tuple([(name, v.dtype, v.shape, v.stride()) for name, v in named])


@contextlib.contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Has an optimizer accept that it is captured: all of its state is on the device."""
    before = [group.get("capturable") for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(optimizer.param_groups, before, strict=True):
            group["capturable"] = value


@contextlib.contextmanager
def _waits() -> Iterator[list[object]]:
    """A list that is filled, at the end, with what waited for the device."""
    found: list[object] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        text = str(warning.message)
        if "synchronizing CUDA operation" in text:
            found.append(warning)
        elif "debug mode is a prototype" not in text:  # the model's own
            where = warning.filename, warning.lineno
            warnings.warn_explicit(warning.message, warning.category, *where)


def _plain_state(module: nn.Module) -> list[object]:
    """What a module remembers outside its tensors, and where its buffers lie."""
    plain = (bool, int, float, str, tuple, type(None))
    own = [(name, value) for name, value in vars(module).items() if isinstance(value, plain)]
    places = [(name, id(buffer)) for name, buffer in module._buffers.items()]
    return [*own, *places]


def _written(loss: object) -> list[int]:
    """Changes when a loss writes into tensors of its own: those would go on from task to task."""
    return [b._version for b in loss.buffers()] if isinstance(loss, nn.Module) else []


def _random_state() -> tuple[object, ...]:
    """Of what a module could draw from on the CPU."""
    numpy, torchs = np.random.get_state(legacy=False), torch.default_generator.get_state()
    return random.getstate(), pickle.dumps(numpy), torchs.numpy().tobytes()
