"""A suite's model on one device: its weights, the data, and the activations kept between stages.

Knows how to bring the model to a state and how to run a split through it from the nearest kept
boundary; not what a stage is.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args, get_type_hints

import torch
from torch import Tensor

from rlhf_ray.digests import source_digest
from rlhf_ray.engine.activations import ActivationCache
from rlhf_ray.engine.batches import Examples
from rlhf_ray.engine.fitting import output_layer
from rlhf_ray.engine.graphs import StepGraphs
from rlhf_ray.engine.segments import SegmentPlan, Values, plan_segments
from rlhf_ray.engine.splits import SplitData, Splits
from rlhf_ray.errors import InputError, unknown_name
from rlhf_ray.isolation import restored_buffers
from rlhf_ray.levels import split_levels
from rlhf_ray.outcomes import PRETRAINED, LevelState
from rlhf_ray.tasks import Inputs, Loss, Suite, Task, call_model, loss_on, map_inputs, n_examples

Load = Callable[[str, int], LevelState]
"""(version, level) -> that level's state as the stage `version` left it."""

CHUNK = 512
"""Examples per forward pass of an evaluation or a cache fill, at most."""

CPU_CHUNK = 128
"""The same on a CPU for splits larger than `CHUNK`: activations that stay in the processor's cache
made forward passes of the built-in suites' CNN 1.6 times as fast."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How stages are carried out.

    Attributes:
        device: "cpu", "cuda", or "auto": CUDA where there is a device.
        precision: "fp32", or "bf16": autocast, on CUDA only.
        val_size: val examples that decisions use, >= 1.
        cache_bytes: bound on cached activations, and as much on the tasks' data on the device, per
            worker, in bytes; 0 switches caching off. The data of the task at work always stay.
        probe_size: train examples of the gradient probe at the start, >= 1.
        reference_steps: steps of the full stage, the unit of cost, >= 1.
        reference_batch_size: its batch size, >= 1.
        channels_last: memory format of 4-D weights and inputs.
        cuda_graphs: on CUDA, capture training steps and replay them, where that can be relied on.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"
    val_size: int = 256
    cache_bytes: int = 1 << 28
    probe_size: int = 64
    reference_steps: int = 20
    reference_batch_size: int = 64
    channels_last: bool = True
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        for name in ("device", "precision"):
            value, valid = getattr(self, name), get_args(get_type_hints(EngineSettings)[name])
            if value not in valid:
                raise unknown_name(name, str(value), valid)
        for name in ("val_size", "probe_size", "reference_steps", "reference_batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {name}={getattr(self, name)}.")
        if self.cache_bytes < 0:
            raise InputError(f"cache_bytes must be >= 0, got cache_bytes={self.cache_bytes}.")
        if self.precision == "bf16" and self.device == "cpu":
            raise InputError("precision 'bf16' needs a CUDA device, got device='cpu'. Use 'fp32'.")

    def check_device(self) -> None:
        """Raises InputError unless this machine has the device; another one of a cluster may."""
        if torch.cuda.is_available():
            return
        if self.device == "cuda":
            raise InputError("device must be there, got device='cuda'. Use 'auto' or 'cpu'.")
        if self.precision == "bf16":
            raise InputError("precision 'bf16' needs a CUDA device, got none. Use 'fp32'.")

    def on_this_machine(self) -> "EngineSettings":
        """The same, or on a machine without the device what prices stages as well there."""
        if torch.cuda.is_available():
            return self
        return replace(self, device="cpu", precision="fp32")

    @property
    def torch_device(self) -> torch.device:
        """The device that "auto" stands for here."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return torch.device(self.device)


def channels_last(value: Tensor) -> Tensor:
    """A copy of a 4-D float tensor with channels-last strides; others as they are.

    With one channel they are NCHW's, too, for all that `contiguous` looks at, so strides are set
    outright: on a CPU channels-last ones, lest the first convolution answers in NCHW; on a GPU
    NCHW's, where cuDNN has a faster deterministic kernel for the gradient of its weights.
    """
    if value.dim() != 4 or not value.is_floating_point():
        return value
    n, c, h, w = value.shape
    plain = c == 1 and value.is_cuda
    strides = (h * w, h * w, w, 1) if plain else (c * h * w, 1, w * c, c)
    strided = torch.empty_strided(value.shape, strides, dtype=value.dtype, device=value.device)
    return strided.copy_(value) if n else value


