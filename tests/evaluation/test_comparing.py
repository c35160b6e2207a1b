from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.nn.functional as F
from sweep_files import small_suite

from rlhf_ray.config import SearchConfig
from rlhf_ray.engine.stages import Engine
from rlhf_ray.errors import FailedStageError, InputError
from rlhf_ray.evaluation.comparing import run_baselines
from rlhf_ray.tasks import Metric


def config(storage: Path, **changes: Any) -> SearchConfig:
    few = {"horizon": 2, "steps": 2, "batch_size": 8, "judge_replicas": 1, "device": "cpu"}
    return SearchConfig(storage_path=str(storage), **{**few, **changes})


def test_a_stage_that_fails_counts_as_diverged_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carry_out = Engine.run

    def run(engine: Engine, request: Any, parent: Any, load: Any) -> Any:
        if request.path[-1].operation.settings().get("learning_rate") == 3e-3:
            raise RuntimeError("no such luck")
        return carry_out(engine, request, parent, load)

    monkeypatch.setattr(Engine, "run", run)
    lines: list[str] = []
    results = run_baselines(small_suite(), config=config(tmp_path), progress=lines.append)
    assert len(set(results.failures)) == len(results.failures) > 0
    assert all(" at 0.003@" in line and "no such luck" in line for line in results.failures)
    assert lines[-1] == (
        f"{len(results.failures)} stages failed and count as diverged; the first: "
        f"{results.failures[0]}"
    )
    assert all(runs[0].test_metric is not None for runs in results.runs.values())


def test_a_start_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(Engine, "start", fails)
    with pytest.raises(FailedStageError, match="no such luck"):
        run_baselines(small_suite(), config=config(tmp_path))


@pytest.mark.parametrize("tasks", [[], ["x", "x"]])
def test_tasks_are_distinct_and_at_least_one(tmp_path: Path, tasks: list[str]) -> None:
    suite = small_suite()
    tasks = [suite.test_tasks[0].name for _ in tasks]
    with pytest.raises(InputError, match="tasks must be distinct, at least one"):
        run_baselines(suite, tasks=tasks, config=config(tmp_path))


def test_metrics_of_two_directions_are_refused(tmp_path: Path) -> None:
    suite = small_suite()
    lower = Metric(name="loss", function=F.cross_entropy, higher_is_better=False)
    mixed = replace(suite, val_tasks=[replace(suite.val_tasks[0], metric=lower)])
    with pytest.raises(InputError, match="metrics must have one direction, got accuracy, loss"):
        run_baselines(mixed, config=config(tmp_path))


def test_a_search_that_does_not_train_has_baselines_that_do(tmp_path: Path) -> None:
    asked = config(tmp_path, only_operations=("skip",), learning_rates=(0.1, 0.2, 0.5))
    results = run_baselines(small_suite(), config=asked)
    assert results.settings["head"]["learning_rate"] in (0.1, 0.2, 0.5, 1.67)
    assert not results.failures
