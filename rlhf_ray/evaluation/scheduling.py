"""Tunes the schedule that a sweep's policies start from: one for all tasks, on the train tasks.

First the best single training operation, to the horizon; then, one after the other, whatever else
is worth doing before it; then the training once more. Candidates race on few tasks before they meet
more. It is judged as the sweep is, on the tasks' val splits.

Dimension letters: N stages done.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.digests import derive_seed
from rlhf_ray.evaluation.choosing import REPLICA
from rlhf_ray.evaluation.judging import Utility
from rlhf_ray.evaluation.rollouts import THREADS, Stages, concurrently, walk
from rlhf_ray.operations import Operation, Skip, Train
from rlhf_ray.outcomes import Outcome
from rlhf_ray.policies.schedules import Move, Schedule, moves, path_of, placed
from rlhf_ray.process import ProcessSpec

ROUNDS = ((2, 8), (6, 2), (12, 1))
"""(tasks met so far, candidates that stay at most) of a race."""

KEEPS_UP = 0.9
"""Of what the first of a race gained, what another must have gained to stay in it."""

RETRIED = 4
"""Trainings that are tried again once it is settled what comes before them."""


@dataclass(frozen=True, kw_only=True)
class MetSchedule:
    """A schedule that was met on all tasks, and the means over them after 0, 1, ..., N stages.

    Attributes:
        moves: N of them.
        scores: N + 1; the best score so far, as a policy returns it.
        costs: N + 1, full stages (or seconds).
        switches: N + 1.
    """

    moves: Schedule
    scores: tuple[float, ...]
    costs: tuple[float, ...]
    switches: tuple[float, ...]

    def values(self, utility: Utility) -> list[float]:
        """Its utility at all N + 1 lengths."""
        return list(map(utility.of, self.scores, self.costs, self.switches))

    def best(self, utility: Utility) -> tuple[float, int]:
        """The most utility that a length of it has, and the shortest such length."""
        values = self.values(utility)
        return max(values), values.index(max(values))


@dataclass(frozen=True, kw_only=True)
class Walk:
    """A schedule and a task that met it, on the first replica seed.

    Attributes:
        moves: N of them.
        task: its name.
        outcomes: of the start and of each stage, N + 1; fewer where the walk ended before.
    """

    moves: Schedule
    task: str
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What came of looking for a schedule.

    Attributes:
        candidates: those that met all tasks, the best among them (`chosen`).
        walks: all that was met.
    """

    candidates: tuple[MetSchedule, ...]
    walks: tuple[Walk, ...]


def chosen(candidates: Sequence[MetSchedule], utility: Utility) -> Schedule:
    """The best of some schedules at the length that pays best; empty where none pays."""
    if not candidates:
        return ()
    found = max(candidates, key=lambda candidate: candidate.best(utility)[0])
    return found.moves[: found.best(utility)[1]]


def by_weights(base: Schedule, candidates: Sequence[MetSchedule], weights: Utility) -> Schedule:
    """The schedule for other cost weights: the same, unless another is better by them.

    Args:
        base: one of the candidates, at some length.
        candidates: met on all tasks.
        weights: what costs weigh now.
    """
    n = len(base)
    values = [c.values(weights)[n] for c in candidates if c.moves[:n] == base]
    best = max((c.best(weights)[0] for c in candidates), default=0.0)
    return chosen(candidates, weights) if best > max(values, default=0.0) else base


