"""Training steps on a CUDA device as CUDA graphs: captured once, replayed from then on.

A step of a small model is some dozens of kernels that take microseconds each; Python and autograd
need ten times as long to launch them. A graph launches them all at once, and computes the same to
the last bit: the same kernels on the same memory.

That memory must stay where it is: the live model's weights do (states are copied into them), the
optimizer's state does (`StepGraphs.settle`), and each step's batch is copied to the place that the
graph reads. Python code runs while a step is captured and then no more. So what it decides must not
hang on anything but shapes: a stage that meets a kind of steps for the first time carries two out
as they are, and the kind is captured only if nothing that could be seen speaks against it
(`StepGraphs.refused`).
"""

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_ray.engine.segments import Values
from rlhf_ray.errors import StageError, in_one_line
from rlhf_ray.operations import OptimizerName

Step = Callable[[Values, Tensor], Tensor]
"""(values at the boundary, targets) of a batch -> its loss, detached; the weights have moved."""

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
        # held, so that what is moved cannot come to lie there again
        self._held = [value.detach() for value in (*model.parameters(), *model.buffers())]
        self.refused: dict[object, str] = {}
        self._graphs: dict[object, _Graph] = {}
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
        """The steps of one stage: replayed as soon as they can be.

        Args:
            kind: hashable; steps of one kind do the same, but for their batch.
            step: as it is carried out otherwise.
            optimizer: that it uses; settled.
            loss: that it uses.
        """
        if self._moved():
            return step
        last: tuple[object, _Graph] | None = None
        trials: dict[object, _Trial] = {}

        def run(values: Values, targets: Tensor) -> Tensor:
            nonlocal last
            form = _form(values, targets)
            if last is not None and last[0] == form:
                return last[1].step(values, targets)
            key = kind, form
            if key not in self._graphs and key not in self.refused:
                if key not in trials:
                    trials[key] = _Trial(self._model, loss)
                if not trials[key].over:
                    return trials[key].step(step, values, targets)
                if why := trials[key].objection():
                    self.refused[key] = why
                else:
                    self._capture(key, step, optimizer, loss, values, targets)
            if key in self.refused:
                return step(values, targets)
            last = form, self._graphs[key]
            return last[1].step(values, targets)

        return run

    def _moved(self) -> bool:
        """Whether code of the model's or of an operation has put what graphs read elsewhere."""
        now = (*self._model.parameters(), *self._model.buffers())
        return [v.data_ptr() for v in now] != [v.data_ptr() for v in self._held]

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
            self._places.clear()
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        form = _form(values, targets)
        if form not in self._places:
            # one place for all kinds: the values of a batch are copied there just before a replay
            copies = {name: value.clone() for name, value in values.items()}
            self._places[form] = copies, targets.clone()
        placed, wanted = self._places[form]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with (
                _capturable(optimizer),
                torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"),
            ):
                found = step(placed, wanted)
        except torch.AcceleratorError as error:
            # the process is not to be relied on: its random numbers are those of the capture
            raise StageError(
                "a training step must be captured as a CUDA graph, got "
                f"{in_one_line(error)} Switch that off with --no-cuda-graphs."
            ) from error
        except Exception as error:  # whatever a model's code raises, or the device is full
            self.refused[key] = in_one_line(error)
            return
        self._graphs[key] = _Graph(
            graph=graph, values=placed, targets=wanted, loss=found, held=loss
        )


class _Trial:
    """Steps of a kind at the beginning of a stage that are carried out as they are, and watched.

    The first loads libraries, and is where modules set themselves up.
    """

    def __init__(self, model: nn.Module, loss: object) -> None:
        of_loss = _modules_of(loss)
        self._modules = [*model.modules(), *of_loss]
        self._loss_buffers = [buffer for module in of_loss for buffer in module.buffers()]
        # held, so that nothing new can lie where it lay
        self._held = [{**vars(m), "_buffers": dict(m._buffers)} for m in self._modules]
        self._before = self._memory()
        self._done = 0
        self._seen = ""

    @property
    def over(self) -> bool:
        return self._done == 2

    def step(self, step: Step, values: Values, targets: Tensor) -> Tensor:
        """Carries one out."""
        drawn = _random_state()
        with _waits() as waits:
            found = step(values, targets)
        self._done += 1
        if self.over and waits:
            self._seen = "it waits for the device"
        elif drawn != _random_state():
            self._seen = "it draws random numbers on the CPU"
        return found

    def objection(self) -> str:
        """Why steps like these cannot be captured; "" if nothing speaks against it."""
        if not self._seen and self._before != self._memory():
            return "a module keeps account of its calls"
        return self._seen

    def _memory(self) -> list[object]:
        # the model's buffers are put back, or part of its state; those of a loss are made anew
        written = [buffer._version for buffer in self._loss_buffers]
        return [*(_memory(module) for module in self._modules), written]


def _form(values: Values, targets: Tensor) -> tuple[object, ...]:
    """What a graph takes for granted of a batch."""
    named = (*values.items(), ("", targets))
    return tuple([(name, v.dtype, v.shape, v.stride()) for name, v in named])


@contextlib.contextmanager
def _capturable(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Has an optimizer accept that it is captured: all of its state is on the device."""
    groups = [group for group in optimizer.param_groups if "capturable" in group]
    before = [group["capturable"] for group in groups]
    for group in groups:
        group["capturable"] = True
    try:
        yield
    finally:
        for group, value in zip(groups, before, strict=True):
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


def _modules_of(loss: object) -> list[nn.Module]:
    """Modules that a loss consists of."""
    if isinstance(loss, nn.Module):
        return list(loss.modules())
    if isinstance(loss, partial):
        inside = (loss.func, *loss.args, *loss.keywords.values())
        return [module for part in inside for module in _modules_of(part)]
    return []


def _memory(module: nn.Module) -> list[object]:
    """What a module may remember from one call to the next, its weights and buffers' values aside.

    Equal before and after a call if it remembered nothing.
    """
    tensors = (*module._parameters.items(), *module._buffers.items())
    places = [(name, id(value), value.data_ptr()) for name, value in tensors if value is not None]
    own = {name: value for name, value in vars(module).items() if name not in _LISTED}
    return [places, _told(own, depth=3)]


def _told(value: object, depth: int) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, nn.Parameter):
        return id(value), value.data_ptr()
    if isinstance(value, Tensor):
        return id(value), value._version
    if isinstance(value, _GENERATORS):
        return object()  # equal to nothing: what it holds may change at every call
    if depth and isinstance(value, Mapping):
        return [(repr(key), _told(item, depth - 1)) for key, item in value.items()]
    if depth and isinstance(value, list | tuple | set | frozenset):
        return [_told(item, depth - 1) for item in value]
    return id(value)


_LISTED = ("_parameters", "_buffers", "_modules")
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)


def _random_state() -> tuple[object, ...]:
    """Of what a module could draw from on the CPU."""
    numpy: dict[str, Any] = np.random.get_state(legacy=False)["state"]  # type: ignore[assignment]
    parts = [v.tobytes() if isinstance(v, np.ndarray) else v for v in numpy.values()]
    return random.getstate(), *parts, torch.default_generator.get_state().numpy().tobytes()
