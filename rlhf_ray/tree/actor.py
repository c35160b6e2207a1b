"""The actor that all trials ask for stages: index, single-flight and dispatch to the workers.

Only metadata passes through it: outcomes are about 1 kB, weights travel by the storage. It keeps
nothing that cannot be had again: outcomes lie on the storage, askers ask again (Ray repeats their
calls), workers belong to the driver and outlive it. Started anew, it first asks the workers what
they are running, so that a stage in flight is waited for and not carried out twice.
"""

import asyncio
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import ActorDiedError, RayActorError, RayError

from rlhf_ray.errors import FailedStageError, RlhfRayError, StageError
from rlhf_ray.outcomes import PRETRAINED, Outcome, StageRequest
from rlhf_ray.storage import open_storage
from rlhf_ray.tree.stage_tree import describe, episode_of, not_in_tree, start_of
from rlhf_ray.tree.store import TreeStore
from rlhf_ray.tree.tally import Answer

Ask = tuple[tuple[str, ...], StageRequest]
"""Keys of all states on the way to a request, its own last, and the request."""

_WINDOW = 16
"""How many waiting jobs are searched for one whose task a worker has at hand."""

_MAX_EPISODES = 10_000
"""Unshared: of how many episodes the actor knows which worker they are on."""

_MAX_OVERTAKEN = 16
"""A job that others overtook this often is next, whatever is at hand."""

_RESTART_PATIENCE_S = 5.0
"""How long an actor that starts anew waits for the workers to say what they run."""


@dataclass(eq=False, kw_only=True)
class _Worker:
    handle: Any
    pid: int = 0
    node: str = ""
    job: "_Job | None" = None
    tasks: deque[str] = field(default_factory=lambda: deque(maxlen=4))
    executed: int = 0
    spent_s: float = 0.0
    lost: int = 0
    state: str = "starting"  # then "idle", "busy", "restarting", "gone"


@dataclass(eq=False, kw_only=True)
class _Job:
    key: str
    request: StageRequest
    episode: str
    answered: asyncio.Future[Answer]
    pinned: _Worker | None = None
    attempts: int = 0
    overtaken: int = 0


@dataclass(eq=False, kw_only=True)
class _Flight:
    task: asyncio.Task[Answer]
    claimed: bool = False


