"""`q-learning`: the founding document's tables with the hand-over backup, inside RLlib.

`Q_l(s, a) <- Q_l(s, a) + alpha * (r + gamma * max_a' Q_l'(s', a') - Q_l(s, a))`, l' being the level
that acts next. One iteration plays episodes (`rlhf_ray.algorithms.algorithm`), learns once from
each new step, the last of an episode first, and then `updates_per_step * batch_size` times per new
step from steps drawn from everything seen so far. It adds to the result `td_error` (mean absolute,
over the iteration's updates), `states` (rows of all tables) and `alpha`.

The features must have finitely many values: every distinct vector is a state of its own.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.rllib.env.multi_agent_episode import MultiAgentEpisode

from rlhf_ray.algorithms import AlgorithmSettings
from rlhf_ray.algorithms.algorithm import HandoverAlgorithm, configure
from rlhf_ray.algorithms.handover import Backup, Transitions, Turn, following, turns
from rlhf_ray.algorithms.modules import module_id, spaces
from rlhf_ray.digests import derive_seed
from rlhf_ray.policies.q_table import QTable, as_weights


class TableStep(NamedTuple):
    """One step of the environment in terms of the tables.

    Attributes:
        level: who acted.
        row: the state, in that level's table.
        action: what it did.
        reward: of this one step.
        next_level: whose turn is bootstrapped from.
        next_row: the state there, in that level's table.
        next_actions: the valid actions there; none after the end.
    """

    level: int
    row: int
    action: int
    reward: float
    next_level: int
    next_row: int
    next_actions: tuple[int, ...]


def table_steps(
    played: Sequence[Turn], tables: Sequence[QTable], backup: Backup = "handover"
) -> list[TableStep]:
    """A complete episode in terms of the tables, which get rows for the states in it.

    Args:
        played: its turns.
        tables: one per level.
        backup: see `rlhf_ray.algorithms.handover.following`.
    """
    rows = [tables[turn.level].row(turn.observation["features"]) for turn in played]
    actions = [tuple(np.flatnonzero(turn.observation["action_mask"]).tolist()) for turn in played]
    places = following([turn.level for turn in played], backup)
    return [
        TableStep(
            level=turn.level,
            row=row,
            action=turn.action,
            reward=turn.reward,
            next_level=played[place].level,
            next_row=rows[place],
            next_actions=actions[place] if place >= 0 else (),
        )
        for turn, row, place in zip(played, rows, places, strict=True)
    ]


def learn_step(tables: Sequence[QTable], step: TableStep, *, alpha: float, gamma: float) -> float:
    """The update of one step; returns its temporal-difference error."""
    target = step.reward
    if step.next_actions:
        target += gamma * tables[step.next_level].best(step.next_row, step.next_actions)
    return tables[step.level].learn(step.row, step.action, target, alpha)


class TableModule(TorchRLModule):
    """The policy of one level: its table."""

    observation_space: Any

    def setup(self) -> None:
        """Makes an empty table."""
        (n_features,) = self.observation_space["features"].shape
        (n_actions,) = self.observation_space["action_mask"].shape
        self.table = QTable(n_features, n_actions)

    def act(self, observation: dict[str, np.ndarray], noise: np.ndarray | float = 0.0) -> int:
        """The valid action of highest value, with noise (A,) added; the first among equals."""
        values = self.table.values(torch.from_numpy(observation["features"]).unsqueeze(0))[0]
        valid = observation["action_mask"] != 0
        return int(np.where(valid, values.numpy() + noise, -np.inf).argmax())

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        raise NotImplementedError("a table is asked through act, one observation at a time.")

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The table as arrays."""
        return {part: tensor.numpy() for part, tensor in self.table.tensors().items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes the arrays that `get_state` gave."""
        self.table = QTable.from_tensors(state)


class TableLearner(TorchLearner):
    """Holds the tables that learn; there is no gradient and so no optimizer."""

    module: Any

    def configure_optimizers(self) -> None:
        """None."""

    def compute_loss_for_module(self, **kwargs: Any) -> Any:
        """Never called: tables learn by `learn_step`."""
        raise AssertionError("a table has no loss")

    def tables(self, levels: Sequence[str]) -> list[QTable]:
        """One per level."""
        return [self.module[module_id(level)].table for level in levels]


class HandoverQConfig(AlgorithmConfig):
    """RLlib's configuration, with ours in `settings`."""

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class or HandoverQLearning)
        self.settings: AlgorithmSettings | None = None
        self.levels: tuple[str, ...] = ()
        self.samples_actions = False

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """A table."""
        return RLModuleSpec(module_class=TableModule)


