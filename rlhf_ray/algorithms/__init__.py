"""The algorithms, by name. Ray is imported only when one is built.

Every algorithm is an RLlib `Algorithm` with one RLModule (policy) per level and the hand-over
backup; it works for any turn-based `MultiAgentEnv` in which exactly one agent (a level) acts per
step. Such an environment
- names its agents after the levels; observations are `{"features": (F,) float32, "action_mask":
  (A,)}`, actions `Discrete(A)`, alike for all levels;
- gives each step's reward to the acting agent alone, and ends by `terminateds["__all__"]`;
- is reset by `reset(options={"episode": n})`, which fixes all that is random about episode n;
- may block in `step`, and is called from one thread at a time;
- may have the methods `episode_metrics() -> dict[str, float]` and `episode_notes() -> dict[str,
  Any]` (whatever can be pickled), asked when an episode has ended.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from rlhf_ray.algorithms.overrides import check_overrides
from rlhf_ray.algorithms.settings import AlgorithmSettings, completed
from rlhf_ray.errors import InputError, unknown_name
from rlhf_ray.policies.networks import NetworkSettings

if TYPE_CHECKING:
    from ray.rllib.algorithms.algorithm import Algorithm
    from ray.rllib.env.multi_agent_env import MultiAgentEnv
    from torch import Tensor

ALGORITHMS: Mapping[str, str] = {
    "dqn": "rlhf_ray.algorithms.dqn",
    "ppo": "rlhf_ray.algorithms.ppo",
    "q-learning": "rlhf_ray.algorithms.q_learning",
}
"""Name -> module with `build`, which takes `build_algorithm`'s arguments but the name. What it
builds has a method `level_weights()` and the results that `episodes_of` reads."""


def check_algorithm(name: str) -> None:
    """Raises InputError, with the nearest valid name, unless `name` is an algorithm."""
    if name not in ALGORITHMS:
        raise unknown_name("algorithm", name, ALGORITHMS)


def build_algorithm(
    name: str,
    *,
    env_creator: "Callable[[dict[str, Any]], MultiAgentEnv]",
    env_config: dict[str, Any],
    levels: tuple[str, ...],
    n_features: int,
    n_actions: int,
    settings: AlgorithmSettings,
) -> "Algorithm":
    """Builds an algorithm, ready for `train()`. Starts Ray if none runs.

    Sets torch to one thread in this process: the networks are too small to gain from more.

    Args:
        name: one of `ALGORITHMS`.
        env_creator: makes an environment (see the module) from its configuration. It is neither
            copied nor pickled as long as `settings.num_env_runners` is 0.
        env_config: handed to `env_creator`.
        levels: the level names, the environment's agents.
        n_features: F.
        n_actions: A.
        settings: of the trial.

    Returns:
        The algorithm, untrained. Each `train()` plays `episodes_per_iteration` episodes and
        returns the metrics listed in its module; after the last one `done` is true.

    Raises:
        InputError: unknown algorithm or setting.
    """
    check_algorithm(name)
    check_overrides(name, settings.overrides)
    if not levels or len(set(levels)) != len(levels):
        raise InputError(f"levels must be distinct names, at least one, got levels={levels}.")
    if settings.controller == "single" and name == "q-learning":
        raise InputError(
            "controller must be 'levels' for q-learning, got controller='single': the state says "
            "whose turn it is, so one table would hold the rows of all. Take dqn or ppo."
        )
    return import_module(ALGORITHMS[name]).build(
        env_creator=env_creator,
        env_config=env_config,
        levels=levels,
        n_features=n_features,
        n_actions=n_actions,
        settings=completed(settings, name),
    )


def network_settings(
    name: str, *, n_levels: int, n_features: int, n_actions: int, settings: AlgorithmSettings
) -> NetworkSettings | None:
    """The shape of the networks that an algorithm learns, None for tables; needs no Ray."""
    check_algorithm(name)
    if name == "q-learning":
        return None
    if name == "ppo":  # a policy's logits: no state value to add to, no members to average
        settings = replace(settings, dueling=False, n_members=1, pessimism=0.0, schedule=None)
    return NetworkSettings(
        n_levels=n_levels,
        n_features=n_features,
        n_actions=n_actions,
        hidden=settings.hidden,
        dueling=settings.dueling,
        encoder=settings.encoder,
        controller=settings.controller,
        n_members=settings.n_members,
        pessimism=settings.pessimism,
        schedule=settings.schedule,
        progress=settings.progress,
    )


def level_weights(algorithm: "Algorithm") -> "dict[str, Tensor]":
    """What was learned: the state dict of `LevelQNetworks`, or tables (`q_table`)."""
    learned: dict[str, Tensor] = algorithm.level_weights()  # pyright: ignore[reportAttributeAccessIssue]
    return learned


def episodes_of(result: Mapping[str, Any]) -> list[dict[str, float]]:
    """One record per episode that a `train()` played, in order.

    Each has `episode` (its number), `return` (undiscounted), `length` (steps), `epsilon`, and what
    the environment's `episode_metrics()` gave.
    """
    return list(result["episode_records"])


def notes_of(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the environment's `episode_notes()` gave for each episode that a `train()` played."""
    return list(result["episode_notes"])


__all__ = [
    "ALGORITHMS",
    "AlgorithmSettings",
    "build_algorithm",
    "check_algorithm",
    "check_overrides",
    "episodes_of",
    "level_weights",
    "network_settings",
    "notes_of",
]
