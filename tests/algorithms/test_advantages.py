import numpy as np
import pytest
import torch
from turns import four_turns

from rlhf_ray.algorithms.advantages import (
    PolicyBatch,
    advantages,
    log_probabilities,
    normalised,
    policy_batch,
    policy_loss,
    trajectory,
)
from rlhf_ray.algorithms.handover import following

torch.set_num_threads(1)
VALUES = torch.tensor([10.0, 20.0, 30.0, 40.0])


class Fixed(torch.nn.Module):
    """Networks of two levels whose outputs are given, whatever the features."""

    def __init__(self, outputs):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(outputs))

    def forward(self, features, level):
        return self.table[level].unsqueeze(0)


class ByFeature(torch.nn.Module):
    """A critic that says ten times the first feature plus ten, and a hundred more for level 1."""

    def forward(self, features, level):
        return (10 * features[:, :1] + 10 + 100 * level.unsqueeze(-1)).unsqueeze(0)


def test_following_is_the_next_turn_or_the_levels_own():
    assert following([0, 1, 0, 0]) == [1, 2, 3, -1]
    assert following([0, 1, 0, 0], "own") == [2, -1, 3, -1]


def test_trajectory_follows_the_environment_and_keeps_episodes_apart():
    steps = trajectory([four_turns(), four_turns()], ["a", "b"])
    assert steps.level.tolist() == [0, 1, 0, 0] * 2
    assert steps.action.tolist() == [0, 1, 0, 1] * 2
    assert steps.reward.tolist() == [1, 2, 3, 4] * 2
    assert steps.features[:, 0].tolist() == [0, 1, 2, 3] * 2
    assert steps.mask.tolist() == [[True, True], [True, True], [True, False], [True, False]] * 2
    assert steps.next_step.tolist() == [1, 2, 3, -1, 5, 6, 7, -1]
    own = trajectory([four_turns(), four_turns()], ["a", "b"], "own")
    assert own.next_step.tolist() == [2, -1, 3, -1, 6, -1, 7, -1]


def test_advantages_by_hand_along_the_global_trajectory():
    steps = trajectory([four_turns()], ["a", "b"])
    found = advantages(steps.reward, VALUES, steps.next_step, gamma=0.5, lambda_=0.5)
    # deltas: 1 + 10 - 10 = 1, 2 + 15 - 20 = -3, 3 + 20 - 30 = -7, 4 - 40 = -36
    fourth = -36.0
    third = -7 + 0.25 * fourth  # -16
    second = -3 + 0.25 * third  # -7
    assert found.tolist() == [1 + 0.25 * second, second, third, fourth]


def test_advantages_by_hand_along_each_levels_own_turns():
    steps = trajectory([four_turns()], ["a", "b"], "own")
    found = advantages(steps.reward, VALUES, steps.next_step, gamma=0.5, lambda_=0.5)
    fourth = -36.0
    third = 3 + 20 - 30 + 0.25 * fourth
    assert found.tolist() == [1 + 15 - 10 + 0.25 * third, 2 - 20, third, fourth]


def test_lambda_one_gives_the_return_and_zero_the_one_step_difference():
    steps = trajectory([four_turns()], ["a", "b"])
    returns = advantages(steps.reward, VALUES, steps.next_step, gamma=0.5, lambda_=1.0) + VALUES
    assert returns.tolist() == [1 + 0.5 * (2 + 0.5 * (3 + 0.5 * 4)), 2 + 0.5 * 5, 5, 4]
    one_step = advantages(steps.reward, VALUES, steps.next_step, gamma=0.5, lambda_=0.0)
    assert one_step.tolist() == [1, -3, -7, -36]


def test_normalised_over_all_levels_or_within_each():
    advantage, level = torch.tensor([0.0, 2.0, 10.0, 14.0]), torch.tensor([0, 0, 1, 1])
    together = normalised(advantage)
    np.testing.assert_allclose(together, (advantage - 6.5) / np.std(advantage.numpy()), rtol=1e-6)
    assert normalised(advantage, level).tolist() == [-1, 1, -1, 1]
    assert normalised(torch.ones(3)).tolist() == [0, 0, 0]


def test_batch_values_each_step_by_the_level_that_acts_there():
    steps = trajectory([four_turns()], ["a", "b"])
    actor = Fixed([[0.0, 0.0], [0.0, np.log(3.0)]])
    batch = policy_batch(steps, actor, ByFeature(), gamma=1.0, lambda_=0.0)
    # values 10, 120, 30, 40: targets r + V of the level that acts next
    assert batch.target.tolist() == [1 + 120, 2 + 30, 3 + 40, 4]
    np.testing.assert_allclose(batch.log_probability[:2].exp(), [0.5, 0.75], rtol=1e-6)
    raw = batch.target - torch.tensor([10.0, 120.0, 30.0, 40.0])
    torch.testing.assert_close(batch.advantage, normalised(raw))


def test_masked_actions_have_no_probability_and_no_gradient():
    actor, critic = Fixed([[1.0, 5.0], [0.0, 0.0]]), Fixed([[0.0], [0.0]])
    mask = torch.tensor([[True, False], [True, True]])
    level = torch.tensor([0, 1])
    log_p = log_probabilities(actor, torch.zeros(2, 1), level, mask)
    assert log_p.exp().tolist() == [[1.0, 0.0], [0.5, 0.5]]
    batch = PolicyBatch(
        features=torch.zeros(2, 1),
        mask=mask,
        level=level,
        action=torch.tensor([0, 1]),
        log_probability=torch.tensor([0.0, np.log(0.5)]),
        advantage=torch.tensor([1.0, 2.0]),
        target=torch.zeros(2),
    )
    result = policy_loss(batch, actor, critic, clip=0.2, entropy_weight=0.1, value_weight=0.5)
    assert result.entropy.item() == pytest.approx(np.log(2) / 2)
    result.loss.backward()
    assert torch.isfinite(actor.table.grad).all()
    assert actor.table.grad[0].tolist() == [0.0, 0.0]


def test_loss_by_hand():
    actor, critic = Fixed([[0.0, np.log(3.0)]]), Fixed([[2.0]])
    old = torch.tensor([0.25, 0.5, 0.25])  # ratios 1, 1.5, 3
    batch = PolicyBatch(
        features=torch.zeros(3, 1),
        mask=torch.ones(3, 2, dtype=torch.bool),
        level=torch.zeros(3, dtype=torch.int64),
        action=torch.tensor([0, 1, 1]),
        log_probability=old.log(),
        advantage=torch.tensor([-1.0, 2.0, -1.0]),
        target=torch.tensor([2.0, 3.0, 5.0]),
    )
    result = policy_loss(batch, actor, critic, clip=0.2, entropy_weight=0.1, value_weight=0.5)
    # the second is clipped at 1.2; the third, whose advantage is negative, is not
    surrogate = -(-1.0 + 1.2 * 2 - 3.0) / 3
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert result.policy_loss.item() == pytest.approx(surrogate, rel=1e-5)
    assert result.value_loss.item() == pytest.approx((0 + 1 + 9) / 3)
    expected = surrogate + 0.5 * 10 / 3 - 0.1 * entropy
    assert result.loss.item() == pytest.approx(expected, rel=1e-5)
