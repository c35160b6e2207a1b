"""Operations: what can be done to a level, and how to add another.

An operation is a frozen dataclass with a name. It says which levels it changes when a given level
acts, what that takes, and, being run, changes them through the `StageSession` it is handed: data,
activations cached below the trained levels and optimizer state are the session's business.
"""

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, get_args

import torch

from rlhf_ray.digests import source_digest
from rlhf_ray.errors import InputError, unknown_name
from rlhf_ray.tasks import Task

Scope = Literal["level", "up", "all"]
OptimizerName = Literal["adam", "sgd"]

NEEDS = {
    "source": "source data to hold the model's activations against, and modules with a weight and "
    "a bias",
    "output layer": "a last level that ends with a plain linear layer, whose output is the model's",
    "readable targets": "classes or real values that a linear read-out of its outputs can explain",
}
"""What operations may need of a suite (`rlhf_ray.engine.support`)."""


Pass = tuple[tuple[int, ...], int]
"""Levels that change (ascending), and how many train examples that takes."""


class FlopCounts(Protocol):
    """FLOPs per example of a model's parts, whoever counted them (`rlhf_ray.engine.costs`)."""

    @property
    def usable(self) -> tuple[bool, ...]:
        """Per boundary 0 ... L - 1 (below each level): whether its values can be cached."""
        ...

    def forward(self, start: int, stop: int) -> float:
        """Of an eval-mode run between usable boundaries; stop = L: the output."""
        ...

    def train_step(self, levels: tuple[int, ...]) -> float:
        """Of a training step of some levels (ascending)."""
        ...

    def output_step(self) -> float:
        """Of the loss and its gradient as functions of the output layer alone; 0 without one."""
        ...

    def align(self, levels: tuple[int, ...]) -> tuple[float, float]:
        """Of aligning levels in turn, each where it helps: per example, and once."""
        ...


class StageSession(Protocol):
    """What an operation works with; implemented by `rlhf_ray.engine.stages`.

    Attributes:
        levels: the levels the operation may change, ascending.
        task: data, loss and metric of the task (an operation reads its train split only).
        generator: a CPU generator, seeded from the stage's key: the one source of randomness.
    """

    levels: tuple[int, ...]
    task: Task
    generator: torch.Generator

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """The parameters of the session's levels by full name, to be changed in place."""
        ...

    def train(self, settings: "Train") -> None:
        """Trains the session's levels on the task's train split, as the settings say."""
        ...

    def align(self, settings: "Align", levels: tuple[int, ...]) -> None:
        """Aligns some of the session's levels with the source, in turn, as the settings say."""
        ...

    def fit(self, settings: "Fit") -> None:
        """Fits the output layer to the task's train split, as the settings say."""
        ...

    def charge(self, flops: float) -> None:
        """Adds work to the path's account that `Operation.flops` does not know of beforehand."""
        ...


@dataclass(frozen=True, kw_only=True)
class Operation(abc.ABC):
    """One thing that can be done at a level. Subclasses are frozen dataclasses.

    Attributes:
        name: unique among the operations of a search; shown in tables.
    """

    name: str

    needs: ClassVar[tuple[str, ...]] = ()
    """What a suite must have for it, of `NEEDS`."""

    def applies(self, level: int, n_levels: int) -> bool:
        """Whether it is open to a level at all."""
        return True

    @abc.abstractmethod
    def levels(self, level: int, n_levels: int) -> tuple[int, ...]:
        """The levels changed when `level` acts, ascending; empty: no stage is carried out."""

    @property
    def parts(self) -> tuple["Operation", ...]:
        """Operations that it consists of; those that are possible stand in where it is not."""
        return (self,)

    @abc.abstractmethod
    def run(self, session: StageSession) -> None:
        """Changes the weights of the session's levels."""

    def examples_drawn(self, n_train: int) -> int:
        """How many training examples a run draws from a train split of `n_train`; 0: none."""
        return 0

    def passes(self, levels: tuple[int, ...], n_train: int) -> tuple[Pass, ...]:
        """What a run changes, one after the other: below each the activations can be cached.

        Args:
            levels: that it changes, ascending.
            n_train: examples in the train split.
        """
        return ((levels, self.examples_drawn(n_train)),)

    def flops(self, counts: FlopCounts, levels: tuple[int, ...], n_train: int) -> float:
        """FLOPs of a run; filling caches, running the levels below and evaluating come on top.

        Args:
            counts: per example.
            levels: that it changes, ascending.
            n_train: examples in the train split.
        """
        drawn = self.examples_drawn(n_train)
        return drawn * counts.train_step(levels) if drawn else 0.0

    def settings(self) -> dict[str, Any]:
        """What identifies the operation's effect (JSON-able), and so the stages it leads to.

        The name is left out: two names for one effect share their stages.
        """
        own = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "name"}
        return {"code": source_digest(type(self)), **own}


