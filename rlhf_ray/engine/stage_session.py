"""One stage from the inside: what an operation works with (`operations.StageSession`)."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from rlhf_ray.engine.alignment import OutputMoments, align_where_it_helps, weighted_modules
from rlhf_ray.engine.allocation import to_keep
from rlhf_ray.engine.batches import Examples, Step, batch_order, one_by_one
from rlhf_ray.engine.fitting import fit_where_quickest, layer_inputs
from rlhf_ray.engine.graphs import StepGraphs
from rlhf_ray.engine.loaded_model import CHUNK, Load, LoadedModel
from rlhf_ray.engine.recurrent import differentiable_recurrence
from rlhf_ray.engine.training import (
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    train_steps,
)
from rlhf_ray.errors import InputError
from rlhf_ray.isolation import restored_buffers, seed_all
from rlhf_ray.operations import NEEDS, Align, Fit, Operation, Train, span
from rlhf_ray.outcomes import PRETRAINED, LevelState, Outcome
from rlhf_ray.tasks import Task, loss_on


class Session:
    """What an operation works with, for the length of one stage (`operations.StageSession`).

    Attributes:
        charged: FLOPs of the operation's own.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        task: Task,
        levels: tuple[int, ...],
        parent: Outcome,
        load: Load,
        key: str,
        seed: int,
        source: OutputMoments,
    ) -> None:
        self.levels = levels
        self.task = task
        self.charged = 0.0
        self._touched: set[int] = set()
        self._lent = False
        self._key = key
        self._seed = seed
        self.generator = torch.Generator().manual_seed(seed)
        self._loaded = loaded
        loaded.forget(key, above=0)  # of the same stage carried out before: this one is on its way
        self._parent = parent
        self._load = load
        self._source = source
        self._losses: list[Tensor] = []
        self._kept: dict[str, Tensor] = {}  # optimizer state, on the CPU
        self._unread: dict[str, Tensor] = {}  # the same, where the next training will write
        self._kept_name = ""

    @property
    def changed(self) -> tuple[int, ...]:
        """Those of its levels that are not what they were before, as far as is known."""
        return tuple(level for level in self.levels if level in self._touched)

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the session's levels by full name; whoever asks may change them."""
        self._lent = True
        self._touch(self.levels)
        return self._parameters()

    def _parameters(self) -> dict[str, nn.Parameter]:
        names = [n for level in self.levels for n in self._loaded.split.parameters[level]]
        found = self._loaded.parameters
        return {name: found[name] for name in names if name in found}

    def _touch(self, levels: Iterable[int]) -> None:
        """Notes that levels change: what this stage kept of those above them is of the past."""
        levels = tuple(levels)
        self._touched.update(levels)
        if levels:
            self._loaded.forget(self._key, above=min(levels))

    def _examples(self, boundary: int, n_drawn: int) -> Examples:
        """The train examples at a boundary, as the levels below are by now."""
        if self._lent:  # what is lent may have changed since
            self._loaded.forget(self._key, above=0)
        return self._loaded.train_examples(self.task, self.versions(), boundary, n_drawn)

    def charge(self, flops: float) -> None:
        """Adds work of the operation's own to the account."""
        self.charged += flops

    def train(self, settings: Train) -> None:
        """Trains the session's levels on the task's train split."""
        loaded = self._loaded
        if self._unread:
            self._kept, self._unread = to_keep(self._unread), {}
        data = loaded.data(self.task, "train")
        boundary = loaded.plan.nearest(min(self.levels))
        examples = self._examples(boundary, settings.examples_drawn(data.n))
        self._touch(self.levels)
        parameters = self._parameters()
        with _training(self._modules(), parameters), differentiable_recurrence(loaded.model):
            optimizer = make_optimizer(
                settings.optimizer, parameters, settings.learning_rate, self._scales(settings)
            )
            graphs, carried_out = loaded.graphs, one_by_one
            if graphs is not None and not graphs.settle(optimizer, settings.optimizer, parameters):
                graphs = None
            if graphs is not None:
                carried_out = self._replaying(graphs, settings, optimizer, boundary)
            if settings.keep_optimizer_state:
                load_optimizer_state(optimizer, parameters, self._earlier(settings.optimizer))
            losses = train_steps(
                settings,
                optimizer=optimizer,
                batches=batch_order(
                    data.n,
                    settings.steps,
                    settings.batch_size,
                    self.generator,
                    device=loaded.device,
                ),
                examples=examples,
                output=lambda values: loaded.output(values, boundary),
                loss=loaded.loss(self.task),
                anchors={p: loaded.pretrained[name] for name, p in parameters.items()},
                carried_out=carried_out,
            )
        self._losses.append(losses)
        if settings.keep_optimizer_state:
            state = optimizer_state(optimizer, parameters)
            # what graphs use stays there anyway; all else would take a full GPU's memory
            self._kept, self._unread = (to_keep(state), {}) if graphs is None else ({}, state)
            self._kept_name = settings.optimizer

    def _replaying(
        self,
        graphs: StepGraphs,
        settings: Train,
        optimizer: torch.optim.Optimizer,
        boundary: int,
    ) -> Callable[[Step, Examples, Iterable[Tensor]], list[Tensor]]:
        """How training steps are carried out on a GPU: replayed where they can be."""
        numbers = settings.learning_rate, settings.level_scales, settings.l2_sp
        loss, digest = self._loaded.loss(self.task), self._loaded.loss_digest(self.task)
        kind = self.levels, boundary, settings.optimizer, numbers, digest
        return functools.partial(graphs.carry_out, kind=kind, optimizer=optimizer, loss=loss)

    def align(self, settings: Align, levels: tuple[int, ...]) -> None:
        """Aligns some of the session's levels with the source, in turn, as the settings say."""
        loaded = self._loaded
        data = loaded.data(self.task, "train")
        start = loaded.plan.nearest(min(levels))
        n = settings.examples_drawn(data.n)
        examples = self._examples(start, n)
        drawn = torch.randperm(data.n, generator=self.generator)[:n].to(loaded.device)
        with torch.no_grad():
            values = examples.take(drawn)
        aligned = align_where_it_helps(
            [weighted_modules(loaded.model, loaded.split, (level,)) for level in levels],
            self._source,
            lambda: loaded.output(values, start),
            data.targets[drawn],
            margin=settings.margin,
        )
        self._touch(level for level, done in zip(levels, aligned, strict=True) if done)

    def fit(self, settings: Fit) -> None:
        """Fits the output layer to the task's train split."""
        loaded = self._loaded
        data = loaded.data(self.task, "train")
        layer, last = loaded.output_layer, loaded.plan.n_levels - 1
        if layer is None:
            raise InputError(f"{settings.name} must have {NEEDS['output layer']}.")
        start, _ = span(loaded.plan.usable, (last,))
        take = self._examples(start, data.n).take
        chunks = torch.arange(data.n, device=loaded.device).split(CHUNK)
        features = layer_inputs(layer, lambda: [loaded.output(take(i), start) for i in chunks])
        self._touch((last,))
        loss = fit_where_quickest(
            layer,
            features,
            data.targets,
            lambda device: (
                loaded.loss(self.task)
                if device.type == loaded.device.type
                else loss_on(device, self.task)
            ),
            proximal=settings.proximal,
            evaluations=settings.evaluations,
        )
        self._losses.append(loss)

    def carry_out(self, operation: Operation) -> None:
        """Runs an operation with the stage's own seed for everything drawn by modules (dropout)."""
        loaded = self._loaded
        loaded.forget_losses()
        seed_all(self._seed, loaded.device)
        own = {name for level in self.levels for name in loaded.split.state[level]}
        with restored_buffers(loaded.model, kept=own):
            operation.run(self)
        if self._lent:
            self._loaded.forget(self._key, above=0)

    def versions(self) -> tuple[str, ...]:
        """Of the state that the stage leads to."""
        return tuple(
            self._key if level in self.changed else version
            for level, version in enumerate(self._parent.versions)
        )

    def largest(self) -> Tensor:
        """Of the magnitudes of losses and weights: finite if they are. A GPU is not waited for."""
        weights = [p.detach() for p in self._parameters().values() if p.numel()]
        return get_total_norm([*weights, *self._losses], torch.inf)

    def train_loss(self) -> float:
        """Mean over the second half of the steps; the parent's where nothing was trained."""
        if not self._losses:
            return self._parent.train_loss
        losses = torch.cat([value.cpu() for value in self._losses])
        return float(losses[losses.shape[0] // 2 :].mean())

    def states(self) -> dict[int, LevelState]:
        """What the stage leaves of the levels it changed."""
        live, split = self._loaded.state, self._loaded.split
        weights = {("w", name): live[name] for level in self.changed for name in split.state[level]}
        unread = {("o", entry): value for entry, value in self._unread.items()}
        found = to_keep({**weights, **unread})  # all at once: each transfer holds a GPU up
        optimizer = self._kept | {entry: found["o", entry] for entry in self._unread}
        return {
            level: LevelState(
                weights={name: found["w", name] for name in split.state[level]},
                optimizer={
                    entry: value
                    for entry, value in optimizer.items()
                    if entry.split("/", 1)[1] in split.parameters[level]
                },
                optimizer_name=self._kept_name,
            )
            for level in self.changed
        }

    def _earlier(self, optimizer: str) -> dict[str, Tensor]:
        """Optimizer state that the levels' last stages left, of the same optimizer."""
        kept: dict[str, Tensor] = {}
        for level in self.levels:
            version = self._parent.versions[level]
            if version != PRETRAINED:
                state = self._load(version, level)
                if state.optimizer_name == optimizer:
                    kept.update(state.optimizer)
        return kept

    def _scales(self, settings: Train) -> dict[str, float] | None:
        """Factor on the learning rate of each parameter, from those of the levels."""
        if settings.level_scales is None:
            return None
        names = self._loaded.split.parameters
        scales = zip(self.levels, settings.level_scales, strict=True)
        return {name: scale for level, scale in scales for name in names[level]}

    def _modules(self) -> list[nn.Module]:
        names = [name for level in self.levels for name in self._loaded.split.modules[level]]
        return [self._loaded.model.get_submodule(name) for name in names]


@contextlib.contextmanager
def _training(modules: list[nn.Module], parameters: dict[str, nn.Parameter]) -> Iterator[None]:
    """Trained levels in train mode with gradients; before and after, in eval mode without."""
    for module in modules:
        module.train()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for module in modules:
            module.eval()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
