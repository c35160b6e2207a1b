"""What a sweep's time limit ends, and what it leaves."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from synthetic import SyntheticStages, spec_of

from rlhf_ray.config import SearchConfig
from rlhf_ray.env import EpisodePlan
from rlhf_ray.evaluation.exhaustive import prefill
from rlhf_ray.evaluation.rollouts import THREADS
from rlhf_ray.policies.observations import Observer
from rlhf_ray.storage import open_storage
from rlhf_ray.sweep import time_limit
from rlhf_ray.sweep.scheduling import scheduled
from rlhf_ray.sweep.time_limit import StagesUntil, TimeIsUpError
from rlhf_ray.sweep.trial import TrialContext

SPEC = spec_of(2, horizon=3)
TASKS = tuple(f"train{i}" for i in range(8))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> SyntheticStages:
    """Every answer takes a second of the clock."""
    found = SyntheticStages()
    clock = SimpleNamespace(monotonic=lambda: float(len(found.asked)))
    monkeypatch.setattr(time_limit, "time", clock)
    return found


def context(folder: Path, stages: Any) -> TrialContext:
    return TrialContext(
        sweep="s",
        storage=open_storage(folder),
        suite="toy",
        config=SearchConfig(storage_path=str(folder)),
        spec=SPEC,
        observer=Observer(),
        plan=EpisodePlan(tasks=TASKS, replicas=1, n_levels=2, random_start=False, seed=0),
        val_tasks=("val",),
        metric="accuracy",
        stages=stages,
        source_moments=None,
    )


def test_looking_for_a_schedule_ends_in_time_and_is_gone_on_with(
    stages: SyntheticStages, tmp_path: Path
) -> None:
    with pytest.raises(TimeIsUpError):
        scheduled(context(tmp_path, stages), ends=40.0)
    assert 40 <= len(stages.asked) <= 40 + THREADS
    assert not (tmp_path / "s").exists()
    again = scheduled(context(tmp_path, stages), ends=100_000.0)
    assert again.schedule and len(stages.asked) > 100
    assert again.schedule == scheduled(context(tmp_path / "other", SyntheticStages())).schedule


def test_filling_the_tree_ends_in_time(stages: SyntheticStages) -> None:
    what: Any = {"tasks": TASKS, "reported": (), "replicas": 1, "depth": 2}
    with pytest.raises(TimeIsUpError):
        prefill(SPEC, StagesUntil(stages, 40.0), **what)
    assert 40 <= len(stages.asked) <= 40 + THREADS
    assert prefill(SPEC, StagesUntil(stages, None), **what) > 100