@dataclass(frozen=True, kw_only=True)
class Train(Operation):
    """Train the acting level, the levels from it up to the head, or all of them.

    Attributes:
        learning_rate: step size, > 0.
        scope: "level" (the acting one), "up" (it and all above it) or "all".
        steps: K optimizer steps, >= 1; or None: one pass over the train split.
        batch_size: examples per step, >= 1.
        optimizer: "adam" or "sgd" (momentum 0.9).
        keep_optimizer_state: go on with the state of the level's last stage, or start it anew.
        level_scales: factor on the learning rate per trained level, ascending: one for scope
            "level", L for "all"; None: 1 for all.
        l2_sp: pull towards the pretrained weights, >= 0: l2_sp / 2 times the squared distance is
            added to the loss (L2-SP, Li et al. 2018).
    """

    learning_rate: float
    scope: Scope = "level"
    steps: int | None = 20
    batch_size: int = 64
    optimizer: OptimizerName = "adam"
    keep_optimizer_state: bool = True
    level_scales: tuple[float, ...] | None = None
    l2_sp: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate < math.inf:
            raise InputError(f"learning_rate must be > 0, got learning_rate={self.learning_rate}.")
        if self.scope not in get_args(Scope):
            raise unknown_name("scope", self.scope, get_args(Scope))
        if self.level_scales is not None:  # a list where it was read from JSON
            object.__setattr__(self, "level_scales", tuple(self.level_scales))
        if (self.steps is not None and self.steps < 1) or self.batch_size < 1:
            raise InputError("steps and batch_size must be at least 1, got "
                             f"steps={self.steps}, batch_size={self.batch_size}.")  # fmt: skip
        if self.optimizer not in ("adam", "sgd"):
            raise InputError(f"optimizer must be 'adam' or 'sgd', got {self.optimizer!r}.")
        if not 0 <= self.l2_sp < math.inf:
            raise InputError(f"l2_sp must be >= 0, got l2_sp={self.l2_sp}.")

    def levels(self, level: int, n_levels: int) -> tuple[int, ...]:
        """The acting level, it and those above, or all: by scope."""
        if self.scope == "level":
            return (level,)
        return tuple(range(level if self.scope == "up" else 0, n_levels))

    def examples_drawn(self, n_train: int) -> int:
        """`steps * batch_size`, or the train split once."""
        return n_train if self.steps is None else self.steps * self.batch_size

    def settings(self) -> dict[str, Any]:
        """All fields but name, scope, absent scales and an absent pull."""
        # Which levels are trained stands in the path: "up" at the bottom is "all", and shares it.
        found = {key: value for key, value in Operation.settings(self).items() if key != "scope"}
        if self.level_scales is None:
            del found["level_scales"]
        if not self.l2_sp:
            del found["l2_sp"]
        return found

    def run(self, session: StageSession) -> None:
        """Trains the session's levels."""
        session.train(self)


@dataclass(frozen=True, kw_only=True)
class Align(Operation):
    """Align the acting level's outputs with the source data: no gradient, no learning rate.

    Mean and covariance of the features that each weighted module of the level puts out become what
    they are in the pretrained model on the source data, by weight and bias. It undoes what a shift
    of the inputs did to the level (after adaptive batch normalisation, Li et al. 2017, and CORAL,
    Sun et al. 2016, for modules with or without normalisation). The level stays as it was unless
    a linear read-out of the model's outputs explains the targets better with it than without.
    Open to all levels but the last, whose outputs a shift of the labels moves with good reason.

    Attributes:
        examples: train examples that moments and read-out are taken over, >= 2.
        margin: share of the targets' variance that must be explained in addition; -1: always align.
    """

    examples: int = 64
    margin: float = 0.02

    needs: ClassVar[tuple[str, ...]] = ("source", "readable targets")

    def __post_init__(self) -> None:
        if self.examples < 2:
            raise InputError(f"examples must be at least 2, got examples={self.examples}.")
        if not -1 <= self.margin < 1:
            raise InputError(f"margin must be in [-1, 1), got margin={self.margin}.")

    def applies(self, level: int, n_levels: int) -> bool:
        """To all levels but the last; to the only one of a model."""
        return level < n_levels - 1 or n_levels == 1

    def levels(self, level: int, n_levels: int) -> tuple[int, ...]:
        """The acting level."""
        return (level,)

    def examples_drawn(self, n_train: int) -> int:
        """`examples`, or as many as there are."""
        return min(self.examples, n_train)

    def flops(self, counts: FlopCounts, levels: tuple[int, ...], n_train: int) -> float:
        """A run from the level to the output without and one with it, and covariances."""
        per_example, once = counts.align(levels)
        return self.examples_drawn(n_train) * per_example + once

    def run(self, session: StageSession) -> None:
        """Aligns the session's level."""
        session.align(self, session.levels)


