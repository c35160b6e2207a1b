"""RLModules: one policy per level, each a view on the levels' networks.

With a shared encoder every level's module holds the same encoder object, so each is a complete
policy by itself while all learn one encoder. A level's state lists it too; loading all levels'
states writes the same values into it L times. A single controller's modules share their head too:
they are one policy under L names.
"""

import re
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule, MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule

from rlhf_ray.digests import derive_seed
from rlhf_ray.policies.networks import LevelQNetwork, LevelQNetworks, NetworkSettings, masked


def spaces(n_features: int, n_actions: int) -> tuple[gym.spaces.Dict, gym.spaces.Discrete]:
    """What every level sees, features (F,) and the mask of open actions (A,), and its actions."""
    observation_space = gym.spaces.Dict(
        {
            "features": gym.spaces.Box(-np.inf, np.inf, (n_features,), np.float32),
            "action_mask": gym.spaces.Box(0, 1, (n_actions,), np.int8),
        }
    )
    return observation_space, gym.spaces.Discrete(n_actions)


class LevelModule(TorchRLModule):
    """The policy of one level; the `LevelsModule` that holds it gives it its networks."""

    q: LevelQNetwork  # Q-values, or an actor's logits
    critic: LevelQNetwork  # of actor-critic algorithms

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        observation = batch[Columns.OBS]
        values = masked(self.q.decided(observation["features"]), observation["action_mask"])
        return {Columns.ACTIONS: values.argmax(dim=-1)}

    @torch.no_grad()
    def act(self, observation: dict[str, np.ndarray], noise: np.ndarray | float = 0.0) -> int:
        """The valid action of highest value, with noise (A,) added, for one observation.

        One row at a time: in a batch, rounding would depend on which other episodes happened to
        be ready, and results on timing.
        """
        features = torch.from_numpy(observation["features"]).float().unsqueeze(0)
        values = self.q.decided(features)[0].numpy() + noise
        return int(np.where(observation["action_mask"] != 0, values, -np.inf).argmax())


class LevelsModule(MultiRLModule):
    """All levels' policies and the networks behind them, with a critic where one is asked for."""

    networks: LevelQNetworks
    network_seed: int
    critic: LevelQNetworks
    model_config: Any

    def setup(self) -> None:
        """Builds the levels' modules and gives each its network."""
        super().setup()
        own = self.model_config
        self.network_seed = own["network_seed"]
        self.networks = LevelQNetworks(own["network"], seed=self.network_seed)
        for index, level in enumerate(own["levels"]):
            self._rl_modules[module_id(level)].q = self.networks.level(index)
        if own["critic"] is not None:
            seed = derive_seed(self.network_seed, "critic")
            self.critic = LevelQNetworks(own["critic"], seed=seed)
            for index, level in enumerate(own["levels"]):
                self._rl_modules[module_id(level)].critic = self.critic.level(index)


def levels_spec(
    levels: tuple[str, ...],
    network: NetworkSettings,
    seed: int,
    observation_space: gym.Space,
    action_space: gym.Space,
    critic: NetworkSettings | None = None,
) -> MultiRLModuleSpec:
    """The specification from which RLlib builds a `LevelsModule`.

    Args:
        levels: the level names, in order; they name the modules.
        network: shape of the networks.
        seed: of the initial weights.
        observation_space: of every level.
        action_space: of every level.
        critic: shape of further networks, for values that are learned beside the policies.
    """
    return MultiRLModuleSpec(
        multi_rl_module_class=LevelsModule,
        model_config={
            "levels": levels,
            "network": network,
            "network_seed": seed,
            "critic": critic,
        },
        rl_module_specs={
            module_id(level): RLModuleSpec(
                module_class=LevelModule,
                observation_space=observation_space,
                action_space=action_space,
                model_config={},
            )
            for level in levels
        },
    )


def module_id(level: str) -> str:
    """The id of a level's module: its name, with what RLlib refuses in one written as codes.

    >>> module_id("conv1"), module_id("encoder/block:1."), module_id("100%")
    ('conv1', 'encoder%2fblock%3a1%2e', '100%25')
    """
    return re.sub(r'[%<>:"/\\|?*]|[. ]\Z|\A\Z', lambda found: f"%{found[0].encode().hex()}", level)


def module_of_agent(agent_id: str, episode: Any, **kwargs: Any) -> str:
    """The policy mapping: an agent is named after its level, and has its module."""
    return module_id(agent_id)
