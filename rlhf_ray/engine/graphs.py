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
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.engine.batches import Examples, Step, one_by_one
from rlhf_ray.engine.segments import SegmentPlan, Values
from rlhf_ray.engine.watching import TRIAL_STEPS, Memory, Trial, closed_over
from rlhf_ray.errors import StageError, in_one_line
from rlhf_ray.operations import OptimizerName

MAX_GRAPHS = 256
"""Kept at once; beyond that all are dropped, and captured anew as they are needed."""

WINDOW_STEPS, WINDOW_BYTES = 32, 1 << 24
"""Steps whose batches are copied at once, and bytes that they may take, but for a single batch."""

MAX_WINDOWS_BYTES = 1 << 30
"""For the batches of all kinds; beyond that graphs are dropped, as beyond `MAX_GRAPHS`."""

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

        device, one = examples.targets.device, examples.targets[:1]
        n_bytes = SegmentPlan.n_bytes(taken(batch_size)) + batch_size * one.nbytes
        self.n_steps = max(1, min(WINDOW_STEPS, WINDOW_BYTES // max(1, n_bytes)))
        self.n_bytes = self.n_steps * n_bytes
        n = self.n_steps * batch_size
        self._values = taken(n)
        self._targets = one.repeat_interleave(n, 0)
        self._nothing = torch.zeros(n, dtype=torch.long, device=device)  # rows of no step
        self._order = torch.arange(n, device=device).view(self.n_steps, batch_size)
        self._losses = torch.zeros(self.n_steps, dtype=torch.float32, device=device)
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
        index = self._order.index_select(0, self._next).view(-1)
        loss = step(self.holding(examples), index)
        self._losses.index_copy_(0, self._next, loss.view(1))
        self._next.add_(1)

    def holding(self, examples: Examples) -> Examples:
        """Those that lie here, in place of others."""
        return replace(examples, values=self._values, targets=self._targets)

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

    @property
    def like(self) -> tuple[object, ...]:
        """Equal for kinds whose batches can lie in one place."""
        return self.boundary, self.form, self.batch_size

    @classmethod
    def of(cls, asked: object, examples: Examples, batch: Tensor) -> "_Kind":
        values, targets = examples.select(examples.values, batch), examples.targets
        return cls(
            asked=asked,
            boundary=examples.boundary,
            form=(*_form(values), targets.dtype, targets.shape[1:]),
            batch_size=len(batch),
        )


def _form(values: Values) -> tuple[object, ...]:
    return tuple((name, v.dtype, v.shape, v.stride()) for name, v in values.items())


@dataclass(frozen=True, kw_only=True, eq=False)
class _Graph:
    """A captured step.

    Attributes:
        memory: of the model's modules, and of what the loss closes over, when it was captured.
        held: what else the graph may read.
    """

    graph: torch.cuda.CUDAGraph
    window: _Window
    memory: Memory
    held: tuple[object, ...]

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
        self._kinds: dict[tuple[object, ...], _Kind] = {}
        self._states: dict[tuple[nn.Parameter, str], Tensor] = {}
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def settle(
        self,
        optimizer: torch.optim.Optimizer,
        name: OptimizerName,
        parameters: Mapping[str, nn.Parameter],
    ) -> bool:
        """Gives a new optimizer the state it starts from, zeros, where graphs look for it.

        Returns:
            False, and it did nothing, where operations or the model have moved weights or buffers:
            no graph can be relied on.
        """
        if [v.data_ptr() for v in self._read()] != [v.data_ptr() for v in self._held]:
            return False
        places: list[Tensor] = []
        for parameter in parameters.values():
            for slot in _SLOTS[name]:
                if (parameter, slot) not in self._states:
                    new = torch.empty((), dtype=torch.float32, device=parameter.device)
                    place = new if slot == "step" else torch.empty_like(parameter.detach())
                    self._states[parameter, slot] = place
                places.append(self._states[parameter, slot])
                optimizer.state[parameter][slot] = places[-1]
        torch._foreach_zero_(places)  # pyright: ignore[reportPrivateImportUsage] documented
        return True

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
        found: list[Tensor] = []
        for _, alike in itertools.groupby(batches, len):
            rest = list(alike)
            key = self._kind(kind, examples, rest[0])
            if key in self._graphs and self._graphs[key].memory.changed():
                del self._graphs[key]
                self.refused[key] = "a module has changed since"
            if key not in self._graphs and key not in self.refused:
                trial = Trial(self._model, loss)
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

    def _kind(self, asked: object, examples: Examples, batch: Tensor) -> _Kind:
        """Of steps on batches as large as one; looked up where they were taken before."""
        targets = examples.targets
        of_all = *_form(examples.values), targets.dtype, targets.shape
        known = asked, examples.boundary, of_all, len(batch)
        if known not in self._kinds:
            self._kinds[known] = _Kind.of(asked, examples, batch)
        return self._kinds[known]

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
        self._make_room()
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            window = self._window(key, examples)
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
        self._windows[key.like] = window
        self._graphs[key] = _Graph(
            graph=graph,
            window=window,
            memory=Memory([*self._model.modules()], closed_over(loss)),
            held=(loss, step),
        )

    def _make_room(self) -> None:
        n_bytes = sum(window.n_bytes for window in self._windows.values())
        crowded = n_bytes > MAX_WINDOWS_BYTES and len(self._windows) > 1
        if crowded or len(self._graphs) >= MAX_GRAPHS:
            self._graphs.clear()
            self._windows.clear()
            self._kinds.clear()
        if not self._graphs:
            self._pool = torch.cuda.graph_pool_handle()

    def _window(self, key: _Kind, examples: Examples) -> _Window:
        """One for all kinds with such batches: it is filled just before it is read."""
        window = self._windows.get(key.like) or _Window(examples, key.batch_size)
        index = torch.arange(key.batch_size, device=examples.targets.device)
        if _Kind.of(key.asked, window.holding(examples), index) != key:
            raise StageError(
                "examples must lie alike when they are chosen twice, got other strides."
            )
        window.rewind()
        return window


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
