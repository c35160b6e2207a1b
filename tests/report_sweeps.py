"""Sweeps of any size with made-up figures, whole files as a real sweep leaves them."""

import hashlib
import random
import time
from typing import Any

from rlhf_ray.config import SearchConfig
from rlhf_ray.storage import Storage

OPERATIONS = (
    ("train_low", "Train"), ("train_mid", "Train"), ("train_high", "Train"),
    ("train_up", "Train"), ("train_all", "Train"), ("skip", "Skip"), ("stop", "Stop"),
)  # fmt: skip

METHODS = {"fixed": (0.90, 0.4), "full": (0.909, 1.6), "full_best": (0.922, 3.2),
           "head": (0.90, 0.4), "random": (0.71, 1.9)}  # fmt: skip

LEVELS = ("conv", "dense")


def write_made_up_sweep(
    storage: Storage,
    name: str = "made-up",
    *,
    n_trials: int = 8,
    n_done: int | None = None,
    n_failed: int = 0,
    state: str = "finished",
    suite: str = "digits",
    levels: tuple[str, ...] = LEVELS,
    tasks: tuple[str, ...] = ("blur-0.55", "rotate-0.50", "swap-0.91", "noise-0.66+swap-0.93"),
    error: str = "a stage could not be carried out",
    episodes: int = 96,
    continuous: bool = False,
) -> None:
    """Writes `sweep.json`, a `trial.json` per ended trial, and at the end the comparison."""
    rng = random.Random(0)
    trials = [
        {"name": f"{i:03d}-{_digest(i)[:6]}", "values": _values(rng, i, continuous)}
        for i in range(n_trials)
    ]
    roles = {"train": list(tasks), "val": list(tasks), "test": [f"{task}+dead" for task in tasks]}
    storage.write_json(
        f"{name}/sweep.json",
        {
            "name": name, "state": state, "suite": suite, "levels": list(levels),
            "metric": {"name": "accuracy", "higher_is_better": True}, "tasks": roles,
            "operations": [{"name": n, "kind": kind} for n, kind in OPERATIONS],
            "trials": trials, "config": SearchConfig(episodes=episodes).as_json(),
            "versions": {"rlhf_ray": "0.1.0", "torch": "2.15.0"}, "created": time.time() - 900,
        },
    )  # fmt: skip
    n_done = n_trials - n_failed if n_done is None else n_done
    for i, trial in enumerate(trials[: n_done + n_failed]):
        write_trial(storage, name, trial, i, levels=levels, tasks=tasks, episodes=episodes,
                    error=error if i < n_failed else None)  # fmt: skip
    if state == "finished":
        _write_comparison(storage, name, roles["test"], levels)


def write_trial(
    storage: Storage,
    name: str,
    trial: dict[str, Any],
    number: int,
    *,
    levels: tuple[str, ...] = LEVELS,
    tasks: tuple[str, ...] = ("blur-0.55",),
    episodes: int = 96,
    error: str | None = None,
) -> None:
    """Writes one trial's record; with an `error` one that failed."""
    file = f"{name}/trials/{trial['name']}/trial.json"
    if error is not None:
        storage.write_json(file, {**trial, "status": "failed", "error": error})
        return
    rng = random.Random(number)
    skill = rng.gauss(0, 0.02) + 0.01 * (trial["values"]["gamma"] > 0.95)
    runs = [
        made_up_run(rng, "policy", task, replica, levels, skill)
        for task in tasks for replica in range(3)
    ]  # fmt: skip
    judged = {key: sum(run[of] for run in runs) / len(runs) for key, of in (
        ("metric", "test_metric"), ("cost", "cost"), ("switches", "switches"),
        ("stages", "stages"), ("utility", "utility"),
    )}  # fmt: skip
    curve = [
        {"episode": i, "return": skill + 0.4 * (1 - 0.97**i) + rng.gauss(0, 0.1), "length": 4,
         "epsilon": max(0.05, 1 - 2 * i / episodes)}
        for i in range(episodes)
    ]  # fmt: skip
    keys = [_digest(rng.randrange(4000)) for _ in range(3 * episodes)]
    stages = {"logical": 4 * episodes, "executed": 90, "recomputed": 0, "logical_s": 300.0,
              "spent_s": 70.0, "keys": keys}  # fmt: skip
    drivers = [
        {"level": level, "decisions": 24, "features": [
            {"name": feature, "changed": share / (i + 1)}
            for feature, share in (("val loss", 0.41), ("entropy at the start", 0.22),
                                   (f"gradient norm:{level}", 0.09), ("metric", 0.04))]}
        for i, level in enumerate(levels)
    ]  # fmt: skip
    record = {**trial, "status": "done", "error": None, "judged": judged, "runs": runs,
              "curve": curve, "stages": stages, "drivers": drivers, "wall_s": 42.0}  # fmt: skip
    storage.write_json(file, record)


METRICS = {
    "metric", "val_metric", "test_metric", "start_metric", "utility", "val_utility", "return",
    "metric_mean", "metric_sd", "utility_mean", "mean", "low", "high", "worst",
}  # fmt: skip


