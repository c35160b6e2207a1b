"""The Ray that a sweep runs on: one that is there, or a local one while the sweep lasts."""

import functools
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_constants

from rlhf_ray.config import SearchConfig
from rlhf_ray.engine.stages import Engine
from rlhf_ray.errors import InputError
from rlhf_ray.tasks import Suite
from rlhf_ray.tree.workers import StagesHandle, start_workers

TRIAL_CPUS = 0.5
"""What Ray reserves for a trial: it waits for stages most of the time."""


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def concurrent_trials(config: SearchConfig) -> int:
    """How many trials run at once."""
    if config.concurrent_trials != "auto":
        return config.concurrent_trials
    return max(1, min(4, n_cores()))


@contextmanager
def running_ray(config: SearchConfig) -> Iterator[None]:
    """Ray for the body: the one this process has, the one at `address`, or a local one.

    Raises:
        InputError: no cluster answers at the address.
    """
    if ray.is_initialized():
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
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
                include_dashboard=False,
                **quiet,
            )
    try:
        yield
    finally:
        ray.shutdown()


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


def n_workers(config: SearchConfig) -> int:
    """How many workers the running Ray is asked for: as many as fit beside the trials."""
    if config.num_workers != "auto":
        return config.num_workers
    there = ray.cluster_resources()
    if config.gpus_per_worker > 0:
        return max(1, math.floor(there.get("GPU", 0.0) / config.gpus_per_worker))
    left = there.get("CPU", 1.0) - concurrent_trials(config) * TRIAL_CPUS
    return max(1, math.floor(left / config.cpus_per_worker))


def stage_workers(suite: Suite, config: SearchConfig) -> StagesHandle:
    """Starts the workers of a suite and the tree's actor on the running Ray."""
    return start_workers(
        functools.partial(Engine, suite, config.engine_settings()),
        config.storage_path,
        num_workers=n_workers(config),
        cpus_per_worker=config.cpus_per_worker,
        gpus_per_worker=config.gpus_per_worker,
        share=config.share,
        replay_only=config.replay_only,
        max_weight_bytes=int(config.weights_gb * 2**30),
        memory_bytes=int(config.cache_gb * 2**30),
    )