@dataclass(frozen=True, kw_only=True)
class Fit(Operation):
    """Fit the output layer to all train examples at once, to the end.

    L-BFGS on the task's loss over the kept inputs of the model's last linear layer, with a pull
    towards the weights that the layer has (a proximal step; Parikh and Boyd 2014): it costs next to
    nothing and, for a convex loss, has one answer: no learning rate. Where the features are good
    and the labels new, it learns them; where the features are poor, it stays near to what the layer
    knew. Open to all levels, whichever acts: one below may have it fitted and then train on.

    Attributes:
        proximal: half of it times the squared distance from the weights before is added to the
            loss, >= 0.
        evaluations: of the loss and its gradient over the train split, >= 1.
    """

    proximal: float = 0.3
    evaluations: int = 80

    needs: ClassVar[tuple[str, ...]] = ("output layer",)

    def __post_init__(self) -> None:
        if not 0 <= self.proximal < math.inf:
            raise InputError(f"proximal must be >= 0, got proximal={self.proximal}.")
        if self.evaluations < 1:
            raise InputError(f"evaluations must be at least 1, got {self.evaluations}.")

    def levels(self, level: int, n_levels: int) -> tuple[int, ...]:
        """The last level, whichever acts."""
        return (n_levels - 1,)

    def examples_drawn(self, n_train: int) -> int:
        """All of the train split."""
        return n_train

    def flops(self, counts: FlopCounts, levels: tuple[int, ...], n_train: int) -> float:
        """One run through the level for the layer's inputs, then the evaluations."""
        start, stop = span(counts.usable, levels)
        per_example = counts.forward(start, stop) + self.evaluations * counts.output_step()
        return n_train * per_example

    def run(self, session: StageSession) -> None:
        """Fits the output layer."""
        session.fit(self)


@dataclass(frozen=True, kw_only=True)
class Refit(Operation):
    """Align all levels below the last where it helps, then fit the output layer.

    `Align` of each level in turn, then `Fit`: what can be had without a gradient through the model,
    as one stage with one evaluation. Open to all levels, whichever acts, of a model with several.

    Attributes:
        examples, margin: see `Align`.
        proximal, evaluations: see `Fit`.
    """

    examples: int = Align.examples
    margin: float = Align.margin
    proximal: float = Fit.proximal
    evaluations: int = Fit.evaluations

    needs: ClassVar[tuple[str, ...]] = (*Align.needs, *Fit.needs)

    def __post_init__(self) -> None:
        _ = self.parts  # which refuse bad settings

    @property
    def parts(self) -> tuple[Align, Fit]:
        """What it does, one after the other."""
        return (
            Align(name=self.name, examples=self.examples, margin=self.margin),
            Fit(name=self.name, proximal=self.proximal, evaluations=self.evaluations),
        )

    def applies(self, level: int, n_levels: int) -> bool:
        """To all levels of a model with several."""
        return n_levels > 1

    def levels(self, level: int, n_levels: int) -> tuple[int, ...]:
        """All levels, whichever acts."""
        return tuple(range(n_levels))

    def passes(self, levels: tuple[int, ...], n_train: int) -> tuple[Pass, ...]:
        """The levels below the last, then the last."""
        align, fit = self.parts
        return (
            (levels[:-1], align.examples_drawn(n_train)),
            (levels[-1:], fit.examples_drawn(n_train)),
        )

    def flops(self, counts: FlopCounts, levels: tuple[int, ...], n_train: int) -> float:
        """Of both parts."""
        align, fit = self.parts
        return align.flops(counts, levels[:-1], n_train) + fit.flops(counts, levels[-1:], n_train)

    def run(self, session: StageSession) -> None:
        """Aligns, then fits."""
        align, fit = self.parts
        session.align(align, session.levels[:-1])
        session.fit(fit)


