"""`ppo`: proximal policy optimisation with advantages along the global trajectory, inside RLlib.

One iteration plays episodes (`rlhf_ray.algorithms.algorithm`), every action sampled from the acting
level's policy, and makes `num_epochs` passes over them in minibatches of all levels together. It
adds to the result `policy_loss`, `value_loss`, `entropy` (means over the iteration's updates),
`learning_rate` and `entropy_coeff`. Nothing played is learned from again in a later iteration.

There is no epsilon: what keeps the policy random is the weight of its entropy, RLlib's setting
`entropy_coeff`, which falls linearly to a tenth over the trial as the learning rate does. Other
settings that are read under RLlib's names: `lambda_`, `clip_param`, `vf_loss_coeff`, `num_epochs`,
`minibatch_size`, `grad_clip`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.ppo.ppo import PPOConfig
from ray.rllib.core import ALL_MODULES
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode

from rlhf_ray.algorithms import AlgorithmSettings, network_settings
from rlhf_ray.algorithms.advantages import (
    PolicyBatch,
    PolicyLoss,
    Trajectory,
    policy_batch,
    policy_loss,
    trajectory,
)
from rlhf_ray.algorithms.algorithm import HandoverAlgorithm, configure
from rlhf_ray.algorithms.handover import Transitions, Turn
from rlhf_ray.algorithms.modules import levels_spec, spaces
from rlhf_ray.digests import derive_seed
from rlhf_ray.errors import InputError
from rlhf_ray.policies.networks import LevelQNetworks

DEFAULTS = {
    "lambda_": 0.95,
    "clip_param": 0.2,
    "vf_loss_coeff": 0.5,
    "entropy_coeff": 0.15,
    "num_epochs": 12,
    "minibatch_size": 96,
    "grad_clip": 0.5,
}
"""RLlib settings that few, dear steps want otherwise."""

LOGGED = ("policy_loss", "value_loss", "entropy")


class ActorCriticLearner(TorchLearner):
    """Holds actor and critic of all levels and one optimizer over both."""

    config: Any  # a HandoverPPOConfig; RLlib declares its general class
    module: Any  # a LevelsModule with a critic

    def build(self) -> None:
        """Builds modules and optimizer."""
        torch.set_num_threads(1)
        super().build()
        self._draws = np.random.default_rng(derive_seed(self.config.settings.seed, "minibatches"))

    @property
    def networks(self) -> LevelQNetworks:
        """The actor."""
        return self.module.networks

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [*self.networks.parameters(), *self.module.critic.parameters()]

    def configure_optimizers(self) -> None:
        """One Adam: a shared encoder must not be stepped once per level."""
        rate = self.config.settings.learning_rate
        optimizer = torch.optim.Adam(self._parameters(), lr=rate, fused=True)
        self.register_optimizer(
            module_id=ALL_MODULES,
            optimizer=optimizer,
            params=self._parameters(),
            lr_or_lr_schedule=None,
        )

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: Any, fwd_out: dict[str, Any]
    ) -> PolicyLoss:  # pyright: ignore[reportIncompatibleMethodOverride] more than the bare loss
        """The loss over all levels' steps at once; `fwd_out`: the weight of the entropy."""
        return policy_loss(
            batch,
            self.networks,
            self.module.critic,
            clip=config.clip_param,
            entropy_weight=fwd_out["entropy_coeff"],
            value_weight=config.vf_loss_coeff,
        )

    def update_on(
        self, steps: Trajectory, *, learning_rate: float, entropy_coeff: float
    ) -> tuple[int, dict[str, float]]:
        """The passes over steps just played.

        Args:
            steps: all levels', whole episodes.
            learning_rate: Adam's.
            entropy_coeff: weight of the entropy.

        Returns:
            How many updates were made, and means over them of `LOGGED`.
        """
        config, settings = self.config, self.config.settings
        (optimizer,) = self._named_optimizers.values()
        optimizer.param_groups[0]["lr"] = learning_rate
        played = policy_batch(
            steps,
            self.networks,
            self.module.critic,
            gamma=settings.gamma,
            lambda_=config.lambda_,
            per_level=settings.stock,
        )
        logged = [
            self._update_on_batch(batch, optimizer, entropy_coeff)
            for _ in range(config.num_epochs)
            for batch in self._minibatches(played)
        ]
        self._weights_seq_no += 1
        means = torch.stack(logged).mean(dim=0).tolist()
        return len(logged), dict(zip(LOGGED, means, strict=True))

    def _minibatches(self, played: PolicyBatch) -> list[PolicyBatch]:
        order = torch.from_numpy(self._draws.permutation(len(played)))
        count = math.ceil(len(played) / self.config.minibatch_size)
        return [played.take(index) for index in order.tensor_split(count)]

    def _update_on_batch(
        self, batch: PolicyBatch, optimizer: torch.optim.Optimizer, entropy_coeff: float
    ) -> torch.Tensor:
        result = self.compute_loss_for_module(
            module_id=ALL_MODULES,
            config=self.config,
            batch=batch,
            fwd_out={"entropy_coeff": entropy_coeff},
        )
        optimizer.zero_grad(set_to_none=True)
        result.loss.backward()
        if self.config.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(self._parameters(), self.config.grad_clip)
        optimizer.step()
        return torch.stack([getattr(result, name) for name in LOGGED])


