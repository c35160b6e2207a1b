from dataclasses import dataclass, replace

import pytest
from synthetic import SyntheticStages, spec_of

from rlhf_ray.evaluation.departures import departures
from rlhf_ray.evaluation.judging import Utility
from rlhf_ray.policies.observations import Observer
from rlhf_ray.process import ProcessSpec

SPEC = spec_of(2, horizon=1, probed=True)
TASKS = [f"train{i}" for i in range(4)]
UTILITY = Utility(tuning_cost=0.1, switch_cost=0.0)
NAMES = [operation.name for operation in SPEC.operations]
USUAL, OTHER = (NAMES.index(name) * 2 for name in ("train_mid", "train_low"))  # level 0 goes on
PROBES = 0.1 * 0.4  # what they cost, as utility


@dataclass(frozen=True)
class Decided:
    """As much of a policy as is asked: it takes one action, or another if it may."""

    departs: bool = True

    def act(self, level, features, mask) -> int:  # type: ignore[no-untyped-def]
        return OTHER if self.departs else USUAL

    def faithful(self) -> "Decided":
        return Decided(departs=False)

    def as_charged(self, spec: ProcessSpec) -> ProcessSpec:
        return replace(spec, probed=self.departs)


def found(*gains: float):  # type: ignore[no-untyped-def]
    """What leaving the schedule is found to give, where it adds so much to each task's metric."""

    def metric(path, task):  # type: ignore[no-untyped-def]
        departed = bool(path) and path[0].operation.name == "train_low"
        return 0.6 + (gains[int(task[-1])] if departed else 0.0) if path else 0.5

    return departures(
        Decided(),  # type: ignore[arg-type]
        SPEC,
        Observer(),
        SyntheticStages(metric=metric),
        tasks=TASKS[: len(gains)],
        utility=UTILITY,
        threads=1,
    )


def test_the_gain_is_against_the_schedule_and_pays_for_the_probes() -> None:
    left = found(0.1, 0.1, 0.1, 0.1)
    assert left.gain == pytest.approx(0.1 - PROBES)
    assert left.standard_error == pytest.approx(0.0, abs=1e-12)
    assert left.paid and left.n_tasks == 4 and left.n_stages == 8
    assert not found(0.03, 0.03, 0.03, 0.03).paid  # less than the probes cost


def test_a_gain_on_some_tasks_must_exceed_its_standard_error() -> None:
    # gains 0.36, -0.04, -0.04, -0.04: mean 0.06, standard error 0.1
    left = found(0.4, 0.0, 0.0, 0.0)
    assert (left.gain, left.standard_error) == (pytest.approx(0.06), pytest.approx(0.1))
    assert not left.paid
    assert found(0.4, 0.3, 0.2, 0.0).paid


def test_one_task_is_taken_at_its_word() -> None:
    assert found(0.1).paid and found(0.1).standard_error == 0.0
    assert not found(0.0).paid
