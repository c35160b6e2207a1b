"""The tree of stages: kept durably, and carried out in this process where it has gaps.

`TreeStore` keeps outcomes for ever and weights within a limit; `LocalStages` answers requests from
it and runs the engine for the rest. Several processes may work on one store: what each wrote is
whole or absent, and the first committed outcome of a key stands. That two of them do not carry out
one stage at the same time is left to `workers`.
"""

import json
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from rlhf_ray.errors import FailedStageError, StageError, StorageError, in_one_line
from rlhf_ray.outcomes import Identity, LevelState, Outcome, StageRequest
from rlhf_ray.tree.store import StateCache, TreeStore
from rlhf_ray.tree.tally import Answer

T = TypeVar("T")

LoadState = Callable[[str, int], LevelState]
"""(version, level) -> the level's state as that stage left it."""


class StageEngine(Protocol):
    """Runs single stages of one suite, as `rlhf_ray.engine.stages.Engine` does.

    Neither thread-safe nor re-entrant; an exception from `load` must leave it usable.
    """

    identity: Identity

    def start(self, request: StageRequest) -> Outcome:
        """Evaluates the pretrained model on a task."""
        ...

    def run(
        self, request: StageRequest, parent: Outcome, load: LoadState
    ) -> tuple[Outcome, dict[int, LevelState]]:
        """Carries out the last stage of a path; returns the states of the levels it changed."""
        ...

    def test(self, request: StageRequest, state: Outcome, load: LoadState) -> Outcome:
        """Evaluates a state on the test split."""
        ...

    def state_dict(self, state: Outcome, load: LoadState) -> dict[str, Tensor]:
        """The whole model in a state."""
        ...

    def release(self) -> None:
        """Gives back what memory it can."""
        ...


class Stages(Protocol):
    """Answers requests, by whatever means: `LocalStages`, or `workers.RayStages`."""

    @property
    def identity(self) -> Identity:
        """What the keys of its suite have in common."""
        ...

    def outcome(self, request: StageRequest, namespace: str = "") -> Answer:
        """Answers one request."""
        ...

    def outcomes(self, requests: Sequence[StageRequest], namespace: str = "") -> list[Answer]:
        """Answers several requests, in their order."""
        ...

    def state_dict(self, request: StageRequest) -> dict[str, Tensor]:
        """The whole model in the state that a request asks for."""
        ...


def start_of(request: StageRequest) -> StageRequest | None:
    """The state that a request is carried out from; None for the pretrained model's start."""
    if request.kind == "test":
        return request.as_kind("stage")
    return request.parent() if request.path else None


def episode_of(request: StageRequest, namespace: str) -> str:
    """Names an unshared episode: one at a time per namespace, task and replica."""
    return json.dumps([namespace, request.task, request.replica])


def describe(request: StageRequest) -> str:
    """A request in one line, for messages."""
    steps = [f"{step.operation.name}@{','.join(map(str, step.levels))}" for step in request.path]
    where = f"task {request.task!r}, replica {request.replica}"
    return f"{request.kind} [{' > '.join(steps) or 'start'}] of {where}"


def not_in_tree(request: StageRequest) -> StageError:
    """The error of a request that only the tree may answer, and cannot."""
    return StageError(
        f"every stage must be in the tree when replaying, got {describe(request)}, which is not. "
        "Run without replay_only to carry it out."
    )


class LocalStages:
    """Answers requests in one process, without Ray; also the core of each Ray worker.

    Args:
        engine: runs what is not known.
        store: where outcomes and weights are kept; None: in memory only.
        share: False: every request is carried out. Only the states it starts from are known from
            the requests before it of its episode, and nothing is stored.
            Random draws, and so the outcomes, are those of a shared tree.
        replay_only: refuse what is not in the tree instead of carrying it out.
        memory_bytes: limit of level states kept in memory.
        retry: False: a stage that failed is not tried again. Its error is the answer to every
            later request for it, or for what goes on from it.
    """

    def __init__(
        self,
        engine: StageEngine,
        store: TreeStore | None = None,
        *,
        share: bool = True,
        replay_only: bool = False,
        memory_bytes: int = 2**30,
        retry: bool = True,
    ) -> None:
        self.engine = engine
        self.store = store if share else None
        self.share = share
        self.replay_only = replay_only
        self.retry = retry
        self.failures: dict[str, str] = {}
        """Key of a request not to be tried again -> why it failed; no error, which holds frames."""
        self.states = StateCache(memory_bytes)
        self._known: dict[str, dict[str, Outcome]] = {}

    @property
    def identity(self) -> Identity:
        """What the keys of its suite have in common."""
        return self.engine.identity

    def release(self) -> None:
        """Has the engine give back what memory it can; level states stay."""
        self.engine.release()

    def outcome(self, request: StageRequest, namespace: str = "") -> Answer:
        """Answers one request; carries out what is missing, ancestors included.

        Args:
            request: the state asked for.
            namespace: unshared only: names whoever follows one episode after another per task and
                replica.

        Raises:
            FailedStageError: the engine raised.
            StageError: the stage is not in the tree with `replay_only`.
        """
        if not self.share:
            self._forget_all_but_start(request, episode_of(request, namespace))
        return self._call(request, namespace).answer(request)

    def outcomes(self, requests: Sequence[StageRequest], namespace: str = "") -> list[Answer]:
        """Answers several requests, in their order."""
        return [self.outcome(request, namespace) for request in requests]

    def state_dict(self, request: StageRequest, namespace: str = "") -> dict[str, Tensor]:
        """The whole model in a state; carries out what is missing."""
        call = self._call(request, namespace)
        state = call.ensure(request.as_kind("stage"))
        return call.engine_does(request, lambda load: self.engine.state_dict(state, load))

    def _call(self, request: StageRequest, namespace: str) -> "_Call":
        space = "" if self.share else episode_of(request, namespace)
        known = self._known.setdefault(space, {})
        return _Call(self, known, space)

    def _forget_all_but_start(self, request: StageRequest, episode: str) -> None:
        known = self._known.pop(episode, {})
        kept: dict[str, Outcome] = {}
        start = start_of(request)
        while start is not None:
            key = self.identity.key(start)
            if key in known:
                kept[key] = known[key]
            start = start_of(start)
        self._known[episode] = kept
        self.states.keep(episode, kept)
        while len(self._known) > 1000:  # the episode used longest ago
            self._known.pop(next(iter(self._known)))


