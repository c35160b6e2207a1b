"""What a trial's algorithm can be told. No Ray here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from rlhf_ray.errors import InputError
from rlhf_ray.networks import EncoderKind


@dataclass(frozen=True, kw_only=True)
class AlgorithmSettings:
    """Settings of one trial.

    Attributes:
        gamma: discount per step of the environment, in [0, 1].
        epsilon: final probability of a random action, in [0, 1]; it starts at 1.
        n_episodes: episodes of the trial, >= 1.
        seed: of the sweep: initial weights, replay draws and exploration follow from it.
        decay_fraction: part of the trial over which epsilon falls linearly, in [0, 1].
        episodes_per_iteration: episodes per call of `train()`, >= 1; the weights stay as they are
            while they are played.
        learning_rate: Adam's at the start, > 0; it falls linearly to a tenth over the trial.
        batch_size: transitions per update, >= 1.
        updates_per_step: updates per step of the environment, > 0.
        tau: part of the way that the target networks go to the online ones at each update, (0, 1].
        hidden: units of the encoder's hidden layers.
        encoder: "shared" by all levels' heads, or "separate".
        dueling: see `rlhf_ray.networks.NetworkSettings`.
        n_members: networks in the ensemble, >= 1.
        pessimism: see `rlhf_ray.networks.NetworkSettings`.
        double_q: double Q-learning.
        stock: bootstrap every level from its own next turn, as RLlib's own multi-agent DQN does;
            for comparison.
        num_env_runners: processes that play episodes; 0: the trial's own.
        num_envs_per_runner: episodes in flight per process, >= 1 (a thread each).
        overrides: further RLlib settings by name.
    """

    gamma: float
    epsilon: float
    n_episodes: int
    seed: int
    decay_fraction: float = 0.5
    episodes_per_iteration: int = 4
    learning_rate: float = 1e-3
    batch_size: int = 64
    updates_per_step: float = 3.0
    tau: float = 0.02
    hidden: tuple[int, ...] = (64, 64)
    encoder: EncoderKind = "shared"
    dueling: bool = True
    n_members: int = 1
    pessimism: float = 0.0
    double_q: bool = True
    stock: bool = False
    num_env_runners: int = 0
    num_envs_per_runner: int = 4
    overrides: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))

    def __post_init__(self) -> None:
        for name in ("gamma", "epsilon", "decay_fraction"):
            _check(name, getattr(self, name), 0.0 <= getattr(self, name) <= 1.0, "in [0, 1]")
        for name in ("n_episodes", "episodes_per_iteration", "batch_size", "num_envs_per_runner"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        for name in ("learning_rate", "updates_per_step"):
            _check(name, getattr(self, name), getattr(self, name) > 0, "> 0")
        _check("tau", self.tau, 0.0 < self.tau <= 1.0, "in (0, 1]")
        _check("num_env_runners", self.num_env_runners, self.num_env_runners >= 0, ">= 0")
        # a plain dict: RLlib copies and pickles its configuration
        object.__setattr__(self, "overrides", dict(self.overrides))


def _check(name: str, value: float, holds: bool, what: str) -> None:
    if not holds:
        raise InputError(f"{name} must be {what}, got {name}={value}.")
