"""Which worker carries out which stage, and what becomes of it when its worker is lost.

Lives in the tree's actor; `actor` decides what has to be carried out at all. Workers come and go
while stages wait: the driver's pool (`workers`) starts them, hands them in here and replaces those
that are lost for good.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray.exceptions import ActorDiedError, RayActorError, RayError

from rlhf_ray.errors import (
    FailedStageError,
    FullDeviceError,
    RlhfRayError,
    StageError,
    StorageError,
)
from rlhf_ray.outcomes import StageRequest
from rlhf_ray.tree.stage_tree import describe
from rlhf_ray.tree.tally import Answer

WINDOW = 16
"""How many waiting jobs are searched for one whose task a worker has at hand."""

MAX_EPISODES = 10_000
"""Unshared: of how many episodes it is known which worker they are on."""

MAX_OVERTAKEN = 16
"""A job that others overtook this often is next, whatever is at hand."""

PAUSE_S = 0.5
"""Before a stage is tried again that found no storage or memory; doubled each time."""

MAX_FAILED_IN_LEDGER = 200
"""Failed stages that a ledger names: it travels with every stage."""


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """The counts of a tree's actor; workers and driver keep them for the one that takes its place.

    Attributes:
        answered: requests answered.
        executed: stages carried out.
        recomputed: stages run again for their evicted weights.
        retried: stages begun again after they failed or lost their worker.
        spent_s: seconds of all that was run.
        failed: stages set aside, by key.
    """

    answered: int = 0
    executed: int = 0
    recomputed: int = 0
    retried: int = 0
    spent_s: float = 0.0
    failed: tuple[tuple[str, RlhfRayError], ...] = ()


@dataclass(eq=False, kw_only=True)
class Worker:
    """What is known of a worker; `state`: starting, idle, busy, restarting or gone."""

    number: int
    handle: Any
    pid: int = 0
    node: str = ""
    job: "Job | None" = None
    tasks: deque[str] = field(default_factory=lambda: deque(maxlen=4))
    executed: int = 0
    spent_s: float = 0.0
    lost: int = 0
    state: str = "starting"
    reason: str = ""

    def as_json(self) -> dict[str, Any]:
        """For displays, and for the driver's pool."""
        return {
            "number": self.number,
            "pid": self.pid,
            "node": self.node,
            "state": self.state,
            "stage": describe(self.job.request) if self.job else "",
            "executed": self.executed,
            "seconds_spent": self.spent_s,
            "lost": self.lost,
            "reason": self.reason,
        }


@dataclass(eq=False, kw_only=True)
class Job:
    """A stage that waits for a worker, or runs on one."""

    key: str
    request: StageRequest
    episode: str
    answered: asyncio.Future[Answer]
    pinned: Worker | None = None
    attempts: int = 0
    overtaken: int = 0


