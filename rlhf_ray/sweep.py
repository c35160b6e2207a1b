"""`rr.search`: the sweep. Prepares the ground, lets Tune run the trials, compares, and sums up."""

from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.config import SearchConfig, with_defaults
from rlhf_ray.driver_lock import driver_lock
from rlhf_ray.errors import InputError
from rlhf_ray.operations import Operation
from rlhf_ray.progress import NO_PROGRESS, Progress
from rlhf_ray.results import (
    SearchResult,
)
from rlhf_ray.storage import open_storage
from rlhf_ray.sweep_plan import PlannedTrial, plan_trials
from rlhf_ray.tasks import Metric, Suite

TRIAL_CPUS = 0.5
"""What Ray reserves for a trial: it waits for stages most of the time."""


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
        max_minutes: stop after so long, > 0; the same call resumes.
        progress: told what happens.

    Returns:
        The result, also when some trials failed (`result.failures`).

    Raises:
        InputError: the suite, the configuration or the storage path will not do.
    """
    config = with_defaults(config or SearchConfig(), suite.defaults)
    ground = prepare(suite, config, operations)
    storage = open_storage(config.storage_path, check=True)
    with driver_lock(storage, ground.name):
        if fresh:
            storage.delete_prefix(ground.name)
        _record_sweep(storage, ground)
        result = SearchResult(storage, ground.name)
        if result.finished:
            return result
        _run(storage, ground, max_minutes=max_minutes, progress=progress)
    return SearchResult(storage, ground.name)


@dataclass(frozen=True, kw_only=True)
class Ground:
    """All that a sweep needs to know before Ray starts.

    Attributes:
        suite: checked.
        config: with the suite's own defaults.
        name: of the sweep's folder.
        trials: planned.
        operations: of the process.
        metric: of the suite's tasks; they agree on its direction.
    """

    suite: Suite
    config: SearchConfig
    name: str
    trials: list[PlannedTrial]
    operations: tuple[Operation, ...]
    metric: Metric


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
    metrics = [task.metric for task in suite.tasks() if isinstance(task.metric, Metric)]
    if len({metric.higher_is_better for metric in metrics}) > 1:
        names = sorted({metric.name for metric in metrics})
        raise InputError(f"all tasks' metrics must have one direction, got {', '.join(names)}.")
    for name in config.baselines:
        check_baseline(name, suite)
    name = config.name or f"{suite.name}-{_identity(suite, config)[:8]}"
    return Ground(
        suite=suite,
        config=config,
        name=name,
        trials=plan_trials(config),
        operations=tuple(operations or config.operations()),
        metric=metrics[0],
    )
