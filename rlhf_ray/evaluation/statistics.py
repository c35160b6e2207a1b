"""Methods beside each other: means, spreads and ranks over runs. No Ray, plain arithmetic."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

from rlhf_ray.errors import InputError
from rlhf_ray.evaluation.judging import Run, known, mean

RunsByMethod = Mapping[str, Sequence[Run]]
"""Method -> its runs; all methods have the same tasks and replica seeds."""

FIGURES = (
    "metric_mean", "metric_sd", "cost_mean", "switches_mean", "utility_mean", "rank_mean",
)  # fmt: skip
"""Of a method: see `summarise`."""

DIGITS = 12
"""Utilities that agree to so many decimals are tied: sums of floats differ by their order."""


def summarise(runs: RunsByMethod) -> dict[str, dict[str, Any]]:
    """A row of figures per method.

    Args:
        runs: method -> its runs, with test figures.

    Returns:
        Method -> `metric_mean`; `metric_sd`: over replica seeds of the mean over tasks (None with
        one seed); `cost_mean` (full stages), `switches_mean`, `utility_mean`, `rank_mean` (1: the
        highest utility among the methods shown).
    """
    ranked = ranks(runs)
    return {
        method: {
            "metric_mean": mean([known(run.test_metric) for run in mine]),
            "metric_sd": _spread(mine),
            "cost_mean": mean([run.cost for run in mine]),
            "switches_mean": mean([run.switches for run in mine]),
            "utility_mean": mean([known(run.utility) for run in mine]),
            "rank_mean": mean(list(ranked[method].values())),
        }
        for method, mine in runs.items()
    }


def rows(runs: RunsByMethod) -> list[dict[str, Any]]:
    """A flat record per method, task and replica seed, in the order given."""
    ranked = ranks(runs)
    return [
        {
            "method": method,
            "task": run.task,
            "seed": run.replica,
            "metric": known(run.test_metric),
            "val_metric": run.val_metric,
            "start_metric": run.start_metric,
            "cost": run.cost,
            "switches": run.switches,
            "stages": run.stages,
            "utility": known(run.utility),
            "rank": ranked[method][run.task, run.replica],
            "time_s": run.time_s,
            "diverged": run.diverged,
        }
        for method, mine in runs.items()
        for run in mine
    ]


def ranks(runs: RunsByMethod) -> dict[str, dict[tuple[str, int], float]]:
    """Ranks by test utility within each (task, replica seed), 1 the best; ties share their mean.

    Raises:
        InputError: the methods do not have the same tasks and replica seeds, once each.
    """
    utilities = {
        method: {(run.task, run.replica): round(known(run.utility), DIGITS) for run in mine}
        for method, mine in runs.items()
    }
    places = {frozenset(mine) for mine in utilities.values()}
    if len(places) > 1 or any(len(utilities[method]) != len(runs[method]) for method in runs):
        sizes = {method: len(mine) for method, mine in runs.items()}
        raise InputError(f"all methods must have the same tasks and seeds, got runs={sizes}.")

    def rank(method: str, place: tuple[str, int]) -> float:
        mine = utilities[method][place]
        others = [utilities[other][place] for other in utilities]
        above, equal = sum(u > mine for u in others), sum(u == mine for u in others)
        return above + (equal + 1) / 2

    return {
        method: {place: rank(method, place) for place in mine} for method, mine in utilities.items()
    }


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """How much one method is above another on the same tasks and seeds.

    Attributes:
        mean: over tasks of the mean over seeds.
        low: of the 95% interval; minus infinity with one task.
        high: of the interval; infinity with one task.
        n_tasks: tasks it is over.
        worst: the lowest difference on a single task, a mean over seeds.
    """

    mean: float
    low: float
    high: float
    n_tasks: int
    worst: float


def paired_difference(
    mine: Sequence[Run],
    others: Sequence[Run],
    figure: Callable[[Run], float | None] = lambda run: run.utility,
) -> PairedDifference:
    """Student's interval of a figure's differences, clustered by task.

    Runs of one task share its data, so that seeds are no independent draws of the difference: they
    are averaged first, and tasks count.

    Args:
        mine: runs of one method.
        others: of the other, on the same tasks and replica seeds.
        figure: of a run; its utility on test by default.

    Raises:
        InputError: the tasks and seeds differ, or there are none.
    """
    theirs = {(run.task, run.replica): known(figure(run)) for run in others}
    ours = {(run.task, run.replica): known(figure(run)) for run in mine}
    if set(ours) != set(theirs) or not ours:
        raise InputError(
            "runs must be of the same tasks and seeds, one at least, got "
            f"{len(ours)} and {len(theirs)}."
        )
    by_task: dict[str, list[float]] = {}
    for place, value in ours.items():
        by_task.setdefault(place[0], []).append(value - theirs[place])
    differences = np.array([mean(values) for values in by_task.values()])
    n, middle = len(differences), float(differences.mean())
    half = float("inf")
    if n > 1:
        half = float(stats.t.ppf(0.975, n - 1) * differences.std(ddof=1) / np.sqrt(n))
    return PairedDifference(
        mean=middle,
        low=middle - half,
        high=middle + half,
        n_tasks=n,
        worst=float(differences.min()),
    )


def against(runs: RunsByMethod, method: str) -> dict[str, dict[str, float | None]]:
    """One method's paired differences of utility to each other, as plain data.

    Args:
        runs: method -> its runs, with test figures.
        method: whose utility is above the other's where a difference is positive.

    Returns:
        Other method -> the fields of `PairedDifference`; None: no interval, with one task.
    """
    return {
        other: {
            name: value if math.isfinite(value) else None
            for name, value in asdict(paired_difference(runs[method], theirs)).items()
        }
        for other, theirs in runs.items()
        if other != method
    }


def _spread(runs: Sequence[Run]) -> float | None:
    """Standard deviation over replica seeds of the mean over tasks; None with one seed."""
    seeds = sorted({run.replica for run in runs})
    means = [mean([known(run.test_metric) for run in runs if run.replica == s]) for s in seeds]
    return float(np.std(means, ddof=1)) if len(means) > 1 else None
