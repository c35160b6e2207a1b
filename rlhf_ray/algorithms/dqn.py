"""`dqn`: double, dueling deep Q-learning with the hand-over backup, inside RLlib.

One iteration (`train()`): play `episodes_per_iteration` episodes, store their transitions, then
`updates_per_step` updates per new transition on batches drawn from everything seen so far, and
send the weights to the env runners. Its result holds, and nothing else of RLlib's:

- `episodes`, `environment_steps`, `updates`: so far, in this trial;
- `epsilon`, `return_mean`, `return_min`, `return_max`, `length_mean`: of this iteration's episodes
  (returns undiscounted, explored);
- `loss`, `td_error`, `q_value`: means over this iteration's updates;
- `learning_rate`; `sample_s`, `update_s`: seconds of this iteration;
- `episode_records`: see `rlhf_ray.algorithms.episodes_of`.

Stock DQN counts cheap steps (1,000 per iteration, a target update every 500); a step here is a
fine-tuning stage, so everything is counted in episodes and updates instead.
"""

import copy
import logging
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.algorithms.dqn.dqn import DQN, DQNConfig
from ray.rllib.core import ALL_MODULES, COMPONENT_RL_MODULE
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME

from rlhf_ray.algorithms import AlgorithmSettings, network_settings
from rlhf_ray.algorithms.env_runner import EnvFactory, NumberedEpisodesRunner
from rlhf_ray.algorithms.handover import ReplayBuffer, Transitions, flatten, td_loss
from rlhf_ray.algorithms.modules import LevelsModule, level_of_agent, levels_spec
from rlhf_ray.digests import derive_seed
from rlhf_ray.errors import InputError, RlhfRayError, unknown_name

FINAL_LEARNING_RATE = 0.1
"""Learning rate at a trial's end, as a part of the one at its start."""

COUNTS = "rlhf_ray_counts"
"""Key of the trial's counts in an algorithm's state."""

OURS = {
    "adam_epsilon", "batch_mode", "burn_in_len", "categorical_distribution_temperature", "dueling",
    "double_q", "env", "env_config", "epsilon", "gamma", "hiddens", "levels", "lr", "n_step",
    "noisy", "num_atoms", "num_env_runners", "num_envs_per_env_runner", "num_learners",
    "num_steps_sampled_before_learning_starts", "policies", "replay_buffer_config",
    "rollout_fragment_length", "seed", "settings", "sigma0", "target_network_update_freq", "tau",
    "train_batch_size", "training_intensity", "v_max", "v_min",
}  # fmt: skip
"""RLlib settings that this algorithm replaces by its own or does not read."""


class HandoverDQNConfig(DQNConfig):
    """RLlib's configuration, with ours in `settings`."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or HandoverDQN)
        self.settings: AlgorithmSettings | None = None
        self.levels: tuple[str, ...] = ()


class HandoverLearner(TorchLearner):
    """Holds the networks, their target copies and one optimizer over all levels."""

    def build(self) -> None:
        """Builds modules and optimizer, and copies the networks."""
        torch.set_num_threads(1)
        super().build()
        self.target = copy.deepcopy(self.networks).requires_grad_(False)

    @property
    def networks(self) -> Any:
        """The `LevelQNetworks` that learn."""
        assert isinstance(self.module, LevelsModule)
        return self.module.networks

    def configure_optimizers(self) -> None:
        """One Adam: a shared encoder must not be stepped once per level."""
        parameters = list(self.networks.parameters())
        optimizer = torch.optim.Adam(parameters, lr=self.config.settings.learning_rate, fused=True)
        self.register_optimizer(
            module_id=ALL_MODULES, optimizer=optimizer, params=parameters, lr_or_lr_schedule=None
        )

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: Any, fwd_out: dict[str, Any]
    ) -> Any:
        """The loss over all levels' transitions at once (`module_id` is ALL_MODULES)."""
        return td_loss(
            batch,
            self.networks,
            self.target,
            gamma=config.settings.gamma,
            double_q=config.settings.double_q,
            huber=config.td_error_loss_fn == "huber",
        )

    def update_on(
        self, batches: Iterable[Transitions], *, learning_rate: float
    ) -> dict[str, float]:
        """One gradient step and one step of the target networks per batch.

        RLlib's `update` takes 10 to 25 ms per batch here, nearly all of it conversion and metrics.

        Args:
            batches: the batches, in order.
            learning_rate: Adam's.

        Returns:
            Means over the batches: `loss`, `td_error`, `q_value`.
        """
        (optimizer,) = self._named_optimizers.values()
        optimizer.param_groups[0]["lr"] = learning_rate
        online, target = list(self.networks.parameters()), list(self.target.parameters())
        logged: list[torch.Tensor] = []
        for batch in batches:
            result = self.compute_loss_for_module(
                module_id=ALL_MODULES, config=self.config, batch=batch, fwd_out={}
            )
            optimizer.zero_grad(set_to_none=True)
            result.loss.backward()
            if self.config.grad_clip is not None:
                torch.nn.utils.clip_grad_norm_(online, self.config.grad_clip)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(target, online, self.config.settings.tau)
            logged.append(torch.stack((result.loss.detach(), result.td_error, result.q_value)))
        self._weights_seq_no += 1
        means = torch.stack(logged).mean(dim=0).tolist()
        return dict(zip(("loss", "td_error", "q_value"), means, strict=True))


