"""What a policy's quality on unseen tasks depends on: features, tasks, controller, cost weights.

    python experiments/learning_variants.py --storage-path e1 --data-root data

On one suite and fold, the storage and the protocol of `unseen_shifts.py`. Every variant changes one
thing; its policies (one per seed) meet the test tasks, and their utility is compared with the
default's, paired by task and seed, with Student's interval over tasks. Learned and compared by cost
weights with which the best way differs from task to task (`DEAR`): with those of `unseen_shifts.py`
policies keep to their schedule, whatever they see. The features' price is in the utility: who does
not look at the probes does not pay for them. Goes on where it was cut off; writes
learning_variants.md.
"""

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cells import N_TASKS, Cell, as_json, cell, kept, made_by, markdown, same_settings
from scipy import stats

import rlhf_ray as rr
from rlhf_ray.evaluation.judging import Run, Utility, known, mean
from rlhf_ray.evaluation.statistics import paired_difference
from rlhf_ray.outcomes import StageRequest
from rlhf_ray.policies.observations import FEATURE_GROUPS

DEFAULT, ALONE = "default", "its schedule alone, no policy"
DEAR = {"tuning_cost": 0.03, "switch_cost": 0.02}
"""Weights of the rewards, and of the utility that variants are compared by."""

N_TRAIN_TASKS = (6, 12, 48)
SWITCH_WEIGHTS, TUNING_WEIGHTS = (0.0, 0.005, 0.02, 0.08), (0.0, 0.03, 0.1, 0.3)

VARIANTS: dict[str, dict[str, Any]] = {
    DEFAULT: {},
    ALONE: {},
    "without a schedule": {"schedule": False},
    "without `refit`": {
        "only_operations": tuple(o.name for o in rr.default_operations() if o.name != "refit")
    },
    **{
        f"without the features of {group}": {
            "observation": tuple(name for name in FEATURE_GROUPS if name != group)
        }
        for group in FEATURE_GROUPS
        if group not in ("level", "progress")  # what a policy with a schedule must see
    },
    "the task's figures and progress alone": {"observation": ("level", "progress", "figures")},
    "one policy for all levels": {"controller": "single"},
    "nothing implied by stages": {"counterfactuals": False},
}
PARTS = ("variants", "tasks", "weights")
"""What can be run by itself."""

WEIGHTS: dict[str, dict[str, Any]] = {
    **{
        f"switch-cost weight {weight}": {
            "switch_cost_weight": (weight,),
            "tuning_cost_weight": (DEAR["tuning_cost"],),
        }
        for weight in SWITCH_WEIGHTS
    },
    **{
        f"tuning-cost weight {weight}": {
            "tuning_cost_weight": (weight,),
            "switch_cost_weight": (DEAR["switch_cost"],),
        }
        for weight in TUNING_WEIGHTS
    },
}


def tested(here: Cell, folder: Path, name: str, changes: Mapping[str, Any], seed: int) -> list[Run]:
    """A variant's policy of one seed on the test tasks."""

    def make() -> dict[str, Any]:
        learned = here.learn(seed, **changes)
        test = here.test_schedule if name == ALONE else here.test
        return {"runs": as_json(test(learned, seed, name))}

    words = "".join(c if c.isalnum() or c == "." else "-" for c in name)
    found = kept(folder / words / f"seed{seed}.json", make, {"changes": dict(changes)})
    runs = found if isinstance(found, list) else found["runs"]  # earlier records are bare lists
    return [Run.from_json(run) for run in runs]


def by_dear(runs: Sequence[Run]) -> list[Run]:
    """The same, with the utility of `DEAR`."""
    utility = Utility(**DEAR)
    return [
        replace(run, utility=utility.of(known(run.test_metric), run.cost, run.switches))
        for run in runs
    ]


def table(found: Mapping[str, list[Run]]) -> str:
    """A row per variant, the default first; utility by `DEAR`."""
    rows: list[Sequence[str]] = [
        ("variant", "accuracy", "cost", "switches", "utility", "against the default, points")
    ]
    for name, runs in found.items():
        difference = paired_difference(runs, found[DEFAULT])
        low, high = 100 * difference.low, 100 * difference.high
        against = f"{100 * difference.mean:+.2f} ({low:+.2f} to {high:+.2f})"
        rows.append((name, *figures(runs), "-" if name == DEFAULT else against))
    return markdown(rows)


