"""The tree of stages: kept durably, and carried out in this process where it has gaps.

`TreeStore` keeps outcomes for ever and weights within a limit; `LocalStages` answers requests from
it and runs the engine for the rest. Several processes may work on one store: what each wrote is
whole or absent, and the first committed outcome of a key stands. That two of them do not carry out
one stage at the same time is left to `workers`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Protocol

from torch import Tensor

from rlhf_ray.errors import RlhfRayError, StageError
from rlhf_ray.outcomes import Identity, LevelState, Outcome, StageRequest
from rlhf_ray.tally import Answer
from rlhf_ray.tree_store import StateCache, TreeStore

LoadState = Callable[[str, int], LevelState]
"""(version, level) -> the level's state as that stage left it."""


class Engine(Protocol):
    """Runs single stages of one suite; implemented by `rlhf_ray.stages`. Not thread-safe."""

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


def describe(request: StageRequest) -> str:
    """A request in one line, for messages."""
    steps = [f"{step.operation.name}@{','.join(map(str, step.levels))}" for step in request.path]
    where = f"task {request.task!r}, replica {request.replica}"
    return f"{request.kind} [{' > '.join(steps) or 'start'}] of {where}"


class LocalStages:
    """Answers requests in one process, without Ray; also the core of each Ray worker.

    Args:
        engine: runs what is not known.
        store: where outcomes and weights are kept; None: in memory only.
        share: False: every request is carried out. Only the states it starts from are known from
            the requests before it in its namespace (an episode after another), and nothing is
            stored. Random draws, and so the outcomes, are those of a shared tree.
        replay_only: refuse what is not in the tree instead of carrying it out.
        memory_bytes: limit of level states kept in memory.
    """

    def __init__(
        self,
        engine: Engine,
        store: TreeStore | None = None,
        *,
        share: bool = True,
        replay_only: bool = False,
        memory_bytes: int = 2**30,
    ) -> None:
        self.engine = engine
        self.store = store if share else None
        self.share = share
        self.replay_only = replay_only
        self.states = StateCache(memory_bytes)
        self._known: dict[str, dict[str, Outcome]] = {}

    @property
    def identity(self) -> Identity:
        """What the keys of its suite have in common."""
        return self.engine.identity

    def outcome(self, request: StageRequest, namespace: str = "") -> Answer:
        """Answers one request; carries out what is missing, ancestors included.

        Args:
            request: the state asked for.
            namespace: unshared only: requests of one namespace follow one another along a path.

        Raises:
            StageError: the engine raised, or the stage is not in the tree with `replay_only`.
        """
        if not self.share:
            self._forget_all_but_start(request, namespace)
        return self._call(namespace).answer(request)

    def outcomes(self, requests: Sequence[StageRequest], namespace: str = "") -> list[Answer]:
        """Answers several requests, in their order."""
        return [self.outcome(request, namespace) for request in requests]

    def state_dict(self, request: StageRequest, namespace: str = "") -> dict[str, Tensor]:
        """The whole model in a state; carries out what is missing."""
        call = self._call(namespace)
        state = call.ensure(request.as_kind("stage"))
        return call.guarded(request, partial(self.engine.state_dict, state, call.load_for(request)))

    def _call(self, namespace: str) -> "_Call":
        space = "" if self.share else namespace
        known = self._known.setdefault(space, {})
        return _Call(self, known, space)

    def _forget_all_but_start(self, request: StageRequest, namespace: str) -> None:
        known = self._known.pop(namespace, {})
        kept: dict[str, Outcome] = {}
        start = start_of(request)
        while start is not None:
            key = self.identity.key(start)
            if key in known:
                kept[key] = known[key]
            start = start_of(start)
        self._known[namespace] = kept
        self.states.keep(namespace, kept)
        while len(self._known) > 1000:  # namespaces that have ended; oldest use first
            self._known.pop(next(iter(self._known)))


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
        self._recomputed = 0
        self._spent_s = 0.0

    def answer(self, request: StageRequest) -> Answer:
        outcome = self.ensure(request)
        return Answer(
            outcome=outcome,
            executed=outcome.key in self._executed,
            carried_out=tuple(self._carried_out),
            recomputed=self._recomputed,
            spent_s=self._spent_s,
        )

    def ensure(self, request: StageRequest) -> Outcome:
        """The outcome of a request, from the tree or carried out now."""
        key = self._engine.identity.key(request)
        known = self._known.get(key) if self._store is None else self._store.get(key)
        if known is not None:
            return known
        if self._stages.replay_only:
            raise StageError(
                f"every stage must be in the tree when replaying, got {describe(request)}, which "
                "is not. Carry it out first (run without replay_only)."
            )
        outcome, states = self._run(request)
        self._executed.add(key)
        if request.kind == "stage" and request.path:
            self._carried_out.append(key)
        if self._store is None:
            self._known[key] = outcome
            return outcome
        return self._store.put(outcome, states)

    def load_for(self, request: StageRequest) -> LoadState:
        """How the engine gets at the level states on a request's path."""
        return partial(self._load, request)

    def guarded[T](self, request: StageRequest, function: Callable[[], T]) -> T:
        """Runs a function of the engine; whatever it raises becomes a `StageError`."""
        try:
            return function()
        except RlhfRayError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0]
            raise StageError(
                f"a stage must run, got {describe(request)} failing with "
                f"{type(error).__name__}: {reason}"
            ) from error
    
    def _run(self, request: StageRequest) -> tuple[Outcome, dict[int, LevelState]]:
        start = start_of(request)
        state = None if start is None else self.ensure(start)
        outcome, states = self.guarded(request, partial(self._engine_run, request, state))
        self._spent_s += outcome.time_s
        self._remember(outcome.key, states)
        return outcome, states

    def _engine_run(
        self, request: StageRequest, state: Outcome | None
    ) -> tuple[Outcome, dict[int, LevelState]]:
        if state is None:
            return self._engine.start(request), {}
        if request.kind == "test":
            return self._engine.test(request, state, self.load_for(request)), {}
        return self._engine.run(request, state, self.load_for(request))

    def _load(self, request: StageRequest, version: str, level: int) -> LevelState:
        kept = self._stages.states.get(self._space, version, level)
        if kept is not None:
            return kept
        states = None if self._store is None else self._store.states(version)
        if states is None:
            states = self._recompute(request, version)
        self._remember(version, states)
        if level not in states:
            raise StageError(
                f"a version must hold the levels its stage changed, got {version[:12]} without "
                f"level {level}."
            )
        return states[level]

    def _recompute(self, request: StageRequest, version: str) -> dict[int, LevelState]:
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
        self._recomputed += 1
        if self._store is not None:
            self._store.put_states(version, states)
        return states

    def _remember(self, version: str, states: Mapping[int, LevelState]) -> None:
        self._stages.states.put(self._space, version, states)
