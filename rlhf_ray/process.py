"""The decision process: states, actions, rewards. Pure functions over frozen records; no Ray.

State = acting level, the task's and the model's descriptors, what is left of horizon and budget.
Action = (operation, next level), flattened to `operation * L + next level`. Who carries the stages
out is left to the caller: `stage_request` says what to ask for, `advance` takes the answer.

Dimension letters: L levels, O operations, A = O * L actions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.digests import digest
from rlhf_ray.errors import InputError
from rlhf_ray.operations import Operation, Skip, Stop, Train
from rlhf_ray.outcomes import Outcome, StagePath, StageRequest, StageStep


@dataclass(frozen=True, kw_only=True)
class RewardWeights:
    """What a reward is made of: `performance * gain - tuning_cost * cost - switch_cost * distance`.

    Attributes:
        performance: per unit of the metric, >= 0.
        tuning_cost: per full stage (per second with `cost="seconds"`), >= 0.
        switch_cost: per level of distance handed over, >= 0.
    """

    performance: float = 1.0
    tuning_cost: float = 0.02
    switch_cost: float = 0.002

    def __post_init__(self) -> None:
        for name in ("performance", "tuning_cost", "switch_cost"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} weight must be finite and >= 0, got {name}={value}.")


@dataclass(frozen=True, kw_only=True)
class ProcessSettings:
    """What an episode is.

    Attributes:
        horizon: stages after which an episode ends, >= 1.
        performance: "gain": increase of the best val metric so far; "value": the metric itself at
            every step, the founding document's literal form.
        cost: "flops": in full stages; "seconds": as measured (then no two runs are equal).
        budget: what a path may cost, > 0; None: no bound. A stage whose price would exceed it is
            not begun. Where prices are not known beforehand (`cost="seconds"`; what operations of
            a user's own charge besides), the last stage may exceed it.
        weights: of the reward's terms.
    """

    horizon: int = 5
    performance: Literal["gain", "value"] = "gain"
    cost: Literal["flops", "seconds"] = "flops"
    budget: float | None = None
    weights: RewardWeights = field(default_factory=RewardWeights)

    def __post_init__(self) -> None:
        if self.horizon < 1:
            raise InputError(f"horizon must be at least 1, got horizon={self.horizon}.")
        if self.budget is not None and not self.budget > 0:
            raise InputError(f"budget must be > 0 full stages, got budget={self.budget}.")


def check_operations(operations: Sequence[Operation], n_levels: int) -> None:
    """Raises InputError unless operations can be those of a process with L levels."""
    if not isinstance(operations, Sequence) or isinstance(operations, str):
        raise InputError(f"operations must be a list of rlhf_ray.Operation, got {operations!r}.")
    for operation in operations:
        if not isinstance(operation, Operation):
            raise InputError(f"operations must hold rlhf_ray.Operation, got {operation!r}.")
    names = [operation.name for operation in operations]
    if len(set(names)) != len(names):
        raise InputError(f"operations must have names of their own, got {names}.")
    if sum(isinstance(operation, Stop) for operation in operations) != 1:
        raise InputError(f"operations must hold one Stop, got {names}.")
    if sum(isinstance(operation, Skip) for operation in operations) > 1:
        raise InputError(f"operations must hold at most one Skip, got {names}.")
    for operation in operations:
        _check_levels(operation, n_levels)
        if isinstance(operation, Train) and operation.level_scales is not None:
            _check_scales(operation, operation.level_scales, n_levels)
        try:
            hash(operation)
        except TypeError as error:
            raise InputError(
                f"operations must be hashable, got {operation.name!r}: {error}. Make its lists "
                "tuples."
            ) from error


def _check_levels(operation: Operation, n_levels: int) -> None:
    for level in range(n_levels):
        if not operation.applies(level, n_levels):
            continue
        levels: object = operation.levels(level, n_levels)
        known = isinstance(levels, tuple) and all(type(each) is int for each in levels)
        if not known or list(levels) != [each for each in range(n_levels) if each in levels]:
            raise InputError(
                f"levels of the operation {operation.name!r} must give a tuple of whole numbers in "
                f"[0, {n_levels - 1}], ascending, got {levels!r} for level={level}."
            )


def _check_scales(operation: Train, scales: tuple[float, ...], n_levels: int) -> None:
    if not all(isinstance(scale, int | float) and 0 <= scale < math.inf for scale in scales):
        raise InputError(
            f"level_scales must be finite and >= 0, got level_scales={scales} of "
            f"{operation.name!r}."
        )
    n_scales = len(scales)
    for level in range(n_levels):
        n_trained = len(operation.levels(level, n_levels))
        if operation.applies(level, n_levels) and n_trained != n_scales:
            raise InputError(
                f"level_scales must hold one factor per trained level, got {n_scales} for "
                f"{operation.name!r}, which trains {n_trained} of {n_levels} levels when level "
                f"{level} acts. Give as many, or a subclass whose applies leaves that level out."
            )


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    """All that is fixed about a decision process.

    Attributes:
        levels: L names, input side first.
        operations: O operations; exactly one `Stop`, at most one `Skip` (see `check_operations`).
        reference_flops: FLOPs of a full stage.
        higher_is_better: the metric's direction.
        probed: whether the observation uses the probes of the start, which are then charged.
        settings: see `ProcessSettings`.
        price: (task, path) -> FLOPs of the path's last stage; None: not known beforehand.
    """

    levels: tuple[str, ...]
    operations: tuple[Operation, ...]
    reference_flops: float
    higher_is_better: bool = True
    probed: bool = True
    settings: ProcessSettings = field(default_factory=ProcessSettings)
    price: Callable[[str, StagePath], float] | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        check_operations(self.operations, self.n_levels)

    @property
    def n_levels(self) -> int:
        """L."""
        return len(self.levels)

    @property
    def n_actions(self) -> int:
        """A = O * L."""
        return len(self.operations) * len(self.levels)

    @cached_property
    def effects(self) -> tuple[tuple[str, ...], ...]:
        """What an operation (O rows) of a level (L columns) does to the model, as digests.

        Equal for what is alike in all but its name and who asks for it.
        """
        return tuple(
            tuple(
                digest(operation.settings(), list(operation.levels(level, self.n_levels)))
                for level in range(self.n_levels)
            )
            for operation in self.operations
        )

    def decode(self, action: int) -> tuple[Operation, int]:
        """The operation and the next level of an action in [0, A)."""
        operation, next_level = divmod(int(action), self.n_levels)
        return self.operations[operation], next_level

    def cost(self, outcome: Outcome) -> float:
        """What a stage adds to its path's tuning cost, in full stages (or seconds)."""
        if self.settings.cost == "seconds":
            return outcome.time_s
        probe = 0.0 if self.probed else outcome.flops["probe"]
        return (sum(outcome.flops.values()) - probe) / self.reference_flops

    def score(self, metric: float) -> float:
        """A metric turned so that higher is better."""
        return metric if self.higher_is_better else -metric


@dataclass(frozen=True, kw_only=True)
class State:
    """A state of the process.

    Attributes:
        task: the task's name.
        replica: replica seed.
        level: the acting level.
        outcome: of the current model state.
        start: outcome of the pretrained model.
        previous: outcome of the state before the last stage (the start at first).
        path: stages executed.
        best_path: prefix of `path` that reached the best val metric: the returned model.
        best: its val metric.
        cost: of the path so far, in full stages (or seconds).
        switches: sum of |l - l'| so far.
        skips: skips in a row.
        tuned: per level, how many stages changed it.
        last_tuned: per level, the number of the stage that last changed it (from 1; 0: none).
        terminated: whether the episode has ended.
    """

    task: str
    replica: int
    level: int
    outcome: Outcome
    start: Outcome
    previous: Outcome
    path: StagePath = ()
    best_path: StagePath = ()
    best: float
    cost: float
    switches: int = 0
    skips: int = 0
    tuned: tuple[int, ...]
    last_tuned: tuple[int, ...]
    terminated: bool = False


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of an episode, with the terms of its reward apart.

    Attributes:
        level: the acting level.
        operation: its operation's name.
        levels: the levels it changed.
        next_level: the level handed to; the acting one where the episode ends.
        metric: val metric after the step.
        performance: the reward's first term before weighing: gain (or value).
        tuning_cost: in full stages (or seconds).
        switch_cost: |level - next_level|.
        time_s: measured seconds of the stage.
        diverged: the stage met NaN or infinity.
        reward: the weighed sum.
    """

    level: int
    operation: str
    levels: tuple[int, ...]
    next_level: int
    metric: float
    performance: float
    tuning_cost: float
    switch_cost: int
    time_s: float
    diverged: bool
    reward: float


def start_state(spec: ProcessSpec, outcome: Outcome, task: str, replica: int, level: int) -> State:
    """The state after reset, from the outcome of an empty path."""
    return State(
        task=task,
        replica=replica,
        level=level,
        outcome=outcome,
        start=outcome,
        previous=outcome,
        best=outcome.metric,
        cost=spec.cost(outcome),
        tuned=(0,) * spec.n_levels,
        last_tuned=(0,) * spec.n_levels,
    )


def start_request(task: str, replica: int) -> StageRequest:
    """What to ask for at reset."""
    return StageRequest(task=task, replica=replica)


def affordable(spec: ProcessSpec, state: State, step: StageStep) -> bool:
    """Whether the budget has room for another stage; with prices not known, whether any is left."""
    budget = spec.settings.budget
    if budget is None:
        return True
    if spec.price is None or not step.levels:
        return state.cost < budget
    price = spec.price(state.task, (*state.path, step)) / spec.reference_flops
    # sums of the same terms may differ by rounding
    return state.cost + price <= budget * (1 + 1e-9)


def action_mask(spec: ProcessSpec, state: State) -> NDArray[np.int8]:
    """Which actions are open, int8 (A,): at least `stop`.

    Closed are: operations that do not apply to the acting level; actions that differ in name only
    (`stop` with every next level, an operation that does here what an earlier one does, a hand-over
    after the last stage); `skip` to oneself or after L - 1 skips in a row; stages that the budget
    has no room for (`affordable`), and all but `stop` once it is spent.
    """
    mask = np.zeros((len(spec.operations), spec.n_levels), dtype=np.int8)
    budget = spec.settings.budget
    spent = budget is not None and state.cost >= budget
    last = len(state.path) + 1 >= spec.settings.horizon
    seen: set[str] = set()
    for row, operation in enumerate(spec.operations):
        if isinstance(operation, Stop):
            mask[row, state.level] = 1
        elif isinstance(operation, Skip):
            if state.skips < spec.n_levels - 1 and not spent:
                mask[row] = 1
                mask[row, state.level] = 0
        elif operation.applies(state.level, spec.n_levels):
            levels = operation.levels(state.level, spec.n_levels)
            if not affordable(spec, state, StageStep(operation=operation, levels=levels)):
                continue
            effect = spec.effects[row][state.level]
            if effect not in seen:
                seen.add(effect)
                mask[row, state.level if last else slice(None)] = 1
    return mask.reshape(-1)


def stage_request(spec: ProcessSpec, state: State, action: int) -> StageRequest | None:
    """The stage that an action needs; None for `skip` and `stop`."""
    operation, _ = spec.decode(action)
    levels = operation.levels(state.level, spec.n_levels)
    if not levels:
        return None
    path = (*state.path, StageStep(operation=operation, levels=levels))
    return StageRequest(task=state.task, replica=state.replica, path=path)


def advance(
    spec: ProcessSpec, state: State, action: int, outcome: Outcome | None
) -> tuple[State, Step]:
    """The next state and the step's record.

    Args:
        spec: the process.
        state: not terminated.
        action: an open one (see `action_mask`).
        outcome: of `stage_request(spec, state, action)`; None where that is None.
    """
    operation, next_level = spec.decode(action)
    levels = operation.levels(state.level, spec.n_levels)
    stop = isinstance(operation, Stop)
    terminated = stop or (bool(levels) and len(state.path) + 1 >= spec.settings.horizon)
    next_level = state.level if terminated else next_level
    after = state if outcome is None else with_stage(spec, state, operation, levels, outcome)
    distance = abs(state.level - next_level)
    after = replace(
        after,
        level=next_level,
        switches=state.switches + distance,
        skips=state.skips + 1 if outcome is None else 0,
        terminated=terminated,
    )
    step = step_record(spec, state, after, operation, levels, level=state.level, outcome=outcome)
    return after, step


def step_record(
    spec: ProcessSpec,
    before: State,
    after: State,
    operation: Operation,
    levels: tuple[int, ...],
    *,
    level: int,
    outcome: Outcome | None,
) -> Step:
    """The record of a step that is made, with its reward.

    Args:
        spec: the process.
        before: where it began.
        after: where it led.
        operation: carried out.
        levels: that it changes.
        level: where it acted.
        outcome: of its stage; None: it had none.
    """
    cost = 0.0 if outcome is None else spec.cost(outcome)
    performance, distance = _performance(spec, before, after), after.switches - before.switches
    weights = spec.settings.weights
    reward = (
        weights.performance * performance
        - weights.tuning_cost * cost
        - weights.switch_cost * distance
    )
    return Step(
        level=level,
        operation=operation.name,
        levels=levels,
        next_level=after.level,
        metric=after.outcome.metric,
        performance=performance,
        tuning_cost=cost,
        switch_cost=distance,
        time_s=0.0 if outcome is None else outcome.time_s,
        diverged=outcome is not None and outcome.diverged,
        reward=reward,
    )


def with_stage(
    spec: ProcessSpec,
    state: State,
    operation: Operation,
    levels: tuple[int, ...],
    outcome: Outcome,
) -> State:
    """The state after a stage; level, switches and skips are the caller's to set."""
    path = (*state.path, StageStep(operation=operation, levels=levels))
    better = spec.score(outcome.metric) > spec.score(state.best)
    number = len(path)
    return replace(
        state,
        outcome=outcome,
        previous=state.outcome,
        path=path,
        best=outcome.metric if better else state.best,
        best_path=path if better else state.best_path,
        cost=state.cost + spec.cost(outcome),
        tuned=tuple(n + (level in levels) for level, n in enumerate(state.tuned)),
        last_tuned=tuple(
            number if level in levels else n for level, n in enumerate(state.last_tuned)
        ),
    )


def _performance(spec: ProcessSpec, before: State, after: State) -> float:
    if spec.settings.performance == "value":
        return spec.score(after.outcome.metric)
    return spec.score(after.best) - spec.score(before.best)
