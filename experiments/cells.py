"""A cell of the experiments on unseen tasks: a suite and a fold, its workers, what is learned.

A fold's test tasks come from families of shifts that its train and val tasks have not. All that a
cell carries out lies in the tree under its storage path: what was cut off goes on where it was.
"""

import json
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import rlhf_ray as rr
from rlhf_ray.config import with_defaults
from rlhf_ray.engine.stages import Engine
from rlhf_ray.evaluation.judging import Run, compare
from rlhf_ray.evaluation.rollouts import Stages
from rlhf_ray.policies.searching import guided
from rlhf_ray.progress import NO_PROGRESS
from rlhf_ray.ray_session import running_ray, stage_workers
from rlhf_ray.storage import open_storage
from rlhf_ray.sweep.results import trial_folder
from rlhf_ray.sweep.scheduling import schedule_tally, scheduled
from rlhf_ray.sweep.search import prepare, trial_context
from rlhf_ray.sweep.trial import TrialContext
from rlhf_ray.sweep.tuning import run_trials
from rlhf_ray.tree.pool import StagesHandle
from rlhf_ray.tree.store import TreeStore
from rlhf_ray.tree.tally import TalliedStages, Tally

SWEPT = {
    "gamma": (0.99,),
    "epsilon": (0.1,),
    "tuning_cost_weight": (0.02,),
    "switch_cost_weight": (0.002,),
}
"""One trial per seed, whose reward weighs costs as the utility does."""

N_TASKS: dict[str, Any] = {"n_train_tasks": 24, "n_val_tasks": 6, "n_test_tasks": 12}
"""Of a fold."""


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What a sweep gave.

    Attributes:
        policy: of the best trial on the val tasks.
        context: of the sweep.
        distinct: stages that its schedule and its trials asked for, each once.
        cost: of these in full stages.
    """

    policy: rr.Policy
    context: TrialContext
    distinct: int
    cost: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A suite with its workers running."""

    suite: rr.Suite
    storage_path: str
    handle: StagesHandle

    def config(self, seed: int, **changes: Any) -> rr.SearchConfig:
        """Of a sweep: the package's defaults but for `SWEPT`, and judged on one replica seed.

        It has no name: its folder is named for what it is, so that no other settings meet it.
        """
        fields = {**SWEPT, "judge_replicas": 1, "cache_gb": 1.0, **changes}
        config = rr.SearchConfig(seed=seed, storage_path=self.storage_path, **fields)
        return with_defaults(config, self.suite.defaults)

    def context(self, config: rr.SearchConfig) -> TrialContext:
        """What the trials of a sweep share."""
        storage = open_storage(config.storage_path, check=True)
        engine = Engine(self.suite, config.engine_settings())
        return trial_context(storage, prepare(self.suite, config), engine, self.handle.stages)

    def learn(self, seed: int, **changes: Any) -> Learned:
        """A sweep on the train tasks, judged on the val tasks."""
        config = self.config(seed, **changes)
        ground, context = prepare(self.suite, config), scheduled(self.context(config))
        run_trials(context, ground.trials, self.handle, ends=None, progress=NO_PROGRESS)
        folders = [trial_folder(ground.name, trial.name) for trial in ground.trials]
        records: Any = [context.storage.read_json(f"{folder}/trial.json") for folder in folders]
        errors = [record["error"] for record in records if record["status"] != "done"]
        if errors:
            raise SystemExit(f"trials of {ground.name} failed: {errors}")
        best = max(range(len(records)), key=lambda i: records[i]["judged"]["utility"])
        trials = [Tally.from_json(record["stages"]) for record in records]
        tally = Tally.total([schedule_tally(context.storage, ground.name), *trials])
        store = TreeStore(context.storage)
        outcomes = [store.get(key) for key in sorted(tally.keys)]
        return Learned(
            policy=rr.Policy.read(context.storage, f"{folders[best]}/policy"),
            context=context,
            distinct=tally.distinct,
            cost=sum(context.spec.cost(outcome) for outcome in outcomes if outcome),
        )

    def stages(self) -> Stages:
        """The workers' answers."""
        return TalliedStages(self.handle.stages, Tally(), namespace="experiment")

    def test(self, learned: Learned, replica: int, method: str, n_stages: int = 0) -> list[Run]:
        """A policy on the test tasks; its values guide a search of `n_stages` beyond its own."""
        context, stages = learned.context, self.stages()
        player = guided(learned.policy, context.spec, context.observer, stages, n_stages)
        runs = compare(
            {method: player},
            context.spec,
            stages,
            tasks=[task.name for task in self.suite.test_tasks],
            replicas=[replica],
            utility=context.utility,
        )
        return runs[method]

    def test_schedule(self, learned: Learned, replica: int, method: str) -> list[Run]:
        """The schedule that a policy starts from, followed on the test tasks without a look."""
        faithful = replace(learned, policy=learned.policy.faithful())
        return self.test(faithful, replica, method)


@contextmanager
def cell(suite: rr.Suite, storage_path: str) -> Iterator[Cell]:
    """Starts Ray and the workers, and ends them."""
    config = rr.SearchConfig(storage_path=storage_path, cache_gb=1.0)
    with running_ray(config), stage_workers(suite, config) as handle:
        yield Cell(suite=suite, storage_path=storage_path, handle=handle)


def kept(
    file: Path,
    make: Callable[[], Any],
    made_with: Mapping[str, Any] | None = None,
    *,
    enough: Callable[[Any], bool] = lambda found: True,
) -> Any:
    """The file's JSON; made, and written, where it is not there or will not do.

    Args:
        file: of the record.
        make: gives it.
        made_with: plain data that the record, then a mapping, follows from. One that says nothing
            of it, as earlier ones do, is taken as it is.
        enough: whether a record holds all that is asked for.
    """
    now = json.loads(json.dumps(made_with))
    if file.exists():
        found = json.loads(file.read_text())
        before = found.get("made_with", now) if isinstance(found, dict) else now
        if (made_with is None or before == now) and enough(found):
            return found
        print(f"{file} holds other settings, or less: it is made anew", flush=True)
    data = make() if made_with is None else {**make(), "made_with": now}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(data))
    part.rename(file)
    return json.loads(file.read_text())


def same_settings(here: Cell, folder: Path) -> None:
    """Holds the settings against those that a folder's records were made with."""
    settings = {**asdict(here.config(0)), "storage_path": ""}
    now = json.loads(json.dumps(settings, default=str))
    if kept(folder / "settings.json", lambda: now) != now:
        raise SystemExit(f"{folder} holds records of other settings: give another --storage-path")


def made_by(script: str) -> str:
    """What stands below a table."""
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "ray"))
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    return f"Made by {script} ({machine}, {versions})."


def as_json(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Runs as plain data, without their steps."""
    return [{**run.as_json(), "steps": ()} for run in runs]


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table; the first row is its head."""
    ruled = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ruled)
