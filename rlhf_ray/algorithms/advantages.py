"""Actor-critic along the global trajectory: advantages over the turns of all levels, and the loss.

Levels take turns, so the value that a turn bootstraps from is the critic's of the level that acts
next, and generalised advantages are summed along the trajectory of the environment, one gamma per
step of it. (Stock multi-agent RLlib does both along each agent's own turns; `backup="own"` does
that.) No Ray here.

Dimensions: N step (of whole episodes, one after the other), B batch, F feature, A action.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from rlhf_ray.algorithms.handover import Backup, following, turns
from rlhf_ray.policies.networks import LevelQNetworks, masked

if TYPE_CHECKING:
    from ray.rllib.env.multi_agent_episode import MultiAgentEpisode


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """N steps of whole episodes as tensors.

    Attributes:
        features: (N, F) float32, what the acting level saw.
        mask: (N, A) bool, the actions that were valid.
        level: (N,) int64, who acted.
        action: (N,) int64.
        reward: (N,) float32, of this one step.
        next_step: (N,) int64, the step whose value is bootstrapped from; -1: none, it ends.
    """

    features: Tensor
    mask: Tensor
    level: Tensor
    action: Tensor
    reward: Tensor
    next_step: Tensor

    def __len__(self) -> int:
        return self.level.shape[0]


def trajectory(
    episodes: Sequence["MultiAgentEpisode"], levels: Sequence[str], backup: Backup = "handover"
) -> Trajectory:
    """Complete episodes, one after the other.

    Args:
        episodes: see `rlhf_ray.algorithms.handover.turns`.
        levels: the level names (agents), in order.
        backup: see `rlhf_ray.algorithms.handover.following`.
    """
    parts = [turns(episode, levels) for episode in episodes]
    played = [turn for part in parts for turn in part]
    next_step: list[int] = []
    for part in parts:
        first = len(next_step)
        places = following([turn.level for turn in part], backup)
        next_step += [first + place if place >= 0 else -1 for place in places]
    return Trajectory(
        features=torch.from_numpy(np.stack([t.observation["features"] for t in played])).float(),
        mask=torch.from_numpy(np.stack([t.observation["action_mask"] for t in played])) != 0,
        level=torch.tensor([turn.level for turn in played]),
        action=torch.tensor([turn.action for turn in played]),
        reward=torch.tensor([turn.reward for turn in played], dtype=torch.float32),
        next_step=torch.tensor(next_step),
    )


def advantages(
    reward_N: Tensor, value_N: Tensor, next_N: Tensor, *, gamma: float, lambda_: float
) -> Tensor:
    """Generalised advantages (Schulman et al. 2016): `A = delta + gamma * lambda * A_next`.

    Args:
        reward_N: of each step.
        value_N: the critic's, each by the level that acts there.
        next_N: the step that each bootstraps from, later than itself; -1: none.
        gamma: discount per step of the environment.
        lambda_: decay of the sum, in [0, 1]; 0: one-step differences, 1: returns.

    Returns:
        (N,) float32.

    >>> one, two = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    >>> advantages(one, two, torch.tensor([1, -1]), gamma=0.5, lambda_=1.0).tolist()
    [-1.0, -2.0]
    """
    rewards, values = reward_N.tolist(), value_N.tolist()
    found = [0.0] * len(rewards)
    for step, after in reversed(list(enumerate(next_N.tolist()))):
        found[step] = rewards[step] - values[step]
        if after >= 0:
            found[step] += gamma * (values[after] + lambda_ * found[after])
    return torch.tensor(found, dtype=torch.float32)


def normalised(advantage_N: Tensor, group_N: Tensor | None = None) -> Tensor:
    """Mean 0 and standard deviation 1: over all levels together, or within each group.

    Args:
        advantage_N: what `advantages` gave.
        group_N: int64; None: all are one group. Stock RLlib normalises per agent.
    """
    if group_N is None:
        return (advantage_N - advantage_N.mean()) / advantage_N.std(correction=0).clamp_min(1e-4)
    result = torch.empty_like(advantage_N)
    for group in group_N.unique():
        mine = group_N == group
        result[mine] = normalised(advantage_N[mine])
    return result


def log_probabilities(actor: LevelQNetworks, features: Tensor, level: Tensor, mask: Tensor):
    """(B, A) log-probabilities of the actor, minus infinity where `mask` is False."""
    return masked(actor(features, level)[0], mask).log_softmax(dim=-1)


@dataclass(frozen=True, kw_only=True)
class PolicyBatch:
    """Steps with what the loss holds them against.

    Attributes:
        features: (B, F) float32.
        mask: (B, A) bool.
        level: (B,) int64.
        action: (B,) int64.
        log_probability: (B,) of the action, under the policy that took it.
        advantage: (B,), normalised.
        target: (B,), what the critic should say.
    """

    features: Tensor
    mask: Tensor
    level: Tensor
    action: Tensor
    log_probability: Tensor
    advantage: Tensor
    target: Tensor

    def __len__(self) -> int:
        return self.level.shape[0]

    def take(self, index: Tensor) -> "PolicyBatch":
        """The steps at an index."""
        return PolicyBatch(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


@torch.no_grad()
def policy_batch(
    steps: Trajectory,
    actor: LevelQNetworks,
    critic: LevelQNetworks,
    *,
    gamma: float,
    lambda_: float,
    per_level: bool = False,
) -> PolicyBatch:
    """Steps just played, ready to learn from.

    Args:
        steps: N of them, played by `actor` as it is now.
        actor: logits per level.
        critic: values per level, A = 1.
        gamma: see `advantages`.
        lambda_: see `advantages`.
        per_level: normalise advantages per level, as stock RLlib does; else all together.
    """
    value = critic(steps.features, steps.level)[0, :, 0]
    advantage = advantages(steps.reward, value, steps.next_step, gamma=gamma, lambda_=lambda_)
    log_p = log_probabilities(actor, steps.features, steps.level, steps.mask)
    return PolicyBatch(
        features=steps.features,
        mask=steps.mask,
        level=steps.level,
        action=steps.action,
        log_probability=log_p.gather(-1, steps.action.unsqueeze(-1)).squeeze(-1),
        advantage=normalised(advantage, steps.level if per_level else None),
        target=advantage + value,
    )


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """A batch's loss, and what is logged of it (0-dimensional tensors).

    Attributes:
        loss: differentiable: policy + value - entropy, each by its weight.
        policy_loss: the clipped surrogate's.
        value_loss: the critic's mean squared error.
        entropy: mean of the policy's, nats.
    """

    loss: Tensor
    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor


def policy_loss(
    batch: PolicyBatch,
    actor: LevelQNetworks,
    critic: LevelQNetworks,
    *,
    clip: float,
    entropy_weight: float,
    value_weight: float,
) -> PolicyLoss:
    """The clipped loss of Schulman et al. (2017) over a batch of all levels together.

    Args:
        batch: B steps.
        actor: logits per level.
        critic: values per level, A = 1.
        clip: how far the probability ratio may usefully go from 1.
        entropy_weight: of the entropy's bonus.
        value_weight: of the critic's loss.
    """
    log_p = log_probabilities(actor, batch.features, batch.level, batch.mask)
    taken = log_p.gather(-1, batch.action.unsqueeze(-1)).squeeze(-1)
    ratio = (taken - batch.log_probability).exp()
    clipped = ratio.clamp(1.0 - clip, 1.0 + clip)
    surrogate = -torch.minimum(ratio * batch.advantage, clipped * batch.advantage).mean()
    # 0 * -inf is NaN: masked actions have probability 0 and add nothing
    entropy = -(log_p.exp() * log_p.masked_fill(~batch.mask, 0.0)).sum(dim=-1).mean()
    value = critic(batch.features, batch.level)[0, :, 0]
    value_loss = (value - batch.target).square().mean()
    return PolicyLoss(
        loss=surrogate + value_weight * value_loss - entropy_weight * entropy,
        policy_loss=surrogate.detach(),
        value_loss=value_loss.detach(),
        entropy=entropy.detach(),
    )