def figures(runs: Sequence[Run]) -> tuple[str, str, str, str]:
    return (
        f"{mean([known(run.test_metric) for run in runs]):.4f}",
        f"{mean([run.cost for run in runs]):.3f}",
        f"{mean([run.switches for run in runs]):.2f}",
        f"{mean([known(run.utility) for run in runs]):.4f}",
    )


def weights_table(found: Mapping[str, list[Run]]) -> str:
    """Switches and cost by weight, with intervals over seeds of their means over tasks."""
    rows: list[Sequence[str]] = [("weight", "switches", "cost", "accuracy", "utility")]
    for name, runs in found.items():
        accuracy, _, _, utility = figures(runs)
        switches, cost = (
            over_seeds(runs, lambda run: run.switches),
            over_seeds(runs, lambda run: run.cost),
        )
        rows.append((name, switches, cost, accuracy, utility))
    return markdown(rows)


def over_seeds(runs: Sequence[Run], figure: Callable[[Run], float]) -> str:
    """Mean with Student's 95% interval over seeds."""
    seeds = sorted({run.replica for run in runs})
    means = [mean([figure(run) for run in runs if run.replica == seed]) for seed in seeds]
    half = float(stats.t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / len(means) ** 0.5)
    return f"{statistics.mean(means):.3f} +- {half:.3f}"


def price_of_probes(here: Cell) -> str:
    """What the probes of the start cost, of a test task's start outcome."""
    context, stages = here.context(here.config(0)), here.stages()
    starts = [
        stages.outcome(StageRequest(task=task.name, path=())).outcome
        for task in here.suite.test_tasks
    ]
    probe = mean([start.flops["probe"] for start in starts]) / context.spec.reference_flops
    seconds = statistics.median(start.time_s for start in starts)
    return (
        f"The probes cost {probe:.3f} full stages per task; the start with them (evaluation, "
        f"gradients, activations) takes {1000 * seconds:.0f} ms. All other features come with "
        "evaluations that decisions need anyway."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suite", default="mnist-4")
    parser.add_argument("--fold", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS)
    parser.add_argument("--storage-path", default="e1", help="what is done is kept here")
    parser.add_argument("--data-root", help="torchvision's layout; else RLHF_RAY_DATA, else ./data")
    args = parser.parse_args()
    if args.seeds < 2:
        parser.error(f"--seeds must be at least 2, for intervals, got {args.seeds}.")
    storage = f"{args.storage_path}/{args.suite}"
    folder = Path(storage, "records", f"variants-fold{args.fold}")

    def suite(n_train_tasks: int = N_TASKS["n_train_tasks"]) -> rr.Suite:
        n_tasks = {**N_TASKS, "n_train_tasks": n_train_tasks}
        return rr.load_suite(
            args.suite, fold=args.fold, data_root=args.data_root, storage_path=storage, **n_tasks
        )

    dear = {f"{name}_weight": (weight,) for name, weight in DEAR.items()}

    def all_seeds(here: Cell, name: str, changes: Mapping[str, Any]) -> list[Run]:
        runs = [
            run for seed in range(args.seeds) for run in tested(here, folder, name, changes, seed)
        ]
        print(name, *figures(runs), flush=True)
        return runs

    variants: dict[str, list[Run]] = {}
    parts: list[str] = []
    with cell(suite(), storage) as here:
        same_settings(here, folder)
        if {"variants", "tasks"} & {*args.parts}:
            wanted = VARIANTS if "variants" in args.parts else {DEFAULT: {}}
            variants |= {
                name: by_dear(all_seeds(here, name, {**dear, **what}))
                for name, what in wanted.items()
            }
        if "weights" in args.parts:
            weights = {name: all_seeds(here, name, what) for name, what in WEIGHTS.items()}
            parts += [weights_table(weights), "With Student's 95% interval over seeds."]
        probes = price_of_probes(here)
    for n in N_TRAIN_TASKS if "tasks" in args.parts else ():
        with cell(suite(n), storage) as here:
            variants[f"{n} train tasks instead of {N_TASKS['n_train_tasks']}"] = by_dear(
                all_seeds(here, f"{n} train tasks", dear)
            )
    if variants:
        weighed = "Utility, and reward, with weights of {tuning_cost} and {switch_cost}."
        parts[:0] = [table(variants), weighed.format(**DEAR)]
    parts.append(
        f"Means over {N_TASKS['n_test_tasks']} unseen tasks of {args.suite}, fold {args.fold}, "
        f"{args.seeds} seeds. {probes}"
    )
    text = "\n\n".join([*parts, made_by("learning_variants.py")])
    Path(__file__).with_suffix(".md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