class LoadedModel:
    """The live model of one engine. Not thread-safe.

    Args:
        suite: its model is copied, not touched.
        settings: see `EngineSettings`.
    """

    def __init__(self, suite: Suite, settings: EngineSettings) -> None:
        self.settings = settings
        self.device = settings.torch_device
        self.split = split_levels(suite.model, suite.levels)
        self.model = copy.deepcopy(suite.model).to(self.device).eval().requires_grad_(False)
        x = suite.train_tasks[0].train[0]
        spread = torch.linspace(0, n_examples(x) - 1, 4).long()  # not all of one class, say
        example = map_inputs(lambda value: value[spread.to(value.device)], x)
        self._channels_last = settings.channels_last and self._takes_channels_last(example)
        self.parameters = dict(self.model.named_parameters())
        self.state = dict(self.model.state_dict(keep_vars=True))
        self.pretrained = {name: value.detach().clone() for name, value in self.state.items()}
        self._loaded: list[str | None] = [PRETRAINED] * self.split.n_levels
        self._losses: dict[str, Loss] = {}
        self._loss_digests: dict[str, str] = {}
        on_graphs = settings.cuda_graphs and self.device.type == "cuda"
        self.graphs = StepGraphs(self.model) if on_graphs else None
        self._activations = ActivationCache(settings.cache_bytes)
        example = self.place(example)
        self.plan: SegmentPlan = plan_segments(self.model, self.split, example)
        self._splits = Splits(
            lambda inputs: self.plan.start(self.place(inputs)),
            val_size=settings.val_size,
            max_bytes=settings.cache_bytes,
        )
        values = self.plan.start(example)
        with restored_buffers(self.model):
            self._example_bytes = {_shapes(values): self._measure(values, n_examples(example))}
            self.output_layer = output_layer(self.model, self.split, example)

    def _takes_channels_last(self, example: Inputs) -> bool:
        """Turns the model to channels-last, and back if its code cannot do with such strides.

        A `view` of a convolution's output is the common case.
        """
        if not any(value.dim() == 4 for value in self.model.parameters()):
            return False
        self.model.to(memory_format=torch.channels_last)
        self._channels_last = True
        try:
            with torch.no_grad(), restored_buffers(self.model):
                call_model(self.model, self.place(example))
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise  # of the device, not of the model
        except RuntimeError:
            self.model.to(memory_format=torch.contiguous_format)
            return False
        return True

    def release(self) -> None:
        """Drops kept activations and tasks' data, and gives the GPU's free memory back.

        Graphs, too, and for good: steps without them compute the same in less memory.
        """
        self._activations = ActivationCache(self.settings.cache_bytes)
        self._splits.clear()
        self.graphs = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- weights and data ----------------------------------------------------------------------

    def forget_losses(self) -> None:
        """Takes the tasks' losses anew: modules among them may hold what they met before."""
        self._losses.clear()

    def loss(self, task: Task) -> Loss:
        """A task's loss; tensors that it holds lie on the device."""
        if task.digest not in self._losses:
            self._losses[task.digest] = loss_on(self.device, task)
        return self._losses[task.digest]

    def loss_digest(self, task: Task) -> str:
        """Equal for losses that compute the same."""
        if task.digest not in self._loss_digests:
            self._loss_digests[task.digest] = source_digest(task.loss)
        return self._loss_digests[task.digest]

    def load(self, versions: tuple[str, ...], load: Load | None) -> None:
        """Brings the model to a state; levels that are there already are not copied.

        Args:
            versions: of the state.
            load: gives the levels' states; None will do for the pretrained state.
        """
        for level, version in enumerate(versions):
            if self._loaded[level] == version:
                continue
            if version == PRETRAINED:
                weights = self.pretrained
            else:
                assert load is not None
                weights = load(version, level).weights
            self._loaded[level] = None
            with torch.no_grad():
                for name in self.split.state[level]:
                    self.state[name].copy_(weights[name])
            self._loaded[level] = version

    def mark(self, levels: tuple[int, ...], version: str | None) -> None:
        """Says what the live weights of levels are now; None: of no state that could be asked."""
        for level in levels:
            self._loaded[level] = version

    def place(self, inputs: Inputs) -> Inputs:
        """Inputs on the device, in the memory format that convolutions like."""

        def place(value: Tensor) -> Tensor:
            value = value.to(self.device)
            return channels_last(value) if self._channels_last else value

        return map_inputs(place, inputs)

    def data(self, task: Task, split: str) -> SplitData:
        """One split of a task on the device; of val the examples that decisions use."""
        data = self._splits.get(task, split)
        if (shapes := _shapes(data.values)) not in self._example_bytes:
            few = torch.arange(min(data.n, 4), device=self.device)
            values = self.plan.take(data.values, few, 0)
            self._example_bytes[shapes] = self._measure(values, len(few))
        return data

    def chunks(self, values: Values, n: int, boundary: int) -> Iterator[Values]:
        """A split's values whole, or beyond `CHUNK` examples in pieces."""
        if n <= CHUNK:
            yield values
            return
        size = CPU_CHUNK if self.device.type == "cpu" else CHUNK
        for first in range(0, n, size):
            index = torch.arange(first, min(first + size, n), device=self.device)
            yield self.plan.take(values, index, boundary)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The precision that forward passes run in."""
        if self.settings.precision == "bf16":
            # without its cache, which is emptied at the end of the outermost autocast alone: steps
            # inside another one, if only one that is off, would go on with the first step's weights
            return torch.autocast(self.device.type, dtype=torch.bfloat16, cache_enabled=False)
        return contextlib.nullcontext()

    def output(self, values: Values, start: int) -> Tensor:
        """The model's output from the values at a boundary: half precision ends before the loss."""
        with self.autocast():
            output = self.plan.output(values, start)
        return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output

    def _measure(self, values: Values, n: int) -> list[float]:
        """Bytes of one example's values at every usable boundary; infinite at the others.

        Args:
            values: inputs of some examples.
            n: how many they are.
        """
        at, found = 0, [0.0]
        for b in range(1, self.split.n_levels):
            if self.plan.usable[b]:
                values, at = self._forward(values, at, b), b
                found.append(SegmentPlan.n_bytes(values) / n)
            else:
                found.append(float("inf"))
        return found

    # -- activations ---------------------------------------------------------------------------

    def outputs(
        self,
        task: Task,
        data: SplitData,
        versions: tuple[str, ...],
        *,
        fresh: bool = False,
        keep: bool = True,
    ) -> Tensor:
        """Outputs (N, ...) of the loaded state on a split, from the nearest kept activations.

        Args:
            task: whose split it is.
            data: the split.
            versions: of the loaded state.
            fresh: run the whole model, whatever is kept.
            keep: keep the activations passed.
        """
        last = self.plan.nearest(self.split.n_levels - 1)
        start = (0, data.values) if fresh or not keep else self._kept(task, data, versions, last)
        parts = self._advance(task, data, versions, start, last, keep=keep)
        with torch.no_grad():
            return torch.cat([self.output(values, last) for values in parts])

    def train_examples(
        self, task: Task, versions: tuple[str, ...], boundary: int, n_drawn: int
    ) -> Examples:
        """The train examples, to be taken at `boundary`.

        Cached where the split is no larger than what the stage draws and its activations fit in
        memory; otherwise the levels below run once per batch. Which of the two is settled by sizes
        alone, never by what happens to be cached: the rounding of a stage must not depend on it.
        """
        data = self.data(task, "train")
        at, values = 0, data.values
        if data.n <= n_drawn and self._fits(boundary, data):
            at, values = self._kept(task, data, versions, boundary)
            if at < boundary:
                for _ in self._advance(task, data, versions, (at, values), boundary):
                    pass  # what is passed is kept
                at, values = self._kept(task, data, versions, boundary)
            assert at == boundary
        return Examples(
            values=values,
            boundary=at,
            targets=data.targets,
            select=lambda values, index: self.plan.take(values, index, at),
            rest=lambda values: self._forward(values, at, boundary),
        )

    def _forward(self, values: Values, start: int, stop: int) -> Values:
        if start == stop:
            return values
        with torch.no_grad(), self.autocast():
            return self.plan.forward(values, start, stop)

    def _kept(
        self, task: Task, data: SplitData, versions: tuple[str, ...], boundary: int
    ) -> tuple[int, Values]:
        """The highest boundary <= `boundary` whose activations are at hand, and they."""
        for b in range(boundary, 0, -1):
            kept = self._activations.get((task.digest, data.name, b, versions[:b]))
            if kept is not None:
                return b, kept
        return 0, data.values

    def _advance(
        self,
        task: Task,
        data: SplitData,
        versions: tuple[str, ...],
        start: tuple[int, Values],
        stop: int,
        *,
        keep: bool = True,
    ) -> Iterator[Values]:
        """Runs a split in eval mode from one boundary to another, chunk by chunk.

        Boundary by boundary, so that every boundary's values are the same wherever the run began;
        those passed are kept if they fit.

        Yields:
            The values at `stop` of each chunk.
        """
        first, values = start
        passed = [b for b in range(first + 1, stop + 1) if self.plan.usable[b]]
        parts: dict[int, list[Values]] = {b: [] for b in passed if keep and self._fits(b, data)}
        for chunk in self.chunks(values, data.n, first):
            at = first
            for b in passed:
                chunk, at = self._forward(chunk, at, b), b
                if b in parts:
                    parts[b].append(chunk)
            yield chunk
        for b, chunks in parts.items():
            joined = chunks[0] if len(chunks) == 1 else self.plan.join(chunks, b)
            self._activations.put((task.digest, data.name, b, versions[:b]), joined)

    def forget(self, version: str, above: int) -> None:
        """Drops kept activations of boundaries higher than `above` that depend on a version."""
        self._activations.forget(version, above)

    def _fits(self, boundary: int, data: SplitData) -> bool:
        return (
            data.n * self._example_bytes[_shapes(data.values)][boundary]
            <= self.settings.cache_bytes
        )


def _shapes(values: Values) -> tuple[torch.Size, ...]:
    """Of one example's inputs."""
    return tuple(value.shape[1:] for value in values.values())
