"""One policy for all levels, for comparison with a policy per level."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms import (
    AlgorithmSettings,
    build_algorithm,
    level_weights,
    network_settings,
)
from rlhf_ray.config import SearchConfig, check_observation
from rlhf_ray.errors import InputError
from rlhf_ray.policies.policy import Policy
from rlhf_ray.testing import known_optimum_env, random_problem, score

torch.set_num_threads(1)
PROBLEM = random_problem(0, 2, gamma=0.8)
SIZES = {"n_features": PROBLEM.n_features, "n_actions": PROBLEM.n_actions}


def settings_of(name, **changes):
    epsilon = 0.0 if name == "ppo" else 0.1
    settings = AlgorithmSettings(
        gamma=0.8, epsilon=epsilon, n_episodes=8, seed=1, hidden=(32, 32), controller="single"
    )
    return replace(settings, **changes)


def learned(name, **changes):
    """The policy after a trial, and the environment runner's modules."""
    settings = settings_of(name, **changes)
    algorithm = build_algorithm(
        name,
        env_creator=lambda config: known_optimum_env(PROBLEM, settings.seed),
        env_config={},
        levels=PROBLEM.levels,
        settings=settings,
        **SIZES,
    )
    while not algorithm.train()["done"]:
        pass
    policy = Policy(
        levels=PROBLEM.levels,
        features=tuple(f"feature {i}" for i in range(PROBLEM.n_features)),
        operations=tuple({"name": f"{i}"} for i in range(3)),
        network=network_settings(name, n_levels=2, settings=settings, **SIZES),
        weights=level_weights(algorithm),
    )
    module = algorithm.env_runner.module
    algorithm.stop()
    return policy, module


@pytest.mark.parametrize("name", ["dqn", "ppo"])
def test_levels_differ_by_what_the_features_say_alone(name, ray_session, tmp_path):
    policy, module = learned(name)
    assert {key.split(".")[1] for key in policy.weights if key.startswith("heads.")} == {"0"}
    assert len({id(module[level].q.head) for level in PROBLEM.levels}) == 1
    mask = np.ones(PROBLEM.n_actions, dtype=np.int8)
    one, other = (PROBLEM.features(state=2, level=level, step=1) for level in (0, 1))
    assert not np.array_equal(policy.values(0, one, mask), policy.values(1, other, mask))
    np.testing.assert_array_equal(policy.values(0, one, mask), policy.values(1, one, mask))

    path = policy.save(tmp_path)
    assert json.loads(path.read_text())["network"]["controller"] == "single"
    loaded = Policy.load(path)
    assert loaded.network == policy.network
    np.testing.assert_array_equal(loaded.values(1, one, mask), policy.values(1, one, mask))


def test_dqn_with_one_controller_finds_the_optimum(ray_session):
    policy, _ = learned("dqn", n_episodes=240)
    assert score(PROBLEM, policy.act) > 0.95


def test_what_a_single_controller_cannot_be_is_refused():
    with pytest.raises(InputError, match="controller must be 'levels' for q-learning"):
        learned("q-learning")
    with pytest.raises(InputError, match="stock must be False for a single controller"):
        settings_of("dqn", stock=True)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"algorithm": "q-learning", "observation": "tabular"}, "must be levels for q-learning"),
        ({"observation": ("figures", "probe")}, "must hold the group level for a single"),
    ],
)
def test_configurations_that_one_controller_cannot_learn_from_are_refused(changes, match):
    with pytest.raises(InputError, match=match):
        check_observation(SearchConfig(controller="single", **changes))
    with pytest.raises(InputError, match="controller must be one that exists"):
        SearchConfig(controller="levles")