class HandoverPPOConfig(PPOConfig):
    """RLlib's configuration, with ours in `settings`."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or HandoverPPO)
        self.settings: AlgorithmSettings | None = None
        self.levels: tuple[str, ...] = ()
        self.samples_actions = True

    def validate(self) -> None:
        """Nothing of RLlib's: its PPO counts train batches, which there are none of here."""


class HandoverPPO(HandoverAlgorithm):
    """The algorithm; see the module."""

    @classmethod
    def get_default_config(cls) -> HandoverPPOConfig:
        """The configuration class's defaults."""
        return HandoverPPOConfig()

    def _learn(self, episodes: list[MultiAgentEpisode]) -> dict[str, float]:
        backup = "own" if self._settings.stock else "handover"
        rate = self._learning_rate(self._progress(episodes))
        entropy_coeff = self.config.entropy_coeff * rate / self._settings.learning_rate
        n_updates, learned = self._learner.update_on(
            trajectory(episodes, self.config.levels, backup),
            learning_rate=rate,
            entropy_coeff=entropy_coeff,
        )
        self._trial_counts["updates"] += n_updates
        return {**learned, "learning_rate": rate, "entropy_coeff": entropy_coeff}

    def remember(
        self, episodes: Sequence[Sequence[Turn]], implied: Sequence[Transitions] = ()
    ) -> None:
        """Raises InputError: what others played says nothing of what this policy would do."""
        raise InputError(
            f"what learns from other trials' episodes must be off-policy, got ppo and "
            f"{len(episodes)} episodes. Take dqn or q-learning."
        )

    def level_weights(self) -> dict[str, torch.Tensor]:
        """The learner's actor as the state dict of `LevelQNetworks`."""
        return {k: v.detach().clone() for k, v in self._learner.networks.state_dict().items()}


def build(
    *,
    env_creator: Callable[[dict[str, Any]], MultiAgentEnv],
    env_config: dict[str, Any],
    levels: tuple[str, ...],
    n_features: int,
    n_actions: int,
    settings: AlgorithmSettings,
) -> HandoverPPO:
    """Builds the algorithm; see `rlhf_ray.algorithms.build_algorithm`."""
    if settings.epsilon != 0.0:
        raise InputError(
            f"epsilon must be 0 for ppo, got epsilon={settings.epsilon}: it samples its actions. "
            "The override entropy_coeff says how random they stay."
        )
    # no random actions at the start either
    settings = replace(settings, decay_fraction=0.0, warm_up=0.0)
    actor = network_settings(
        "ppo", n_levels=len(levels), n_features=n_features, n_actions=n_actions, settings=settings
    )
    assert actor is not None
    config = HandoverPPOConfig()
    configure(
        config,
        env_creator=env_creator,
        env_config=env_config,
        levels=levels,
        settings=settings,
        learner_class=ActorCriticLearner,
        rl_module_spec=levels_spec(
            levels,
            actor,
            settings.seed,
            *spaces(n_features, n_actions),
            critic=replace(actor, n_actions=1),
        ),
        defaults=DEFAULTS,
    )
    return HandoverPPO(config=config)
