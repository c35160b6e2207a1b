"""`rr.search`: the sweep. Checks what is asked, lets Tune run the trials, compares, and sums up."""

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_ray.algorithms import check_overrides
from rlhf_ray.config import SearchConfig, check_observation, with_defaults
from rlhf_ray.engine.stages import Engine
from rlhf_ray.engine.support import against_the_flow, in_no_level, supported
from rlhf_ray.env import EpisodePlan
from rlhf_ray.errors import InputError, StorageError
from rlhf_ray.evaluation.baselines import baselines_for
from rlhf_ray.evaluation.comparing import check_kinds, common_metric
from rlhf_ray.evaluation.exhaustive import distinct_steps, prefill
from rlhf_ray.evaluation.scheduling import candidate_moves, most_walks
from rlhf_ray.operations import Operation
from rlhf_ray.outcomes import StageRequest
from rlhf_ray.policies.finetuning import process_spec
from rlhf_ray.policies.schedules import moves
from rlhf_ray.process import check_operations
from rlhf_ray.progress import NO_PROGRESS, Progress
from rlhf_ray.ray_session import check_answers, n_cores, running_ray, stage_workers
from rlhf_ray.report.live import LivePage, tell_last
from rlhf_ray.storage import Storage, open_storage
from rlhf_ray.sweep.driver_lock import driver_lock
from rlhf_ray.sweep.plan import plan_trials
from rlhf_ray.sweep.record import (
    Ground,
    check_same_sweep,
    forget,
    record_sweep,
    set_state,
    sweep_identity,
)
from rlhf_ray.sweep.results import (
    SUMMARY_FILE,
    SWEEP_FILE,
    SearchResult,
)
from rlhf_ray.sweep.scheduling import has_schedule, scheduled
from rlhf_ray.sweep.summing_up import sum_up
from rlhf_ray.sweep.time_limit import StagesUntil, TimeIsUpError
from rlhf_ray.sweep.trial import TrialContext
from rlhf_ray.sweep.tuning import run_trials
from rlhf_ray.tasks import Suite
from rlhf_ray.trackers import check_extras
from rlhf_ray.tree.client import RayStages
from rlhf_ray.tree.stage_tree import LocalStages
from rlhf_ray.tree.tally import TalliedStages, Tally


def search(
    suite: Suite,
    config: SearchConfig | None = None,
    *,
    operations: Sequence[Operation] | None = None,
    fresh: bool = False,
    max_minutes: float | None = None,
    progress: Progress = NO_PROGRESS,
) -> SearchResult:
    """Learns fine-tuning policies on a suite: a sweep of trials over one tree of stages.

    Uses the running Ray, or starts a local one and ends it again. Called again with the same suite
    and configuration it resumes an unfinished sweep and returns a finished one.

    Args:
        suite: with train, val and test tasks.
        config: see `SearchConfig`; the suite's own defaults fill what it leaves at the default.
        operations: instead of those that the configuration makes.
        fresh: forget an earlier sweep of the same name (the tree of stages is kept).
        max_minutes: stop after so long, > 0; the same call resumes. Once all trials are done,
            summing up is carried to its end.
        progress: told what happens.

    Returns:
        The result, also when some trials failed (`result.failures`).

    Raises:
        InputError: the suite, the configuration or the storage path will not do.
    """
    if max_minutes is not None and not max_minutes > 0:
        raise InputError(f"max_minutes must be > 0, got max_minutes={max_minutes}.")
    check_kinds(suite, config)
    config = with_defaults(config or SearchConfig(), suite.defaults)
    ground = prepare(suite, config, operations)
    storage = open_storage(config.storage_path, check=True)
    begun = not fresh and storage.exists(f"{ground.name}/{SWEEP_FILE}")
    if not (begun and _complete(SearchResult(storage, ground.name), ground)):
        check_answers(config.cluster)  # before anything is written
    with driver_lock(storage, ground.name):
        if fresh:
            forget(storage, ground.name)
        if almost := record_sweep(storage, ground):
            progress.message(almost)
        result = SearchResult(storage, ground.name)
        if _complete(result, ground):
            return result
        try:
            _run(storage, ground, max_minutes=max_minutes, progress=progress)
        except BaseException as error:
            with suppress(StorageError):  # the error that ends the sweep is the one to tell
                failed = isinstance(error, Exception)
                set_state(storage, ground.name, "failed" if failed else "interrupted")
            raise
        finally:
            LivePage(storage, ground.name, progress).write()
    return SearchResult(storage, ground.name)


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """What a search would do.

    Attributes:
        name: of the sweep.
        directory: the sweep's folder.
        complete: nothing is left to do: it is finished, with all baselines asked for.
        state: "new", or of the sweep that is there: "running", "interrupted", "failed", "finished".
        n_done: trials of the sweep that is there that are done.
        trials: the swept settings of each.
        n_stages_estimate: stages that the schedule and training of the whole sweep ask for at
            most, and how many of them may have to be carried out: the distinct ones, all where
            nothing is shared, none where the tree is only replayed.
        seconds_estimate: of those carried out on this machine's cores; None: not measured.
        remarks: lines on what the suite does not allow, or that is seldom meant.
    """

    name: str
    directory: str
    complete: bool
    state: str
    n_done: int
    trials: list[dict[str, float]]
    n_stages_estimate: tuple[int, int]
    seconds_estimate: float | None
    remarks: list[str]


