"""Checks that ship with the package: small turn-based problems whose optimum is known.

A problem has states, levels and a horizon; the acting level chooses an operation and the level
that acts next. Every level can live on small rewards of its own; more is to be had only by a chain
of operations of different levels, of which all but the last cost. A level that looks at its own
rewards alone never starts a chain. Dynamic programming gives the optimum, and the value of any
policy, exactly. Ray is needed for the environment only, not for the rest.

Dimensions: S state, L level, O operation, A action, F feature, T horizon.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ray.digests import derive_seed
from rlhf_ray.errors import InputError

if TYPE_CHECKING:
    from ray.rllib.env.multi_agent_env import MultiAgentEnv

Decide = Callable[[int, np.ndarray, np.ndarray], int]
"""A policy: (level, features (F,) float32, action mask (A,)) -> action."""

LINGER = 0
"""The operation with a small reward that leaves everything as it is."""


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A turn-based problem. Action = operation * L + next level.

    Attributes:
        levels: the L level names.
        gamma: discount per step.
        horizon: T, steps until the end.
        next_state: (S, L, O) int: the state that an operation leads to.
        reward: (S, L, O) float: what the acting level gets.
        ends: (S, L, O) bool: whether the episode ends.
        mask: (S, L, A) int8: the valid actions, at least one each.
    """

    levels: tuple[str, ...]
    gamma: float
    horizon: int
    next_state: np.ndarray
    reward: np.ndarray
    ends: np.ndarray
    mask: np.ndarray

    @property
    def n_states(self) -> int:
        """S."""
        return self.reward.shape[0]

    @property
    def n_actions(self) -> int:
        """A."""
        return self.mask.shape[-1]

    @property
    def n_features(self) -> int:
        """F: one-hot level and state, and the steps done."""
        return len(self.levels) + self.n_states + 1

    def features(self, state: int, level: int, step: int) -> np.ndarray:
        """(F,) float32: what the acting level sees."""
        n_levels = len(self.levels)
        out = np.zeros(self.n_features, dtype=np.float32)
        out[level] = out[n_levels + state] = 1.0
        out[-1] = step / self.horizon
        return out

    def start(self, seed: int, episode: int) -> tuple[int, int]:
        """The (state, level) at which an episode starts: uniform, fixed by its number."""
        generator = np.random.default_rng(derive_seed(seed, "start", episode))
        return int(generator.integers(self.n_states)), int(generator.integers(len(self.levels)))


def random_problem(
    seed: int,
    n_levels: int,
    *,
    gamma: float = 0.9,
    n_states: int = 4,
    n_operations: int = 3,
    horizon: int = 6,
    chain: int = 3,
) -> Problem:
    """A random problem with traps.

    Args:
        seed: equal seeds give equal problems.
        n_levels: L, >= 2.
        gamma: discount in [0, 1].
        n_states: S, >= chain.
        n_operations: O, >= 2, `LINGER` among them.
        horizon: T.
        chain: operations, each of another level than the one before, that lead to the treasure.

    Returns:
        The problem.
    """
    if n_levels < 2 or n_operations < 2 or n_states < chain:
        raise InputError(
            "a problem needs n_levels >= 2, n_operations >= 2 and n_states >= chain, got "
            f"n_levels={n_levels}, n_operations={n_operations}, n_states={n_states}, chain={chain}."
        )
    generator = np.random.default_rng(derive_seed(seed, "problem", n_levels))
    shape = (n_states, n_levels, n_operations)
    next_state = generator.integers(n_states, size=shape)
    reward = generator.uniform(-0.2, 0.0, size=shape)
    ends = np.zeros(shape, dtype=bool)
    next_state[:, :, LINGER] = np.arange(n_states)[:, None]
    reward[:, :, LINGER] = generator.uniform(0.02, 0.1, size=shape[:2])
    level = int(generator.integers(n_levels))
    for link in range(chain):
        operation = int(generator.integers(1, n_operations))
        last = link == chain - 1
        next_state[link, level, operation] = 0 if last else link + 1
        reward[link, level, operation] = 1.0 if last else -0.1
        level = (level + int(generator.integers(1, n_levels))) % n_levels
    mask = (generator.random((*shape[:2], n_operations * n_levels)) < 0.9).astype(np.int8)
    # lingering, and every hand-over after a rewarding operation, stays possible
    keep = (np.arange(n_operations) == LINGER) | (reward >= -0.1)
    mask = np.maximum(mask, np.repeat(keep, n_levels, axis=-1).astype(np.int8))
    return Problem(
        levels=tuple(f"level{i}" for i in range(n_levels)),
        gamma=gamma,
        horizon=horizon,
        next_state=next_state,
        reward=reward,
        ends=ends,
        mask=mask,
    )


