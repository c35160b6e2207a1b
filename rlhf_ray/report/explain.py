"""What a policy learned, derived from its greedy roll-outs: in words, as paths, as a map.

Nothing here knows what a good answer looks like: the sentences state what the records hold, also
that a policy does the same on every task or that it stops at once.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.numerals import are_fine, figure, percent

Runs = Sequence[Mapping[str, Any]]
"""Runs as `evaluation.Run.as_json` gives them."""

SHOWN_FEATURES = 6
"""Per level, of those that its choice hangs on."""

TABLES = "a table knows states as a whole, not by their features"
"""Why features tell nothing of its choices."""


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What a policy learned; shows itself as text, in notebooks as HTML.

    Attributes:
        words: sentences.
        paths: a record per task: task, split, start, metric, cost, stages, replicas, alike (how
            many replica seeds decided like the one shown), steps (level, operation, metric, next).
        level_map: `steps` (1, 2, ...) and per level the share of runs in which it acts at that
            step, with its most frequent operation; `ended`: share of runs that had ended.
        drivers: per level the features that its choice hangs on (see `attribution.drivers`), the
            first few.
    """

    words: list[str]
    paths: list[dict[str, Any]]
    level_map: dict[str, Any]
    drivers: list[dict[str, Any]]

    def __str__(self) -> str:
        return "\n".join(self.words)

    def _repr_html_(self) -> str:
        from rlhf_ray.report.figures import explanation_html

        return explanation_html(self)


def explain(
    val_runs: Runs,
    test_runs: Runs,
    *,
    levels: Sequence[str],
    operations: Sequence[Mapping[str, Any]],
    horizon: int,
    metric: str,
    drivers: Sequence[Mapping[str, Any]] = (),
) -> Explanation:
    """Explains a policy by its roll-outs.

    Args:
        val_runs: on the val tasks.
        test_runs: on the test tasks; empty before the sweep's end.
        levels: names, input side first.
        operations: name and kind of each.
        horizon: stages of an episode at most.
        metric: its name.
        drivers: see `attribution.drivers`.
    """
    kinds = {str(operation["name"]): str(operation["kind"]) for operation in operations}
    paths = [*_paths(val_runs, "val", kinds), *_paths(test_runs, "test", kinds)]
    runs = [*val_runs, *test_runs]
    shown = [{**d, "features": d["features"] and d["features"][:SHOWN_FEATURES]} for d in drivers]
    words = [
        *_on_ways(runs, paths),
        *_on_the_whole(runs, horizon, kinds),
        *_by_path(paths, metric),
        *_on_drivers(shown),
    ]
    return Explanation(words=words, paths=paths, level_map=_level_map(runs, levels), drivers=shown)


# -- tables ----------------------------------------------------------------------------------------


