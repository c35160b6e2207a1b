"""What all algorithms share inside RLlib: one iteration, its counts and metrics, configuration.

One iteration (`train()`): play `episodes_per_iteration` episodes, learn from them, send the weights
to the env runners. Its result holds, and nothing else of RLlib's:

- `episodes`, `environment_steps`, `updates`: so far, in this trial; `done`: all were played;
- `epsilon`, `return_mean`, `return_min`, `return_max`, `length_mean`: of this iteration's episodes
  (returns undiscounted, explored);
- what the algorithm learned: see its module;
- `sample_s`, `update_s`: seconds of this iteration;
- `episode_records`: see `rlhf_ray.algorithms.episodes_of`; `episode_notes`: see `notes_of` there.

RLlib counts cheap steps (1,000 per iteration, say); a step here is a fine-tuning stage, so
everything is counted in episodes and updates instead.
"""

import abc
import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core import COMPONENT_RL_MODULE
from ray.rllib.core.learner.learner import Learner
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME

from rlhf_ray.algorithms.env_runner import EnvFactory, NumberedEpisodesRunner
from rlhf_ray.algorithms.handover import Transitions, Turn
from rlhf_ray.algorithms.modules import module_id, module_of_agent
from rlhf_ray.algorithms.settings import AlgorithmSettings
from rlhf_ray.errors import LostProcessError, RlhfRayError

FINAL_LEARNING_RATE = 0.1
"""Learning rate at a trial's end, as a part of the one at its start."""

COUNTS = "rlhf_ray_counts"
"""Key of the trial's counts in an algorithm's state."""


class HandoverAlgorithm(Algorithm):
    """An algorithm of this package; its configuration is one that `configure` has filled."""

    # RLlib declares its general classes, and most of them optional
    config: Any
    env_runner_group: Any
    learner_group: Any

    @abc.abstractmethod
    def _learn(self, episodes: list[MultiAgentEpisode]) -> dict[str, float]:
        """Learns from new episodes, counts its updates, and says how it went."""

    @abc.abstractmethod
    def remember(
        self, episodes: Sequence[Sequence[Turn]], implied: Sequence[Transitions] = ()
    ) -> None:
        """Takes in complete episodes, its own or others', with this trial's rewards, for replay.

        What they imply (`rlhf_ray.algorithms.counterfactuals`) is for algorithms that replay
        transitions; others leave it.

        No updates are made: on others' episodes, ahead of a trial's first, they changed nothing on
        problems with a known optimum (experiments/LOG.md).

        Raises:
            InputError: it learns from what its own policy played alone.
        """

    @abc.abstractmethod
    def level_weights(self) -> dict[str, torch.Tensor]:
        """What was learned, by name, as `rlhf_ray.policies.policy.Policy` takes it."""

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

    def cleanup(self) -> None:
        """Ends runners and learner, and removes the directory that stood in for Tune's."""
        super().cleanup()
        if not self._storage:
            self._scratch.cleanup()

    @property
    def _settings(self) -> AlgorithmSettings:
        return self.config.settings

    @property
    def _learner(self) -> Any:
        # num_learners is 0: the learner lives in this process
        return self.learner_group._learner

    def training_step(self) -> None:
        """Plays, learns, sends the weights."""
        settings, counts = self._settings, self._trial_counts
        assert settings.episodes_per_iteration is not None  # build_algorithm completed them
        began = time.perf_counter()
        first = counts["episodes"]
        if first >= settings.n_episodes:
            raise RlhfRayError(f"a trial has {settings.n_episodes} episodes; all were played.")
        episodes = self._play(
            first, min(first + settings.episodes_per_iteration, settings.n_episodes)
        )
        played = time.perf_counter()
        n_steps = sum(len(episode) for episode in episodes)
        learned = self._learn(episodes)
        self._send_weights()
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

    def _progress(self, episodes: list[MultiAgentEpisode]) -> float:
        """The part of the trial that is done with these new episodes, in (0, 1]."""
        played = self._trial_counts["episodes"] + len(episodes)
        return min(1.0, played / self._settings.n_episodes)

    def _learning_rate(self, progress: float) -> float:
        rate = self._settings.learning_rate
        assert rate is not None  # build_algorithm completed them
        return rate * (1.0 + progress * (FINAL_LEARNING_RATE - 1.0))

    def _play(self, start: int, stop: int) -> list[MultiAgentEpisode]:
        parts = self.env_runner_group.foreach_env_runner(
            partial(_sampled, start=start, stop=stop),
            local_env_runner=self._settings.num_env_runners == 0,
        )
        for part in parts:
            if isinstance(part, Exception):
                raise part
        episodes = sorted(
            (episode for part in parts for episode in part),
            key=lambda episode: episode.custom_data["episode"],
        )
        numbers = [episode.custom_data["episode"] for episode in episodes]
        if numbers != list(range(start, stop)):
            raise LostProcessError(
                f"every episode from {start} to {stop - 1} must come back, got {numbers}. "
                "A process that plays them was lost; run again."
            )
        return episodes

    def _send_weights(self) -> None:
        state = self._learner.get_state(components=COMPONENT_RL_MODULE)
        weights = {COMPONENT_RL_MODULE: state[COMPONENT_RL_MODULE]}
        # waits for every runner: RLlib's own way drops the weights if too many calls are waiting
        self.env_runner_group.foreach_env_runner(
            partial(NumberedEpisodesRunner.set_state, state=weights),
            local_env_runner=self._settings.num_env_runners == 0,
        )

    def step(self) -> dict[str, Any]:
        """One iteration; the result is ours alone (RLlib's has some hundred entries)."""
        super().step()
        return dict(self._metrics_of_iteration)

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state and our counts; what is kept of past episodes is not in it."""
        return {**super().get_state(*args, **kwargs), COUNTS: dict(self._trial_counts)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes what `get_state` gave."""
        super().set_state({key: value for key, value in state.items() if key != COUNTS})
        self._trial_counts = dict(state.get(COUNTS, self._trial_counts))


