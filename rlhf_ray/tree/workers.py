"""Ray actors that carry out stages for all trials, and the client that trials ask.

The driver starts them, outside any trial's placement group, with `start_workers`; trials get the
picklable `RayStages`. Who waits for whom is `actor`'s business, what a stage does `stages`'.
"""

import logging
import os
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import cloudpickle
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import Tensor

from rlhf_ray.errors import InputError, RlhfRayError, StageError
from rlhf_ray.outcomes import Identity, Outcome, StageRequest
from rlhf_ray.storage import open_storage
from rlhf_ray.tree.actor import Ask, TreeActor
from rlhf_ray.tree.stage_tree import LocalStages, StageEngine, start_of
from rlhf_ray.tree.store import TreeStore
from rlhf_ray.tree.tally import Answer

_log = logging.getLogger(__name__)

MakeEngine = Callable[[], StageEngine]
"""Makes a worker's engine; picklable, sent once."""


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """What a worker says when it is up: the identity of its suite, process and node."""

    identity: Identity
    pid: int
    node: str


class StageWorker:
    """Carries out stages, one at a time. Made an actor by `start_workers`.

    Errors are returned, not raised: they pass Ray as plain values, without its tracebacks.
    """

    def __init__(
        self, make_engine: bytes, storage_path: str, *, threads: int, share: bool, memory_bytes: int
    ) -> None:
        self._threads = threads
        self._running = ""
        self._stages: LocalStages | RlhfRayError
        try:
            torch.set_num_threads(threads)
            make: MakeEngine = ray.get(cloudpickle.loads(make_engine))
            store = TreeStore(open_storage(storage_path))
            self._stages = LocalStages(make(), store, share=share, memory_bytes=memory_bytes)
        except Exception as error:
            self._stages = _as_ours("an engine must be made in every worker", error)

    @ray.method(concurrency_group="control")
    def running(self) -> str:
        """The key of what is being run, "" if nothing; answers while a stage runs."""
        return self._running

    def ready(self) -> WorkerInfo | RlhfRayError:
        """Answers when the worker is up and nothing runs on it."""
        if isinstance(self._stages, RlhfRayError):
            return self._stages
        node = ray.get_runtime_context().get_node_id()
        return WorkerInfo(identity=self._stages.identity, pid=os.getpid(), node=node)

    def run(self, key: str, request: StageRequest, episode: str) -> Answer | RlhfRayError:
        """Answers a request from the store, or carries it out and commits it."""
        if isinstance(self._stages, RlhfRayError):
            return self._stages
        torch.set_num_threads(self._threads)  # counts per calling thread, and Ray may use several
        self._running = key
        try:
            return self._stages.outcome(request, episode)
        except Exception as error:
            return _as_ours("a stage must run", error)
        finally:
            self._running = ""

    def state_dict(self, request: StageRequest) -> dict[str, Tensor] | RlhfRayError:
        """The whole model in a state."""
        if isinstance(self._stages, RlhfRayError):
            return self._stages
        try:
            return self._stages.state_dict(request, namespace="state_dict")
        except Exception as error:
            return _as_ours("a state must be had", error)


class RayStages:
    """Asks the tree's actor; picklable, safe to use from several threads.

    Known outcomes are kept in this process: asking again costs microseconds.

    Args:
        tree: handle of the tree's actor.
        workers: handles of the workers.
        identity: what the keys of the suite have in common.
        share: whether outcomes may serve twice.
        max_outcomes: how many outcomes to keep in this process.
    """

    def __init__(
        self,
        tree: Any,
        workers: Sequence[Any],
        identity: Identity,
        *,
        share: bool = True,
        max_outcomes: int = 20_000,
    ) -> None:
        self._tree = tree
        self._workers = tuple(workers)
        self._share = share
        self._max_outcomes = max_outcomes
        self._known: OrderedDict[str, Outcome] = OrderedDict()
        self._lock = threading.Lock()
        self._episodes = uuid.uuid4().hex
        self.identity = identity

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_known": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock(), _episodes=uuid.uuid4().hex)

    def outcome(self, request: StageRequest, namespace: str = "") -> Answer:
        """Answers one request; waits for the worker that carries it out.

        Raises:
            StageError: it failed or lost its worker too often, or is not in the tree with
                `replay_only`.
        """
        return self.outcomes([request], namespace)[0]

    def outcomes(self, requests: Sequence[StageRequest], namespace: str = "") -> list[Answer]:
        """Answers several requests, in their order; all are in flight at once.

        Args:
            requests: the states asked for.
            namespace: unshared only: names whoever follows one episode after another per task and
                replica; by default this client in this process.

        Raises:
            StageError: the first failure, after all have ended.
        """
        answers: list[Answer | RlhfRayError | None] = [None] * len(requests)
        keys = [self.identity.key(request) for request in requests]
        if self._share:
            answers = [self._recall(key) for key in keys]
        missing = [i for i, answer in enumerate(answers) if answer is None]
        if missing:
            batch = [self._ask_for(requests[i]) for i in missing]
            for i, answer in zip(
                missing, self._send(batch, namespace or self._episodes), strict=True
            ):
                answers[i] = answer
        return [self._accept(answer) for answer in answers]

    def state_dict(self, request: StageRequest) -> dict[str, Tensor]:
        """The whole model in a state, straight from a worker."""
        state = request.as_kind("stage")
        if self._share:
            self.outcome(state)  # so that whatever is missing is carried out once
        reason = "no workers"
        for worker in self._workers:
            try:
                result: Any = ray.get(worker.state_dict.remote(state))
            except RayActorError as error:
                reason = type(error).__name__
                continue
            if isinstance(result, RlhfRayError):
                raise result
            return result
        raise StageError(f"a worker must be left to give a state, got {reason}.")

    def stats(self) -> dict[str, Any]:
        """What is going on: see `TreeActor.stats`."""
        return ray.get(self._tree.stats.remote())

    def _ask_for(self, request: StageRequest) -> Ask:
        keys: list[str] = []
        state: StageRequest | None = request
        while state is not None:
            keys.append(self.identity.key(state))
            state = start_of(state)
        return tuple(reversed(keys)), request

    def _send(self, batch: list[Ask], namespace: str) -> list[Answer | RlhfRayError]:
        for _ in range(20):
            try:
                return ray.get(self._tree.ask.remote(batch, namespace))
            except ActorUnavailableError:  # restarting; Ray's own retries cover most of it
                time.sleep(0.5)
            except ActorDiedError as error:
                raise StageError("the tree's actor must live, got one that was killed for good. "
                                 "Run the same command again to resume.") from error  # fmt: skip
        raise StageError("the tree's actor must answer, got none for 10 seconds.")

    def _recall(self, key: str) -> Answer | None:
        with self._lock:
            outcome = self._known.get(key)
            if outcome is None:
                return None
            self._known.move_to_end(key)
            return Answer(outcome=outcome)

    def _accept(self, answer: Answer | RlhfRayError | None) -> Answer:
        if isinstance(answer, RlhfRayError):
            raise answer
        assert answer is not None
        if self._share:
            with self._lock:
                self._known[answer.outcome.key] = answer.outcome
                while len(self._known) > self._max_outcomes:
                    self._known.popitem(last=False)
        return answer