def tuned_schedules(
    spec: ProcessSpec,
    stages: Callable[[str], Stages],
    *,
    tasks: Sequence[str],
    utility: Utility,
    seed: int,
    threads: int = THREADS,
    tell: Callable[[str], None] = lambda line: None,
) -> Tuned:
    """Looks for the best schedule for some tasks, on their first replica seed.

    Args:
        spec: the process, whose operations a schedule is made of.
        stages: a walk's name -> who carries its stages out; walks are under way at once.
        tasks: names; policies learn on them.
        utility: what counts.
        seed: of the order in which tasks are met.
        threads: walks in flight at once.
        tell: called with short lines.
    """
    rng = np.random.default_rng(derive_seed(seed, "schedule"))
    order: list[int] = rng.permutation(len(tasks)).tolist()
    tuner = _Tuner(
        spec=replace(spec, probed=False),
        stages=stages,
        tasks=[tasks[i] for i in order],
        utility=utility,
        threads=threads,
    )
    trainings, others = candidate_moves(spec.operations, spec.n_levels)
    ranked = tuner.ranked([tuner.filled((), move) for move in trainings])
    best, before = ranked[0], ()
    tell(f"schedule: {describe(spec, best)}")
    while others and len(before) < spec.settings.horizon - 1:
        tried = {other: tuner.filled(_with(spec, before, other), best[-1]) for other in others}
        challenger = tuner.ranked(list(tried.values()))[0]
        if not tuner.better(challenger, best):
            break
        best = challenger
        found = next(other for other, schedule in tried.items() if schedule == challenger)
        before = _with(spec, before, found)
        others.remove(found)
        tell(f"schedule: {describe(spec, best)}")
    again = [tuner.filled(before, schedule[-1]) for schedule in ranked[1 : 1 + RETRIED]]
    tuner.meet([best, *tuner.ranked(again if before else [])[:1]], len(tasks))
    return Tuned(candidates=tuner.candidates(), walks=tuple(tuner.walks))


def candidate_moves(
    operations: Sequence[Operation], n_levels: int
) -> tuple[list[Move], list[Move]]:
    """The moves that a schedule ends with, and those that may come before them."""
    every = moves(operations, n_levels)
    trainings = [move for move in every if isinstance(move.operation, Train)] or every
    others = [move for move in every if move not in trainings]
    if n_levels > 1 and not any(isinstance(o, Skip) for o in operations):
        # no level could hand over to the one that a schedule wants
        return [move for move in trainings if move.level == 0], []
    return trainings, others


def most_walks(n_trainings: int, n_others: int, *, n_tasks: int, horizon: int) -> int:
    """Walks that `tuned_schedules` makes at most.

    Args:
        n_trainings: moves that train, >= 1.
        n_others: moves that do not.
        n_tasks: that it meets, >= 1.
        horizon: of the process.
    """

    def race(n_alive: int) -> int:
        n_walks, met = 0, 0
        for n_met, n_stay in ROUNDS:
            n = min(n_met, n_tasks)
            n_walks += n_alive * (n - met)
            n_alive, met = min(n_alive, n_stay), n
        return n_walks

    left = n_tasks - min(ROUNDS[-1][0], n_tasks)  # tasks that a race's winner has not met
    rounds = range(n_others, max(0, n_others - (horizon - 1)), -1)
    challengers = sum(race(n) + left for n in rounds)
    again = race(min(RETRIED, n_trainings - 1)) + left if rounds and n_trainings > 1 else 0
    return race(n_trainings) + left + challengers + again


def describe(spec: ProcessSpec, schedule: Schedule) -> str:
    """A schedule in words: what is done, and the lowest level changed where it is not all."""

    def word(move: Move) -> str:
        changed = move.operation.levels(move.level, spec.n_levels)
        where = "" if len(changed) == spec.n_levels else f" {spec.levels[changed[0]]}"
        return move.operation.name + where

    runs = [(words, len(list(same))) for words, same in itertools.groupby(map(word, schedule))]
    return ", ".join(words if n == 1 else f"{words} x {n}" for words, n in runs) or "none"


def _with(spec: ProcessSpec, before: Schedule, other: Move) -> Schedule:
    """In the order of the levels changed: what is done to one changes what those above it see."""

    def changed(move: Move) -> tuple[int, ...]:
        return move.operation.levels(move.level, spec.n_levels)

    return tuple(sorted((*before, other), key=changed))