def _paths(runs: Runs, split: str, kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    found = []
    for task in dict.fromkeys(run["task"] for run in runs):
        mine = [run for run in runs if run["task"] == task]
        decided = [_decisions(run) for run in mine]
        usual = Counter(decided).most_common(1)[0][0]
        first = mine[decided.index(usual)]
        found.append(
            {
                "task": task,
                "split": split,
                "start": first["start_metric"],
                "metric": first["val_metric"],
                "cost": first["cost"],
                "stages": first["stages"],
                "replicas": len(mine),
                "alike": decided.count(usual),
                "steps": compact_steps(first, kinds),
                "words": in_words(first, kinds),
            }
        )
    return found


def _decisions(run: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    return tuple((step["level"], step["operation"], step["next_level"]) for step in run["steps"])


def compact_steps(run: Mapping[str, Any], kinds: Mapping[str, str]) -> list[dict[str, Any]]:
    """A run's steps as the page shows them."""
    best = run["best_length"]
    stages, shown = 0, []
    for step in run["steps"]:
        stages += bool(step["levels"])
        shown.append(
            {
                "level": step["level"],
                "operation": step["operation"],
                "kind": kinds.get(step["operation"], "Train").lower(),
                "metric": step["metric"] if step["levels"] else None,
                "diverged": step["diverged"],
                "returned": bool(step["levels"]) and stages == best,
            }
        )
    return shown


def in_words(run: Mapping[str, Any], kinds: Mapping[str, str]) -> str:
    """A run's decisions as one phrase, repeats counted.

    >>> step = {"level": "conv", "operation": "train_mid", "levels": ["conv"]}
    >>> end = {"level": "dense", "operation": "stop", "levels": []}
    >>> in_words({"steps": [step, step, end]}, {"stop": "Stop"})
    'conv train_mid x2, then stop'
    """
    parts: list[tuple[str, int]] = []
    for step in run["steps"]:
        stop = kinds.get(step["operation"]) == "Stop"
        part = "stop" if stop else f"{step['level']} {step['operation']}"
        if parts and parts[-1][0] == part:
            parts[-1] = (part, parts[-1][1] + 1)
        else:
            parts.append((part, 1))
    phrases = [part if n == 1 else f"{part} x{n}" for part, n in parts] or ["nothing"]
    *before, last = phrases
    return f"{', '.join(before)}, then {last}" if before else last


def _level_map(runs: Runs, levels: Sequence[str]) -> dict[str, Any]:
    length = max((len(run["steps"]) for run in runs), default=0)
    rows, ended = [], []
    for level in levels:
        cells = []
        for i in range(length):
            used = [
                run["steps"][i]["operation"]
                for run in runs
                if len(run["steps"]) > i and run["steps"][i]["level"] == level
            ]
            top = Counter(used).most_common(1)
            cells.append({"share": len(used) / len(runs), "operation": top[0][0] if top else ""})
        rows.append({"level": level, "cells": cells})
    for i in range(length):
        ended.append(sum(len(run["steps"]) <= i for run in runs) / len(runs))
    return {"steps": list(range(1, length + 1)), "rows": rows, "ended": ended, "runs": len(runs)}


# -- words -----------------------------------------------------------------------------------------


def _on_ways(runs: Runs, paths: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether it does the same everywhere; a path is what most of a task's replica seeds did."""
    n, ways = len(paths), [_way(run) for run in runs]
    usual = {_way(path) for path in paths}
    if n < 2:
        return []
    if len(usual) > 1:
        distinct = len(set(ways))
        return [f"It goes {distinct} different ways on {n} tasks: what it does depends on them."]
    apart = sum(way not in usual for way in ways)
    if not apart:
        return [f"It does the same on all {n} tasks: a schedule, whatever the task looks like."]
    return [
        f"In {_share(len(runs) - apart, len(runs))} of its runs it does the same, whatever the "
        "task, but not in the others: what it does depends on what it sees there."
    ]


def _way(run: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    return tuple((step["level"], step["operation"]) for step in run["steps"])


def _on_the_whole(runs: Runs, horizon: int, kinds: Mapping[str, str]) -> list[str]:
    if not runs:
        return []
    stages = [run["stages"] for run in runs]
    stopped = sum(_stops(run, kinds) for run in runs)
    words = [
        f"It carries out {sum(stages) / len(runs):.1f} stages on average, of {horizon} at most; "
        f"in {_share(stopped, len(runs))} of its runs it stops by itself."
    ]
    used = Counter(
        (step["level"], step["operation"])
        for run in runs
        for step in run["steps"]
        if step["levels"]
    )
    if used:
        (level, operation), count = used.most_common(1)[0]
        most = f"{operation} at {level}'s turn"
        words.append(
            f"What it does most is {most} ({_share(count, sum(used.values()))} of all stages)."
            if len(used) > 1
            else f"All its stages are {most}."
        )
    wasted = sum(run["stages"] - run["best_length"] for run in runs)
    if wasted and sum(stages):
        words.append(
            f"{_share(wasted, sum(stages)).capitalize()} of its stages came after the model that "
            "it returns: they cost and brought nothing."
        )
    return words


def _stops(run: Mapping[str, Any], kinds: Mapping[str, str]) -> bool:
    return bool(run["steps"]) and kinds.get(run["steps"][-1]["operation"]) == "Stop"


def _by_path(paths: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """A sentence per way of going, the most frequent first."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for path in paths:
        groups.setdefault(path["words"], []).append(path)
    fine = {of: are_fine(path[of] for path in paths) for of in ("metric", "cost")}
    words = []
    for phrase, mine in sorted(groups.items(), key=lambda item: -len(item[1]))[:6]:
        name = family if len(mine) > 1 else str
        families = list(dict.fromkeys(name(path["task"]) for path in mine))
        named = ", ".join(families[:4]) + (f" and {len(families) - 4} more" * (len(families) > 4))
        tasks = f"{len(mine)} task" + "s" * (len(mine) > 1)
        start, end, cost = (
            sum(path[key] for path in mine) / len(mine) for key in ("start", "metric", "cost")
        )
        words.append(
            f"{named} ({tasks}): {phrase}; "
            f"val {metric} {figure(start, fine=fine['metric'])} to "
            f"{figure(end, fine=fine['metric'])} at cost {figure(cost, 2, fine['cost'])}."
        )
    if len(groups) > 6:
        words.append(f"{len(groups) - 6} more ways are in the table.")
    return words


def family(task: str) -> str:
    """What a task is called without its severities, which have decimals.

    >>> family("blur-0.58+permute-0.78"), family("blur-0.58-2"), family("sensor-8")
    ('blur+permute', 'blur', 'sensor-8')
    """
    return re.sub(r"-\d+\.\d+(-\d+)?(?=\+|$)", "", task) or task


def _on_drivers(drivers: Sequence[Mapping[str, Any]]) -> list[str]:
    words = []
    for driver in drivers:
        level, n, features = driver["level"], driver["decisions"], driver["features"]
        if n == 0:
            words.append(f"{level} never acts.")
        elif features is None:
            words.append(f"What {level}'s choice hangs on is not told: {TABLES}.")
        elif features:
            named = ", ".join(f"{f['name']} ({percent(f['changed'])})" for f in features[:3])
            words.append(f"{level}'s choice hangs most on {named}.")
        elif n > 1:
            words.append(f"No single feature would change {level}'s choice.")
        else:
            words.append(f"{level} acted once only: what its choice hangs on cannot be told.")
    return words


def _share(part: int, whole: int) -> str:
    if part in (0, whole):
        return "all" if part else "none"
    return percent(part / whole).replace("<", "less than ").replace(">", "more than ")