def solve(problem: Problem) -> tuple[float, Decide]:
    """The optimum by dynamic programming.

    Returns:
        The discounted return of the best policy, averaged over the starts, and that policy.
    """
    best: dict[bytes, int] = {}

    def choose(values_A: np.ndarray, state: int, level: int, step: int) -> float:
        action = int(np.where(problem.mask[state, level] != 0, values_A, -np.inf).argmax())
        best[problem.features(state, level, step).tobytes()] = action
        return float(values_A[action])

    value = _evaluate(problem, choose)
    return value, lambda level, features, mask: best[features.tobytes()]


def policy_value(problem: Problem, decide: Decide) -> float:
    """The exact discounted return of a policy, averaged over the starts."""

    def choose(values_A: np.ndarray, state: int, level: int, step: int) -> float:
        features, mask = problem.features(state, level, step), problem.mask[state, level]
        return float(values_A[decide(level, features, mask)])

    return _evaluate(problem, choose)


def random_value(problem: Problem) -> float:
    """The exact discounted return of choosing uniformly among the valid actions."""

    def choose(values_A: np.ndarray, state: int, level: int, step: int) -> float:
        return float(values_A[problem.mask[state, level] != 0].mean())

    return _evaluate(problem, choose)


def score(problem: Problem, decide: Decide) -> float:
    """(return - random) / (optimum - random): 1 is optimal, 0 is no better than random."""
    optimum, chance = solve(problem)[0], random_value(problem)
    return (policy_value(problem, decide) - chance) / (optimum - chance)


def _evaluate(problem: Problem, choose: Callable[[np.ndarray, int, int, int], float]) -> float:
    """Backward induction; `choose` makes a state's value out of the values of its actions."""
    n_states, n_levels, _ = problem.reward.shape
    following = np.zeros((n_states, n_levels))
    for step in reversed(range(problem.horizon)):
        present = np.zeros_like(following)
        for state in range(n_states):
            for level in range(n_levels):
                after = following[problem.next_state[state, level]]  # (O, L)
                after = np.where(problem.ends[state, level][:, None], 0.0, after)
                values_OL = problem.reward[state, level][:, None] + problem.gamma * after
                present[state, level] = choose(values_OL.reshape(-1), state, level, step)
        following = present
    return float(following.mean())


@cache
def _environment_class() -> type:
    """The environment's class, made when first asked for: it needs Ray, the rest does not."""
    import gymnasium as gym
    from ray.rllib.env.multi_agent_env import MultiAgentEnv

    class KnownOptimumEnv(MultiAgentEnv):
        """A problem as a turn-based `MultiAgentEnv`."""

        def __init__(self, problem: Problem, seed: int) -> None:
            super().__init__()
            self.problem, self.seed_of_starts = problem, seed
            self.possible_agents = self.agents = list(problem.levels)
            observation = gym.spaces.Dict(
                {
                    "features": gym.spaces.Box(-1.0, 1.0, (problem.n_features,), np.float32),
                    "action_mask": gym.spaces.Box(0, 1, (problem.n_actions,), np.int8),
                }
            )
            self.observation_spaces = dict.fromkeys(problem.levels, observation)
            self.action_spaces = dict.fromkeys(
                problem.levels, gym.spaces.Discrete(problem.n_actions)
            )
            self._episode = -1

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[Any, Any]:
            self._episode = (options or {}).get("episode", self._episode + 1)
            self._state, self._level = self.problem.start(self.seed_of_starts, self._episode)
            self._step = 0
            return self._observation(), {}

        def step(self, action_dict: Any) -> tuple[Any, Any, Any, Any, Any]:
            problem, name = self.problem, self.problem.levels[self._level]
            operation, following = divmod(int(action_dict[name]), len(problem.levels))
            here = (self._state, self._level, operation)
            self._step += 1
            ended = bool(problem.ends[here]) or self._step == problem.horizon
            reward = float(problem.reward[here])
            self._state, self._level = int(problem.next_state[here]), following
            observation = {} if ended else self._observation()
            return observation, {name: reward}, {"__all__": ended}, {"__all__": False}, {}

        def _observation(self) -> dict[str, dict[str, np.ndarray]]:
            problem, state, level = self.problem, self._state, self._level
            return {
                problem.levels[level]: {
                    "features": problem.features(state, level, self._step),
                    "action_mask": problem.mask[state, level],
                }
            }

    return KnownOptimumEnv


def known_optimum_env(problem: Problem, seed: int = 0) -> "MultiAgentEnv":
    """A problem as an environment of the kind that `rlhf_ray.algorithms` describes.

    Args:
        problem: the problem.
        seed: of the episodes' starts.
    """
    return _environment_class()(problem, seed)