def _complete(result: SearchResult, ground: Ground) -> bool:
    """Whether nothing is left to do: the sweep is finished and has all baselines asked for."""
    shown = baselines_for(ground.config.baselines, tuple(ground.suite.levels))
    return result.finished and _holds(result.summary, set(shown), ground.config.search_stages)


def _holds(summary: Mapping[str, Any], names: set[str], search_stages: int) -> bool:
    """Whether a summary has the baselines asked for, those that search with as many stages."""
    chosen = [summary.get("baseline_settings", {}).get(name, {}) for name in names]
    searched = {settings["search_stages"] for settings in chosen if "search_stages" in settings}
    return names <= set(summary.get("methods", {})) and searched <= {search_stages}


def plan(
    suite: Suite, config: SearchConfig | None = None, *, fresh: bool = False, timed: bool = False
) -> SearchPlan:
    """What `search` would do with the same arguments; starts and writes nothing.

    Args:
        suite: as for `search`.
        config: as for `search`.
        fresh: as for `search`.
        timed: where there is something to run, carry out each operation in this process, for an
            estimate of the time.

    Raises:
        InputError: as `search` does.
    """
    config = with_defaults(config or SearchConfig(), suite.defaults)
    ground = prepare(suite, config)
    storage = open_storage(config.storage_path)
    there = storage.read_json(f"{ground.name}/{SWEEP_FILE}")
    earlier = SearchResult(storage, ground.name) if isinstance(there, dict) else None
    if earlier and not fresh:
        check_same_sweep(earlier.sweep, ground)
        timed = timed and not earlier.finished
    highest, carried_out = _stages_estimate(ground)
    per_stage_s = _seconds_per_stage(ground) if timed and carried_out else 0.0
    return SearchPlan(
        name=ground.name,
        complete=bool(earlier and not fresh and _complete(earlier, ground)),
        directory=storage.shown_path(ground.name),
        state=earlier.state if earlier else "new",
        n_done=sum(trial["status"] == "done" for trial in earlier.trials) if earlier else 0,
        trials=[trial.values for trial in ground.trials],
        n_stages_estimate=(highest, carried_out),
        seconds_estimate=carried_out * per_stage_s if timed else None,
        remarks=ground.remarks,
    )


def _stages_estimate(ground: Ground) -> tuple[int, int]:
    """Stages asked for at most, and about how many of them have to be carried out."""
    highest, distinct = _stages_asked(ground)
    if ground.config.replay_only:
        return highest, 0
    return highest, distinct if ground.config.share else highest


def _stages_asked(ground: Ground) -> tuple[int, int]:
    """Stages asked for at most, and about how many of them are distinct."""
    config, n_trials = ground.config, len(ground.trials)
    n_tasks, n_levels = len(ground.suite.train_tasks), len(ground.suite.levels)
    played = config.episodes * config.horizon
    if not has_schedule(config, n_levels):
        # All trials share the random episodes, many of which stop early; beyond, they mostly go
        # ways of their own (shares measured on `digits`: experiments/sweep_sharing.py).
        common = (config.warm_up + config.decay_fraction) / 2
        distinct = math.ceil(played * (0.7 * common + 0.4 * (1 - common) * n_trials))
        return played * n_trials, distinct
    trainings, others = candidate_moves(ground.operations, n_levels)
    walks = most_walks(len(trainings), len(others), n_tasks=n_tasks, horizon=config.horizon)
    raced = walks * config.horizon
    checked = 2 * n_tasks * config.horizon  # whether departures pay; most of it was met before
    # what is played lies around the schedule (shares of the default run: the README's)
    distinct = math.ceil(0.93 * raced + 0.7 * played)
    return raced + (played + checked) * n_trials, distinct


def _seconds_per_stage(ground: Ground) -> float:
    """Of every stage that a level can ask for, on the first task, divided among the workers."""
    settings = ground.config.engine_settings().on_this_machine()
    engine = Engine(ground.suite, settings)
    stages, task = LocalStages(engine), ground.suite.train_tasks[0].name
    steps = distinct_steps(ground.operations, engine.n_levels)
    requests = [
        [StageRequest(task=task, replica=replica, path=(step,)) for step in steps]
        for replica in (0, 1)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, int(ground.config.cpus_per_worker)))  # as a worker has
    try:
        stages.outcomes(requests[0])  # takes what is done but once: tracing, kernels, caches
        seconds = [answer.outcome.time_s for answer in stages.outcomes(requests[1])]
    finally:
        torch.set_num_threads(threads)
    n_workers = ground.config.num_workers
    if settings.torch_device.type == "cuda":  # workers that share one take turns
        n_workers = torch.cuda.device_count()
    return sum(seconds) / len(seconds) / (n_cores() if n_workers == "auto" else n_workers)


