"""The client that trials and the driver ask for stages: one batch, one call to the tree's actor.

Known outcomes are answered from this process's memory, and no Ray call is made for them.
"""

import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayActorError
from torch import Tensor

from rlhf_ray.errors import RlhfRayError, StageError
from rlhf_ray.outcomes import Identity, Outcome, StageRequest
from rlhf_ray.tree.actor import Ask
from rlhf_ray.tree.stage_tree import start_of
from rlhf_ray.tree.tally import Answer

STATS_TIMEOUT_S = 20.0
"""Who shows how things stand must not hang on an actor that is being started anew."""


class RayStages:
    """Asks the tree's actor; picklable, safe to use from several threads.

    Known outcomes are kept in this process: asking again costs microseconds.

    Args:
        tree: handle of the tree's actor.
        identity: what the keys of the suite have in common.
        share: whether outcomes may serve twice.
        max_outcomes: how many outcomes to keep in this process.
    """

    def __init__(
        self,
        tree: Any,
        identity: Identity,
        *,
        share: bool = True,
        max_outcomes: int = 20_000,
    ) -> None:
        self._tree = tree
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
        reason = "none"
        for worker in ray.get(self._tree.handles.remote()):
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
        return ray.get(self._tree.stats.remote(), timeout=STATS_TIMEOUT_S)

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
