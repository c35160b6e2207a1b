"""What the tree of stages saves: a sweep of 16 trials with sharing off, on, and on a warm tree.

    python experiments/sweep_sharing.py --suite digits

Four sweeps on one suite, one after the other on the same machine: every trial carries out its own
stages (`--no-share`); all share an empty tree; the same again on the tree that this left; and a
sweep with other values of gamma, epsilon and both weights on that tree. Trials that share nothing
do not depend on one another: of the first sweep `--off-trials` are run, and its stages and seconds
are theirs, times 16 / so many, and those of the schedule that all trials start from, which is tuned
once either way. The schedule, training and judging count, not the comparison with baselines that
`search` makes afterwards. Worker seconds are what the workers measured around each stage. Writes
sweep_sharing.md, and fails if sharing changed a trial's figures.
"""

import argparse
import dataclasses
import platform
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import rlhf_ray as rr
from rlhf_ray.engine.stages import Engine
from rlhf_ray.progress import NO_PROGRESS
from rlhf_ray.ray_session import running_ray, stage_workers
from rlhf_ray.storage import open_storage
from rlhf_ray.sweep.results import trial_folder
from rlhf_ray.sweep.scheduling import schedule_tally, scheduled
from rlhf_ray.sweep.search import prepare, trial_context
from rlhf_ray.sweep.tuning import run_trials
from rlhf_ray.tree.tally import Tally

VALUES = {
    "gamma": (0.9, 0.99),
    "epsilon": (0.05, 0.15),
    "tuning_cost_weight": (0.05, 0.1),
    "switch_cost_weight": (0.005, 0.01),
}
OTHER_VALUES = {
    "gamma": (0.85, 0.95),
    "epsilon": (0.02, 0.1),
    "tuning_cost_weight": (0.04, 0.07),
    "switch_cost_weight": (0.003, 0.007),
}
N_TRIALS = 16
COLUMNS = (
    "sweep", "stages asked for", "distinct", "carried out", "of those asked for", "worker s",
    "wall s", "worker time against off",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """A sweep's account.

    Attributes:
        schedule: of tuning the schedule, once for all trials.
        trials: of the trials that were run.
        schedule_s: seconds of wall time for the schedule.
        trials_s: and for the trials.
        n_trials: how many were run.
        judged: trial -> its figures.
    """

    schedule: Tally
    trials: Tally
    schedule_s: float
    trials_s: float
    n_trials: int
    judged: dict[str, dict[str, float]]


def run(suite: rr.Suite, config: rr.SearchConfig, n_trials: int | None = None) -> Measured:
    """The trials of a sweep, or some; their account is of schedule, training and judging."""
    ground = prepare(suite, config)
    trials = ground.trials[:: len(ground.trials) // (n_trials or len(ground.trials))]
    storage = open_storage(config.storage_path, check=True)
    with running_ray(config), stage_workers(suite, config) as handle:
        context = trial_context(
            storage, ground, Engine(suite, config.engine_settings()), handle.stages
        )
        began = time.monotonic()
        context = scheduled(context)
        tuned = time.monotonic()
        run_trials(context, trials, handle, ends=None, progress=NO_PROGRESS)
        ended = time.monotonic()
    names = [trial.name for trial in trials]
    records = [storage.read_json(f"{trial_folder(ground.name, name)}/trial.json") for name in names]
    return Measured(
        schedule=schedule_tally(storage, ground.name),
        trials=Tally.total(Tally.from_json(record["stages"]) for record in records),
        schedule_s=tuned - began,
        trials_s=ended - tuned,
        n_trials=len(trials),
        judged={name: record["judged"] for name, record in zip(names, records, strict=True)},
    )


def scaled(found: Measured, once: float, per_trial: float) -> float:
    """A figure of a sweep of all trials, from that of its schedule and of the trials run."""
    return once + N_TRIALS / found.n_trials * per_trial


def row(name: str, found: Measured, off: Measured) -> tuple[str, ...]:
    """A row of the table; of a sweep run in part scaled to the whole, but for distinct stages."""
    whole = found.n_trials == N_TRIALS
    logical = scaled(found, found.schedule.logical, found.trials.logical)
    executed = scaled(found, found.schedule.executed, found.trials.executed)
    spent_s = scaled(found, found.schedule.spent_s, found.trials.spent_s)
    off_s = scaled(off, off.schedule.spent_s, off.trials.spent_s)
    distinct = Tally.total([found.schedule, found.trials]).distinct
    return (
        name if whole else f"{name} ({found.n_trials} trials, scaled)",
        f"{logical:,.0f}",
        f"{distinct:,}" if whole else "-",  # trials have stages in common
        f"{executed:,.0f}",
        f"{executed / logical:.1%}",
        f"{spent_s:.1f}",
        f"{scaled(found, found.schedule_s, found.trials_s):.0f}",
        "-" if found is off else f"{off_s / spent_s:.1f}x less" if spent_s else "nothing run",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="digits")
    parser.add_argument("--data-root")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--off-trials", type=int, default=4)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        suite = rr.load_suite(args.suite, storage_path=scratch, data_root=args.data_root)

        def config(name: str, folder: str, values: dict, share: bool = True) -> rr.SearchConfig:
            path = f"{scratch}/{folder}"
            return rr.SearchConfig(
                **values, name=name, storage_path=path, seed=args.seed, share=share
            )

        off = run(suite, config("off", "off", VALUES, share=False), args.off_trials)
        on = run(suite, config("on", "on", VALUES))
        again = run(suite, config("again", "on", VALUES))
        other = run(suite, config("other", "on", OTHER_VALUES))
    same = on.judged == again.judged and off.judged.items() <= on.judged.items()
    found = {"off": off, "on, empty tree": on, "the same again": again, "other values": other}
    rows = [COLUMNS, ("---",) * len(COLUMNS), *(row(name, m, off) for name, m in found.items())]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    machine = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "ray"))
    text = (
        f"{table}\n\nSuite {args.suite}, seed {args.seed}; {N_TRIALS} trials per sweep; "
        f"values {VALUES}, others {OTHER_VALUES}.\nTrials' figures with sharing off, on and warm: "
        f"{'equal' if same else 'NOT EQUAL'}.\nMade by sweep_sharing.py ({machine}, {versions}).\n"
    )
    Path(__file__).with_suffix(".md").write_text(text)
    sys.stdout.write(text)
    if not same:
        raise SystemExit("sharing changed the trials' figures")


if __name__ == "__main__":
    main()
