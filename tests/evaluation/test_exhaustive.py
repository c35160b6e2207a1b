from typing import Any

import pytest
from synthetic import SyntheticStages, spec_of

from rlhf_ray.errors import FailedStageError
from rlhf_ray.evaluation.exhaustive import all_paths, distinct_steps, prefill
from rlhf_ray.operations import Skip, Stop, Train, default_operations


class Recorder:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.phases: list[tuple[str, int | None]] = []
        self.done: list[int | None] = []

    def message(self, text: str) -> None:
        raise AssertionError(text)

    def phase(self, name: str, total: int | None = None) -> None:
        self.phases.append((name, total))

    def update(self, done: int | None = None, **counters: float) -> None:
        self.done.append(done)


def test_steps_of_one_effect_are_one() -> None:
    steps = distinct_steps(default_operations(), 2)
    # three rates at two levels; up from the first is all; up from the last is mid there
    trained = [step for step in steps if isinstance(step.operation, Train)]
    assert {(s.operation.name, s.levels) for s in steps if s not in trained} == {
        ("refit", (0, 1)),
    }  # fmt: skip
    assert sorted((s.operation.learning_rate, s.levels) for s in trained) == [
        (3e-4, (0,)), (3e-4, (1,)), (1e-3, (0,)), (1e-3, (0, 1)), (1e-3, (1,)),
        (3e-3, (0,)), (3e-3, (1,)),
    ]  # fmt: skip
    assert distinct_steps((Skip(), Stop()), 3) == ()


@pytest.mark.parametrize(("depth", "n"), [(0, 1), (1, 4), (3, 1 + 3 + 9 + 27)])
def test_paths_are_all_of_them_shorter_ones_first(depth: int, n: int) -> None:
    steps = distinct_steps((Train(name="t", learning_rate=1e-3), Stop()), 3)
    paths = list(all_paths(steps, depth))
    assert len(paths) == len(set(paths)) == n
    assert [len(path) for path in paths] == sorted(len(path) for path in paths)


def test_prefill_asks_for_every_state_once() -> None:
    spec = spec_of(2, operations=(Train(name="t", learning_rate=1e-3), Skip(), Stop()))
    stages, progress = SyntheticStages(), Recorder()
    n = prefill(
        spec, stages, tasks=["a", "b"], reported=["b"], replicas=2, depth=2, progress=progress
    )
    per_task = 1 + 2 + 4
    assert n == len(stages.asked) == len(set(stages.asked)) == per_task * 3 * 2
    assert {r.task for r in stages.asked if r.kind == "test"} == {"b"}
    assert progress.phases == [("filling the tree", n)]
    assert sorted(done or 0 for done in progress.done) == list(range(1, n + 1))


class FailingStages(SyntheticStages):
    """Stages of which those that `fails` picks raise."""

    def __init__(self, fails: Any) -> None:
        super().__init__()
        self._fails = fails

    def outcome(self, request: Any, namespace: str = "") -> Any:
        if self._fails(request):
            raise FailedStageError("no such luck")
        return super().outcome(request, namespace)


def test_prefill_goes_on_after_a_stage_that_fails_but_not_without_a_start() -> None:
    spec = spec_of(2, operations=(Train(name="t", learning_rate=1e-3), Stop()))
    few = {"tasks": ["a"], "reported": ["a"], "replicas": 1, "depth": 1}
    stages = FailingStages(lambda request: bool(request.path))
    assert prefill(spec, stages, **few) == 6 and len(stages.asked) == 2
    with pytest.raises(FailedStageError, match="no such luck"):
        prefill(spec, FailingStages(lambda request: not request.path), **few)
