"""What a path costs in FLOPs: measured per segment, added up by a ledger of what is cached.

The ledger is the account of a stand-alone fine-tuning along one path; the engine keeps its caches
by the same rule. What is charged in which unit stands in `env`; seconds are measured in `stages`.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlhf_ray.engine.alignment import (
    align_where_it_helps,
    output_moments,
    readable,
    weighted_modules,
)
from rlhf_ray.engine.fitting import layer_inputs, output_layer, output_loss
from rlhf_ray.engine.segments import SegmentPlan, no_fast_path
from rlhf_ray.isolation import apart, restored_buffers
from rlhf_ray.levels import LevelSplit
from rlhf_ray.operations import FlopCounts, Pass
from rlhf_ray.tasks import Task, call_model, loss_on, map_inputs, model_device, n_examples

_BATCH = 2
"""Examples per measurement; batch statistics need more than one."""


class FlopModel:
    """FLOPs per example of a plan's segments, counted on a task's own data.

    Counted by `torch.utils.flop_counter` on executed runs, with the kernels switched off that it
    cannot see into (oneDNN's and cuDNN's LSTM, the fused Transformer path), and attention by its
    plain formula: so the counts are the same on all devices. Results are kept. The model is left as
    it was.

    Args:
        plan: how the model is cut.
        model: the plan's model.
        split: its levels.
        task: whose inputs and loss are counted with.
    """

    def __init__(self, plan: SegmentPlan, model: nn.Module, split: LevelSplit, task: Task) -> None:
        self.plan = plan
        self.usable = plan.usable
        self._model = model
        self._split = split
        device = model_device(model)
        self._loss = loss_on(device, task)
        x, y = task.train
        index = torch.arange(_BATCH) % n_examples(x)
        self._inputs = map_inputs(lambda value: value[index.to(value.device)].to(device), x)
        self._targets = y[index.to(y.device)].to(device)
        self._forward: dict[tuple[int, int], float] = {}
        self._train: dict[tuple[int, ...], float] = {}
        self._output: float | None = None
        self._align: dict[tuple[int, ...], tuple[float, float]] = {}

    def forward(self, start: int, stop: int) -> float:
        """FLOPs per example of an eval-mode run between usable boundaries; stop = L: the output."""
        if start == stop:
            return 0.0
        if (start, stop) not in self._forward:
            with _measuring(self._model), torch.no_grad():
                values = self.plan.forward(self.plan.start(self._inputs), 0, start)
                with FlopCounterMode(display=False) as counter:
                    if stop == self.plan.n_levels:
                        self.plan.output(values, start)
                    else:
                        self.plan.forward(values, start, stop)
            self._forward[start, stop] = counter.get_total_flops() / _BATCH
        return self._forward[start, stop]

    def train_step(self, levels: tuple[int, ...]) -> float:
        """FLOPs per example of a training step of some levels (ascending).

        Forward from the nearest usable boundary below them to the loss, and backward into them.
        """
        if levels not in self._train:
            start = self.plan.nearest(min(levels))
            with _measuring(self._model), torch.no_grad():
                values = self.plan.forward(self.plan.start(self._inputs), 0, start)
                weights = _train_only(self._model, self._split, levels)
                with torch.enable_grad(), FlopCounterMode(display=False) as counter:
                    loss = self._loss(self.plan.output(values, start), self._targets)
                    # not autograd.grad: the counter cannot be inside it where a module's input is
                    # a parameter
                    loss.backward(inputs=weights)
                for weight in weights:
                    weight.grad = None
            self._train[levels] = counter.get_total_flops() / _BATCH
        return self._train[levels]

    def output_step(self) -> float:
        """FLOPs per example of the loss and its gradient, as functions of the output layer alone.

        0 for a model that does not end with a linear layer.
        """
        if self._output is None:
            with _measuring(self._model):
                self._output = self._output_step()
        return self._output

    def align(self, levels: tuple[int, ...]) -> tuple[float, float]:
        """FLOPs of aligning levels in turn, each where it helps: per example, and once.

        0 where the model's outputs cannot be held against the targets.
        """
        if levels not in self._align:
            with _measuring(self._model), torch.no_grad():
                few, more = (self._align_flops(levels, n) for n in (1, 2))
            per_example = (more - few) / _BATCH
            self._align[levels] = per_example, few - _BATCH * per_example
        return self._align[levels]

    def _align_flops(self, levels: tuple[int, ...], n_batches: int) -> float:
        start = self.plan.nearest(min(levels))
        inputs = map_inputs(lambda value: torch.cat([value] * n_batches), self._inputs)
        targets = torch.cat([self._targets] * n_batches)
        values = self.plan.forward(self.plan.start(inputs), 0, start)
        modules = [weighted_modules(self._model, self._split, (level,)) for level in levels]
        with output_moments({n: m for level in modules for n, m in level.items()}) as moments:
            outputs = self.plan.output(values, start)
        if not readable(outputs, targets):
            return 0.0
        with FlopCounterMode(display=False) as counter:
            align_where_it_helps(
                modules,
                moments(),
                lambda: self.plan.output(values, start),
                targets,
                margin=math.inf,  # it is taken back
            )
        return counter.get_total_flops()

    def _output_step(self) -> float:
        layer = output_layer(self._model, self._split, self._inputs)
        if layer is None:
            return 0.0
        features = layer_inputs(layer, lambda: call_model(self._model, self._inputs))
        layer.requires_grad_(True)
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            output_loss(layer, features, self._targets, self._loss)
        return counter.get_total_flops() / _BATCH

    def full_stage(self, steps: int = 20, batch_size: int = 64) -> float:
        """The unit of cost: so many training steps over the whole model."""
        return steps * batch_size * self.train_step(tuple(range(self.plan.n_levels)))


def _train_only(model: nn.Module, split: LevelSplit, levels: Sequence[int]) -> list[Tensor]:
    """Puts levels in train mode with gradients, all else in eval mode without; their weights."""
    model.requires_grad_(False)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    weights = [parameters[name] for level in levels for name in split.parameters[level]]
    for level in levels:
        for name in split.modules[level]:
            model.get_submodule(name).train()
    return [w.requires_grad_(True) for w in weights if w.is_floating_point()]


@contextlib.contextmanager
def _measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode without kernels that hide their FLOPs; afterwards the model is as it was."""
    training = {module: module.training for module in model.modules()}
    needs_grad = {parameter: parameter.requires_grad for parameter in model.parameters()}
    device = model_device(model)
    # statistics of batch norm move in train mode
    with apart(device), restored_buffers(model), _visible_kernels():
        model.eval()
        try:
            yield
        finally:
            for module, flag in training.items():
                module.training = flag
            for parameter, flag in needs_grad.items():
                parameter.requires_grad_(flag)