def scale_metric(storage: Storage, factor: float, name: str = "made-up") -> None:
    """Makes a sweep's metric another one, so many times as large, of which less is better."""

    def scaled(value: Any) -> Any:
        if isinstance(value, list):
            return [scaled(v) for v in value]
        if not isinstance(value, dict):
            return value
        return {
            k: v * factor if k in METRICS and isinstance(v, float) else scaled(v)
            for k, v in value.items()
        }

    sweep = storage.read_json(f"{name}/sweep.json")
    sweep["metric"] = {"name": "mse", "higher_is_better": False}
    for file in storage.list(name):
        if file.endswith(".json"):
            storage.write_json(file, scaled(storage.read_json(file)))
    storage.write_json(f"{name}/sweep.json", sweep)


def made_up_run(
    rng: random.Random, method: str, task: str, replica: int, levels: tuple[str, ...], skill: float
) -> dict[str, Any]:
    """A roll-out: some stages, the metric rising with less and less."""
    level, metric, cost, steps = 0, 0.45, 0.1, []
    chooser = random.Random(f"{task} {skill > 0}")
    n = chooser.choice((2, 3, 3, 4))
    for i in range(n):
        following = min(level + (i % 2), len(levels) - 1)
        gain = max(0.0, (0.93 + skill - metric) * rng.uniform(0.4, 0.7))
        metric, cost = metric + gain, cost + (1.05, 0.14)[min(level, 1)]
        steps.append({
            "level": levels[level], "operation": OPERATIONS[chooser.randrange(3)][0],
            "levels": [levels[level]], "next_level": levels[following], "metric": metric,
            "gain": gain, "cost": 0.3, "switches": following - level, "time_s": 0.2,
            "diverged": False,
        })  # fmt: skip
        level = following
    steps.append({**steps[-1], "level": levels[level], "operation": "stop", "levels": [],
                  "gain": 0.0, "cost": 0.0, "switches": 0})  # fmt: skip
    test = metric - 0.01
    return {
        "method": method, "task": task, "replica": replica, "start_metric": 0.45,
        "val_metric": metric, "test_metric": test, "cost": cost, "time_s": 1.0, "switches": level,
        "stages": n, "best_length": n, "diverged": 0, "utility": test - 0.02 * cost - 0.002,
        "val_utility": metric - 0.02 * cost - 0.002, "steps": steps,
    }  # fmt: skip


def _write_comparison(
    storage: Storage, name: str, tasks: list[str], levels: tuple[str, ...]
) -> None:
    figures = {"policy": (0.918, 0.62), **METHODS}
    methods = {
        method: {"metric_mean": metric, "metric_sd": 0.004, "cost_mean": cost, "rank_mean": 2.5,
                 "switches_mean": 1.0, "utility_mean": metric - 0.02 * cost - 0.002}
        for method, (metric, cost) in figures.items()
    }  # fmt: skip
    rng = random.Random(1)
    runs = [made_up_run(rng, "policy", task, r, levels, 0.0) for task in tasks for r in range(3)]
    val = {method: {"metric": metric - 0.01, "cost": cost, "switches": 1.0, "stages": 3.0,
                    "utility": metric - 0.01 - 0.02 * cost}
           for method, (metric, cost) in METHODS.items() if method != "random"}  # fmt: skip
    settings = {method: {"learning_rate": 0.003, "val": figures} for method, figures in val.items()}
    storage.write_json(f"{name}/baselines.json", {"settings": settings, "runs": {"policy": runs}})
    account = {"logical": 3840, "distinct": 412, "executed": 412, "recomputed": 0, "failed": 0,
               "seconds_spent": 310.0, "seconds_saved": 2100.0}  # fmt: skip
    own = methods["policy"]["utility_mean"]
    minus = {}
    for method, figures in methods.items():
        if method != "policy":
            mean = own - figures["utility_mean"]
            minus[method] = {"mean": mean, "low": mean - 0.01, "high": mean + 0.01,
                             "worst": mean - 0.03, "n_tasks": 8}  # fmt: skip
    storage.write_json(
        f"{name}/summary.json",
        {"suite": "digits", "name": name, "methods": methods, "rows": [], "stages": account,
         "policy_minus": minus, "stages_of_comparison": account, "wall_s": 700.0},
    )  # fmt: skip


def _values(rng: random.Random, i: int, continuous: bool) -> dict[str, float]:
    if continuous:
        return {"gamma": rng.uniform(0.9, 0.999), "epsilon": rng.uniform(0.02, 0.3),
                "tuning_cost_weight": rng.uniform(0.005, 0.05),
                "switch_cost_weight": rng.uniform(0.0, 0.01)}  # fmt: skip
    return {"gamma": (0.9, 0.99)[i % 2], "epsilon": (0.05, 0.2)[i // 2 % 2],
            "tuning_cost_weight": (0.01, 0.03)[i // 4 % 2],
            "switch_cost_weight": (0.001, 0.004)[i // 8 % 2]}  # fmt: skip


def _digest(value: int) -> str:
    return hashlib.sha256(str(value).encode()).hexdigest()
