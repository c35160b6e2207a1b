"""The actor that all trials ask for stages: index and single-flight.

Only metadata passes through it: outcomes are about 1 kB, weights travel by the storage. It keeps
nothing that cannot be had again: outcomes lie on the storage, askers ask again (Ray repeats their
calls), workers belong to the driver and outlive it. Started anew, it waits for the driver to hand
the workers in, and asks them what they are running, so that a stage in flight is waited for and
not carried out twice, and how far its predecessor had counted.
"""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import cloudpickle
from ray.exceptions import RayError

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.outcomes import PRETRAINED, Outcome, StageRequest
from rlhf_ray.storage import open_storage
from rlhf_ray.tree.dispatch import Dispatcher, Ledger
from rlhf_ray.tree.stage_tree import episode_of, not_in_tree, start_of
from rlhf_ray.tree.store import TreeStore
from rlhf_ray.tree.tally import Answer

Ask = tuple[tuple[str, ...], StageRequest]
"""Keys of all states on the way to a request, its own last, and the request."""

_RESTART_PATIENCE_S = 5.0
"""How long an actor that starts anew waits for the workers to say what they run."""


@dataclass(eq=False, kw_only=True)
class _Flight:
    task: asyncio.Task[Answer]
    claimed: bool = False


class TreeActor:
    """See the module. Made an actor by `workers.start_workers`.

    Args:
        storage_path: where the tree lies.
        share: False: carry out every request, an episode on one worker.
        replay_only: refuse what is not in the tree.
        max_weight_bytes: limit of the weights on the storage; None: keep all.
        max_attempts: how often a stage is tried that fails or loses its worker.
    """

    def __init__(
        self,
        storage_path: str,
        *,
        share: bool,
        replay_only: bool,
        max_weight_bytes: int | None,
        max_attempts: int,
    ) -> None:
        storage = open_storage(storage_path)
        self._store = TreeStore(storage, max_weight_bytes=max_weight_bytes)
        self._dispatcher = Dispatcher(share=share, max_attempts=max_attempts)
        self._share = share
        self._replay_only = replay_only
        self._evicts = max_weight_bytes is not None
        self._flights: dict[str, _Flight] = {}
        self._reads = ThreadPoolExecutor(8)
        self._evictions = ThreadPoolExecutor(1)
        self._running: dict[str, asyncio.Task[None]] = {}  # begun before this actor restarted
        self._peopled = asyncio.Event()  # the driver has handed the workers in
        self._under_way = 0

    async def ask(self, batch: list[Ask], namespace: str = "") -> list[Answer | RlhfRayError]:
        """Answers requests, all in flight at once; errors stand where their answers would."""
        self._under_way += len(batch)
        try:
            await self._peopled.wait()
            answers = (self._answer(keys, request, namespace) for keys, request in batch)
            results = await asyncio.gather(*answers, return_exceptions=True)
        finally:
            self._under_way -= len(batch)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, RlhfRayError):
                raise result
        self._dispatcher.counts["answered"] += len(batch)
        return results  # pyright: ignore[reportReturnType]  # narrowed by the loop above

    async def stats(self) -> dict[str, Any]:
        """What is going on, for progress displays and the driver's pool.

        The counts outlive the actor, but for what was in flight when it died.
        """
        dispatcher = self._dispatcher
        counts = dispatcher.counts
        workers = list(dispatcher.workers.values())
        return {
            "asked": counts["answered"] + self._under_way,
            "executed": counts["executed"],
            "recomputed": counts["recomputed"],
            "seconds_spent": dispatcher.spent_s,
            "in_flight": sum(worker.job is not None for worker in workers),
            "waiting": len(dispatcher.waiting),
            "processor_s": time.process_time(),  # of this actor: its one thread is what saturates
            "retried": counts["retried"],
            "failed": {key: str(error) for key, error in dispatcher.failed.items()},
            "workers": [worker.as_json() for worker in workers],
        }

    # -- for the driver's pool -----------------------------------------------------------------

    async def record(self) -> Ledger:
        """The counts, for the actor that may have to take this one's place."""
        return self._dispatcher.record()

    async def add_workers(self, workers: bytes, ledger: Ledger) -> None:
        """Takes workers in: pickled (number, handle) pairs; all that there are, or only new ones.

        Those known already stay as they are. The first call lets the askers in, and goes on from
        what the ledgers of driver and workers say.
        """
        self._dispatcher.recover(ledger)
        pairs: list[tuple[int, Any]] = cloudpickle.loads(workers)
        first = not self._peopled.is_set()
        if first and ray.get_runtime_context().was_current_actor_reconstructed:
            asked = [asyncio.create_task(self._ask_report(handle)) for _, handle in pairs]
            if asked:
                await asyncio.wait(asked, timeout=_RESTART_PATIENCE_S)
        self.let_in(pairs)

    def let_in(self, workers: Sequence[tuple[int, Any]]) -> None:
        """Takes workers in, each by its number, and then the askers."""
        self._dispatcher.add(workers)
        self._peopled.set()

    async def dismiss_workers(self, numbers: list[int], reason: str) -> None:
        """Forgets workers that are not coming back."""
        for number in numbers:
            self._dispatcher.dismiss(number, reason)

    async def give_up(self, reason: str) -> None:
        """There will be no workers any more: whoever waits for one is told why."""
        self._dispatcher.give_up(reason)

    async def handles(self) -> list[Any]:
        """Handles of the workers, those that are up first; waits for one while there may be any."""
        while not (found := self._dispatcher.handles()) and not self._dispatcher.hopeless:
            await asyncio.sleep(0.1)
        return found

    async def _ask_report(self, handle: Any) -> None:
        """Notes what a worker runs for the actor that was here before, and what that counted."""
        try:
            key, ledger = await handle.report.remote()
        except RayError:
            return
        if ledger is not None:
            self._dispatcher.recover(ledger)
        if key:
            self._running[key] = asyncio.create_task(_until_free(handle))

    # -- index and single-flight ---------------------------------------------------------------

    async def _answer(self, keys: tuple[str, ...], request: StageRequest, namespace: str) -> Answer:
        if not self._share:
            episode = episode_of(request, namespace)
            return await self._dispatcher.carry_out(keys[-1], request, episode)
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
        if key in self._dispatcher.failed:
            raise self._dispatcher.failed[key]
        begun_before = self._running.pop(key, None)
        if begun_before is not None:
            await begun_before
        known = await self._read(key)
        if known is not None:
            return self._finished_before(request, known) if begun_before else Answer(outcome=known)
        if self._replay_only:
            raise not_in_tree(request)
        start = start_of(request)
        before = None if start is None else await self._answer(keys[:-1], start, "")
        answer = await self._dispatcher.carry_out(key, request, "")
        self._store.remember(answer.outcome)
        self._note_use(answer, before)
        return answer if before is None else _joined(before, answer)

    def _finished_before(self, request: StageRequest, outcome: Outcome) -> Answer:
        """The answer that the actor before this one could not give any more."""
        counted = request.kind == "stage" and bool(request.path)
        answer = Answer(
            outcome=outcome,
            executed=True,
            carried_out=(outcome.key,) if counted else (),
            spent_s=outcome.time_s,
        )
        self._dispatcher.account(answer)
        return answer

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


async def _until_free(handle: Any) -> None:
    try:
        await handle.ready.remote()  # queues behind what the worker runs
    except RayError:
        return  # whatever it ran is lost: carried out again


def _joined(before: Answer, answer: Answer) -> Answer:
    """An answer with the account of the ancestors that had to be carried out for it."""
    return replace(
        answer,
        carried_out=before.carried_out + answer.carried_out,
        recomputed=before.recomputed + answer.recomputed,
        spent_s=before.spent_s + answer.spent_s,
    )