@contextlib.contextmanager
def _visible_kernels() -> Iterator[None]:
    onednn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    with no_fast_path(), sdpa_kernel(SDPBackend.MATH):
        # the public context managers set TF32 along with it, and warn of that, or fail
        torch._C._set_mkldnn_enabled(False)
        torch._C._set_cudnn_enabled(False)
        try:
            yield
        finally:
            torch._C._set_mkldnn_enabled(onednn)
            torch._C._set_cudnn_enabled(cudnn)


@dataclass(frozen=True, kw_only=True)
class StageFlops:
    """FLOPs of one stage, by what they are for."""

    fill: float = 0.0
    train: float = 0.0
    evaluate: float = 0.0
    probe: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.fill + self.train + self.evaluate + self.probe


@dataclass(frozen=True, kw_only=True)
class StageWork:
    """Which runs a pass of a stage makes.

    Attributes:
        fill_from, fill_to: boundaries between which train examples are run without gradients.
        n_filled: how many examples: the train split, or those drawn if they are fewer.
        evaluate_from: boundary that the evaluation on val starts from.
    """

    fill_from: int
    fill_to: int
    n_filled: int
    evaluate_from: int


@dataclass(frozen=True, kw_only=True)
class CacheLedger:
    """Which boundaries hold values that are up to date, after the start evaluation and each stage.

    Attributes:
        usable: boundaries that can be cached at all, ascending; 0 is always among them.
        train, val: those that are filled and valid; 0, the inputs, always is.
    """

    usable: tuple[int, ...]
    train: frozenset[int] = frozenset({0})
    val: frozenset[int] = frozenset({0})

    @classmethod
    def started(cls, usable: Sequence[bool]) -> "CacheLedger":
        """After the evaluation of the pretrained state, which fills all boundaries on val."""
        boundaries = tuple(b for b, can in enumerate(usable) if can)
        return cls(usable=boundaries, val=frozenset(boundaries))

    def fold(
        self, levels: Sequence[int], *, n_train: int, n_drawn: int, evaluated: bool = True
    ) -> tuple["CacheLedger", StageWork]:
        """What a pass that changes some levels runs, and what is cached after it.

        Args:
            levels: that are changed; not empty.
            n_train: examples in the train split.
            n_drawn: examples that the pass draws from it (steps x batch size).
            evaluated: whether the state is evaluated after it, which fills val at all boundaries.

        Returns:
            The ledger after the pass, and its work.
        """
        lowest = min(levels)
        start = max(b for b in self.usable if b <= lowest)
        fill_from, train = 0, self.train
        if n_train <= n_drawn:  # else the drawn examples alone are run, from the inputs on
            fill_from = max(b for b in self.train if b <= start)
            train = train | {b for b in self.usable if fill_from < b <= start}
        # values at boundary b depend on the levels below b
        train, val = (frozenset(b for b in kept if b <= lowest) for kept in (train, self.val))
        work = StageWork(
            fill_from=fill_from,
            fill_to=start,
            n_filled=min(n_train, n_drawn),
            evaluate_from=max(val),
        )
        val = frozenset(self.usable) if evaluated else val
        return CacheLedger(usable=self.usable, train=train, val=val), work