class _Missing(Exception):
    """A version's weights are gone. Ends the engine's call: it cannot recompute them inside it."""

    def __init__(self, version: str) -> None:
        super().__init__(version)
        self.version = version


class _Call:
    """One call's way through the tree, with the account of what it ran."""

    def __init__(self, stages: LocalStages, known: dict[str, Outcome], space: str) -> None:
        self._stages = stages
        self._engine = stages.engine
        self._store = stages.store
        self._known = known
        self._space = space
        self._executed: set[str] = set()
        self._carried_out: list[str] = []
        self._recomputed: dict[str, dict[int, LevelState]] = {}
        self._spent_s = 0.0

    def answer(self, request: StageRequest) -> Answer:
        outcome = self.ensure(request)
        return Answer(
            outcome=outcome,
            executed=outcome.key in self._executed,
            carried_out=tuple(self._carried_out),
            recomputed=tuple(self._recomputed),
            spent_s=self._spent_s,
        )

    def ensure(self, request: StageRequest) -> Outcome:
        """The outcome of a request, from the tree or carried out now."""
        key = self._engine.identity.key(request)
        known = self._known.get(key) if self._store is None else self._store.get(key)
        if known is not None:
            return known
        if self._stages.replay_only:
            raise not_in_tree(request)
        if key in self._stages.failures:
            raise FailedStageError(self._stages.failures[key])
        try:
            outcome, states = self._run(request)
        except FailedStageError as error:
            if not self._stages.retry:
                self._stages.failures[key] = str(error)
            raise
        self._executed.add(key)
        if request.kind == "stage" and request.path:
            self._carried_out.append(key)
        if self._store is None:
            self._known[key] = outcome
            return outcome
        return self._store.put(outcome, states)

    def engine_does(self, request: StageRequest, function: Callable[[LoadState], T]) -> T:
        """Calls the engine; recomputes what it misses; wraps what it raises."""
        while True:
            try:
                return function(self._load)
            except _Missing as error:
                missing = error.version
            except StorageError:
                raise
            except Exception as error:
                raise FailedStageError(
                    f"a stage must run, got {describe(request)} failing with {in_one_line(error)}"
                ) from error
            self._recompute(request, missing)

    def _run(self, request: StageRequest) -> tuple[Outcome, dict[int, LevelState]]:
        start = start_of(request)
        state = None if start is None else self.ensure(start)

        def run(load: LoadState) -> tuple[Outcome, dict[int, LevelState]]:
            if state is None:
                return self._engine.start(request), {}
            if request.kind == "test":
                return self._engine.test(request, state, load), {}
            return self._engine.run(request, state, load)

        outcome, states = self.engine_does(request, run)
        self._spent_s += outcome.time_s
        self._stages.states.put(self._space, outcome.key, states)
        return outcome, states

    def _load(self, version: str, level: int) -> LevelState:
        kept = self._stages.states.get(self._space, version, level)
        if kept is not None:
            return kept
        states = self._recomputed.get(version)
        if states is None and self._store is not None:
            states = self._store.states(version)
        if states is None:
            raise _Missing(version)
        if level not in states:
            raise StageError(
                f"a version must hold the levels that its stage changed, got {version[:12]} "
                f"without level {level}."
            )
        self._stages.states.put(self._space, version, states)
        return states[level]

    def _recompute(self, request: StageRequest, version: str) -> None:
        """Runs a stage of the path again for its weights; its committed outcome stands."""
        stage = request.as_kind("stage")
        while self._engine.identity.key(stage) != version:
            if not stage.path:
                raise StageError(
                    f"versions must be stages of the path, got {version[:12]} for "
                    f"{describe(request)}."
                )
            stage = stage.parent()
        _, states = self._run(stage)
        self._recomputed[version] = states  # held to the call's end, whatever the caches do
        if self._store is not None:
            self._store.put_states(version, states)
