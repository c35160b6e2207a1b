"""The Ray that a sweep runs on: one that is there, or a local one while the sweep lasts."""

import functools
import logging
import math
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants
from ray._private.services import get_webui_url_from_internal_kv

from rlhf_ray.config import SearchConfig
from rlhf_ray.engine.stages import Engine
from rlhf_ray.errors import InputError
from rlhf_ray.placement import (
    Needs,
    Nodes,
    fitting,
    sharing_gpus,
    total,
    trial_room,
    wanted_workers,
    worker_room,
)
from rlhf_ray.progress import NO_PROGRESS, Progress
from rlhf_ray.shared_storage import check_shared
from rlhf_ray.tasks import Suite
from rlhf_ray.tree.pool import StagesHandle, node_resources
from rlhf_ray.tree.workers import start_workers

TRIAL_CPUS = 0.5
"""What Ray reserves for a trial: it waits for stages most of the time."""

ANSWER_S = 10.0
"""How long a cluster's port may take to answer."""

PATIENCE_S = 600.0
"""How long a sweep waits for a node with room for a worker: one that starts may take minutes."""


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def concurrent_trials(config: SearchConfig) -> int:
    """How many trials run at once."""
    if config.concurrent_trials != "auto":
        return config.concurrent_trials
    return max(1, min(4, n_cores()))


def check_answers(address: str | None) -> None:
    """Raises InputError if nothing listens at HOST:PORT, where Ray would ask for a quarter hour."""
    found = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+?)\]?:(\d{1,5})", address or "")
    if found is None or ray.is_initialized():
        return  # auto, local, ...: Ray's own words
    try:
        socket.create_connection((found[1], int(found[2])), timeout=ANSWER_S).close()
    except (OSError, OverflowError, ValueError) as error:  # a name that cannot be one, too
        raise InputError(
            f"a Ray cluster must answer at the address, got address={address!r}: {error}. Is it "
            "the port of its head (6379, if it was not chosen), and reachable from here?"
        ) from error


@contextmanager
def running_ray(config: SearchConfig) -> Iterator[str | None]:
    """Ray for the body: the one this process has, the one at `address`, or a local one.

    Yields:
        Where its dashboard is; None where that is off.

    Raises:
        InputError: no cluster answers at the address.
    """
    if ray.is_initialized():
        yield _dashboard()
        return
    address = config.cluster
    on_termination = signal.getsignal(signal.SIGTERM)
    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise InputError(
                f"a Ray cluster must answer at the address, got address={address!r}: {reason}"
            ) from error
    else:
        # Logical CPUs: workers reserve theirs, trials wait beside them.
        workers = _local_workers(config) * config.cpus_per_worker
        trials = concurrent_trials(config) * (1 + config.env_runners) * TRIAL_CPUS
        with _loopback_only():
            ray.init(
                address="local",
                num_cpus=math.ceil(workers + trials),
                include_dashboard=config.dashboard,
                **quiet,
            )
    if callable(on_termination) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_termination)  # Ray has put its own there, which aborts
    try:
        if not address:
            _check_gpus(config)
        yield _dashboard()
    finally:
        ray.shutdown()


def _dashboard() -> str | None:
    address = get_webui_url_from_internal_kv()
    return f"http://{address}" if address else None


def _check_gpus(config: SearchConfig) -> None:
    """A local Ray never grows: what it does not have is not waited for."""
    nodes, share = node_resources(), config.gpus_per_worker
    if share != "auto" and share and not worker_room(nodes, needs(config), trials=1):
        raise InputError(
            "gpus_per_worker must be what this machine has, got gpus_per_worker="
            f"{share:g} with {total(nodes, 'GPU'):g} GPUs. Leave it out, or give "
            "--address of a cluster."
        )


@contextmanager
def _loopback_only() -> Iterator[None]:
    """A Ray that starts in the body listens on 127.0.0.1: on Linux it would on all interfaces.

    Ray has this switch for other systems only, read when it is imported, and by its processes.
    """
    variable = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    before = os.environ.get(variable), ray_constants.ENABLE_RAY_CLUSTER
    os.environ[variable], ray_constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before[1]
        if before[0] is None:
            del os.environ[variable]
        else:
            os.environ[variable] = before[0]