class Dispatcher:
    """Hands stages to workers; all of it runs in one event loop.

    Args:
        share: False: an episode stays on one worker.
        max_attempts: how often a stage is tried that fails or loses its worker.
    """

    def __init__(self, *, share: bool, max_attempts: int) -> None:
        self.workers: dict[int, Worker] = {}
        self.waiting: deque[Job] = deque()
        self.ledger = Ledger()
        self.failed: dict[str, RlhfRayError] = {}  # set aside: not tried again
        self.counts = {"answered": 0, "executed": 0, "recomputed": 0, "retried": 0}
        self.spent_s = 0.0
        self._share = share
        self._max_attempts = max_attempts
        self._idle: dict[Worker, None] = {}  # ordered
        self._homes: OrderedDict[str, Worker] = OrderedDict()  # unshared: episode -> worker
        self.hopeless = ""  # why there will be no workers
        self._background: set[asyncio.Task[None]] = set()

    # -- counts ----------------------------------------------------------------------------------

    def recover(self, ledger: Ledger) -> None:
        """Goes on from what an actor before this one had counted; counts never fall."""
        for name in self.counts:
            self.counts[name] = max(self.counts[name], getattr(ledger, name))
        self.spent_s = max(self.spent_s, ledger.spent_s)
        self.failed = dict(ledger.failed) | self.failed

    def record(self) -> Ledger:
        """The counts as they are."""
        failed = list(self.failed.items())[-MAX_FAILED_IN_LEDGER:]
        return Ledger(**self.counts, spent_s=self.spent_s, failed=tuple(failed))

    def account(self, answer: Answer) -> None:
        """Counts what was run for an answer."""
        self.counts["executed"] += len(answer.carried_out)
        self.counts["recomputed"] += len(answer.recomputed)
        self.spent_s += answer.spent_s

    # -- stages ----------------------------------------------------------------------------------

    async def carry_out(self, key: str, request: StageRequest, episode: str) -> Answer:
        """Has a worker carry out a request; resolves when it is done, tries again when lost."""
        future = asyncio.get_running_loop().create_future()
        job = Job(key=key, request=request, episode=episode, answered=future)
        if len(request.path) > 1 or request.kind == "test":
            home = self._homes.get(episode)
            job.pinned = None if home is None or home.state == "gone" else home
        self.waiting.append(job)
        self._schedule()
        return await future

    def give_up(self, reason: str) -> None:
        """There will be no workers: whoever waits for one is told why."""
        self.hopeless = reason
        self._schedule()

    def _schedule(self) -> None:
        """Gives waiting jobs to idle workers."""
        if self.hopeless:
            error = StageError(f"a worker must be left to run stages, got none ({self.hopeless}).")
            for job in self.waiting:
                _settle(job, error)
            self.waiting.clear()
        while self.waiting and (pair := self._next_pair()) is not None:
            worker, job = pair
            for other in self.waiting:
                if other is job:
                    break
                other.overtaken += 1
            self.waiting.remove(job)
            del self._idle[worker]
            worker.state, worker.job = "busy", job
            if job.episode:
                self._homes[job.episode] = worker
                self._homes.move_to_end(job.episode)
                if len(self._homes) > MAX_EPISODES:
                    self._homes.popitem(last=False)
            self._in_background(self._run(worker, job))

    def _next_pair(self) -> tuple[Worker, Job] | None:
        """A waiting job and an idle worker: such that the worker has the task's data, if any."""
        if not self._idle:
            return None
        oldest: tuple[Worker, Job] | None = None
        for job in list(self.waiting)[:WINDOW] if self._share else self.waiting:
            free = [worker for worker in self._idle if job.pinned in (None, worker)]
            if not free:
                continue
            warm = next((worker for worker in free if job.request.task in worker.tasks), None)
            if warm is not None:
                return warm, job
            # a new task goes to the worker that has done least: tasks spread over the workers
            pair = min(free, key=lambda worker: worker.spent_s), job
            if job.overtaken >= MAX_OVERTAKEN:
                return pair
            oldest = oldest or pair
        return oldest

    async def _run(self, worker: Worker, job: Job) -> None:
        try:
            call = worker.handle.run.remote(job.key, job.request, job.episode, self.record())
            result = await call
        except RayActorError as error:
            worker.lost += 1
            if worker.state != "gone":
                worker.state = "restarting"
                self._in_background(self._welcome(worker))
            result = FailedStageError(
                f"a stage's worker must not die, got {describe(job.request)} losing "
                f"{job.attempts + 1}: {first_line(error)}"
            )
        except RayError as error:
            result = StageError(f"a stage must run, got {describe(job.request)} failing with "
                                f"{first_line(error)}")  # fmt: skip
        worker.job = None
        if worker.state == "busy":
            self._free(worker)
        if isinstance(result, Answer):
            if job.request.task not in worker.tasks:
                worker.tasks.append(job.request.task)
            worker.executed += len(result.carried_out)
            worker.spent_s += result.spent_s
            self.account(result)
            _settle(job, result)
        else:
            await self._try_again(job, result)
        self._schedule()

    async def _try_again(self, job: Job, error: RlhfRayError) -> None:
        job.attempts += 1
        if job.attempts < self._max_attempts:
            self.counts["retried"] += 1
            if isinstance(error, StorageError | FullDeviceError):  # busy: later it may have room
                await asyncio.sleep(PAUSE_S * 2 ** (job.attempts - 1))
            job.pinned = None
            self.waiting.appendleft(job)
            return
        if self._share:
            self.failed[job.key] = error
        _settle(job, error)

    # -- workers ---------------------------------------------------------------------------------

    def add(self, workers: Sequence[tuple[int, Any]]) -> None:
        """Takes workers in, each by its number; those that are known stay as they are."""
        for number, handle in workers:
            if number not in self.workers:
                worker = self.workers[number] = Worker(number=number, handle=handle)
                self._in_background(self._welcome(worker))

    def handles(self) -> list[Any]:
        """Of the workers that are not gone, those that are up first; the others answer later."""
        there = [worker for worker in self.workers.values() if worker.state != "gone"]
        there.sort(key=lambda worker: worker.state not in ("idle", "busy"))
        return [worker.handle for worker in there]

    def dismiss(self, number: int, reason: str) -> None:
        """A worker that is not coming back."""
        worker = self.workers.get(number)
        if worker is None or worker.state == "gone":
            return
        worker.state, worker.reason = "gone", reason
        self._idle.pop(worker, None)
        for job in self.waiting:
            job.pinned = None if job.pinned is worker else job.pinned
        self._schedule()

    async def _welcome(self, worker: Worker) -> None:
        """Takes a worker in once it is up; it may be starting, restarting or still busy."""
        worker.tasks.clear()
        info = None
        while worker.state != "gone" and info is None:
            try:
                info = await worker.handle.ready.remote()
            except ActorDiedError as error:  # for good
                self.dismiss(worker.number, first_line(error))
            except RayError:
                await asyncio.sleep(0.2)
        if isinstance(info, RlhfRayError):
            self.dismiss(worker.number, str(info))
        elif info is not None and worker.state != "gone":
            worker.pid, worker.node = info.pid, info.node
            self._free(worker)
            self._schedule()

    def _free(self, worker: Worker) -> None:
        worker.state = "idle"
        self._idle[worker] = None

    def _in_background(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _settle(job: Job, result: Answer | RlhfRayError) -> None:
    if job.answered.done():  # its asker is gone
        return
    if isinstance(result, Answer):
        job.answered.set_result(result)
    else:
        job.answered.set_exception(result)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its kind."""
    return " ".join(str(error).split("\n")[:1]) or type(error).__name__
