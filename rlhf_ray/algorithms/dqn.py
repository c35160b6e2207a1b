"""`dqn`: double, dueling deep Q-learning with the hand-over backup, inside RLlib.

One iteration plays episodes (`rlhf_ray.algorithms.algorithm`), stores their transitions, and makes
`updates_per_step` updates per new transition on batches drawn from everything seen so far. Networks
keep what they made of the first few transitions (the primacy bias; Nikishin et al. 2022): with
`relearn` they start over after the last episode, on all there is. It adds to the result `loss`,
`td_error`, `q_value` (means over the iteration's updates) and `learning_rate`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from ray.rllib.algorithms.dqn.dqn import DQNConfig
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode

from rlhf_ray.algorithms import AlgorithmSettings, network_settings
from rlhf_ray.algorithms.algorithm import HandoverAlgorithm, configure
from rlhf_ray.algorithms.handover import (
    IMPLIED,
    ReplayBuffer,
    Transitions,
    Turn,
    transitions,
    turns,
)
from rlhf_ray.algorithms.learner import HandoverLearner
from rlhf_ray.algorithms.modules import levels_spec, spaces
from rlhf_ray.digests import derive_seed

RARE_SHARE = 0.5
"""Part of a batch, when learning anew, from actions that are not free: a stage implies some twenty
free transitions, in which what is rare is lost (see experiments/LOG.md)."""


class HandoverDQNConfig(DQNConfig):
    """RLlib's configuration, with ours in `settings`."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or HandoverDQN)
        self.settings: AlgorithmSettings | None = None
        self.levels: tuple[str, ...] = ()
        self.samples_actions = False


class HandoverDQN(HandoverAlgorithm):
    """The algorithm; see the module."""

    local_replay_buffer: Any  # a ReplayBuffer
    _n_turns = 0  # in it that were played, by this trial or before it

    @classmethod
    def get_default_config(cls) -> HandoverDQNConfig:
        """The configuration class's defaults."""
        return HandoverDQNConfig()

    def _create_local_replay_buffer_if_necessary(self, config: Any) -> Any:
        return ReplayBuffer(derive_seed(config.settings.seed, "replay"))

    def _learn(self, episodes: list[MultiAgentEpisode]) -> dict[str, float]:
        rate = self._learning_rate(self._progress(episodes))
        self.remember(
            [turns(episode, self.config.levels) for episode in episodes],
            [
                part
                for episode in episodes
                for part in episode.custom_data["notes"].get(IMPLIED, ())
            ],
        )
        n_updates = max(1, round(self._settings.updates_per_step * sum(map(len, episodes))))
        self._note_tried()
        batches = self.local_replay_buffer.sample(n_updates, self._settings.batch_size)
        learned = self._learner.update_on(batches, learning_rates=[rate] * n_updates)
        self._trial_counts["updates"] += n_updates
        if self._settings.relearn and self._progress(episodes) == 1.0:
            learned, rate = self._relearn(), self._learning_rate(1.0)
        return {**learned, "learning_rate": rate}

    def _relearn(self) -> dict[str, float]:
        n_updates = max(1, round(self._settings.updates_per_step * self._n_turns))
        self._learner.start_over()
        self._note_tried()
        learned = self._learner.update_on(
            self.local_replay_buffer.sample(
                n_updates,
                self._settings.batch_size,
                rare_share=RARE_SHARE,
                common_actions=self._settings.free_actions,
            ),
            learning_rates=[self._learning_rate(i / n_updates) for i in range(n_updates)],
        )
        self._trial_counts["updates"] += n_updates
        return learned

    def _note_tried(self) -> None:
        met = self.local_replay_buffer.stored()
        self._learner.networks.note_tried(met.features, met.level, met.action)

    def remember(
        self, episodes: Sequence[Sequence[Turn]], implied: Sequence[Transitions] = ()
    ) -> None:
        """Stores their transitions and what they imply."""
        backup = "own" if self._settings.stock else "handover"
        self._n_turns += sum(map(len, episodes))
        for played in episodes:
            self.local_replay_buffer.add(transitions(played, backup))
        for part in implied:
            self.local_replay_buffer.add(part)

    def level_weights(self) -> dict[str, torch.Tensor]:
        """The learner's networks as the state dict of `LevelQNetworks`."""
        return {k: v.detach().clone() for k, v in self._learner.networks.state_dict().items()}


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
    network = network_settings(
        "dqn", n_levels=len(levels), n_features=n_features, n_actions=n_actions, settings=settings
    )
    assert network is not None
    config = HandoverDQNConfig()
    configure(
        config,
        env_creator=env_creator,
        env_config=env_config,
        levels=levels,
        settings=settings,
        learner_class=HandoverLearner,
        rl_module_spec=levels_spec(levels, network, settings.seed, *spaces(n_features, n_actions)),
        defaults={"grad_clip": 10.0},
    )
    return HandoverDQN(config=config)