def span(usable: Sequence[bool], levels: Sequence[int]) -> tuple[int, int]:
    """The nearest usable boundaries around some levels (ascending); L above the highest.

    >>> span((True, False, True, True), (1,)), span((True, True), (1,))
    ((0, 2), (1, 2))
    """
    start = max(b for b in range(levels[0] + 1) if usable[b])
    above = [b for b in range(levels[-1] + 1, len(usable)) if usable[b]]
    return start, min(above, default=len(usable))


@dataclass(frozen=True, kw_only=True)
class Skip(Operation):
    """Carry out no stage; look, and hand over."""

    name: str = "skip"

    def levels(self, level: int, n_levels: int) -> tuple[int, ...]:
        """None: no stage."""
        return ()

    def run(self, session: StageSession) -> None:
        """Never called: there is no stage."""
        raise AssertionError("skip carries out no stage")


@dataclass(frozen=True, kw_only=True)
class Stop(Operation):
    """End the fine-tuning."""

    name: str = "stop"

    def levels(self, level: int, n_levels: int) -> tuple[int, ...]:
        """None: no stage."""
        return ()

    def run(self, session: StageSession) -> None:
        """Never called: there is no stage."""
        raise AssertionError("stop carries out no stage")


LEARNING_RATES = {"adam": (3e-4, 1e-3, 3e-3), "sgd": (3e-3, 1e-2, 3e-2)}
"""Low, middle and high, per optimizer."""


def default_operations(
    *,
    steps: int | None = 20,
    batch_size: int = 64,
    optimizer: OptimizerName = "adam",
    keep_optimizer_state: bool = True,
    learning_rates: Sequence[float] | None = None,
) -> tuple[Operation, ...]:
    """Train this level (low, middle, high rate), from it up, all; refit; skip; stop.

    Args:
        steps: optimizer steps per stage; None: one epoch.
        batch_size: examples per step.
        optimizer: "adam" or "sgd".
        keep_optimizer_state: see `Train`.
        learning_rates: low, middle, high; the optimizer's `LEARNING_RATES` by default. The
            operations on several levels use the middle one.

    Returns:
        Eight operations, in the order above.
    """
    rates = tuple(learning_rates or LEARNING_RATES[optimizer])
    if len(rates) != 3:
        raise InputError(f"learning_rates must be three (low, middle, high), got {rates}.")
    if not rates[0] < rates[1] < rates[2]:
        raise InputError(f"learning_rates must ascend (low, middle, high), got {rates}.")

    def train(name: str, learning_rate: float, scope: Scope) -> Train:
        return Train(
            name=name,
            learning_rate=learning_rate,
            scope=scope,
            steps=steps,
            batch_size=batch_size,
            optimizer=optimizer,
            keep_optimizer_state=keep_optimizer_state,
        )

    low, middle, high = rates
    return (
        train("train_low", low, "level"),
        train("train_mid", middle, "level"),
        train("train_high", high, "level"),
        train("train_up", middle, "up"),
        train("train_all", middle, "all"),
        Refit(name="refit"),
        Skip(),
        Stop(),
    )


KINDS: Mapping[str, type[Operation]] = {
    kind.__name__: kind for kind in (Train, Align, Fit, Refit, Skip, Stop)
}
"""The kinds of operations of this module, by the names that `operation_as_json` gives them."""


def operation_as_json(operation: Operation) -> dict[str, Any]:
    """An operation as plain data, for policies on disk."""
    return {"kind": type(operation).__name__, **asdict(operation)}


def operations_from_json(data: Sequence[Mapping[str, Any]]) -> tuple[Operation, ...]:
    """Reads what `operation_as_json` gave, for the operations of this module.

    Raises:
        InputError: an operation of the user's own, which only the user's code can make.
    """
    for entry in data:
        if entry["kind"] not in KINDS:
            raise InputError(
                f"the operation {entry['name']!r} must be one of this package's, got kind="
                f"{entry['kind']!r}. Pass the operations it was learned with as operations=."
            )
    return tuple(
        KINDS[entry["kind"]](**{key: v for key, v in entry.items() if key != "kind"})
        for entry in data
    )
