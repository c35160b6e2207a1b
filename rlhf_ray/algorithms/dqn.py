"""`dqn`: double, dueling deep Q-learning with the hand-over backup, inside RLlib.

One iteration (`train()`): play `episodes_per_iteration` episodes, store their transitions, then
`updates_per_step` updates per new transition on batches drawn from everything seen so far, and
send the weights to the env runners. Its result holds, and nothing else of RLlib's:

- `episodes`, `environment_steps`, `updates`: so far, in this trial; `done`: all were played;
- `epsilon`, `return_mean`, `return_min`, `return_max`, `length_mean`: of this iteration's episodes
  (returns undiscounted, explored);
- `loss`, `td_error`, `q_value`: means over this iteration's updates;
- `learning_rate`; `sample_s`, `update_s`: seconds of this iteration;
- `episode_records`: see `rlhf_ray.algorithms.episodes_of`.

Stock DQN counts cheap steps (1,000 per iteration, a target update every 500); a step here is a
fine-tuning stage, so everything is counted in episodes and updates instead.
"""

import logging
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.dqn.dqn import DQN, DQNConfig
from ray.rllib.core import COMPONENT_RL_MODULE
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME

from rlhf_ray.algorithms import AlgorithmSettings, network_settings
from rlhf_ray.algorithms.env_runner import EnvFactory, NumberedEpisodesRunner
from rlhf_ray.algorithms.handover import ReplayBuffer, flatten
from rlhf_ray.algorithms.learner import HandoverLearner
from rlhf_ray.algorithms.modules import level_of_agent, levels_spec
from rlhf_ray.digests import derive_seed
from rlhf_ray.errors import InputError, RlhfRayError, unknown_name

FINAL_LEARNING_RATE = 0.1
"""Learning rate at a trial's end, as a part of the one at its start."""

COUNTS = "rlhf_ray_counts"
"""Key of the trial's counts in an algorithm's state."""

OURS = {
    "adam_epsilon", "batch_mode", "burn_in_len", "categorical_distribution_temperature",
    "double_q", "dueling", "env", "env_config", "env_runner_cls", "epsilon", "exploration_config",
    "gamma", "grad_clip_by", "hiddens", "learner_class", "levels", "lr", "lr_schedule",
    "minibatch_size", "n_step", "noisy", "num_atoms", "num_env_runners", "num_envs_per_env_runner",
    "num_epochs", "num_learners", "num_steps_sampled_before_learning_starts", "policies",
    "policy_mapping_fn", "replay_buffer_config", "rollout_fragment_length", "seed", "settings",
    "shuffle_batch_per_epoch", "sigma0", "target_network_update_freq", "tau", "train_batch_size",
    "train_batch_size_per_learner", "training_intensity", "v_max", "v_min",
}  # fmt: skip
"""RLlib settings that this algorithm replaces by its own or does not read."""


