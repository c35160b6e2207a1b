"""Tune runs the trials of a sweep; whatever Tune would print stays inside."""

import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyarrow.fs import FileSystem
from ray import cloudpickle, tune
from ray.air.constants import EXPR_ERROR_PICKLE_FILE
from ray.exceptions import RayActorError, RayTaskError
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback
from ray.tune.search import BasicVariantGenerator

from rlhf_ray.cluster_metrics import ClusterMetrics
from rlhf_ray.errors import LostProcessError
from rlhf_ray.progress import Progress
from rlhf_ray.ray_session import concurrent_trials, needs
from rlhf_ray.report.live import LivePage
from rlhf_ray.sweep.plan import PlannedTrial
from rlhf_ray.sweep.results import trial_folder
from rlhf_ray.sweep.scheduling import schedule_tally
from rlhf_ray.sweep.time_limit import is_over
from rlhf_ray.sweep.tracking import Tolerated
from rlhf_ray.sweep.trial import HandoverTrial, TrialContext, failed_record
from rlhf_ray.tensorboard import TensorBoardLog
from rlhf_ray.trackers import tracker_callbacks
from rlhf_ray.tree.pool import StagesHandle

TUNE_FOLDER = "tune"
"""Tune's own files of a sweep, TensorBoard's events among them."""

POLL_S = 0.5

MAX_FAILURES = 2
"""How often a trial starts again that fails by itself."""

MAX_LOST = 20
"""How often a trial starts again that lost a process of its own: spot nodes come and go."""

ROUNDS = 3
"""How often trials are handed to Tune, which never repeats one that is lost while it starts."""


def run_trials(
    context: TrialContext,
    trials: Sequence[PlannedTrial],
    handle: StagesHandle,
    *,
    ends: float | None,
    progress: Progress,
) -> None:
    """Runs the trials that have not ended well before, and records those that fail.

    Args:
        context: what the trials share.
        trials: all that the sweep has.
        handle: of the workers, for progress.
        ends: no trial goes on after this time on the monotonic clock; None: no bound.
        progress: told about episodes and stages.
    """
    waiting = [trial for trial in trials if not _done(context, trial.name)]
    if not waiting or is_over(ends):
        return
    episodes = context.config.episodes
    progress.phase("sweep", total=episodes * len(trials))
    before, total = (len(trials) - len(waiting)) * episodes, episodes * len(trials)
    page = LivePage(context.storage, context.sweep, progress, before=before, total=total)
    watcher = _Watcher(
        progress,
        handle,
        page,
        ClusterMetrics(context.sweep),
        done=before,
        asked=schedule_tally(context.storage, context.sweep).logical,
    )
    failures: dict[str, Exception] = {}
    # as a filesystem: the URI may hold keys, which Tune would write into its files
    with watcher.watching(), _quiet(), context.storage.keyless() as filesystem:
        trackers = [
            Tolerated(name, tracker, progress)
            for name, tracker in tracker_callbacks(context.config, context.sweep).items()
        ]
        for _ in range(ROUNDS):
            again = {trial.name for trial in waiting}
            failures = {name: error for name, error in failures.items() if name not in again}
            failures |= _fit(context, waiting, [watcher, *trackers], filesystem, ends)
            waiting = [trial for trial in waiting if _was_lost(failures.get(trial.name))]
            if not waiting or is_over(ends):
                break
    for trial in trials:
        if trial.name in failures:
            _record_failure(context, trial, failures[trial.name])


def _fit(
    context: TrialContext,
    waiting: Sequence[PlannedTrial],
    callbacks: Sequence[tune.Callback],
    filesystem: FileSystem,
    ends: float | None,
) -> dict[str, Exception]:
    """Lets Tune run trials, until `ends` on the monotonic clock; returns the errors of some."""
    points = [{"trial": trial.name, **trial.values} for trial in waiting]
    _, folder = context.storage.opened(context.sweep)
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(HandoverTrial, context=context), _resources(context)
        ),
        param_space={key: tune.choice([point[key] for point in points]) for key in points[0]},
        tune_config=tune.TuneConfig(
            num_samples=len(points),
            search_alg=BasicVariantGenerator(
                points_to_evaluate=points, max_concurrent=concurrent_trials(context.config)
            ),
            reuse_actors=True,
            time_budget_s=None if ends is None else max(0.1, ends - time.monotonic()),
            trial_dirname_creator=lambda trial: trial.config["trial"],
            trial_name_creator=lambda trial: trial.config["trial"],
        ),
        run_config=tune.RunConfig(
            name=TUNE_FOLDER,
            storage_filesystem=None if context.storage.is_local else filesystem,
            storage_path=folder,
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=MAX_LOST),
            # a trial that is cut off starts again on the warm tree: nothing of it to save
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            callbacks=[*callbacks, TensorBoardLog(), JsonLoggerCallback(), CSVLoggerCallback()],
        ),
    )
    results = tuner.fit()
    return {
        result.config["trial"]: result.error
        for result in results
        if result.error is not None and result.config is not None
    }