def prepare(
    suite: Suite, config: SearchConfig, operations: Sequence[Operation] | None = None
) -> Ground:
    """Checks a suite against a configuration, and plans the trials.

    Raises:
        InputError: they do not fit together.
    """
    for role in ("val", "test"):
        if not getattr(suite, f"{role}_tasks"):
            raise InputError(f"a search must have {role} tasks, got none in {suite.name!r}.")
    metric = common_metric(suite)
    baselines_for(config.baselines, tuple(suite.levels))
    check_observation(config)
    check_extras(config)
    check_overrides(config.algorithm, config.rllib)
    if operations:
        check_operations(operations, len(suite.levels))
    wanted = [operation.name for operation in operations or ()] or config.only_operations
    chosen, left_out = supported(suite, operations or config.operations(), asked=wanted)
    check_operations(chosen, len(suite.levels))
    if not moves(chosen, len(suite.levels)):
        names = [operation.name for operation in chosen]
        raise InputError(f"operations must hold one that changes the model, got {names}.")
    identity, parts = sweep_identity(suite, config, chosen)
    return Ground(
        suite=suite,
        config=config,
        name=config.name or f"{suite.name}-{identity[:8]}",
        identity=identity,
        parts=parts,
        trials=plan_trials(config),
        operations=chosen,
        remarks=[line for line in (*left_out, against_the_flow(suite), in_no_level(suite)) if line],
        metric=metric,
    )


def trial_context(
    storage: Storage, ground: Ground, engine: Engine, stages: RayStages
) -> TrialContext:
    """What all trials of a sweep share.

    Args:
        storage: where trials write.
        ground: what is settled about the sweep.
        engine: of the driver: prices stages, and looks at the source data.
        stages: client of the workers.
    """
    suite, config = ground.suite, ground.config
    observer = config.observer(suite)
    spec = process_spec(
        tuple(suite.levels),
        ground.operations,
        engine,
        ground.metric,
        observer,
        config.process_settings(),
    )
    return TrialContext(
        sweep=ground.name,
        storage=storage,
        suite=suite.name,
        config=config,
        spec=spec,
        observer=observer,
        plan=EpisodePlan(
            tasks=tuple(task.name for task in suite.train_tasks),
            replicas=config.replicas,
            n_levels=spec.n_levels,
            random_start=config.start == "random",
            seed=config.seed,
        ),
        val_tasks=tuple(task.name for task in suite.val_tasks),
        metric=ground.metric.name,
        stages=stages,
        source_moments=engine.source_moments(),
    )


def _run(
    storage: Storage, ground: Ground, *, max_minutes: float | None, progress: Progress
) -> None:
    began = time.monotonic()
    suite, config = ground.suite, ground.config
    left = any(trial["status"] != "done" for trial in SearchResult(storage, ground.name).trials)
    ends = began + 60 * max_minutes if max_minutes is not None and left else None
    set_state(storage, ground.name, "running")
    progress.phase("starting Ray and the workers")
    engine = Engine(suite, config.engine_settings(), carries_out=False)
    for line in ground.remarks:
        progress.message(line)
    if engine.plan.reason:
        progress.message(f"not everything can be cached: {engine.plan.reason}")
    with running_ray(config) as dashboard, stage_workers(suite, config, progress) as handle:
        if dashboard:
            progress.message(f"Ray's dashboard is at {dashboard}")
        context = trial_context(storage, ground, engine, handle.stages)
        tally = Tally()
        stages = TalliedStages(handle.stages, tally, namespace="driver")
        try:
            if config.prefill:
                prefill(
                    context.spec,
                    StagesUntil(stages, ends),
                    tasks=[task.name for task in suite.tasks()],
                    reported=[task.name for task in (*suite.val_tasks, *suite.test_tasks)],
                    replicas=config.replicas,
                    depth=config.prefill,
                    progress=progress,
                )
            context = scheduled(context, progress, ends=ends)
        except TimeIsUpError:
            set_state(storage, ground.name, "interrupted")
            return
        run_trials(context, ground.trials, handle, ends=ends, progress=progress)
        LivePage(storage, ground.name, progress).write()
        result = SearchResult(storage, ground.name)
        if any(trial["status"] == "waiting" for trial in result.trials):
            set_state(storage, ground.name, "interrupted")
            return
        if len(result.failures) < len(result.trials):
            summary = sum_up(context, suite, result, stages, progress=progress)
            summary["wall_s"] = time.monotonic() - began
            storage.write_json(f"{ground.name}/{SUMMARY_FILE}", summary)
            with suppress(Exception):  # the tree's actor may be away: what was told last stands
                tell_last(storage, ground.name, handle.stats())
        set_state(storage, ground.name, "failed" if result.failures else "finished")
