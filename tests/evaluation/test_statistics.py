"""Paired differences: by task and seed, with an interval over tasks."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from scipy import stats

from rlhf_ray.errors import InputError
from rlhf_ray.evaluation.judging import Run
from rlhf_ray.evaluation.statistics import paired_difference


def run(task: str, replica: int, utility: float) -> Run:
    return Run(
        method="m", task=task, replica=replica, start_metric=0.0, val_metric=0.0,
        test_metric=utility + 0.1, cost=0.0, time_s=0.0, switches=0, stages=0, best_length=0,
        diverged=0, utility=utility, val_utility=0.0, steps=(),
    )  # fmt: skip


def runs(values: Sequence[Sequence[float]]) -> list[Run]:
    return [run(f"t{t}", s, value) for t, row in enumerate(values) for s, value in enumerate(row)]


def test_the_interval_is_students_over_task_means() -> None:
    rng = np.random.default_rng(0)
    mine, others = rng.random((6, 3)), rng.random((6, 3))
    found = paired_difference(runs(mine.tolist()), list(reversed(runs(others.tolist()))))
    by_task = (mine - others).mean(1)
    low, high = stats.t.interval(0.95, 5, by_task.mean(), stats.sem(by_task))
    assert found.mean == pytest.approx(by_task.mean()) and found.n_tasks == 6
    assert (found.low, found.high) == pytest.approx((low, high))
    assert found.worst == pytest.approx(by_task.min())


def test_more_seeds_of_the_same_difference_narrow_nothing() -> None:
    few = paired_difference(runs([[0.5], [0.9]]), runs([[0.4], [0.6]]))
    many = paired_difference(runs([[0.5] * 9, [0.9] * 9]), runs([[0.4] * 9, [0.6] * 9]))
    assert vars(few) == pytest.approx(vars(many))


def test_one_task_gives_no_interval_and_other_figures_can_be_compared() -> None:
    found = paired_difference(runs([[0.5]]), runs([[0.25]]), lambda one: one.test_metric)
    assert found.mean == pytest.approx(0.25)
    assert (found.low, found.high) == (-math.inf, math.inf)


@pytest.mark.parametrize("others", [[], [[0.1], [0.2], [0.3]], [[0.1, 0.2]]])
def test_what_cannot_be_paired_is_refused(others: list[list[float]]) -> None:
    with pytest.raises(InputError, match="same tasks and seeds"):
        paired_difference(runs([[0.5], [0.6]]), runs(others))
