"""Exploration by common random numbers.

Whether to explore and which action are drawn from (seed, episode, step) alone: trials that differ
in epsilon, gamma or weights meet the same draws, so they share stages and differ by what is swept.
Where a policy is itself random (actor-critic), the noise it is sampled with is drawn that way.
"""

from typing import Literal

import numpy as np

from rlhf_ray.digests import derive_seed

ExploreBy = Literal["step", "episode"]


def epsilon_at(
    episode: int, *, final: float, n_episodes: int, decay_fraction: float, warm_up: float = 0.0
) -> float:
    """Probability of a random action: 1 at first, then linear to `final`, then constant.

    Args:
        episode: number of the episode, from 0.
        final: the value reached, in [0, 1].
        n_episodes: episodes of the trial, >= 1.
        decay_fraction: part of the trial after which it is `final`, in [0, 1].
        warm_up: part of the trial over which it is 1, in [0, `decay_fraction`].

    Returns:
        A probability.

    >>> [epsilon_at(n, final=0.5, n_episodes=8, decay_fraction=0.5) for n in (0, 2, 4, 7)]
    [1.0, 0.75, 0.5, 0.5]
    """
    begin, end = warm_up * n_episodes, decay_fraction * n_episodes
    if episode >= end:
        return final
    if episode <= begin:
        return 1.0
    return 1.0 + (episode - begin) / (end - begin) * (final - 1.0)


def exploring_action(
    seed: int,
    episode: int,
    step: int,
    mask_A: np.ndarray,
    epsilon: float,
    *,
    by: ExploreBy = "step",
    again: int | None = None,
    persistence: float = 0.0,
    usual: int | None = None,
    adherence: float = 0.0,
) -> int | None:
    """The random action of this step, or None to act greedily.

    Args:
        seed: of the sweep.
        episode: number of the episode.
        step: number of the step in it.
        mask_A: non-zero where an action is valid; at least one is.
        epsilon: probability of a random action.
        by: "step": draw for every step whether it explores; "episode": for all its steps at once.
        again: the action that repeats the last operation where it was handed to; None: there is
            none.
        persistence: probability that a random action is that one, if it is valid: what pays only
            when it is done several times over is found (Dabney et al. 2021).
        usual: the schedule's action; None: there is none.
        adherence: probability that it is taken instead of a random one, if it is valid: what is
            tried is then mostly what lies around the schedule.

    Returns:
        A valid action or None. A larger epsilon only adds steps at which it is not None.
    """
    generator = np.random.default_rng(derive_seed(seed, "explore", episode, step))
    coin, which, repeat = generator.random(3)
    if by == "episode":
        coin = np.random.default_rng(derive_seed(seed, "explore", episode)).random()
    if coin >= epsilon:
        return None
    if usual is not None and mask_A[usual] and generator.random() < adherence:
        return usual
    if again is not None and mask_A[again] and repeat < persistence:
        return again
    valid = np.flatnonzero(mask_A)
    return int(valid[int(which * len(valid))])


def gumbel_noise(seed: int, episode: int, step: int, n_actions: int) -> np.ndarray:
    """(A,) float32 standard Gumbel noise of this step.

    The arg-max of logits plus this noise is a sample of their softmax; policies that differ little
    take, with the same noise, the same action at most steps.

    Args:
        seed: of the sweep.
        episode: number of the episode.
        step: number of the step in it.
        n_actions: A.
    """
    generator = np.random.default_rng(derive_seed(seed, "sample", episode, step))
    return generator.gumbel(size=n_actions).astype(np.float32)
