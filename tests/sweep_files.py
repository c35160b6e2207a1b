"""A small suite, and a sweep's files with made-up figures, for tests of what is shown."""

import json
from pathlib import Path

import torch
from torch import nn

from rlhf_ray.tasks import Suite, Task

METHODS = {
    "policy": (0.912, 0.31), "full_best": (0.924, 3.2), "full": (0.909, 1.0), "fixed": (0.9, 0.4),
    "head": (0.7, 0.2), "random": (0.711, 0.9),
}  # fmt: skip


def small_suite(name: str = "small", task: str = "test-0") -> Suite:
    """Two levels, two train tasks, one val and one test task of 32 examples."""
    rng = torch.Generator().manual_seed(0)

    def made(name: str) -> Task:
        x = torch.randn(32, 4, generator=rng)
        data = (x, x[:, :3].argmax(1))
        return Task(name=name, train=data, val=data, test=data)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return Suite(
        name=name,
        model=model,
        levels={"low": ["0"], "head": ["2"]},
        train_tasks=[made("train-0"), made("train-1")],
        val_tasks=[made("val-0")],
        test_tasks=[made(task)],
    )


def write_sweep(
    storage: Path,
    name: str = "small-1",
    *,
    state: str = "finished",
    n_trials: int = 3,
    failed: tuple[int, ...] = (),
    waiting: tuple[int, ...] = (),
    error: str = "it broke",
    methods: dict[str, tuple[float, float]] | None = None,
    judge_replicas: int = 3,
) -> dict:
    """Writes a sweep's files; returns its summary.json."""
    trials = []
    for i in range(n_trials):
        values = {
            "gamma": 0.9, "epsilon": 0.05, "tuning_cost_weight": 0.01 * (i + 1),
            "switch_cost_weight": 0.001,
        }  # fmt: skip
        trial = {"name": f"{i:03d}-abcdef", "values": values}
        trials.append(trial)
        metric, cost = 0.9 - 0.01 * i, 0.8 - 0.1 * i
        judged = {"metric": metric, "cost": cost, "switches": 1.0, "utility": metric - 0.02 * cost}
        ended = {"status": "done", "error": None, "judged": judged}
        if i in failed:
            ended = {"status": "failed", "error": error}
        if i in waiting:
            continue
        _write(storage / name / "trials" / trial["name"] / "trial.json", {**trial, **ended})
    made_of = {"suite": "small", "metric": {"name": "accuracy", "higher_is_better": True}}
    _write(storage / name / "sweep.json", {**made_of, "state": state, "trials": trials})
    if state != "finished":
        return {}
    spread = 0.004 if judge_replicas > 1 else None
    summary = {
        "suite": "small", "seed": 0, "n_trials": n_trials, "wall_s": 12.5,
        "stages": {"logical": 3840, "distinct": 412, "seconds_spent": 31.0, "seconds_saved": 210.0},
        "methods": {
            method: {
                "metric_mean": metric, "metric_sd": spread, "cost_mean": cost, "switches_mean": 1.5,
                "utility_mean": metric - 0.02 * cost, "rank_mean": 2.5,
            }
            for method, (metric, cost) in (METHODS if methods is None else methods).items()
        },
        "rows": [{"method": "policy", "task": "test-0", "seed": 0}],
    }  # fmt: skip
    _write(storage / name / "summary.json", summary)
    return summary


def _write(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