class HandoverDQNConfig(DQNConfig):
    """RLlib's configuration, with ours in `settings`."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or HandoverDQN)
        self.settings: AlgorithmSettings | None = None
        self.levels: tuple[str, ...] = ()


class HandoverDQN(DQN):
    """The algorithm; see the module."""

    # RLlib declares its general classes, and most of them optional
    config: Any  # a HandoverDQNConfig
    env_runner_group: Any
    learner_group: Any
    local_replay_buffer: Any  # a ReplayBuffer

    @classmethod
    def get_default_config(cls) -> HandoverDQNConfig:
        """The configuration class's defaults."""
        return HandoverDQNConfig()

    def setup(self, config: Any) -> None:
        """Builds runners and learner, and starts the counts."""
        self._trial_counts = {"episodes": 0, "environment_steps": 0, "updates": 0}
        self._metrics_of_iteration: dict[str, Any] = {}
        super().setup(config)

    def _setup_logdir(self) -> None:
        if self._storage:
            super()._setup_logdir()
            return
        # outside of Tune, RLlib would leave a directory in the user's home for every algorithm
        self._scratch = tempfile.TemporaryDirectory(prefix="rlhf_ray_")
        self._logdir = self._scratch.name

    def _create_local_replay_buffer_if_necessary(self, config: Any) -> Any:
        return ReplayBuffer(derive_seed(config.settings.seed, "replay"))

    @property
    def _settings(self) -> AlgorithmSettings:
        return self.config.settings

    def training_step(self) -> None:
        """Plays, stores, updates, sends the weights."""
        settings, counts = self._settings, self._trial_counts
        began = time.perf_counter()
        first = counts["episodes"]
        if first >= settings.n_episodes:
            raise RlhfRayError(f"a trial has {settings.n_episodes} episodes; all were played.")
        episodes = self._play(
            first, min(first + settings.episodes_per_iteration, settings.n_episodes)
        )
        played = time.perf_counter()
        n_steps = sum(len(episode) for episode in episodes)
        n_updates = max(1, round(settings.updates_per_step * n_steps))
        learned = self._learn(episodes, n_updates)
        counts["episodes"] += len(episodes)
        counts["environment_steps"] += n_steps
        self._metrics_of_iteration = {
            **counts,
            "done": counts["episodes"] >= settings.n_episodes,
            **_episode_metrics(episodes),
            **learned,
            "sample_s": played - began,
            "update_s": time.perf_counter() - played,
        }
        self.metrics.log_value(NUM_ENV_STEPS_SAMPLED_LIFETIME, n_steps, reduce="lifetime_sum")

    def _play(self, start: int, stop: int) -> list[MultiAgentEpisode]:
        parts = self.env_runner_group.foreach_env_runner(
            partial(NumberedEpisodesRunner.sample_between, start=start, stop=stop),
            local_env_runner=self._settings.num_env_runners == 0,
        )
        episodes = sorted(
            (episode for part in parts for episode in part),
            key=lambda episode: episode.custom_data["episode"],
        )
        numbers = [episode.custom_data["episode"] for episode in episodes]
        if numbers != list(range(start, stop)):
            raise RlhfRayError(
                f"every episode from {start} to {stop - 1} must come back, got {numbers}. "
                "A process that plays them was lost; run again."
            )
        return episodes

    def _learn(self, episodes: list[MultiAgentEpisode], n_updates: int) -> dict[str, float]:
        settings, buffer = self._settings, self.local_replay_buffer
        for episode in episodes:
            buffer.add(
                flatten(episode, self.config.levels, "own" if settings.stock else "handover")
            )
        done = min(1.0, (self._trial_counts["episodes"] + len(episodes)) / settings.n_episodes)
        rate = settings.learning_rate * (1.0 + done * (FINAL_LEARNING_RATE - 1.0))
        batches = buffer.sample(n_updates, settings.batch_size)
        learned = self._learner.update_on(batches, learning_rate=rate)
        self._trial_counts["updates"] += n_updates
        self._send_weights()
        return {**learned, "learning_rate": rate}

    def _send_weights(self) -> None:
        state = self._learner.get_state(components=COMPONENT_RL_MODULE)
        weights = {COMPONENT_RL_MODULE: state[COMPONENT_RL_MODULE]}
        # waits for every runner: RLlib's own way drops the weights if too many calls are waiting
        self.env_runner_group.foreach_env_runner(
            partial(NumberedEpisodesRunner.set_state, state=weights),
            local_env_runner=self._settings.num_env_runners == 0,
        )

    @property
    def _learner(self) -> HandoverLearner:
        # num_learners is 0: the learner lives in this process
        return self.learner_group._learner

    def level_weights(self) -> dict[str, torch.Tensor]:
        """The learner's networks as the state dict of `LevelQNetworks`."""
        return {k: v.detach().clone() for k, v in self._learner.networks.state_dict().items()}

    def step(self) -> dict[str, Any]:
        """One iteration; the result is ours alone (RLlib's has some hundred entries)."""
        super().step()
        return dict(self._metrics_of_iteration)

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state and our counts; the replay buffer is not in it."""
        return {**super().get_state(*args, **kwargs), COUNTS: dict(self._trial_counts)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes what `get_state` gave."""
        super().set_state({key: value for key, value in state.items() if key != COUNTS})
        self._trial_counts = dict(state.get(COUNTS, self._trial_counts))