class HandoverDQN(DQN):
    """The algorithm; see the module."""

    @classmethod
    def get_default_config(cls) -> HandoverDQNConfig:
        """The configuration class's defaults."""
        return HandoverDQNConfig()

    def setup(self, config: Any) -> None:
        """Builds runners and learner, and starts the counts."""
        self._trial_counts = {"episodes": 0, "environment_steps": 0, "updates": 0}
        self._metrics_of_iteration: dict[str, Any] = {}
        super().setup(config)

    def _create_local_replay_buffer_if_necessary(self, config: Any) -> Any:
        return ReplayBuffer(derive_seed(config.settings.seed, "replay"))

    @property
    def _settings(self) -> AlgorithmSettings:
        return self.config.settings  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]

    def training_step(self) -> None:
        """Plays, stores, updates, sends the weights."""
        settings, counts = self._settings, self._trial_counts
        began = time.perf_counter()
        first = counts["episodes"]
        episodes = self._play(first, first + settings.episodes_per_iteration)
        played = time.perf_counter()
        n_steps = sum(len(episode) for episode in episodes)
        learned = self._learn(episodes, n_updates=max(1, round(settings.updates_per_step * n_steps)))
        counts["episodes"] += len(episodes)
        counts["environment_steps"] += n_steps
        self._metrics_of_iteration = {
            **counts,
            **_episode_metrics(episodes),
            **learned,
            "sample_s": played - began,
            "update_s": time.perf_counter() - played,
        }
        self.metrics.log_value(NUM_ENV_STEPS_SAMPLED_LIFETIME, n_steps, reduce="lifetime_sum")

    def _play(self, start: int, stop: int) -> list[MultiAgentEpisode]:
        group = self.env_runner_group
        assert group is not None
        parts = group.foreach_env_runner(
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
        assert isinstance(buffer, ReplayBuffer)
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
        group = self.env_runner_group
        assert group is not None
        state = self._learner.get_state(components=COMPONENT_RL_MODULE)
        weights = {COMPONENT_RL_MODULE: state[COMPONENT_RL_MODULE]}
        # waits for every runner: RLlib's own way drops the weights if too many calls are waiting
        group.foreach_env_runner(
            partial(NumberedEpisodesRunner.set_state, state=weights),
            local_env_runner=self._settings.num_env_runners == 0,
        )

    @property
    def _learner(self) -> HandoverLearner:
        # num_learners is 0: the learner lives in this process
        assert self.learner_group is not None
        learner = self.learner_group._learner
        assert isinstance(learner, HandoverLearner)
        return learner

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
    network = network_settings(
        "dqn", n_levels=len(levels), n_features=n_features, n_actions=n_actions, settings=settings
    )
    observation_space = gym.spaces.Dict(
        {
            "features": gym.spaces.Box(-np.inf, np.inf, (n_features,), np.float32),
            "action_mask": gym.spaces.Box(0, 1, (n_actions,), np.int8),
        }
    )
    # RLlib seeds whole processes from this; 32 bits is what NumPy takes
    process_seed = derive_seed(settings.seed, "process") % 2**31
    config = HandoverDQNConfig()
    config.settings = settings
    config.levels = levels
    config.environment(
        env=MultiAgentEnv,  # a name only: the runner makes its environments from the factory
        env_config={"factory": EnvFactory(env_creator, env_config)},
        disable_env_checking=True,
    )
    config.framework("torch")
    config.env_runners(
        env_runner_cls=NumberedEpisodesRunner,
        num_env_runners=settings.num_env_runners,
        num_envs_per_env_runner=settings.num_envs_per_runner,
        batch_mode="complete_episodes",
        sample_timeout_s=None,
    )
    config.training(gamma=settings.gamma, lr=settings.learning_rate, grad_clip=10.0)
    config.learners(num_learners=0, num_gpus_per_learner=0)
    config.training(learner_class=HandoverLearner)
    config.multi_agent(policies=list(levels), policy_mapping_fn=level_of_agent)
    config.rl_module(
        rl_module_spec=levels_spec(
            levels, network, settings.seed, observation_space, gym.spaces.Discrete(n_actions)
        )
    )
    config.reporting(min_sample_timesteps_per_iteration=0, min_time_s_per_iteration=0)
    config.debugging(seed=process_seed, log_level="ERROR")
    _override(config, settings)
    return HandoverDQN(config=config)


def _override(config: HandoverDQNConfig, settings: AlgorithmSettings) -> None:
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
