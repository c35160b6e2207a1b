"""Training steps on a CUDA device as CUDA graphs: captured once, replayed from then on.

A step of a small model is some dozens of kernels that take microseconds each; Python and autograd
need ten times as long to launch them. A graph launches them all at once, and computes the same to
the last bit: the same kernels on the same memory.

That memory must stay where it is: the live model's weights do (states are copied into them), the
optimizer's state does (`StepGraphs.settle`), and the batches of some steps at a time are copied to
the place that the graph reads (`_Window`), where each step finds the next by itself.

Python code runs while a step is captured and then no more. So what it decides must not hang on
anything but shapes: a stage that meets a kind of steps for the first time carries two out as they
are, and the kind is captured only if nothing that could be seen speaks against it
(`StepGraphs.refused`).
"""

import contextlib
import itertools
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_ray.engine.batches import Examples, Step, one_by_one
from rlhf_ray.engine.segments import SegmentPlan, Values
from rlhf_ray.errors import StageError, in_one_line
from rlhf_ray.operations import OptimizerName

MAX_GRAPHS = 256
"""Kept at once; beyond that all are dropped, and captured anew as they are needed."""

TRIAL_STEPS = 2
"""At the beginning of a stage, before a kind of steps is captured; the first loads libraries."""

WINDOW_STEPS, WINDOW_BYTES = 32, 1 << 24
"""Steps whose batches are copied at once, and bytes that they may take, but for a single batch."""

_SLOTS: Mapping[OptimizerName, tuple[str, ...]] = {
    "adam": ("step", "exp_avg", "exp_avg_sq"),
    "sgd": ("momentum_buffer",),
}