@dataclass(frozen=True, kw_only=True)
class _Tuner:
    """Compares schedules on tasks, in their order; knows what each met."""

    spec: ProcessSpec
    stages: Callable[[str], Stages]
    tasks: Sequence[str]
    utility: Utility
    threads: int
    met: dict[Schedule, list[NDArray[np.float64]]] = field(default_factory=dict)
    walks: list[Walk] = field(default_factory=list)

    def filled(self, before: Schedule, training: Move) -> Schedule:
        """What comes before, then the training to the horizon."""
        rest = self.spec.settings.horizon - len(before)
        return placed((*before, *(training,) * rest), self.spec.n_levels)

    def ranked(self, schedules: Sequence[Schedule]) -> list[Schedule]:
        """All of them after a race: the winner first, those that fell behind soonest last."""
        alive, out = list(schedules), []
        for n_tasks, n_most in ROUNDS:
            n = min(n_tasks, len(self.tasks))
            self.meet(alive, n)
            gains = {schedule: self._gain(schedule, n) for schedule in alive}
            alive.sort(key=lambda schedule: -gains[schedule])
            least = KEEPS_UP * max(gains.values(), default=0.0)
            n_stay = sum(gains[schedule] >= least for schedule in alive[:n_most])
            alive, out = alive[:n_stay], alive[n_stay:] + out
        return alive + out

    def better(self, challenger: Schedule, best: Schedule) -> bool:
        """Whether a schedule has more utility on all tasks, each at the length that pays best."""
        n = len(self.tasks)
        self.meet([challenger, best], n)
        return self._gain(challenger, n) > self._gain(best, n)

    def candidates(self) -> tuple[MetSchedule, ...]:
        """The schedules that met all tasks."""
        n = len(self.tasks)
        found = []
        for schedule, rows in self.met.items():
            if len(rows) == n:
                scores, costs, switches = np.mean(rows, axis=0).T.tolist()
                found.append(
                    MetSchedule(
                        moves=schedule,
                        scores=tuple(scores),
                        costs=tuple(costs),
                        switches=tuple(switches),
                    )
                )
        return tuple(found)

    def _gain(self, schedule: Schedule, n_tasks: int) -> float:
        """Utility that its best length adds to the start, mean over the first tasks; >= 0."""
        rows = np.mean(self.met[schedule][:n_tasks], axis=0).tolist()
        values = [self.utility.of(*row) for row in rows]
        return max(values) - values[0]

    def meet(self, schedules: Sequence[Schedule], n_tasks: int) -> None:
        """Walks those along the first tasks that have not met them."""
        waiting = [
            (schedule, task)
            for schedule in dict.fromkeys(schedules)
            for task in self.tasks[len(self.met.setdefault(schedule, [])) : n_tasks]
        ]
        found = concurrently(self._walked, waiting, threads=self.threads)
        for (schedule, task), (account, outcomes) in zip(waiting, found, strict=True):
            self.met[schedule].append(account)
            self.walks.append(Walk(moves=schedule, task=task, outcomes=outcomes))

    def _walked(
        self, pair: tuple[Schedule, str]
    ) -> tuple[NDArray[np.float64], tuple[Outcome, ...]]:
        """Score on a task's val split, cost, switches (N + 1, 3) at lengths 0, 1, ..., N; outcomes.

        The last account that there is where a walk ends before.
        """
        schedule, task = pair
        path = path_of(schedule, self.spec.n_levels)
        stages = self.stages(f"{describe(self.spec, schedule)}/{task}")
        acting = [move.level for move in schedule]
        found = walk(self.spec, stages, task, REPLICA, path, acting=acting)
        states = [found[min(n, len(found) - 1)].state for n in range(len(schedule) + 1)]
        account = np.array([(self.spec.score(s.best), s.cost, s.switches) for s in states])
        return account, tuple(episode.state.outcome for episode in found)
