from itertools import product

import pytest
import torch

from rlhf_ray.errors import InputError
from rlhf_ray.policies.networks import LevelQNetworks, NetworkSettings, masked, pessimistic

SHAPES = [
    NetworkSettings(
        n_levels=3,
        n_features=5,
        n_actions=4,
        hidden=hidden,
        encoder=encoder,
        dueling=dueling,
        n_members=n_members,
    )
    for hidden, encoder, dueling, n_members in product(
        [(7,), (6, 8)], ["shared", "separate"], [True, False], [1, 2]
    )
]


@pytest.mark.parametrize("settings", SHAPES)
def test_mixed_batch_equals_the_levels_one_by_one(settings):
    networks = LevelQNetworks(settings, seed=1)
    features, level = torch.randn(9, 5), torch.arange(9) % 3
    together = networks(features, level)
    assert together.shape == (settings.n_members, 9, 4)
    for row in range(9):
        alone = networks.level(int(level[row]))(features[row : row + 1])[:, 0]
        torch.testing.assert_close(together[:, row], alone)


@pytest.mark.parametrize("settings", SHAPES)
def test_levels_hold_the_parameters_of_the_whole(settings):
    networks = LevelQNetworks(settings)
    held = {id(p) for level in range(3) for p in networks.level(level).parameters()}
    assert held == {id(p) for p in networks.parameters()}


@pytest.mark.parametrize("dueling", [True, False])
def test_a_single_controller_has_one_head_and_answers_all_levels_alike(dueling):
    settings = NetworkSettings(
        n_levels=3, n_features=5, n_actions=4, n_members=2, dueling=dueling, controller="single"
    )
    networks = LevelQNetworks(settings)
    assert sum(name.startswith("heads.") for name in networks.state_dict()) == 2  # weight and bias
    features = torch.randn(6, 5)
    together = networks(features, torch.arange(6) % 3)
    assert together.shape == (2, 6, 4)
    for level in range(3):  # whose turn it is is known from the features alone
        torch.testing.assert_close(networks.level(level)(features), together)


def test_equal_seeds_give_equal_weights_and_members_differ():
    settings = NetworkSettings(n_levels=2, n_features=3, n_actions=4, n_members=2)
    one, same, other = (LevelQNetworks(settings, seed=seed) for seed in (1, 1, 2))
    features, level = torch.ones(1, 3), torch.tensor([1])
    torch.testing.assert_close(one(features, level), same(features, level), rtol=0, atol=0)
    assert not torch.allclose(one(features, level), other(features, level))
    assert not torch.allclose(*one(features, level))


def test_pessimism_takes_deviations_off_the_mean():
    values = torch.tensor([[[1.0, 2.0]], [[3.0, 2.0]]])
    torch.testing.assert_close(pessimistic(values, 0.5), torch.tensor([[1.5, 2.0]]))


def test_masked_values_are_never_the_largest():
    values = masked(torch.tensor([[5.0, -3.0]]), torch.tensor([[0, 1]], dtype=torch.int8))
    assert values.argmax(dim=-1).tolist() == [1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"n_levels": 0}, "n_levels must be at least 1, got n_levels=0"),
        ({"hidden": ()}, "hidden must be at least 1"),
        ({"encoder": "common"}, "encoder must be 'shared' or 'separate'"),
        ({"controller": "one"}, "controller must be 'levels' or 'single', got 'one'"),
        ({"controller": "single", "encoder": "separate"}, "encoder must be 'shared' for a single"),
        ({"pessimism": -1.0}, "pessimism must be finite"),
        ({"assurance": float("nan")}, "assurance must be finite"),
        ({"least_tried": -1}, "least_tried must be finite and >= 0"),
        ({"schedule": ((0, 4),)}, r"schedule must hold actions in \[0, 3\]"),
    ],
)
def test_settings_refuse_what_cannot_be(change, match):
    with pytest.raises(InputError, match=match):
        NetworkSettings(**{"n_levels": 2, "n_features": 3, "n_actions": 4, **change})