class _Window:
    """Where graphs find the batches of some steps, all of one size, and leave their losses.

    Every replay takes the next batch by itself.

    Args:
        examples: what those that come to lie here are like.
        batch_size: B.
    """

    def __init__(self, examples: Examples, batch_size: int) -> None:
        def taken(n: int) -> Values:
            return examples.select(examples.values, torch.zeros(n, dtype=torch.long, device=device))

        device = examples.targets.device
        n_bytes = SegmentPlan.n_bytes(taken(batch_size))
        self.n_steps = max(1, min(WINDOW_STEPS, WINDOW_BYTES // max(1, n_bytes)))
        n = self.n_steps * batch_size
        self._values = taken(n)
        self._targets = examples.targets[:1].repeat_interleave(n, 0)
        self._nothing = torch.zeros(n, dtype=torch.long, device=device)  # rows of no step
        self._order = torch.arange(n, device=device).view(self.n_steps, batch_size)
        self._losses = torch.zeros(self.n_steps, device=device)
        self._next = torch.zeros(1, dtype=torch.long, device=device)

    def rewind(self) -> None:
        """The next step takes the first batch."""
        self._next.zero_()

    def fill(self, examples: Examples, batches: list[Tensor]) -> None:
        """Copies batches here, at most `n_steps`; the next step takes the first."""
        none = self._nothing[: (self.n_steps - len(batches)) * self._order.shape[1]]
        rows = torch.cat([*batches, none])
        for name, value in examples.select(examples.values, rows).items():
            self._values[name].copy_(value)
        self._targets.copy_(examples.targets.index_select(0, rows))
        self.rewind()

    def carry_out(self, step: Step, examples: Examples) -> None:
        """A step on the next batch of those that lie here."""
        here = replace(examples, values=self._values, targets=self._targets)
        loss = step(here, self._order.index_select(0, self._next).view(-1))
        self._losses.index_copy_(0, self._next, loss.view(1))
        self._next.add_(1)

    def losses(self, n: int) -> Tensor:
        """Of the first steps since it was filled."""
        return self._losses[:n].clone()


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """Steps of one kind do the same, but for their examples.

    Attributes:
        asked: what the caller tells apart.
        boundary: where the examples' values lie.
        form: what a graph takes for granted of a batch; it hangs on no number of examples but B.
        batch_size: B.
    """

    asked: object
    boundary: int
    form: tuple[object, ...]
    batch_size: int

    @classmethod
    def of(cls, asked: object, examples: Examples, batch: Tensor) -> "_Kind":
        values, targets = examples.select(examples.values, batch), examples.targets
        of_values = [(name, v.dtype, v.shape, v.stride()) for name, v in values.items()]
        return cls(
            asked=asked,
            boundary=examples.boundary,
            form=(*of_values, targets.dtype, targets.shape[1:]),
            batch_size=len(batch),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Graph:
    graph: torch.cuda.CUDAGraph
    window: _Window
    held: object  # the loss function, whose tensors the graph reads

    def carry_out(self, examples: Examples, batches: list[Tensor]) -> list[Tensor]:
        found = []
        for first in range(0, len(batches), self.window.n_steps):
            part = batches[first : first + self.window.n_steps]
            self.window.fill(examples, part)
            for _ in part:
                self.graph.replay()
            found.append(self.window.losses(len(part)))
        return found


class StepGraphs:
    """The graphs of one live model. Not thread-safe; all on one stream, which is not the default.

    Attributes:
        refused: kinds of steps that are not captured -> why.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        # held, so that what is moved cannot come to lie there again
        self._held = [value.detach() for value in self._read()]
        self.refused: dict[_Kind, str] = {}
        self._graphs: dict[_Kind, _Graph] = {}
        self._windows: dict[object, _Window] = {}
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
        """Gives a new optimizer the state it starts from, zeros, where graphs look for it."""
        places = []
        for parameter in parameters.values():
            for slot in _SLOTS[name]:
                if (parameter, slot) not in self._states:
                    new = torch.empty((), device=parameter.device)
                    place = new if slot == "step" else torch.empty_like(parameter.detach())
                    self._states[parameter, slot] = place
                places.append(self._states[parameter, slot])
                optimizer.state[parameter][slot] = places[-1]
        torch._foreach_zero_(places)  # pyright: ignore[reportPrivateImportUsage] documented

    def carry_out(
        self,
        step: Step,
        examples: Examples,
        batches: Iterable[Tensor],
        *,
        kind: object,
        optimizer: torch.optim.Optimizer,
        loss: object,
    ) -> list[Tensor]:
        """Carries out the steps of one stage: they are replayed as soon as they can be.

        Args:
            step: as it is carried out otherwise.
            examples: that it takes batches from.
            batches: index of each.
            kind: hashable; equal for steps that do the same, but for the examples.
            optimizer: that it uses; settled.
            loss: that it uses.

        Returns:
            The losses of some steps at a time, in order.
        """
        if self._moved():
            return one_by_one(step, examples, batches)
        found: list[Tensor] = []
        for _, alike in itertools.groupby(batches, len):
            rest = list(alike)
            key = _Kind.of(kind, examples, rest[0])
            if key not in self._graphs and key not in self.refused:
                trial = _Trial(self._model, loss)
                found += [trial.step(step, examples, index) for index in rest[:TRIAL_STEPS]]
                rest = rest[TRIAL_STEPS:]
                if not rest:
                    continue
                if why := trial.objection():
                    self.refused[key] = why
                else:
                    self._capture(key, step, examples, optimizer, loss)
            if key in self.refused:
                found += one_by_one(step, examples, rest)
            else:
                found += self._graphs[key].carry_out(examples, rest)
        return found

    def _moved(self) -> bool:
        """Whether code of the model's or of an operation has put what graphs read elsewhere."""
        return [v.data_ptr() for v in self._read()] != [v.data_ptr() for v in self._held]

    def _read(self) -> list[Tensor]:
        """What graphs may read of the model: all weights and buffers."""
        own = [d for m in self._model.modules() for d in (m._parameters, m._buffers)]
        return [value for tensors in own for value in tensors.values() if value is not None]

    def _capture(
        self,
        key: _Kind,
        step: Step,
        examples: Examples,
        optimizer: torch.optim.Optimizer,
        loss: object,
    ) -> None:
        """Captures a step, which carries nothing out; says in `refused` if it cannot be done."""
        if len(self._graphs) >= MAX_GRAPHS:
            self._graphs.clear()
            self._windows.clear()
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()
        like = key.form, key.batch_size
        if like not in self._windows:  # one for all such kinds: it is filled just before replays
            self._windows[like] = _Window(examples, key.batch_size)
        window = self._windows[like]
        window.rewind()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with (
                _capturable(optimizer),
                torch.cuda.graph(graph, self._pool, stream, capture_error_mode="thread_local"),
            ):
                window.carry_out(step, examples)
        except torch.AcceleratorError as error:
            # the process is not to be relied on: its random numbers are those of the capture
            raise StageError(
                "a training step must be captured as a CUDA graph, got "
                f"{in_one_line(error)} Switch that off with --no-cuda-graphs."
            ) from error
        except Exception as error:  # whatever a model's code raises, or the device is full
            self.refused[key] = in_one_line(error)
            return
        self._graphs[key] = _Graph(graph=graph, window=window, held=loss)


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

    def step(self, step: Step, examples: Examples, index: Tensor) -> Tensor:
        """Carries one out."""
        drawn = _random_state()
        with _waits() as waits:
            found = step(examples, index)
        self._done += 1
        if self._done == TRIAL_STEPS and waits:
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
