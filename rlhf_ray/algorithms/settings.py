"""What a trial's algorithm can be told. No Ray here."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from rlhf_ray.algorithms.exploration import ExploreBy
from rlhf_ray.errors import InputError
from rlhf_ray.policies.networks import Controller, EncoderKind


@dataclass(frozen=True, kw_only=True)
class AlgorithmSettings:
    """Settings of one trial.

    Attributes:
        gamma: discount per step of the environment, in [0, 1].
        epsilon: final probability of a random action, in [0, 1]; it starts at 1.
        n_episodes: episodes of the trial, >= 1.
        seed: of the sweep: initial weights, replay draws and exploration follow from it.
        decay_fraction: part of the trial after which epsilon has fallen to its final value,
            linearly, in [0, 1].
        warm_up: part of the trial before epsilon begins to fall, in [0, `decay_fraction`].
        explore_by: "step": each step explores or does not; "episode": an episode is random
            altogether or greedy altogether. Trials then have all that they explore in common.
        persistence: probability that a random action repeats the operation before it, in [0, 1).
        schedule: see `rlhf_ray.policies.networks.NetworkSettings`; "dqn" only.
        progress: see there.
        adherence: probability that a step that explores takes the schedule's action, in [0, 1).
        episodes_per_iteration: episodes per call of `train()`, >= 1; the weights stay as they are
            while they are played. None: the algorithm's own (`completed`).
        learning_rate: Adam's at the start, > 0; it falls linearly to a tenth over the trial. None:
            the algorithm's own.
        weight_decay: of the networks, decoupled (Loshchilov and Hutter 2019), >= 0; "dqn" only.
        batch_size: transitions per update, >= 1.
        updates_per_step: updates per step of the environment, > 0.
        relearn: after the last episode, learn the networks anew from all transitions, with
            `updates_per_step` for every step remembered, whoever played it; "dqn" only.
        free_actions: those that carry out no stage; seen often, they are drawn less when learning
            anew.
        tau: part of the way that the target networks go to the online ones at each update, (0, 1].
        hidden: units of the encoder's hidden layers.
        encoder: "shared" by all levels' heads, or "separate".
        controller: "levels": a policy per level; "single": one for all, for comparison. Then what
            follows a turn is a turn of the same policy, so the backup is the usual one.
        dueling: see `rlhf_ray.policies.networks.NetworkSettings`.
        n_members: networks in the ensemble, >= 1.
        pessimism: see `rlhf_ray.policies.networks.NetworkSettings`.
        double_q: double Q-learning.
        alpha: step size of tabular Q-learning, in (0, 1].
        stock: bootstrap every level from its own next turn, as RLlib's own multi-agent DQN does;
            for comparison.
        num_env_runners: processes that play episodes; 0: the trial's own.
        num_envs_per_runner: episodes in flight per process, >= 1 (a thread each).
        overrides: further RLlib settings by name: those of `overrides.READ`.
    """

    gamma: float
    epsilon: float
    n_episodes: int
    seed: int
    decay_fraction: float = 0.5
    warm_up: float = 0.0
    explore_by: ExploreBy = "step"
    persistence: float = 0.0
    schedule: tuple[tuple[int, ...], ...] | None = None
    progress: int = 0
    adherence: float = 0.0
    episodes_per_iteration: int | None = None
    learning_rate: float | None = None
    weight_decay: float = 0.0
    batch_size: int = 64
    updates_per_step: float = 3.0
    relearn: bool = False
    free_actions: tuple[int, ...] = ()
    tau: float = 0.02
    hidden: tuple[int, ...] = (64, 64)
    encoder: EncoderKind = "shared"
    controller: Controller = "levels"
    dueling: bool = True
    n_members: int = 1
    pessimism: float = 0.0
    double_q: bool = True
    alpha: float = 0.1
    stock: bool = False
    num_env_runners: int = 0
    num_envs_per_runner: int = 4
    overrides: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        for name in ("gamma", "epsilon", "decay_fraction"):
            _check(name, getattr(self, name), 0.0 <= getattr(self, name) <= 1.0, "in [0, 1]")
        for name in ("persistence", "adherence"):
            _check(name, getattr(self, name), 0.0 <= getattr(self, name) < 1.0, "in [0, 1)")
        held = 0.0 <= self.warm_up <= self.decay_fraction
        _check("warm_up", self.warm_up, held, f"in [0, decay_fraction={self.decay_fraction}]")
        for name in ("n_episodes", "episodes_per_iteration", "batch_size", "num_envs_per_runner"):
            value = getattr(self, name)
            _check(name, value, value is None or value >= 1, "at least 1")
        for name in ("learning_rate", "updates_per_step"):
            value = getattr(self, name)
            _check(name, value, value is None or value > 0, "> 0")
        for name in ("tau", "alpha"):
            _check(name, getattr(self, name), 0.0 < getattr(self, name) <= 1.0, "in (0, 1]")
        held = not (self.stock and self.controller == "single")
        _check("stock", self.stock, held, "False for a single controller, which has no other turns")
        _check("weight_decay", self.weight_decay, self.weight_decay >= 0, ">= 0")
        _check("num_env_runners", self.num_env_runners, self.num_env_runners >= 0, ">= 0")
        # a plain dict: RLlib copies and pickles its configuration
        object.__setattr__(self, "overrides", dict(self.overrides))


def completed(settings: AlgorithmSettings, algorithm: str) -> AlgorithmSettings:
    """The settings with an algorithm's own values where they leave them to it.

    What `ppo` plays is learned from once: it wants many episodes per iteration and many iterations,
    and so gets up to 32 of the first, and of the second 12 where there are 48 episodes or more.
    """
    rate, episodes = 1e-3, 4
    if algorithm == "ppo":
        rate, episodes = 3e-3, min(32, max(4, settings.n_episodes // 12))
    return replace(
        settings,
        learning_rate=rate if settings.learning_rate is None else settings.learning_rate,
        episodes_per_iteration=settings.episodes_per_iteration or episodes,
    )


def _check(name: str, value: float, holds: bool, what: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {what}, got {name}={value}.")
