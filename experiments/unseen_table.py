"""The table and the figure of `unseen_shifts.py`, from its records."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cells import markdown
from curves import Curve, drawn

from rlhf_ray.evaluation.judging import Run, known
from rlhf_ray.evaluation.statistics import PairedDifference, paired_difference, summarise

HINDSIGHT = "best_single_level"
"""Per task and seed the best of the single levels by test utility."""

SEARCHING = ("policy_search", "asha", "tpe")
"""They search on the test task itself."""

SCHEDULE = "schedule"
"""What the policy starts from, followed without it (and without probes): a part of it, unranked."""

TWICE = "level:head"
"""The same as `head`: it is ranked once."""

COLUMNS = (
    "method", "accuracy", "cost", "switches", "utility", "rank", "utility: policy minus it",
    "worst task",
)  # fmt: skip

NOT_BLIND = (
    "The operations were developed on other tasks of the same families, and seeds of fold 1 of "
    "`mnist-4` met these test tasks under earlier rules for schedules and departures (LOG.md)."
)
"""What a reader of the table should know."""

HERE = Path(__file__).parent
Runs = dict[str, list[Run]]


def report(storage_path: str, suites: Sequence[str], made_by: str) -> str:
    """Writes the table and the figure of all folds that are complete; gives the text."""
    parts, curves = [], {}
    for suite in suites:
        folds = complete_folds(Path(storage_path, suite, "records"))
        if folds:
            parts.append(suite_section(suite, folds))
            curves[suite] = cost_curves(folds)
    if not parts:  # nothing is overwritten by nothing
        raise SystemExit(f"no fold of {suites} is complete under {storage_path!r}")
    text = "\n\n".join([*parts, made_by, NOT_BLIND]) + "\n"
    (HERE / "unseen_shifts.md").write_text(text)
    figure = HERE / "figures" / "unseen_shifts.svg"
    figure.write_text(drawn(curves, "tuning cost, full stages", "accuracy on unseen tasks"))
    return text


def complete_folds(folder: Path) -> list[dict[str, Any]]:
    """Per fold its records, of as many seeds as its baselines met: "learned" and "baselines"."""
    found = []
    for fold in sorted(folder.glob("fold*")):
        numbers = [int(file.stem.split("-")[1]) for file in fold.glob("baselines-*.json")]
        seeds = max(numbers, default=0)
        files = [fold / f"seed{seed}.json" for seed in range(seeds)]
        if files and all(file.exists() for file in files):
            found.append(
                {
                    "learned": [json.loads(file.read_text()) for file in files],
                    "baselines": json.loads((fold / f"baselines-{seeds}.json").read_text()),
                    "name": fold.name,
                }
            )
    return found


def all_runs(folds: Sequence[Mapping[str, Any]]) -> Runs:
    """Method -> runs of all folds; tasks are named for their fold."""
    runs: Runs = {}

    def add(method: str, fold: str, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            named = {**record, "method": method, "task": f"{fold}/{record['task']}"}
            runs.setdefault(method, []).append(Run.from_json(named))

    for fold in folds:
        for learned in fold["learned"]:
            for method, records in learned["runs"].items():
                add(method, fold["name"], records)
        for method, records in fold["baselines"]["runs"].items():
            add(method, fold["name"], records)
    return runs


def by_hindsight(runs: Runs) -> list[Run]:
    """The best single level per task and seed."""
    singles = [mine for method, mine in runs.items() if method.startswith("level:")]
    best: dict[tuple[str, int], Run] = {}
    for run in (run for mine in singles for run in mine):
        place = (run.task, run.replica)
        if place not in best or known(run.utility) > known(best[place].utility):
            best[place] = run
    return list(best.values())


def suite_section(suite: str, folds: Sequence[Mapping[str, Any]]) -> str:
    """Heading, table, and the targets of one suite."""
    runs = all_runs(folds)
    unranked = {*SEARCHING, SCHEDULE, TWICE}
    without_search = {name: mine for name, mine in runs.items() if name not in unranked}
    ranks = {name: f["rank_mean"] for name, f in summarise(without_search).items()}
    shown = {**runs, HINDSIGHT: by_hindsight(runs)}
    figures = summarise(shown)
    rows: list[Sequence[str]] = [COLUMNS]
    for method in sorted(figures, key=lambda name: -figures[name]["utility_mean"]):
        row, difference = figures[method], paired_difference(shown["policy"], shown[method])
        rows.append(
            (
                method,
                f"{row['metric_mean']:.4f}",
                f"{row['cost_mean']:.3f}",
                f"{row['switches_mean']:.2f}",
                f"{row['utility_mean']:.4f}",
                f"{ranks[method]:.2f}" if method in ranks else "-",
                "-" if method == "policy" else points(difference),
                "-" if method == "policy" else f"{100 * difference.worst:+.1f}",
            )
        )
    n_tasks = len({run.task for run in runs["policy"]})
    seeds = len({run.replica for run in runs["policy"]})
    return "\n\n".join(
        [
            f"## {suite}: {n_tasks} unseen tasks, {len(folds)} folds, {seeds} seeds",
            markdown(rows),
            "Differences in points of utility with their 95% interval over tasks; the worst task "
            "is the policy's against the method. Ranks are among those that search nothing on the "
            "new task and know nothing by hindsight. `schedule` is what the policy starts from, "
            "followed without it.",
            "\n".join(targets(folds, shown, figures, ranks)),
        ]
    )


def targets(
    folds: Sequence[Mapping[str, Any]],
    runs: Runs,
    figures: Mapping[str, Mapping[str, float]],
    ranks: Mapping[str, float],
) -> list[str]:
    """What was aimed at, what came out, and whether it was met."""
    accuracy = paired_difference(runs["policy"], runs["full_best"], lambda run: run.test_metric)
    share = figures["policy"]["cost_mean"] / figures["full_best"]["cost_mean"]
    fixed = paired_difference(runs["policy"], runs["fixed"])
    hindsight = paired_difference(runs["policy"], runs[HINDSIGHT])
    best = min(ranks, key=lambda name: ranks[name])
    lines = [
        _target("accuracy within 1 point of full_best at no more than 15% of its cost",
                f"{points(accuracy)} at {share:.1%}", accuracy.mean >= -0.01 and share <= 0.15),
        _target("utility 1 point above fixed, the interval above zero", points(fixed),
                fixed.mean >= 0.01 and fixed.low > 0),
        _target("within 1.5 points of the best single level by hindsight", points(hindsight),
                hindsight.mean >= -0.015),
        _target("the best mean rank", f"{ranks['policy']:.2f}, the best is {best}'s "
                f"{ranks[best]:.2f}", best == "policy"),
        _target("no task more than 5 points below fixed", f"{100 * fixed.worst:+.1f}",
                fixed.worst >= -0.05),
    ]  # fmt: skip
    return [*lines, break_even(folds, runs)]


def break_even(folds: Sequence[Mapping[str, Any]], runs: Runs) -> str:
    """After how many tasks learning the policy has paid for itself, in cost."""
    learning = statistics.mean(learned["cost"] for fold in folds for learned in fold["learned"])
    cost = {name: statistics.mean(run.cost for run in mine) for name, mine in runs.items()}
    said = []
    for method in (name for name in ("full", "full_best", "asha", "tpe") if name in cost):
        saved = cost[method] - cost["policy"]
        tasks = f"{learning / saved:.0f} tasks" if saved > 0 else "never"
        said.append(f"{method} {tasks}")
    return (
        f"- Break-even: learning a policy costs {learning:.0f} full stages; it is repaid by lower "
        f"cost per task against {', '.join(said)}."
    )


def points(difference: PairedDifference) -> str:
    """In hundredths, with the interval."""
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.mean:+.2f} ({low:+.2f} to {high:+.2f})"


def _target(what: str, found: str, met: bool) -> str:
    return f"- {what}: {found}: **{'met' if met else 'missed'}**."


def cost_curves(folds: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Accuracy against cost: full fine-tuning by stages, and the methods as points."""
    lengths = sorted(folds[0]["baselines"]["curve"], key=int)

    def means(key: str) -> list[float]:
        return [
            statistics.mean(run[key] for fold in folds for run in fold["baselines"]["curve"][n])
            for n in lengths
        ]

    name = f"full fine-tuning, 1 to {lengths[-1]} stages"
    curves = {name: Curve(x=means("cost"), y=means("test_metric"))}
    for method, mine in all_runs(folds).items():
        if method in ("policy", "policy_search", "fixed", "full_best", "asha", "tpe"):
            curves[method] = Curve(
                x=[statistics.mean(run.cost for run in mine)],
                y=[statistics.mean(known(run.test_metric) for run in mine)],
            )
    return curves
