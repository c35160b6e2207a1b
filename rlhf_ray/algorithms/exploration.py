"""Exploration by common random numbers.

Whether to explore and which action are drawn from (seed, episode, step) alone: trials that differ
in epsilon, gamma or weights meet the same draws, so they share stages and differ by what is swept.
"""

import numpy as np

from rlhf_ray.digests import derive_seed


def epsilon_at(episode: int, *, final: float, n_episodes: int, decay_fraction: float) -> float:
    """Probability of a random action: linear from 1 to `final`, then constant.

    Args:
        episode: number of the episode, from 0.
        final: the value reached, in [0, 1].
        n_episodes: episodes of the trial, >= 1.
        decay_fraction: part of the trial over which it falls, in [0, 1].

    Returns:
        A probability.

    >>> [epsilon_at(n, final=0.5, n_episodes=8, decay_fraction=0.5) for n in (0, 2, 4, 7)]
    [1.0, 0.75, 0.5, 0.5]
    """
    length = decay_fraction * n_episodes
    progress = min(1.0, episode / length) if length > 0 else 1.0
    return 1.0 + progress * (final - 1.0)


def exploring_action(
    seed: int, episode: int, step: int, mask_A: np.ndarray, epsilon: float
) -> int | None:
    """The random action of this step, or None to act greedily.

    Args:
        seed: of the sweep.
        episode: number of the episode.
        step: number of the step in it.
        mask_A: non-zero where an action is valid; at least one is.
        epsilon: probability of a random action.

    Returns:
        A valid action or None. A larger epsilon only adds steps at which it is not None.
    """
    generator = np.random.default_rng(derive_seed(seed, "explore", episode, step))
    coin, which = generator.random(2)
    if coin >= epsilon:
        return None
    valid = np.flatnonzero(mask_A)
    return int(valid[int(which * len(valid))])