class StagesHandle:
    """The driver's hold on the workers and the tree's actor: they live as long as it does.

    Attributes:
        stages: the client, for trials and the driver alike.
    """

    def __init__(self, stages: RayStages, actors: Sequence[Any]) -> None:
        self.stages = stages
        self._actors = tuple(actors)

    def __enter__(self) -> "StagesHandle":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stats(self) -> dict[str, Any]:
        """What is going on: see `TreeActor.stats`."""
        return self.stages.stats()

    def stop(self) -> None:
        """Ends workers and tree; what is committed stays."""
        for actor in self._actors:
            ray.kill(actor)


def start_workers(
    make_engine: MakeEngine,
    storage_path: str | Path,
    *,
    num_workers: int,
    cpus_per_worker: float = 1.0,
    gpus_per_worker: float = 0.0,
    threads_per_worker: int | None = None,
    share: bool = True,
    replay_only: bool = False,
    max_weight_bytes: int | None = 20 * 2**30,
    memory_bytes: int = 2**30,
    max_attempts: int = 5,
) -> StagesHandle:
    """Starts workers and the tree's actor on the running Ray; returns when one worker is up.

    Args:
        make_engine: makes each worker's engine.
        storage_path: where the tree lies; the same for all nodes.
        num_workers: how many, >= 1. Those for which the cluster has no room yet join later.
        cpus_per_worker: CPUs that Ray reserves for each.
        gpus_per_worker: GPUs for each; fractions share one.
        threads_per_worker: torch's threads; by default the whole CPUs reserved, at least 1.
        share: False: carry out every request anew.
        replay_only: refuse what is not in the tree.
        max_weight_bytes: limit of the weights on the storage; None: keep all.
        memory_bytes: limit of the weights that each worker keeps in memory.
        max_attempts: how often a stage is tried that fails or loses its worker.

    Raises:
        InputError: settings out of range, a storage path that cannot be written.
        StageError: no worker could make its engine.
    """
    if num_workers < 1 or max_attempts < 1:
        raise InputError("num_workers and max_attempts must be at least 1, got "
                         f"num_workers={num_workers}, max_attempts={max_attempts}.")  # fmt: skip
    storage = open_storage(storage_path, check=True)
    location = str(storage.local_path() or storage_path)
    # Pickled, so that actors that restart find the reference and handles without Ray's warning.
    pickled: Callable[[object], bytes] = cloudpickle.dumps  # pyright: ignore[reportPrivateImportUsage]
    engine = pickled(ray.put(make_engine))
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
    options = {"threads": threads, "share": share, "memory_bytes": memory_bytes}
    workers = [worker_class.remote(engine, location, **options) for _ in range(num_workers)]
    needs = f"{cpus_per_worker:g} CPUs and {gpus_per_worker:g} GPUs"
    try:
        identity = _first_ready(workers, needs)
    except BaseException:
        for worker in workers:
            ray.kill(worker)
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
        pickled(workers),
        share=share,
        replay_only=replay_only,
        max_weight_bytes=max_weight_bytes,
        max_attempts=max_attempts,
    )
    return StagesHandle(RayStages(tree, workers, identity, share=share), [tree, *workers])


def _first_ready(workers: Sequence[Any], needs: str) -> Identity:
    """Waits for the first worker; says what for, every 20 seconds."""
    waited_for = [worker.ready.remote() for worker in workers]
    while True:
        ready, _ = ray.wait(waited_for, num_returns=1, timeout=20.0)
        if not ready:
            _log.warning(
                "Still waiting for a first worker, which needs %s; the cluster has free: %s.",
                needs,
                {name: n for name, n in ray.available_resources().items() if "PU" in name},
            )
            continue
        try:
            info = ray.get(ready[0])
        except RayError as error:
            info = _as_ours("a worker must start", error)
        if isinstance(info, RlhfRayError):
            raise info
        return info.identity


def _as_ours(what: str, error: Exception) -> RlhfRayError:
    if isinstance(error, RlhfRayError):
        return error
    lines = str(error).splitlines() or [""]
    return StageError(f"{what}, got {type(error).__name__}: {lines[0]}")
