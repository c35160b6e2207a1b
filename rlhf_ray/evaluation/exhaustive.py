"""The whole tree of a task to a small depth: filled ahead, and searched for the true optimum."""

from collections.abc import Iterator, Sequence

from rlhf_ray.errors import FailedStageError
from rlhf_ray.evaluation.rollouts import Stages, concurrently
from rlhf_ray.operations import Operation
from rlhf_ray.outcomes import StagePath, StageRequest, StageStep
from rlhf_ray.policies.schedules import moves
from rlhf_ray.process import ProcessSpec
from rlhf_ray.progress import NO_PROGRESS, Progress


def distinct_steps(operations: Sequence[Operation], n_levels: int) -> tuple[StageStep, ...]:
    """All stages that some level can ask for, each effect once."""
    return tuple(move.step(n_levels) for move in moves(operations, n_levels))


def all_paths(steps: Sequence[StageStep], depth: int) -> Iterator[StagePath]:
    """Every path of 0 to `depth` stages, shorter ones first."""
    layer: list[StagePath] = [()]
    yield from layer
    for _ in range(depth):
        layer = [(*path, step) for path in layer for step in steps]
        yield from layer


def prefill(
    spec: ProcessSpec,
    stages: Stages,
    *,
    tasks: Sequence[str],
    reported: Sequence[str],
    replicas: int,
    depth: int,
    progress: Progress = NO_PROGRESS,
) -> int:
    """Carries out the whole tree of every task to a depth, layer by layer.

    Args:
        spec: gives operations and levels.
        stages: carries them out.
        tasks: names of the tasks.
        reported: those whose states are evaluated on test as well.
        replicas: replica seeds 0 ... replicas - 1.
        depth: stages per path, >= 1.
        progress: told how many are done.

    Returns:
        How many states were asked for.
    """
    paths = list(all_paths(distinct_steps(spec.operations, spec.n_levels), depth))
    requests = [
        StageRequest(task=task, replica=replica, path=path, kind=kind)
        for path in paths
        for task in tasks
        for kind in (("stage", "test") if task in reported else ("stage",))
        for replica in range(replicas)
    ]

    def ask(request: StageRequest) -> None:
        try:
            stages.outcome(request)
        except FailedStageError:  # a stage that failed leads to no state to report on
            if not request.path:
                raise

    progress.phase("filling the tree", total=len(requests))
    concurrently(ask, requests, progress=lambda done, _: progress.update(done=done))
    return len(requests)
