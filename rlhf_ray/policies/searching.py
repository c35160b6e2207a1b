"""A policy's values guide a search on one task: best first, so many stages. No Ray here.

Between no search (the policy's own decisions) and all of the tree. What has been carried out is
sunk, so the result is the best val metric that was met, and its cost is that of everything tried.

Dimension letters: A actions.
"""

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.config import WITHOUT_EPSILON
from rlhf_ray.errors import InputError
from rlhf_ray.evaluation.judging import Player
from rlhf_ray.evaluation.rollouts import Decide, Episode, Stages, Tried
from rlhf_ray.operations import Stop
from rlhf_ray.outcomes import StagePath
from rlhf_ray.policies.observations import Observer
from rlhf_ray.policies.policy import Policy
from rlhf_ray.process import (
    ProcessSpec,
    RewardWeights,
    State,
    Step,
    action_mask,
    advance,
    stage_request,
    start_request,
    start_state,
)

Values = Callable[[State, NDArray[np.int8]], NDArray[np.float32]]
"""(state, mask of open actions (A,)) -> Q-values (A,), minus infinity where the mask is 0."""


def guided(
    policy: Policy, spec: ProcessSpec, observer: Observer, stages: Stages, n_stages: int
) -> Player:
    """How a policy fine-tunes a task when it may search on it.

    Args:
        policy: with values; made for the process and the observer.
        spec: the process; its reward weights are replaced by those the policy was learned under.
        observer: what the policy sees.
        stages: carries the stages out.
        n_stages: see `best_first`.

    Raises:
        InputError: the policy has no values.
    """
    algorithm = policy.metadata["config"]["algorithm"]
    if algorithm in WITHOUT_EPSILON:
        raise InputError(
            "a search must be guided by a policy with values, got one learned by "
            f"algorithm={algorithm}. Learn one with dqn or q-learning, or leave search_stages out."
        )
    learned = policy.metadata["values"]
    weights = RewardWeights(
        tuning_cost=learned["tuning_cost_weight"], switch_cost=learned["switch_cost_weight"]
    )
    weighed = replace(spec, settings=replace(spec.settings, weights=weights))
    weighed = weighed if n_stages else policy.as_charged(weighed)

    def values(state: State, mask: NDArray[np.int8]) -> NDArray[np.float32]:
        return policy.values(state.level, observer.observe(weighed, state), mask)

    def decide(state: State, mask: NDArray[np.int8]) -> int:
        return policy.act(state.level, observer.observe(weighed, state), mask)

    def player(task: str, replica: int) -> Episode:
        return best_first(
            weighed,
            values,
            stages,
            task,
            replica,
            gamma=learned["gamma"],
            n_stages=n_stages,
            decide=decide,
        )

    return player


@dataclass(frozen=True, kw_only=True, eq=False)
class _Node:
    state: State
    steps: tuple[Step, ...]
    collected: float  # discounted rewards so far
    discount: float  # of the next reward


def best_first(
    spec: ProcessSpec,
    values: Values,
    stages: Stages,
    task: str,
    replica: int,
    *,
    gamma: float,
    n_stages: int,
    decide: Decide | None = None,
) -> Episode:
    """Follows the policy to its end, then takes the most promising actions left, anywhere.

    An action promises the discounted rewards collected before it and the policy's value of it: by
    the most promising of the ways that lead to its model and acting level.

    Args:
        spec: the process, with the reward weights that the values were learned under.
        values: of the policy.
        stages: carries the stages out.
        task: name of the task.
        replica: replica seed.
        gamma: the policy's discount.
        n_stages: stages to carry out beyond the policy's own, >= 0. Fewer where the tree ends.
        decide: the policy's own decisions; None: the highest value.

    Returns:
        The fine-tuning that met the best val metric, charged with everything that was tried.
    """
    tried = Tried(spec, stages)
    start = tried.outcome(start_request(task, replica)).outcome
    state = start_state(spec, start, task, replica, level=0)
    root = _Node(state=state, steps=(), collected=0.0, discount=1.0)
    frontier = _Frontier(spec)

    def follow(node: _Node, action: int) -> _Node:
        request = stage_request(spec, node.state, action)
        outcome = None if request is None else tried.outcome(request).outcome
        after, step = advance(spec, node.state, action, outcome)
        return _Node(
            state=after,
            steps=(*node.steps, step),
            collected=node.collected + node.discount * step.reward,
            discount=node.discount * gamma,
        )

    node = root
    while not node.state.terminated:
        mask = action_mask(spec, node.state)
        values_A = values(node.state, mask)
        decided = decide(node.state, mask) if decide else int(values_A.argmax())
        frontier.add(node, values_A, but=decided)
        node = follow(node, decided)
    best, own = node, tried.n_stages
    while tried.n_stages < own + n_stages and (promising := frontier.pop()) is not None:
        node, action = promising
        # the budget bounds all that is tried together, not each path by itself
        if not action_mask(spec, replace(node.state, cost=tried.cost))[action]:
            continue
        node = follow(node, action)
        if spec.score(node.state.best) > spec.score(best.state.best):
            best = node
        if not node.state.terminated:
            frontier.add(node, values(node.state, action_mask(spec, node.state)))
    return tried.charged(Episode(state=best.state, steps=best.steps))


class _Frontier:
    """Actions not taken yet, the most promising first; ties by the order in which they came.

    Many ways of handing over and skipping lead to one model and one acting level. An action there
    is kept only where it promises more than by every other way that leaves as many skips.
    """

    def __init__(self, spec: ProcessSpec) -> None:
        self._spec = spec
        self._heap: list[tuple[float, int, _Node, int]] = []
        self._order = itertools.count()
        self._most: dict[tuple[StagePath, int, int], list[float]] = {}
        """(path, acting level, action) -> the most that it promised after at most 0, 1, ... skips
        in a row."""

    def add(self, node: _Node, values_A: NDArray[np.float32], but: int | None = None) -> None:
        """Takes in a state's open actions, but for one; not `stop`, which shows nothing new.

        Args:
            node: the state.
            values_A: minus infinity where an action is closed.
            but: is taken at once.
        """
        for action in np.flatnonzero(np.isfinite(values_A)).tolist():
            if isinstance(self._spec.decode(action)[0], Stop):
                continue
            promise = node.collected + node.discount * float(values_A[action])
            if self._promises_most(node.state, action, promise) and action != but:
                heapq.heappush(self._heap, (-promise, next(self._order), node, action))

    def pop(self) -> tuple[_Node, int] | None:
        """The most promising action left, with its state; None if there is none."""
        while self._heap:
            promise, _, node, action = heapq.heappop(self._heap)
            if -promise >= self._known(node.state, action)[node.state.skips]:
                return node, action
        return None

    def _promises_most(self, state: State, action: int, promise: float) -> bool:
        """Whether an action promises more than it ever did, and takes note if so."""
        known = self._known(state, action)
        if promise <= known[state.skips]:
            return False
        known[state.skips :] = [max(promise, most) for most in known[state.skips :]]
        return True

    def _known(self, state: State, action: int) -> list[float]:
        none = [-math.inf] * self._spec.n_levels
        return self._most.setdefault((state.path, state.level, action), none)
