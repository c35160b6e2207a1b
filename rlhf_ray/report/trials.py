"""What the page needs of a trial: its digest once it has ended, a place-holder before."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_ray.report.explain import in_words

CURVE_POINTS = 48
"""Of a learning curve at most."""

SMOOTHED = 16
"""Episodes that a point of a learning curve is the mean of, at most."""


def unfinished(planned: Mapping[str, Any], running: Mapping[str, Any] | None) -> dict[str, Any]:
    """A trial without figures yet; `running` is what the driver knows of one that runs."""
    blank = dict.fromkeys(("metric", "cost", "switches", "utility", "wall_s", "error", "others"))
    curve = (running or {}).get("curve", [])
    return {
        "name": planned["name"],
        "values": planned["values"],
        "status": "waiting" if running is None else "running",
        "episodes": curve[-1][0] if curve else 0,
        "curve": thinned(curve),
        **blank,
    }


def digest_of(record: Mapping[str, Any], sweep: Mapping[str, Any]) -> dict[str, Any]:
    """What the page needs of a trial that has ended."""
    judged, episodes = record.get("judged") or {}, record.get("curve", [])
    stages = record.get("stages") or {}
    kinds = {str(o["name"]): str(o["kind"]) for o in sweep.get("operations", [])}
    return {
        "name": record["name"],
        "values": record["values"],
        "status": record["status"],
        "error": record.get("error"),
        **{name: judged.get(name) for name in ("metric", "cost", "switches", "utility")},
        "wall_s": record.get("wall_s"),
        "others": record.get("experience", {}).get("episodes"),
        "episodes": len(episodes),
        "curve": smoothed([episode["return"] for episode in episodes]),
        "stages": {k: stages.get(k, 0) for k in ("logical", "executed", "logical_s", "spent_s")},
        "keys": frozenset(key[:16] for key in stages.get("keys", [])),
        "paths": [path_of(run, kinds, record["name"]) for run in record.get("runs", [])],
    }


def smoothed(values: Sequence[float]) -> list[list[float]]:
    """Moving means as at most `CURVE_POINTS` pairs (episodes played, mean of the last ones)."""
    window = max(1, min(SMOOTHED, len(values) // 4))
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    pairs = [
        [n, float(f"{(sums[n] - sums[n - window]) / window:.5g}")]
        for n in range(window, len(values) + 1)
    ]
    return thinned(pairs)


def thinned(pairs: Sequence[list[float]]) -> list[list[float]]:
    """Of many points some, the last one among them."""
    every = math.ceil(len(pairs) / CURVE_POINTS) or 1
    return list(pairs[::-1][::every][::-1])


def path_of(run: Mapping[str, Any], kinds: Mapping[str, str], who: str) -> dict[str, Any]:
    """How one roll-out went, and whose it is."""
    return {
        "task": run["task"],
        "by": who,
        "metric": run["val_metric"],
        "cost": run["cost"],
        "utility": run["val_utility"],
        "words": in_words(run, kinds),
    }
