"""The README's run on five suites: what the policy gains there, and how far the figures move.

    python experiments/default_runs.py --storage-path RUNS

`python -m rlhf_ray.launch` with default flags and the suite seeds 0 to 4: each has other images in
its pools, another pretrained network and other tasks. Means over the five, differences of utility
with Student's interval over them. Sweeps that are there are not run again; writes default_runs.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from scipy import stats

SUITE_SEEDS = range(5)
METHODS = ("policy", "fixed", "head", "full", "full_best", "random")


def summary(suite_seed: int, storage_path: str) -> dict[str, Any]:
    """What the run on a suite seed found."""
    command = [sys.executable, "-m", "rlhf_ray.launch", "--json"]
    command += ["--suite-seed", str(suite_seed), "--storage-path", storage_path]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def interval(values: list[float]) -> tuple[float, float, float]:
    """Mean and 95% interval, times 100."""
    mean = statistics.mean(values)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values)
    half /= len(values) ** 0.5
    return 100 * mean, 100 * (mean - half), 100 * (mean + half)


def table(found: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| method | accuracy | cost | utility | rank | policy minus it | 95% interval | each |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for method in METHODS:
        figures = [one["methods"][method] for one in found]
        means = [
            statistics.mean(f[name] for f in figures)
            for name in ("metric_mean", "cost_mean", "utility_mean", "rank_mean")
        ]
        accuracy, cost, utility, rank = means
        line = f"| {method} | {accuracy:.3f} | {cost:.2f} | {utility:.3f} | {rank:.1f} |"
        if method == "policy":
            lines.append(f"{line} | | |")
            continue
        gains = [one["policy_minus"][method]["mean"] for one in found]
        mean, low, high = interval(gains)
        each = ", ".join(f"{100 * gain:+.1f}" for gain in gains)
        lines.append(f"{line} {mean:+.1f} | {low:+.1f} to {high:+.1f} | {each} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--storage-path", required=True)
    storage_path = parser.parse_args().storage_path
    found = [summary(seed, storage_path) for seed in SUITE_SEEDS]
    seconds = [one["wall_s"] for one in found]
    counts = Counter(
        ", ".join(f"{move['operation']}@{move['level']}" for move in one["schedule"])
        for one in found
    )
    schedules = "; ".join(f"{words} ({count} of {len(found)})" for words, count in counts.items())
    text = [
        f"`python -m rlhf_ray.launch`, suite seeds {SUITE_SEEDS.start} to {SUITE_SEEDS.stop - 1}, "
        f"eight test tasks each; differences in hundredths of utility. {os.cpu_count()} cores of "
        f"{platform.machine()}, torch {torch.__version__}; a search took "
        f"{min(seconds) / 60:.0f} to {max(seconds) / 60:.0f} minutes, with other work beside it.",
        "",
        *table(found),
        "",
        f"Schedules that policies start from: {schedules}.",
    ]
    Path(__file__).with_suffix(".md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
