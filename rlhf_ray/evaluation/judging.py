"""Finished fine-tunings: judged by one fixed utility, recorded, set beside each other. No Ray here.

What a fine-tuning returns is the state of the best val metric on its way, the start included; its
test metric is a report, never charged, never part of a decision.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf_ray.errors import InputError
from rlhf_ray.evaluation.rollouts import THREADS, Act, Episode, Stages, concurrently, roll_out
from rlhf_ray.outcomes import StageRequest
from rlhf_ray.policies.observations import Observer
from rlhf_ray.process import ProcessSpec, State, Step


@dataclass(frozen=True, kw_only=True)
class Utility:
    """What everything is judged by: `score - tuning_cost * cost - switch_cost * switches`.

    Attributes:
        tuning_cost: per full stage, >= 0.
        switch_cost: per level of distance handed over, >= 0.
    """

    tuning_cost: float = 0.02
    switch_cost: float = 0.002

    def of(self, score: float, cost: float, switches: float) -> float:
        """The utility; `score` is a metric turned so that higher is better.

        >>> Utility().of(0.9, 2.0, 5)
        0.85
        """
        return score - self.tuning_cost * cost - self.switch_cost * switches


Player = Callable[[str, int], Episode]
"""(task, replica seed) -> a finished fine-tuning."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished fine-tuning, as reports hold it; plain data.

    Attributes:
        method: "policy", or the baseline's name.
        task: name of the task.
        replica: replica seed.
        start_metric: val metric of the pretrained model.
        val_metric: val metric of the returned model.
        test_metric: its test metric; None: not reported.
        cost: tuning cost of the whole path, full stages (seconds with `cost="seconds"`); where the
            method searches on the task, of all stages that it carried out there.
        time_s: measured seconds of these stages.
        switches: sum of |level - next level| on the way.
        stages: number of stages carried out.
        best_length: number of stages after which the returned model was reached.
        diverged: number of stages that diverged.
        utility: on the test metric; None: not reported.
        val_utility: on the val metric.
        steps: a record per step: level, operation, levels (changed), next_level, metric, gain,
            cost, switches, time_s, diverged.
    """

    method: str
    task: str
    replica: int
    start_metric: float
    val_metric: float
    test_metric: float | None
    cost: float
    time_s: float
    switches: int
    stages: int
    best_length: int
    diverged: int
    utility: float | None
    val_utility: float
    steps: tuple[Mapping[str, Any], ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data, for files."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Run":
        """Reads what `as_json` gave."""
        return cls(**{**data, "steps": tuple(data["steps"])})


# -- judging ---------------------------------------------------------------------------------------


def report(stages: Stages, state: State) -> float:
    """Test metric of the model that a fine-tuning returns; may be NaN. Not charged."""
    request = StageRequest(
        task=state.task, replica=state.replica, path=state.best_path, kind="test"
    )
    return stages.outcome(request).outcome.metric


def finite_report(stages: Stages, state: State) -> float:
    """The same, where methods are compared by it.

    Raises:
        InputError: it is not finite.
    """
    metric = report(stages, state)
    if not math.isfinite(metric):
        raise InputError(
            f"task {state.task!r}: the metric must give a finite number on test, got {metric} of a "
            f"fine-tuned model (replica seed {state.replica}). Let it give one where it has none, "
            "as for 0/0."
        )
    return metric


def run_of(
    spec: ProcessSpec,
    method: str,
    episode: Episode,
    *,
    utility: Utility | None = None,
    test_metric: float | None = None,
) -> Run:
    """The record of a finished fine-tuning; `test_metric` is what `report` gave."""
    state, steps, utility = episode.state, episode.steps, utility or Utility()
    on_the_way_s = state.start.time_s + sum(step.time_s for step in steps)

    def judged(metric: float) -> float:
        return utility.of(spec.score(metric), state.cost, state.switches)

    return Run(
        method=method,
        task=state.task,
        replica=state.replica,
        start_metric=state.start.metric,
        val_metric=state.best,
        test_metric=test_metric,
        cost=state.cost,
        time_s=on_the_way_s if episode.tried_s is None else episode.tried_s,
        switches=state.switches,
        stages=len(state.path) if episode.tried_stages is None else episode.tried_stages,
        best_length=len(state.best_path),
        diverged=sum(step.diverged for step in steps),
        utility=None if test_metric is None else judged(test_metric),
        val_utility=judged(state.best),
        steps=tuple(_record(spec, step) for step in steps),
    )


def _record(spec: ProcessSpec, step: Step) -> dict[str, Any]:
    return {
        "level": spec.levels[step.level],
        "operation": step.operation,
        "levels": [spec.levels[level] for level in step.levels],
        "next_level": spec.levels[step.next_level],
        "metric": step.metric,
        "gain": step.performance,
        "cost": step.tuning_cost,
        "switches": step.switch_cost,
        "time_s": step.time_s,
        "diverged": step.diverged,
    }


def judge(
    spec: ProcessSpec,
    observer: Observer,
    act: Act,
    stages: Stages,
    *,
    tasks: Sequence[str],
    replicas: Iterable[int],
    utility: Utility,
    method: str = "policy",
    threads: int = THREADS,
    progress: Callable[[int, int], None] | None = None,
) -> list[Run]:
    """Plays a policy on tasks and replica seeds; figures on their test splits. See `compare`."""

    def player(task: str, replica: int) -> Episode:
        state, steps = roll_out(spec, observer, act, stages, task, replica)
        return Episode(state=state, steps=steps)

    runs = compare(
        {method: player},
        spec,
        stages,
        tasks=tasks,
        replicas=replicas,
        utility=utility,
        threads=threads,
        progress=progress,
    )
    return runs[method]


def compare(
    players: Mapping[str, Player],
    spec: ProcessSpec,
    stages: Stages,
    *,
    tasks: Sequence[str],
    replicas: Iterable[int],
    utility: Utility,
    threads: int = THREADS,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Run]]:
    """Plays every method on every task and replica seed, many at once.

    Args:
        players: method -> how it fine-tunes a task.
        spec: for level names and the metric's direction.
        stages: gives the test metrics.
        tasks: names of the tasks.
        replicas: replica seeds.
        utility: what is recorded with each run.
        threads: fine-tunings in flight at once.
        progress: called with (finished, of all) after each run, from any thread.

    Returns:
        Method -> its runs, ordered by task, then replica seed, whatever ended first.

    Raises:
        InputError: a test metric is not finite.
    """
    replicas = tuple(replicas)
    asked = [(method, task, r) for method in players for task in tasks for r in replicas]

    def finish(item: tuple[str, str, int]) -> Run:
        method, task, replica = item
        episode = players[method](task, replica)
        test = finite_report(stages, episode.state)
        return run_of(spec, method, episode, utility=utility, test_metric=test)

    runs = concurrently(finish, asked, threads=threads, progress=progress)
    return {method: [run for run in runs if run.method == method] for method in players}


# -- figures ---------------------------------------------------------------------------------------


def summary_of(runs: Sequence[Run]) -> dict[str, float]:
    """Means over runs: metric and utility on test, cost (full stages), switches, stages."""
    return {
        "metric": mean([known(run.test_metric) for run in runs]),
        "cost": mean([run.cost for run in runs]),
        "switches": mean([run.switches for run in runs]),
        "stages": mean([run.stages for run in runs]),
        "utility": mean([known(run.utility) for run in runs]),
    }


def known(figure: float | None) -> float:
    """A test figure that must have been reported."""
    if figure is None:
        raise InputError("test figures must have been reported, got a run with test_metric=None.")
    return figure


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean of one or more values."""
    if not values:
        raise InputError("a mean needs at least one value, got none.")
    return sum(values) / len(values)


def front(
    points: Sequence[tuple[float | None, float | None]], higher_is_better: bool = True
) -> list[bool]:
    """Which (metric, cost) points no other beats: at least as good in both, better in one.

    Points without figures are never on the front; of equal points all are.

    >>> front([(0.9, 2.0), (0.8, 1.0), (0.8, 1.5), (None, None)])
    [True, True, False, False]
    """
    sign = 1 if higher_is_better else -1
    scored = [(sign * m, c) for m, c in points if m is not None and c is not None]

    def beaten(score: float, cost: float) -> bool:
        return any(s >= score and c <= cost and (s > score or c < cost) for s, c in scored)

    return [m is not None and c is not None and not beaten(sign * m, c) for m, c in points]
