"""Playing a fine-tuning: by a policy, or along a fixed sequence of stages. No Ray here.

Both go by one account of cost and switches; how the result is judged is left to `judging`.

Dimension letters: A actions, F features.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import InputError
from rlhf_ray.outcomes import Outcome, StagePath, StageRequest
from rlhf_ray.policies.observations import Observer
from rlhf_ray.process import (
    ProcessSpec,
    State,
    Step,
    action_mask,
    advance,
    affordable,
    stage_request,
    start_request,
    start_state,
    step_record,
    with_stage,
)
from rlhf_ray.tree.stage_tree import Stages as TreeStages
from rlhf_ray.tree.tally import Answer, TalliedStages, Tally

THREADS = 16
"""Episodes that are in flight at once; each waits for one stage at a time."""

T = TypeVar("T")
S = TypeVar("S")

Act = Callable[[int, NDArray[np.float32], NDArray[np.int8]], int]
"""(acting level, features (F,), mask of open actions (A,)) -> action."""

Decide = Callable[[State, NDArray[np.int8]], int]
"""(state, mask of open actions (A,)) -> action."""


class Stages(Protocol):
    """Answers requests for stages, by whatever means; calls may come from several threads."""

    def outcome(self, request: StageRequest) -> Answer:
        """Answers one request."""
        ...


@dataclass(frozen=True, kw_only=True)
class Episode:
    """A fine-tuning so far.

    Attributes:
        state: where it stands; where a search found it, the state's cost is of all that was tried.
        steps: a record per step of the way there.
        tried_stages: stages that a search carried out; None: those on the way.
        tried_s: measured seconds of all that a search carried out; None: of the way.
    """

    state: State
    steps: tuple[Step, ...] = ()
    tried_stages: int | None = None
    tried_s: float | None = None


class Tried:
    """The account of a search on one task: what it carries out, every distinct stage once.

    Args:
        spec: says what a stage costs.
        stages: carries them out.
    """

    def __init__(self, spec: ProcessSpec, stages: Stages) -> None:
        self._spec, self._stages = spec, stages
        self._known: dict[StagePath, Outcome] = {}

    def __contains__(self, path: StagePath) -> bool:
        return path in self._known

    @property
    def n_stages(self) -> int:
        """Stages so far; the evaluation of the start is none."""
        return sum(bool(path) for path in self._known)

    @property
    def cost(self) -> float:
        """Of all of them and of the start, full stages (or seconds)."""
        return sum(self._spec.cost(outcome) for outcome in self._known.values())

    def outcome(self, request: StageRequest) -> Answer:
        """Answers one request."""
        answer = self._stages.outcome(request)
        self._known.setdefault(request.path, answer.outcome)
        return answer

    def charged(self, episode: Episode) -> Episode:
        """A fine-tuning that the search returns: all that was tried is its price."""
        return replace(
            episode,
            state=replace(episode.state, cost=self.cost),
            tried_stages=self.n_stages,
            tried_s=sum(outcome.time_s for outcome in self._known.values()),
        )


class TolerantStages:
    """A provider for which a stage that fails is one that diverged, as in a search.

    Args:
        stages: who answers; the start and reports on test splits must not fail.
    """

    def __init__(self, stages: TreeStages) -> None:
        self._stages = stages
        self._failures: dict[str, None] = {}

    @property
    def failures(self) -> tuple[str, ...]:
        """A line per stage that failed: which, and why."""
        return tuple(self._failures)

    def outcome(self, request: StageRequest) -> Answer:
        """Answers one request (see `TalliedStages.outcome`)."""
        tally = Tally()
        answer = TalliedStages(self._stages, tally).outcome(request)
        if tally.failed:  # what goes on from a failed stage fails with its line
            self._failures.setdefault(tally.failure)
        return answer


def play(
    spec: ProcessSpec,
    decide: Decide,
    stages: Stages,
    task: str,
    replica: int,
    *,
    level: int = 0,
    on_step: Callable[[State, Step], None] | None = None,
) -> Episode:
    """One episode of the decision process.

    Args:
        spec: the process.
        decide: gives an open action.
        stages: carries the stages out.
        task: name of the task.
        replica: replica seed.
        level: acts first.
        on_step: called after each step with the state it led to and its record.
    """
    start = stages.outcome(start_request(task, replica)).outcome
    state, steps = start_state(spec, start, task, replica, level), []
    while not state.terminated:
        mask = action_mask(spec, state)
        action = int(decide(state, mask))
        if not mask[action]:
            raise InputError(f"a decision must be an open action, got action={action} of task "
                             f"{task!r}. Open: {np.flatnonzero(mask).tolist()}.")  # fmt: skip
        request = stage_request(spec, state, action)
        outcome = None if request is None else stages.outcome(request).outcome
        state, step = advance(spec, state, action, outcome)
        steps.append(step)
        if on_step is not None:
            on_step(state, step)
    return Episode(state=state, steps=tuple(steps))


def roll_out(
    spec: ProcessSpec,
    observer: Observer,
    act: Act,
    stages: Stages,
    task: str,
    replica: int,
    *,
    level: int = 0,
    on_step: Callable[[State, Step], None] | None = None,
) -> tuple[State, tuple[Step, ...]]:
    """One episode of a policy: its last state, and its steps. Arguments as in `play`."""

    def decide(state: State, mask: NDArray[np.int8]) -> int:
        return act(state.level, observer.observe(spec, state), mask)

    episode = play(spec, decide, stages, task, replica, level=level, on_step=on_step)
    return episode.state, episode.steps


def walk(
    spec: ProcessSpec,
    stages: Stages,
    task: str,
    replica: int,
    path: StagePath,
    *,
    acting: Sequence[int] | None = None,
    stop: Callable[[State], bool] = lambda state: False,
) -> list[Episode]:
    """Carries out a fixed sequence of stages under the account of the process.

    The position starts at level 0; each stage acts at its lowest level, and getting there from the
    position before is a switch of that distance. The walk ends where the budget has no room for the
    next stage.

    Args:
        spec: the process; only its account is used, not its operations.
        stages: carries the stages out.
        task: name of the task.
        replica: replica seed.
        path: the stages.
        acting: the level at which each stage acts; None: its lowest.
        stop: ends the walk early.

    Returns:
        The fine-tunings that end after 0, 1, 2, ... stages: one walk gives all its lengths.
    """
    start = stages.outcome(start_request(task, replica)).outcome
    found = [Episode(state=start_state(spec, start, task, replica, level=0))]
    for i, step in enumerate(path):
        state = found[-1].state
        if stop(state) or not affordable(spec, state, step):
            break
        request = StageRequest(task=task, replica=replica, path=(*state.path, step))
        outcome = stages.outcome(request).outcome
        level = step.levels[0] if acting is None else acting[i]
        after = with_stage(spec, state, step.operation, step.levels, outcome)
        switches = state.switches + abs(level - state.level)
        after = replace(after, level=level, switches=switches)
        record = step_record(
            spec, state, after, step.operation, step.levels, level=level, outcome=outcome
        )
        found.append(Episode(state=after, steps=(*found[-1].steps, record)))
    return found


def concurrently(
    function: Callable[[T], S],
    items: Sequence[T],
    *,
    threads: int = THREADS,
    progress: Callable[[int, int], None] | None = None,
) -> list[S]:
    """A function's results in the items' order; `threads=1`: in the caller's own thread."""
    done: list[None] = []

    def run(item: T) -> S:
        result = function(item)
        done.append(None)  # append is atomic
        if progress is not None:
            progress(len(done), len(items))
        return result

    if threads <= 1 or len(items) <= 1:
        return [run(item) for item in items]
    with ThreadPoolExecutor(max_workers=min(threads, len(items))) as pool:
        futures = [pool.submit(run, item) for item in items]
        try:
            return [future.result() for future in futures]
        finally:
            for future in futures:  # after a failure: begin nothing new
                future.cancel()
