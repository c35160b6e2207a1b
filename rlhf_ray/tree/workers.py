"""Starts the workers and the tree's actor on the running Ray.

They are created outside any trial's placement group, live as long as the driver's `StagesHandle`
(`pool`), and follow the cluster as it says there.
"""

from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.errors import InputError, in_one_line
from rlhf_ray.progress import NO_PROGRESS, Progress
from rlhf_ray.storage import open_storage
from rlhf_ray.tree.actor import TreeActor
from rlhf_ray.tree.pool import HowMany, StagesHandle, dumps
from rlhf_ray.tree.stage_worker import MakeEngine, StageWorker
from rlhf_ray.tree.store import TreeStore

MAX_REPLACED = 20
"""Workers lost for good that are replaced in all: what kills every worker must not go on."""


def start_workers(
    make_engine: MakeEngine,
    storage_path: str | Path,
    *,
    num_workers: int | HowMany,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    threads_per_worker: int | None = None,
    share: bool = True,
    replay_only: bool = False,
    max_weight_bytes: int | None = 20 * 2**30,
    memory_bytes: int = 2**30,
    max_attempts: int = 5,
    max_replaced: int = MAX_REPLACED,
    patience_s: float | None = None,
    poll_s: float = 1.0,
    progress: Progress = NO_PROGRESS,
) -> StagesHandle:
    """Starts workers and the tree's actor on the running Ray; returns when one worker is up.

    Args:
        make_engine: makes each worker's engine.
        storage_path: where the tree lies; the same for all nodes.
        num_workers: how many, >= 1, or a function of the cluster's nodes, which is followed. Those
            for which the cluster has no room yet join later.
        cpus_per_worker: CPUs that Ray reserves for each.
        gpus_per_worker: GPUs for each; fractions share one.
        threads_per_worker: torch's threads; by default the whole CPUs reserved, at least 1.
        share: False: carry out every request anew.
        replay_only: refuse what is not in the tree.
        max_weight_bytes: limit of the weights on the storage; None: keep all.
        memory_bytes: limit of the weights that each worker keeps in memory.
        max_attempts: how often a stage is tried that fails or loses its worker.
        max_replaced: how many workers that are lost for good are replaced.
        patience_s: how long to wait for a first worker; None: for ever.
        poll_s: how often the thread of `StagesHandle` looks at the cluster.
        progress: told what is waited for, and how the number of workers changes.

    Raises:
        InputError: settings out of range, a storage path that cannot be written, no room, an
            engine that cannot be pickled.
        StageError: no worker could make its engine.
    """
    fixed = num_workers if isinstance(num_workers, int) else 1
    if fixed < 1 or max_attempts < 1:
        raise InputError("num_workers and max_attempts must be at least 1, got "
                         f"num_workers={num_workers}, max_attempts={max_attempts}.")  # fmt: skip
    storage = open_storage(storage_path, check=True)
    location = str(storage.local_path() or storage_path)
    engine = _sent(make_engine)
    mark = TreeStore(storage).mark() if share else ""
    # "DEFAULT": not in the placement group of whoever calls
    remote: Any = ray.remote  # its overloads miss some of these options
    worker_class = remote(
        num_cpus=cpus_per_worker,
        num_gpus=gpus_per_worker,
        max_restarts=-1,
        concurrency_groups={"control": 1},
        scheduling_strategy="DEFAULT",
    )(StageWorker)
    threads = threads_per_worker or max(1, int(cpus_per_worker))

    def make_worker(**options: float) -> Any:
        return worker_class.options(**options).remote(
            engine, location, mark, threads=threads, share=share, memory_bytes=memory_bytes
        )

    handle = StagesHandle(
        make_worker,
        (lambda _: fixed) if isinstance(num_workers, int) else num_workers,
        needs=f"{cpus_per_worker:g} CPUs and {gpus_per_worker:g} GPUs",
        progress=progress,
        max_replaced=max_replaced,
        poll_s=poll_s,
    )
    try:
        identity = handle.first_worker(patience_s)
    except BaseException:
        handle.stop()
        raise
    tree_class = remote(
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        max_concurrency=10_000,
        # beside the driver, whose local paths it can read; elsewhere if that node is lost
        scheduling_strategy=NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        ),
    )(TreeActor)
    tree = tree_class.remote(
        location,
        share=share,
        replay_only=replay_only,
        max_weight_bytes=max_weight_bytes,
        max_attempts=max_attempts,
    )
    handle.run(tree, identity, share=share)
    return handle


def _sent(make_engine: MakeEngine) -> bytes:
    """The reference to what makes engines, pickled.

    So actors that restart find it without Ray's warning.
    """
    try:
        return dumps(ray.put(make_engine))
    except Exception as error:  # whatever a user's objects raise
        raise InputError(
            "model, data, losses and metrics must be picklable, to travel to workers, "
            f"got {in_one_line(error)}"
        ) from error