def _local_workers(config: SearchConfig) -> int:
    return n_cores() if config.num_workers == "auto" else config.num_workers


def needs(config: SearchConfig) -> Needs:
    """What workers and trials reserve on the running Ray: less CPUs where it is too small.

    Raises:
        InputError: a share of GPUs that cannot be had.
    """
    nodes, share = node_resources(), config.gpus_per_worker
    if config.device == "cuda" or config.precision == "bf16":
        if not total(nodes, "GPU"):
            raise InputError(
                "device must be there, got no GPU on any node for "
                f"device={config.device!r}, precision={config.precision!r}. Use 'auto' and 'fp32'."
            )
        if share == 0:
            raise InputError(
                f"gpus_per_worker must be > 0 for device={config.device!r}, "
                f"precision={config.precision!r}, got gpus_per_worker=0. Or use 'cpu' and 'fp32'."
            )
    asked = Needs(
        worker_cpus=config.cpus_per_worker,
        worker_gpus=0.0 if share == "auto" else share,
        trial_cpus=TRIAL_CPUS * (1 + config.env_runners),
        trials=concurrent_trials(config),
    )
    if share == "auto" and config.device != "cpu":
        asked = sharing_gpus(nodes, asked)
    return fitting(nodes, asked)


def stage_workers(
    suite: Suite,
    config: SearchConfig,
    progress: Progress = NO_PROGRESS,
    *,
    patience_s: float | None = None,
) -> StagesHandle:
    """Starts the workers of a suite and the tree's actor on the running Ray.

    Their number follows the cluster: as many as asked for, or as fit beside the trials ("auto").

    Args:
        suite: what they work on.
        config: of the search.
        progress: told what is waited for, and what there is less of than was asked for.
        patience_s: how long to wait for room for a first worker; None: `PATIENCE_S`.

    Raises:
        InputError: the storage path is not shared by all nodes; no room for a worker.
    """
    check_shared(config.storage_path)
    reserved = needs(config)
    asked = None if config.num_workers == "auto" else config.num_workers
    for line in shortages(node_resources(), reserved, config):
        progress.message(line)
    return start_workers(
        functools.partial(Engine, suite.on_cpu(), config.engine_settings()),
        config.storage_path,
        num_workers=functools.partial(wanted_workers, needs=reserved, asked=asked),
        cpus_per_worker=reserved.worker_cpus,
        gpus_per_worker=reserved.worker_gpus,
        share=config.share,
        replay_only=config.replay_only,
        max_weight_bytes=int(config.weights_gb * 2**30),
        memory_bytes=int(config.cache_gb * 2**30),
        patience_s=PATIENCE_S if patience_s is None else patience_s,
        progress=progress,
    )


def shortages(nodes: Nodes, reserved: Needs, config: SearchConfig) -> list[str]:
    """What there will be less of than was asked for, a line each."""
    lines = []
    there = f"the cluster has {total(nodes, 'CPU'):g} CPUs and {total(nodes, 'GPU'):g} GPUs"
    if reserved.worker_cpus < config.cpus_per_worker:
        lines.append(
            f"{there}: a worker reserves {reserved.worker_cpus:g} CPUs instead of "
            f"{config.cpus_per_worker:g}, a trial {reserved.trial_cpus:g}"
        )
    asked = None if config.num_workers == "auto" else config.num_workers
    n_workers = wanted_workers(nodes, reserved, asked)
    if asked is not None and n_workers < asked:
        lines.append(f"{there}: {n_workers} workers instead of {asked}; more when it grows")
    n_trials = trial_room(nodes, reserved, n_workers)
    if worker_room(nodes, reserved, trials=1) and n_trials < reserved.trials:
        lines.append(f"{there}: {n_trials} trials at once instead of {reserved.trials}")
    return lines