def _episode_metrics(episodes: list[MultiAgentEpisode]) -> dict[str, Any]:
    records = [
        {
            **episode.custom_data["metrics"],
            "episode": episode.custom_data["episode"],
            "return": float(episode.get_return()),
            "length": len(episode),
            "epsilon": episode.custom_data["epsilon"],
        }
        for episode in episodes
    ]
    returns = [record["return"] for record in records]
    return {
        "epsilon": float(np.mean([record["epsilon"] for record in records])),
        "return_mean": float(np.mean(returns)),
        "return_min": min(returns),
        "return_max": max(returns),
        "length_mean": float(np.mean([record["length"] for record in records])),
        "episode_records": records,
    }


def build(
    *,
    env_creator: Callable[[dict[str, Any]], MultiAgentEnv],
    env_config: dict[str, Any],
    levels: tuple[str, ...],
    n_features: int,
    n_actions: int,
    settings: AlgorithmSettings,
) -> HandoverDQN:
    """Builds the algorithm; see `rlhf_ray.algorithms.build_algorithm`."""
    quiet_rllib()
    config = _config(levels, n_features, n_actions, settings)
    config.environment(
        env=MultiAgentEnv,  # a name only: the runner makes its environments from the factory
        env_config={"factory": EnvFactory(env_creator, env_config)},
        disable_env_checking=True,
    )
    _override(config, settings)
    return HandoverDQN(config=config)


def _config(
    levels: tuple[str, ...], n_features: int, n_actions: int, settings: AlgorithmSettings
) -> Any:
    network = network_settings(
        "dqn", n_levels=len(levels), n_features=n_features, n_actions=n_actions, settings=settings
    )
    observation_space = gym.spaces.Dict(
        {
            "features": gym.spaces.Box(-np.inf, np.inf, (n_features,), np.float32),
            "action_mask": gym.spaces.Box(0, 1, (n_actions,), np.int8),
        }
    )
    config: Any = HandoverDQNConfig()
    config.settings, config.levels = settings, levels
    config.framework("torch")
    config.env_runners(
        env_runner_cls=NumberedEpisodesRunner,
        num_env_runners=settings.num_env_runners,
        num_envs_per_env_runner=settings.num_envs_per_runner,
        batch_mode="complete_episodes",
        sample_timeout_s=None,
    )
    config.training(
        gamma=settings.gamma,
        lr=settings.learning_rate,
        grad_clip=10.0,
        learner_class=HandoverLearner,
    )
    config.learners(num_learners=0, num_gpus_per_learner=0)
    config.multi_agent(policies=list(levels), policy_mapping_fn=level_of_agent)
    config.rl_module(
        rl_module_spec=levels_spec(
            levels, network, settings.seed, observation_space, gym.spaces.Discrete(n_actions)
        )
    )
    config.reporting(min_sample_timesteps_per_iteration=0, min_time_s_per_iteration=0)
    # no seed: RLlib would seed the whole process, and every draw here has a generator of its own
    config.debugging(log_level="ERROR")
    return config


def _override(config: Any, settings: AlgorithmSettings) -> None:
    known = {name for name in vars(config) if not name.startswith("_")}
    for name in settings.overrides:
        if name in OURS:
            raise InputError(
                f"overrides must not hold what this package sets itself, got {name!r}. "
                "See rlhf_ray.algorithms.AlgorithmSettings."
            )
        if name not in known:
            raise unknown_name("RLlib setting", name, known - OURS)
    config.update_from_dict(dict(settings.overrides))


def quiet_rllib() -> None:
    """Keeps RLlib's notices (deprecations, untested settings) from the user; errors stay."""
    for name in ("ray.rllib", "ray.tune", "ray._common.deprecation"):
        logging.getLogger(name).setLevel(logging.ERROR)
