"""The hand-over backup: episodes as global transitions, a replay buffer of them, the loss.

Levels take turns, so what follows level l's action is the turn of another level l'. The backup is
`Q_l(s, a) <- r + gamma * max_a' Q_l'(s', a')`, one gamma per step of the environment. (Stock
multi-agent RLlib bootstraps every agent from its own next turn instead; `backup="own"` does that.)
No Ray here: an episode is read through the attributes of RLlib's `MultiAgentEpisode`.

Dimensions: N transition, U update, B batch, F feature, A action, M ensemble member.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.policies.networks import LevelQNetworks, decided, masked

if TYPE_CHECKING:
    from ray.rllib.env.multi_agent_episode import MultiAgentEpisode

Backup = Literal["handover", "own"]

IMPLIED = "implied"
"""Key of an episode's notes: a list of transitions that its steps imply (`counterfactuals`)."""

_SKIPPED = "S"  # MultiAgentEpisode.SKIP_ENV_TS_TAG: the agent saw nothing at this step


@dataclass(frozen=True, kw_only=True)
class Transitions:
    """N transitions as tensors; slices and stacks of them keep the fields' trailing shapes.

    Attributes:
        features: (N, F) float32, what the acting level saw.
        level: (N,) int64, who acted.
        action: (N,) int64.
        reward: (N,) float32, of this one step.
        next_features: (N, F) float32, what is bootstrapped from; zeros after the end.
        next_mask: (N, A) bool, the actions valid there; all False after the end.
        next_level: (N,) int64, whose turn that is.
        terminated: (N,) float32, 1 where nothing follows.
    """

    features: Tensor
    level: Tensor
    action: Tensor
    reward: Tensor
    next_features: Tensor
    next_mask: Tensor
    next_level: Tensor
    terminated: Tensor

    def __len__(self) -> int:
        return self.level.shape[0]

    def take(self, index: Tensor | int) -> "Transitions":
        """The transitions at an index of the first dimension."""
        return Transitions(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    @staticmethod
    def concatenate(parts: Sequence["Transitions"]) -> "Transitions":
        """All transitions of the parts, in order."""
        names = [f.name for f in fields(Transitions)]
        return Transitions(**{n: torch.cat([getattr(part, n) for part in parts]) for n in names})


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One step of the environment: who acted, on what, and what it brought.

    Attributes:
        level: who acted.
        observation: "features" (F,) and "action_mask" (A,), which it acted on.
        action: what it did.
        reward: of this one step.
    """

    level: int
    observation: dict[str, np.ndarray]
    action: int
    reward: float


def turns(episode: "MultiAgentEpisode", levels: Sequence[str]) -> list[Turn]:
    """The steps of a complete episode in the order of the environment.

    Args:
        episode: exactly one agent acted per step, rewards went to the acting agent, and it ended by
            `terminateds["__all__"]`.
        levels: the level names (agents), in order.

    Returns:
        One turn per step.

    Raises:
        RlhfRayError: the episode is not of that kind.
    """
    if not episode.is_terminated:
        raise RlhfRayError("an episode must end by terminateds['__all__'], got one that did not.")
    found: list[Turn] = []
    seen: Any = episode.env_t_to_agent_t
    for t in range(len(episode)):
        acting = [
            (name, agent_t.data[t])
            for name, agent_t in seen.items()
            if len(agent_t.data) > t and agent_t.data[t] != _SKIPPED
        ]
        if len(acting) != 1:
            raise RlhfRayError(f"exactly one level must act per step, got {acting} at step {t}.")
        name, agent_t = acting[0]
        own: Any = episode.agent_episodes[name]
        found.append(
            Turn(
                level=levels.index(name),
                observation=own.get_observations(agent_t),
                action=int(own.get_actions(agent_t)),
                reward=float(own.get_rewards(agent_t)),
            )
        )
    return found


def following(level_T: Sequence[int], backup: Backup = "handover") -> list[int]:
    """The step whose value each step of a complete episode bootstraps from; -1: none, it ends.

    Args:
        level_T: who acted at each step.
        backup: "handover": what follows a turn is the next turn, whoever's it is; "own": the same
            level's next turn, and the end if there is none (stock RLlib).

    >>> following([0, 1, 0]), following([0, 1, 0], "own")
    ([1, 2, -1], [2, -1, -1])
    """
    places = range(len(level_T))
    if backup == "handover":
        return [t + 1 if t + 1 in places else -1 for t in places]
    return [
        next((later for later in places[t + 1 :] if level_T[later] == level_T[t]), -1)
        for t in places
    ]


def transitions(played: Sequence[Turn], backup: Backup = "handover") -> Transitions:
    """A complete episode as transitions.

    Args:
        played: its turns, one at least.
        backup: see `following`.

    Returns:
        One transition per step, in the order of the environment.
    """
    places = following([turn.level for turn in played], backup)
    after_turns = [played[place] if place >= 0 else None for place in places]
    blank = {name: np.zeros_like(value) for name, value in played[0].observation.items()}
    after = [turn.observation if turn else blank for turn in after_turns]

    def stack(observations: list[dict[str, np.ndarray]], name: str) -> Tensor:
        return torch.from_numpy(np.stack([observation[name] for observation in observations]))

    return Transitions(
        features=stack([turn.observation for turn in played], "features").float(),
        level=torch.tensor([turn.level for turn in played]),
        action=torch.tensor([turn.action for turn in played]),
        reward=torch.tensor([turn.reward for turn in played], dtype=torch.float32),
        next_features=stack(after, "features").float(),
        next_mask=stack(after, "action_mask") != 0,
        next_level=torch.tensor([turn.level if turn else 0 for turn in after_turns]),
        terminated=torch.tensor([float(turn is None) for turn in after_turns]),
    )


class ReplayBuffer:
    """Everything seen so far, drawn from uniformly; searches are small, so nothing is dropped.

    Args:
        seed: of the draws.
    """

    def __init__(self, seed: int) -> None:
        self._parts: list[Transitions] = []
        self._generator = np.random.default_rng(seed)

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def stored(self) -> Transitions:
        """All transitions, in the order in which they came."""
        self._parts = [Transitions.concatenate(self._parts)]
        return self._parts[0]

    def add(self, transitions: Transitions) -> None:
        """Appends transitions."""
        self._parts.append(transitions)

    def sample(
        self,
        n_batches: int,
        batch_size: int,
        *,
        rare_share: float = 0.0,
        common_actions: Sequence[int] = (),
    ) -> Iterator[Transitions]:
        """Batches drawn uniformly, with replacement.

        Args:
            n_batches: U.
            batch_size: B.
            rare_share: part of every batch that is drawn, uniformly too, from the transitions of
                actions other than the common ones, if there are any.
            common_actions: see there.

        Yields:
            U batches of B transitions.
        """
        stored = self.stored()
        index = self._generator.integers(len(stored), size=(n_batches, batch_size))
        rare = np.flatnonzero(~np.isin(stored.action.numpy(), common_actions))
        if rare.size and (n_rare := round(rare_share * batch_size)):
            chosen = self._generator.integers(rare.size, size=(n_batches, n_rare))
            index[:, :n_rare] = rare[chosen]
        for rows in torch.from_numpy(index):
            yield stored.take(rows)


@dataclass(frozen=True, kw_only=True)
class TdLoss:
    """A batch's loss, and what is logged of it (0-dimensional tensors).

    Attributes:
        loss: differentiable.
        td_error: mean absolute difference from the target.
        q_value: mean value of the actions taken.
    """

    loss: Tensor
    td_error: Tensor
    q_value: Tensor


@torch.no_grad()
def td_targets(
    batch: Transitions,
    online: LevelQNetworks,
    target: LevelQNetworks,
    *,
    gamma: float,
    double_q: bool = True,
) -> Tensor:
    """`r + gamma * Q_l'(s', a*)`, with l' the level whose turn comes next.

    Args:
        batch: B transitions.
        online: chooses a* when `double_q` (van Hasselt et al. 2016).
        target: values it; chooses it too when not `double_q`.
        gamma: discount per step of the environment.
        double_q: see above.

    Returns:
        (M, B) float32: every member has its own target.
    """
    after = target(batch.next_features, batch.next_level)
    chooser = online(batch.next_features, batch.next_level) if double_q else after
    settings = online.settings
    if settings.schedule is not None:  # as the policy decides: one action for all members
        chooser = decided(chooser, batch.next_features, batch.next_level, settings, online.tried)
        chooser = chooser.expand(after.shape)
    # after the end no action is valid; whatever is chosen there is multiplied by 0
    best = masked(chooser, batch.next_mask).argmax(dim=-1, keepdim=True)
    value = after.gather(-1, best).squeeze(-1)
    return batch.reward + gamma * (1.0 - batch.terminated) * value


def td_loss(
    batch: Transitions,
    online: LevelQNetworks,
    target: LevelQNetworks,
    *,
    gamma: float,
    double_q: bool = True,
    huber: bool = True,
) -> TdLoss:
    """The temporal-difference loss over a batch of all levels together.

    Args:
        batch: B transitions.
        online: the networks that learn.
        target: their slow copies.
        gamma: discount per step of the environment.
        double_q: see `td_targets`.
        huber: Huber loss (delta 1) or squared error.

    Returns:
        The loss, averaged over batch and members.
    """
    goal = td_targets(batch, online, target, gamma=gamma, double_q=double_q)
    values = online(batch.features, batch.level)
    taken = values.gather(-1, batch.action.expand(goal.shape).unsqueeze(-1)).squeeze(-1)
    function = torch.nn.functional.huber_loss if huber else torch.nn.functional.mse_loss
    with torch.no_grad():
        td_error, q_value = (taken - goal).abs().mean(), taken.mean()
    return TdLoss(loss=function(taken, goal), td_error=td_error, q_value=q_value)