class HandoverQLearning(HandoverAlgorithm):
    """The algorithm; see the module."""

    @classmethod
    def get_default_config(cls) -> HandoverQConfig:
        """The configuration class's defaults."""
        return HandoverQConfig()

    def setup(self, config: Any) -> None:
        """Builds runners and learner; nothing was played so far."""
        self._steps: list[TableStep] = []
        self._draws = np.random.default_rng(derive_seed(config.settings.seed, "replay"))
        super().setup(config)

    def _learn(self, episodes: list[MultiAgentEpisode]) -> dict[str, float]:
        settings, tables = self._settings, self._learner.tables(self.config.levels)
        errors: list[float] = []
        for episode in episodes:
            new = self._stored(turns(episode, self.config.levels))
            errors += self._update(tables, reversed(new))
        per_step = settings.updates_per_step * settings.batch_size
        n_replayed = round(per_step * sum(map(len, episodes)))
        drawn = self._draws.integers(len(self._steps), size=n_replayed).tolist()
        errors += self._update(tables, (self._steps[place] for place in drawn))
        self._trial_counts["updates"] += len(errors)
        return {
            "td_error": float(np.abs(errors).mean()),
            "states": sum(len(table) for table in tables),
            "alpha": settings.alpha,
        }

    def remember(
        self, episodes: Sequence[Sequence[Turn]], implied: Sequence[Transitions] = ()
    ) -> None:
        """Stores their steps."""
        for played in episodes:
            self._stored(played)

    def _stored(self, played: Sequence[Turn]) -> list[TableStep]:
        backup = "own" if self._settings.stock else "handover"
        new = table_steps(played, self._learner.tables(self.config.levels), backup)
        self._steps += new
        return new

    def _update(self, tables: Sequence[QTable], steps: Iterable[TableStep]) -> list[float]:
        alpha, gamma = self._settings.alpha, self._settings.gamma
        return [learn_step(tables, step, alpha=alpha, gamma=gamma) for step in steps]

    def level_weights(self) -> dict[str, torch.Tensor]:
        """The learner's tables, as `rlhf_ray.policies.q_table.as_weights` writes them."""
        return as_weights(self._learner.tables(self.config.levels))


def build(
    *,
    env_creator: Callable[[dict[str, Any]], MultiAgentEnv],
    env_config: dict[str, Any],
    levels: tuple[str, ...],
    n_features: int,
    n_actions: int,
    settings: AlgorithmSettings,
) -> HandoverQLearning:
    """Builds the algorithm; see `rlhf_ray.algorithms.build_algorithm`."""
    observation_space, action_space = spaces(n_features, n_actions)
    module = RLModuleSpec(
        module_class=TableModule,
        observation_space=observation_space,
        action_space=action_space,
        model_config={},
    )
    config = HandoverQConfig()
    configure(
        config,
        env_creator=env_creator,
        env_config=env_config,
        levels=levels,
        settings=settings,
        learner_class=TableLearner,
        rl_module_spec=MultiRLModuleSpec(
            rl_module_specs=dict.fromkeys(map(module_id, levels), module)
        ),
        defaults={},
    )
    return HandoverQLearning(config=config)