def _sampled(
    runner: NumberedEpisodesRunner, start: int, stop: int
) -> list[MultiAgentEpisode] | Exception:
    """Errors are returned: RLlib would take a remote runner that raises for one that is lost."""
    try:
        return runner.sample_between(start, stop)
    except Exception as error:
        return error


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
        "episode_notes": [episode.custom_data["notes"] for episode in episodes],
    }


def configure(
    config: Any,
    *,
    env_creator: Callable[[dict[str, Any]], MultiAgentEnv],
    env_config: dict[str, Any],
    levels: tuple[str, ...],
    settings: AlgorithmSettings,
    learner_class: type[Learner],
    rl_module_spec: MultiRLModuleSpec,
    defaults: dict[str, Any],
) -> None:
    """Fills an RLlib configuration with what all algorithms here have in common.

    Args:
        config: the algorithm's own, with the attributes `settings`, `levels`, `samples_actions`.
        env_creator: see `rlhf_ray.algorithms.build_algorithm`.
        env_config: likewise.
        levels: likewise.
        settings: likewise.
        learner_class: what learns.
        rl_module_spec: one module per level.
        defaults: RLlib settings that this algorithm wants otherwise; overrides may change them.
    """
    quiet_rllib()
    config.settings, config.levels = settings, levels
    config.framework("torch")
    config.environment(
        env=MultiAgentEnv,  # a name only: the runner makes its environments from the factory
        env_config={"factory": EnvFactory(env_creator, env_config)},
        disable_env_checking=True,
    )
    config.env_runners(
        env_runner_cls=NumberedEpisodesRunner,
        num_env_runners=settings.num_env_runners,
        num_envs_per_env_runner=settings.num_envs_per_runner,
        num_cpus_per_env_runner=0,  # who starts a trial reserves for all its processes
        batch_mode="complete_episodes",
        sample_timeout_s=None,
    )
    config.training(
        gamma=settings.gamma, lr=settings.learning_rate, learner_class=learner_class, **defaults
    )
    config.learners(num_learners=0, num_gpus_per_learner=0)
    config.multi_agent(
        policies=[module_id(level) for level in levels], policy_mapping_fn=module_of_agent
    )
    config.rl_module(rl_module_spec=rl_module_spec)
    config.reporting(min_sample_timesteps_per_iteration=0, min_time_s_per_iteration=0)
    # no seed: RLlib would seed the whole process, and every draw here has a generator of its own
    config.debugging(log_level="ERROR")
    config.update_from_dict(dict(settings.overrides))


def quiet_rllib() -> None:
    """Keeps RLlib's notices (deprecations, untested settings) from the user; errors stay."""
    for name in ("ray.rllib", "ray.tune", "ray._common.deprecation"):
        logging.getLogger(name).setLevel(logging.ERROR)