def start_flops(flops: FlopModel, n_val: int, *, n_probe: int = 0) -> StageFlops:
    """Cost of the pretrained state's evaluation on val, and of its gradient probe.

    Args:
        flops: FLOPs per example.
        n_val: examples evaluated.
        n_probe: examples whose gradient, over all levels, is taken for the observation.
    """
    levels = tuple(range(flops.plan.n_levels))
    return StageFlops(
        evaluate=n_val * flops.forward(0, flops.plan.n_levels),
        probe=n_probe * flops.train_step(levels) if n_probe else 0.0,
    )


def stage_flops(
    flops: FlopCounts,
    history: Sequence[Sequence[Pass]],
    *,
    n_train: int,
    n_val: int,
    own: float | None = None,
) -> StageFlops:
    """Cost of the last stage of a path, whoever carried out which part of it before.

    Args:
        flops: FLOPs per example.
        history: the passes of each stage so far (`Operation.passes`), the one to account last.
        n_train: examples in the train split.
        n_val: examples evaluated after each stage.
        own: FLOPs of the last stage's own work (`Operation.flops`); None: of training its levels
            on the examples that it draws.

    Returns:
        The stage's FLOPs.
    """
    ledger, works = CacheLedger.started(flops.usable), []
    for passes in history:
        works = []
        for place, (levels, n_drawn) in enumerate(passes, start=1):
            evaluated = place == len(passes)
            ledger, work = ledger.fold(
                levels, n_train=n_train, n_drawn=n_drawn, evaluated=evaluated
            )
            works.append(work)
    assert works, "history must hold the stage to account"
    if own is None:
        own = sum(n_drawn * flops.train_step(levels) for levels, n_drawn in history[-1])
    return StageFlops(
        fill=sum(w.n_filled * flops.forward(w.fill_from, w.fill_to) for w in works),
        train=own,
        evaluate=n_val * flops.forward(works[-1].evaluate_from, len(flops.usable)),
    )