def _resources(context: TrialContext) -> Any:
    n_processes = 1 + context.config.env_runners
    bundles = [{"CPU": needs(context.config).trial_cpus / n_processes}] * n_processes
    return tune.PlacementGroupFactory(bundles)


def _done(context: TrialContext, trial: str) -> bool:
    record = context.storage.read_json(f"{trial_folder(context.sweep, trial)}/trial.json")
    return isinstance(record, dict) and record["status"] == "done"


def _was_lost(error: Exception | None) -> bool:
    """Whether a trial's error is the loss of a process, and not one of its own making."""
    cause = error.as_instanceof_cause() if isinstance(error, RayTaskError) else error
    if isinstance(cause, RayActorError):
        return "error raised in its creation task" not in str(cause)
    return isinstance(cause, LostProcessError)


def _record_failure(context: TrialContext, trial: PlannedTrial, error: Exception) -> None:
    if _done(context, trial.name):
        return  # it broke while it was taken down
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    record = failed_record(trial.name, trial.values, lines[-1].strip())
    name = f"{trial_folder(context.sweep, trial.name)}/trial.json"
    context.storage.write_json(name, record)


class _Watcher(tune.Callback):
    """Adds up what trials report, asks the tree how its stages stand, and shows both."""

    def __init__(
        self,
        progress: Progress,
        handle: StagesHandle,
        page: LivePage,
        metrics: ClusterMetrics,
        *,
        done: int,
        asked: int,
    ) -> None:
        self._progress = progress
        self._handle = handle
        self._page = page
        self._metrics = metrics
        self._before = done
        self._asked = asked  # for the schedule
        self._curves: dict[str, list[list[float]]] = {}
        self._restarts: dict[str, int] = {}
        self._failures: dict[str, int] = {}
        self._episodes: dict[str, int] = {}
        self._logical: dict[str, int] = {}
        self._stats: dict[str, Any] = {}
        self._told_of_failures = False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks with the experiment; this one is never read back

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        name = trial.config["trial"]  # Tune gives a trial that was lost another id
        self._episodes[name] = result["episodes"]
        self._logical[name] = result["stages/logical"]
        curve = self._curves.setdefault(name, [])
        curve.append([result["episodes"], result["train/return"]])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        self._restarts[name] = self._restarts.get(name, 0) + 1
        self._curves.pop(name, None)  # it starts again
        error = _last_error(trial)
        if not _was_lost(error):
            self._failures[name] = self._failures.get(name, 0) + 1
            if self._failures[name] >= MAX_FAILURES:
                trial.max_failures = trial.num_failures  # the next one is the last
        why = (str(error).strip().splitlines() or [""])[-1]
        again = f"trial {name} starts again ({self._restarts[name]})"
        self._progress.message(f"{again}: {why}")

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Shows progress while the body runs."""
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _watch(self, ended: threading.Event) -> None:
        while not ended.wait(POLL_S):
            self._show()
        self._show(last=True)

    def _show(self, *, last: bool = False) -> None:
        try:
            stats = self._stats = self._handle.stats()
        except Exception:  # the tree's actor restarts: show what trials said meanwhile
            stats = self._stats if last else {}
        failed = stats.get("failed", {})
        if failed and not self._told_of_failures:
            self._told_of_failures = True
            why = next(iter(failed.values()))
            self._progress.message(f"stages fail and count as diverged; the first: {why}")
        logical = self._asked + sum(list(self._logical.values()))
        done = self._before + sum(list(self._episodes.values()))
        self._metrics.show(stats)
        counts = {"done": done, "restarts": dict(self._restarts)}
        if last:
            self._page.end(stats, **counts)
        else:
            curves = {name: {"curve": list(c)} for name, c in list(self._curves.items())}
            self._page.tick(stats, curves, **counts)
        self._progress.update(
            done=done,
            logical=logical,
            executed=stats.get("executed", 0),
            in_flight=stats.get("in_flight", 0),
        )


def _last_error(trial: Any) -> Exception | None:
    """What a Tune trial failed with last; Tune keeps it in a file of this machine."""
    path = Path(trial.local_path or "") / EXPR_ERROR_PICKLE_FILE
    return cloudpickle.loads(path.read_bytes()) if path.is_file() else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Tune's and RLlib's remarks from the user; Ctrl-C reaches the caller as it is."""
    settings = {
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # `TensorBoardLog` stands in for Tune's
    }
    before = {name: os.environ.get(name) for name in settings}
    os.environ |= settings
    logger = logging.getLogger("ray.tune")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # failures are in the trials' records
    try:
        yield
    finally:
        logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
