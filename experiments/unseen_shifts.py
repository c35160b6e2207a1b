"""E1: does a learned policy fine-tune tasks of unseen families better and cheaper than schedules?

    python experiments/unseen_shifts.py --storage-path e1 --data-root data

Cross-validation over families: in every fold the test tasks come from a group of families of their
own (three folds; each group is the tested one once), the train and val tasks from all others. Per
fold and seed a trial learns on the train tasks; its policy meets the test tasks on the replica seed
of the same number. Baselines choose on the train and val tasks and meet the test tasks on the same
replica seeds. Differences are paired by task and seed, averaged over seeds, with Student's interval
over tasks. Every cost counts: training, evaluations, probes, and of those that search on the test
task all that they tried. Goes on where it was cut off; writes unseen_shifts.md and
figures/unseen_shifts.svg of the complete folds of `--suites`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cells import N_TASKS, Cell, as_json, cell, kept, made_by, same_settings
from unseen_table import SCHEDULE, report

import rlhf_ray as rr
from rlhf_ray.evaluation.baselines import baselines_for
from rlhf_ray.evaluation.judging import Run, compare
from rlhf_ray.evaluation.rollouts import Episode, walk
from rlhf_ray.evaluation.running import choose_and_play
from rlhf_ray.operations import Train
from rlhf_ray.outcomes import StageStep

BASELINES = (
    "lp_ft", "gradual_last_first", "gradual_first_last", "auto_rgn", "l2_sp", "asha", "tpe",
    *(f"level:{name}" for name in ("conv1", "conv2", "dense", "head")),
)  # fmt: skip
SEARCH_STAGES, GUIDED_STAGES = 10, 5
"""Of `asha` and `tpe` on a test task; of the policy's own search beyond its up to five stages."""

CURVE = 10
"""Stages of full fine-tuning that are drawn."""


def learn_and_test(here: Cell, folder: Path, seed: int) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        began = time.monotonic()
        learned = here.learn(seed)
        return {
            "runs": {
                "policy": as_json(here.test(learned, seed, "policy")),
                "policy_search": as_json(here.test(learned, seed, "policy_search", GUIDED_STAGES)),
                SCHEDULE: as_json(here.test_schedule(learned, seed, SCHEDULE)),
            },
            "values": learned.policy.metadata["values"],
            "distinct": learned.distinct,
            "cost": learned.cost,
            "wall_s": time.monotonic() - began,
        }

    return kept(folder / f"seed{seed}.json", make, {"guided_stages": GUIDED_STAGES})


def schedules(
    here: Cell, folder: Path, seeds: int, max_stages: int, names: Sequence[str]
) -> dict[str, Any]:
    """The baselines asked for; those that a record has besides stay in it."""
    file = folder / f"baselines-{seeds}.json"
    there = tuple(json.loads(file.read_text())["runs"]) if file.exists() else ()
    asked = baselines_for(names, tuple(here.suite.levels)) if "all" in names else names

    def make() -> dict[str, Any]:
        context, stages, suite = here.context(here.config(0)), here.stages(), here.suite
        found = choose_and_play(
            context.spec,
            stages,
            train_tasks=[task.name for task in suite.train_tasks],
            val_tasks=[task.name for task in suite.val_tasks],
            test_tasks=[task.name for task in suite.test_tasks],
            names=[*names, *there],
            replicas=range(seeds),
            utility=context.utility,
            max_stages=max_stages,
            search_stages=SEARCH_STAGES,
            progress=lambda line: print(f"  {line}", flush=True),
        )
        curve = full_curve(here, found.settings["full_best"]["learning_rate"])
        return {
            "runs": {name: as_json(runs) for name, runs in found.runs.items()},
            "settings": {name: dict(settings) for name, settings in found.settings.items()},
            "curve": {name: as_json(runs) for name, runs in curve.items()},
        }

    made_with = {"max_stages": max_stages, "search_stages": SEARCH_STAGES, "curve": CURVE}
    return kept(file, make, made_with, enough=lambda found: set(asked) <= set(found["runs"]))


def full_curve(here: Cell, learning_rate: float) -> dict[str, list[Run]]:
    """Full fine-tuning of 1 to `CURVE` stages, on the first replica seed."""
    context, stages = here.context(here.config(0)), here.stages()
    spec = replace(
        context.spec,
        probed=False,
        settings=replace(context.spec.settings, horizon=CURVE),
    )
    train = next(op for op in spec.operations if isinstance(op, Train))
    operation = replace(train, name=f"train at {learning_rate:g}", learning_rate=learning_rate)
    step = StageStep(operation=operation, levels=tuple(range(spec.n_levels)))

    def player(task: str, replica: int, n: int) -> Episode:
        return walk(spec, stages, task, replica, (step,) * n)[-1]

    return compare(
        {str(n): lambda task, r, n=n: player(task, r, n) for n in range(1, CURVE + 1)},
        spec,
        stages,
        tasks=[task.name for task in here.suite.test_tasks],
        replicas=[0],
        utility=context.utility,
    )


def run(args: argparse.Namespace, name: str, fold: int) -> None:
    storage = f"{args.storage_path}/{name}"
    suite = rr.load_suite(
        name, fold=fold, data_root=args.data_root, storage_path=storage, **N_TASKS
    )
    folder = Path(storage, "records", f"fold{fold}")
    with cell(suite, storage) as here:
        same_settings(here, folder.parent)
        learned: list[Mapping[str, Any]] = []
        for seed in range(args.seeds):
            learned.append(learn_and_test(here, folder, seed))
            utility = statistics.mean(run["utility"] for run in learned[-1]["runs"]["policy"])
            print(f"{suite.name} seed {seed}: utility {utility:.4f}", flush=True)
        distinct = round(statistics.mean(record["distinct"] for record in learned))
        schedules(here, folder, args.seeds, distinct, args.baselines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--suites", nargs="+", default=["mnist-4", "fashion-mnist-4"])
    parser.add_argument("--folds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--baselines", nargs="+", default=BASELINES, help="besides the usual ones")
    parser.add_argument("--storage-path", default="e1", help="what is done is kept here")
    parser.add_argument("--data-root", help="torchvision's layout; else RLHF_RAY_DATA, else ./data")
    parser.add_argument("--report-only", action="store_true", help="carry out nothing")
    args = parser.parse_args()
    if not args.report_only:
        for name in args.suites:
            for fold in args.folds:
                run(args, name, fold)
    print(report(args.storage_path, args.suites, made_by("unseen_shifts.py")))


if __name__ == "__main__":
    main()
