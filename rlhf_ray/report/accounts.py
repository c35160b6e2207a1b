"""Sums over a sweep's trials for the page: methods, effects of settings, stages, paths, health.

Plain data in and out. `trials` are digests as `trials.digest_of` gives them.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_ray.config import SWEPT
from rlhf_ray.report.trials import path_of


def methods(
    summary: Mapping[str, Mapping[str, float]],
    policy_minus: Mapping[str, Mapping[str, float | None]],
) -> list[dict[str, Any]]:
    """The policy and the baselines on the test tasks, best utility first.

    Args:
        summary: method -> figures.
        policy_minus: method -> the policy's paired difference to it; then every record has `minus`,
            None for the policy's own.
    """
    ordered = sorted(summary.items(), key=lambda item: -item[1]["utility_mean"])
    return [
        {"name": name, **figures, **({"minus": policy_minus.get(name)} if policy_minus else {})}
        for name, figures in ordered
    ]


def val_marks(baselines: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The figures of the chosen baselines on the val tasks, where they were recorded."""
    settings = baselines.get("settings", {})
    return [{"name": name, **s["val"]} for name, s in settings.items() if "val" in s]


def effects(done: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per swept setting that varies: mean utility at each value, or its correlation where many.

    Returns:
        Records with `setting`, and `values` (value, n, mean, sd) or `correlation` (Pearson's, of
        the setting with utility).
    """
    found: list[dict[str, Any]] = []
    for setting in SWEPT:
        pairs = [(trial["values"][setting], trial["utility"]) for trial in done]
        values = sorted({value for value, _ in pairs})
        if len(values) < 2:
            continue
        if len(values) > 6:
            found.append({"setting": setting, "correlation": _correlation(pairs), "n": len(pairs)})
            continue
        rows = []
        for value in values:
            mine = [utility for v, utility in pairs if v == value]
            mean = sum(mine) / len(mine)
            spread = sum((u - mean) ** 2 for u in mine) / max(1, len(mine) - 1)
            sd = math.sqrt(spread) if len(mine) > 1 else None
            rows.append({"value": value, "n": len(mine), "mean": mean, "sd": sd})
        found.append({"setting": setting, "values": rows})
    return found


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    n = len(pairs)
    x, y = (sum(pair[i] for pair in pairs) / n for i in (0, 1))
    xy = sum((a - x) * (b - y) for a, b in pairs)
    xx, yy = sum((a - x) ** 2 for a, _ in pairs), sum((b - y) ** 2 for _, b in pairs)
    return xy / math.sqrt(xx * yy) if xx and yy else None


def account(
    done: Sequence[Mapping[str, Any]],
    seen: Iterable[tuple[Any, Mapping[str, Any]]],
    summary: Mapping[str, Any],
) -> dict[str, Any]:
    """The tree: what trials asked for, what was distinct among it, and what sharing saved."""
    if "stages" in summary:
        return {**summary["stages"], "comparison": summary.get("stages_of_comparison")}
    logical = sum(trial["stages"]["logical"] for trial in done)
    spent = sum(trial["stages"]["spent_s"] for trial in done)
    needed = sum(trial["stages"]["logical_s"] for trial in done)
    return {
        "logical": logical,
        "distinct": len(frozenset().union(*(trial["keys"] for _, trial in seen))),
        "seconds_spent": spent,
        "seconds_saved": needed - spent,
        "comparison": None,
    }


def best_paths(
    done: Sequence[Mapping[str, Any]], baselines: Mapping[str, Any], sweep: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Per val and test task the fine-tuning of highest utility on the val split."""
    kinds = {str(o["name"]): str(o["kind"]) for o in sweep.get("operations", [])}
    every = [path for trial in done for path in trial["paths"]]
    for method, runs in baselines.get("runs", {}).items():
        every += [path_of(run, kinds, method) for run in runs]
    best: dict[str, dict[str, Any]] = {}
    for path in every:
        if path["utility"] > best.get(path["task"], {"utility": -math.inf})["utility"]:
            best[path["task"]] = path
    tasks = sweep.get("tasks", {})
    ordered = [(task, split) for split in ("val", "test") for task in tasks.get(split, [])]
    return [{**best[task], "split": split} for task, split in ordered if task in best]


def health(
    sweep: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], progress: Mapping[str, Any]
) -> dict[str, Any]:
    """Counts by state, what runs, what failed, when it may end."""
    counts = {
        state: sum(trial["status"] == state for trial in trials)
        for state in ("done", "running", "waiting", "failed")
    }
    running = sweep["state"] == "running"
    done, total = progress.get("done", 0), progress.get("total", 0)
    played, elapsed = done - progress.get("before", 0), progress.get("elapsed_s", 0.0)
    left = (total - done) * elapsed / played if running and played > 0 else None
    return {
        **counts,
        "heard": progress.get("time") if running else None,
        "left_s": left,
        "comparing": running and not counts["waiting"] and not counts["running"],
        "failures": [
            {"name": trial["name"], "error": str(trial["error"])}
            for trial in trials
            if trial["status"] == "failed"
        ],
        "restarts": progress.get("restarts", {}),
        "in_flight": progress.get("in_flight") if running else None,
        "retried": progress.get("retried"),
        "failed_stages": progress.get("failed_stages", []),
        "workers": progress.get("workers", []),
        "in_progress": [
            {"name": trial["name"], "episodes": trial["episodes"]}
            for trial in trials
            if trial["status"] == "running" and running
        ],
    }