class TreeActor:
    """See the module. Made an actor by `workers.start_workers`.

    Args:
        storage_path: where the tree lies.
        workers: the workers' handles, pickled.
        share: False: carry out every request, an episode on one worker.
        replay_only: refuse what is not in the tree.
        max_weight_bytes: limit of the weights on the storage; None: keep all.
        max_attempts: how often a stage is tried that fails or loses its worker.
    """

    def __init__(
        self,
        storage_path: str,
        workers: bytes,
        *,
        share: bool,
        replay_only: bool,
        max_weight_bytes: int | None,
        max_attempts: int,
    ) -> None:
        storage = open_storage(storage_path)
        self._store = TreeStore(storage, max_weight_bytes=max_weight_bytes)
        self._workers = [_Worker(handle=handle) for handle in cloudpickle.loads(workers)]
        self._share = share
        self._replay_only = replay_only
        self._evicts = max_weight_bytes is not None
        self._max_attempts = max_attempts
        self._flights: dict[str, _Flight] = {}
        self._failed: dict[str, RlhfRayError] = {}  # set aside: not tried again
        self._waiting: deque[_Job] = deque()
        self._homes: OrderedDict[str, _Worker] = OrderedDict()  # unshared: episode -> worker
        self._reads = ThreadPoolExecutor(8)
        self._evictions = ThreadPoolExecutor(1)
        self._background: set[asyncio.Task[None]] = set()
        self._running: dict[str, asyncio.Task[None]] = {}  # begun before this actor restarted
        self._started: asyncio.Task[None] | None = None
        self._asked = self._executed = self._recomputed = self._retried = 0
        self._spent_s = 0.0
        self._gone_because = ""

    async def ask(self, batch: list[Ask], namespace: str = "") -> list[Answer | RlhfRayError]:
        """Answers requests, all in flight at once; errors stand where their answers would."""
        if self._started is None:
            self._started = asyncio.create_task(self._start())
        await self._started
        self._asked += len(batch)
        answers = (self._answer(keys, request, namespace) for keys, request in batch)
        results = await asyncio.gather(*answers, return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, RlhfRayError):
                raise result
        return results  # pyright: ignore[reportReturnType]  # narrowed by the loop above

    async def stats(self) -> dict[str, Any]:
        """What is going on, for progress displays; counted since this actor last started."""
        return {
            "asked": self._asked,
            "executed": self._executed,
            "recomputed": self._recomputed,
            "seconds_spent": self._spent_s,
            "in_flight": sum(worker.job is not None for worker in self._workers),
            "waiting": len(self._waiting),
            "retried": self._retried,
            "failed": {key: str(error) for key, error in self._failed.items()},
            "workers": [
                {
                    "pid": worker.pid,
                    "node": worker.node,
                    "state": worker.state,
                    "stage": describe(worker.job.request) if worker.job else "",
                    "executed": worker.executed,
                    "seconds_spent": worker.spent_s,
                    "lost": worker.lost,
                }
                for worker in self._workers
            ],
        }

    # -- index and single-flight ---------------------------------------------------------------

    async def _answer(self, keys: tuple[str, ...], request: StageRequest, namespace: str) -> Answer:
        if not self._share:
            return await self._dispatch(keys[-1], request, episode_of(request, namespace))
        key = keys[-1]
        known = self._store.peek(key)
        if known is not None:
            return Answer(outcome=known)
        flight = self._flights.get(key)
        if flight is None:
            flight = _Flight(task=asyncio.create_task(self._find_or_carry_out(keys, request)))
            self._flights[key] = flight
            flight.task.add_done_callback(lambda _: self._flights.pop(key))
        answer = await asyncio.shield(flight.task)
        if flight.claimed:  # one asker accounts for what was run
            return Answer(outcome=answer.outcome)
        flight.claimed = True
        return answer

    async def _find_or_carry_out(self, keys: tuple[str, ...], request: StageRequest) -> Answer:
        key = keys[-1]
        if key in self._failed:
            raise self._failed[key]
        begun_before = self._running.get(key)
        if begun_before is not None:
            await begun_before
        known = await self._read(key)
        if known is not None:
            return Answer(outcome=known, executed=begun_before is not None)
        if self._replay_only:
            raise not_in_tree(request)
        start = start_of(request)
        before = None if start is None else await self._answer(keys[:-1], start, "")
        answer = await self._dispatch(key, request, "")
        self._store.remember(answer.outcome)
        self._note_use(answer, before)
        return answer if before is None else _joined(before, answer)

    async def _read(self, key: str) -> Outcome | None:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._reads, self._store.get, key)

    def _note_use(self, answer: Answer, before: Answer | None) -> None:
        """Lets the store evict, in its own time."""
        if not self._evicts:
            return
        used = [*(before.outcome.versions if before else ()), *answer.outcome.versions]
        versions = [v for v in dict.fromkeys([*used, *answer.recomputed]) if v != PRETRAINED]
        asyncio.get_running_loop().run_in_executor(self._evictions, self._store.use, versions)

    # -- dispatch ------------------------------------------------------------------------------

    async def _dispatch(self, key: str, request: StageRequest, episode: str) -> Answer:
        """Has a worker carry out a request; resolves when it is done, tries again when lost."""
        job = _Job(
            key=key,
            request=request,
            episode=episode,
            answered=asyncio.get_running_loop().create_future(),
        )
        if len(request.path) > 1 or request.kind == "test":
            job.pinned = self._homes.get(episode)
        self._waiting.append(job)
        self._schedule()
        return await job.answered

    def _schedule(self) -> None:
        """Gives waiting jobs to idle workers."""
        if self._workers and all(worker.state == "gone" for worker in self._workers):
            error = StageError(f"a worker must be left to run stages, got {self._gone_because}")
            for job in self._waiting:
                _settle(job, error)
            self._waiting.clear()
        while (pair := self._next_pair()) is not None:
            worker, job = pair
            for other in self._waiting:
                if other is job:
                    break
                other.overtaken += 1
            self._waiting.remove(job)
            worker.state, worker.job = "busy", job
            if job.episode:
                self._homes[job.episode] = worker
                self._homes.move_to_end(job.episode)
                if len(self._homes) > _MAX_EPISODES:
                    self._homes.popitem(last=False)
            self._in_background(self._run(worker, job))

    def _next_pair(self) -> tuple[_Worker, _Job] | None:
        """A waiting job and an idle worker: such that the worker has the task's data, if any."""
        idle = [worker for worker in self._workers if worker.state == "idle"]
        if not idle:
            return None
        oldest: tuple[_Worker, _Job] | None = None
        for job in list(self._waiting)[:_WINDOW] if self._share else self._waiting:
            free = [worker for worker in idle if job.pinned in (None, worker)]
            if not free:
                continue
            warm = [worker for worker in free if job.request.task in worker.tasks]
            if warm:
                return warm[0], job
            # a new task goes to the worker that has done least: tasks spread over the workers
            pair = min(free, key=lambda worker: worker.spent_s), job
            if job.overtaken >= _MAX_OVERTAKEN:
                return pair
            oldest = oldest or pair
        return oldest

    async def _run(self, worker: _Worker, job: _Job) -> None:
        try:
            result = await worker.handle.run.remote(job.key, job.request, job.episode)
        except RayActorError as error:
            worker.lost += 1
            worker.state = "restarting"
            self._in_background(self._welcome(worker))
            result = FailedStageError(
                f"a stage's worker must not die, got {describe(job.request)} losing "
                f"{job.attempts + 1}: {_first_line(error)}"
            )
        except RayError as error:
            result = StageError(f"a stage must run, got {describe(job.request)} failing with "
                                f"{_first_line(error)}")  # fmt: skip
        worker.job = None
        if worker.state == "busy":
            worker.state = "idle"
        if isinstance(result, Answer):
            self._account(worker, job, result)
            _settle(job, result)
        else:
            self._try_again(job, result)
        self._schedule()

    def _account(self, worker: _Worker, job: _Job, answer: Answer) -> None:
        if job.request.task not in worker.tasks:
            worker.tasks.append(job.request.task)
        worker.executed += len(answer.carried_out)
        worker.spent_s += answer.spent_s
        self._executed += len(answer.carried_out)
        self._recomputed += len(answer.recomputed)
        self._spent_s += answer.spent_s

    def _try_again(self, job: _Job, error: RlhfRayError) -> None:
        job.attempts += 1
        if job.attempts < self._max_attempts:
            self._retried += 1
            job.pinned = None
            self._waiting.appendleft(job)
            return
        if self._share:
            self._failed[job.key] = error
        _settle(job, error)

    # -- workers -------------------------------------------------------------------------------

    async def _start(self) -> None:
        if ray.get_runtime_context().was_current_actor_reconstructed:
            asked = [asyncio.create_task(self._ask_running(worker)) for worker in self._workers]
            await asyncio.wait(asked, timeout=_RESTART_PATIENCE_S)
        for worker in self._workers:
            self._in_background(self._welcome(worker))

    async def _ask_running(self, worker: _Worker) -> None:
        """Notes what a worker runs for the actor that was here before."""
        try:
            key = await worker.handle.running.remote()
        except RayError:
            return
        if key:
            self._running[key] = asyncio.create_task(self._wait_until_free(worker))

    async def _wait_until_free(self, worker: _Worker) -> None:
        try:
            await worker.handle.ready.remote()  # queues behind what the worker runs
        except RayError:
            return  # whatever it ran is lost: carried out again

    async def _welcome(self, worker: _Worker) -> None:
        """Takes a worker in once it is up; it may be starting, restarting or still busy."""
        worker.tasks.clear()
        while True:
            try:
                info = await worker.handle.ready.remote()
                break
            except ActorDiedError as error:  # for good
                self._dismiss(worker, _first_line(error))
                return
            except RayError:
                await asyncio.sleep(0.2)
        if isinstance(info, RlhfRayError):
            self._dismiss(worker, str(info))
            return
        worker.pid, worker.node, worker.state = info.pid, info.node, "idle"
        self._schedule()

    def _dismiss(self, worker: _Worker, reason: str) -> None:
        worker.state = "gone"
        self._gone_because = f"none ({reason})"
        for job in self._waiting:
            job.pinned = None if job.pinned is worker else job.pinned
        self._schedule()

    def _in_background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _settle(job: _Job, result: Answer | RlhfRayError) -> None:
    if job.answered.done():  # its asker is gone
        return
    if isinstance(result, Answer):
        job.answered.set_result(result)
    else:
        job.answered.set_exception(result)


def _joined(before: Answer, answer: Answer) -> Answer:
    """An answer with the account of the ancestors that had to be carried out for it."""
    return replace(
        answer,
        carried_out=before.carried_out + answer.carried_out,
        recomputed=before.recomputed + answer.recomputed,
        spent_s=before.spent_s + answer.spent_s,
    )


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split("\n")[:1]) or type(error).__name__
