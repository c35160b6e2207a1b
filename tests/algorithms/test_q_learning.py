import numpy as np
import pytest
import torch
from turns import four_turns

from rlhf_ray.algorithms import (
    AlgorithmSettings,
    build_algorithm,
    episodes_of,
    level_weights,
    network_settings,
)
from rlhf_ray.algorithms.handover import turns
from rlhf_ray.errors import InputError
from rlhf_ray.policies.policy import Policy
from rlhf_ray.policies.q_table import QTable, from_weights
from rlhf_ray.testing import known_optimum_env, random_problem, score

torch.set_num_threads(1)
PROBLEM = random_problem(1, 3, gamma=0.9)


def make(**changes):
    settings = {"gamma": 0.9, "epsilon": 0.1, "n_episodes": 24, "seed": 7, **changes}
    return build_algorithm(
        "q-learning",
        env_creator=lambda config: known_optimum_env(PROBLEM, 7),
        env_config={},
        levels=PROBLEM.levels,
        n_features=PROBLEM.n_features,
        n_actions=PROBLEM.n_actions,
        settings=AlgorithmSettings(**settings),
    )


def train(n_iterations=3, **changes):
    algorithm = make(**changes)
    records = [record for _ in range(n_iterations) for record in episodes_of(algorithm.train())]
    weights = level_weights(algorithm)
    algorithm.stop()
    return records, weights


def test_updates_by_hand_bootstrap_from_the_level_that_acts_next():
    from rlhf_ray.algorithms.q_learning import learn_step, table_steps

    tables = [QTable(2, 2), QTable(2, 2)]
    steps = table_steps(turns(four_turns(), ["a", "b"]), tables)
    assert [(s.level, s.row, s.action, s.next_level, s.next_row) for s in steps[:3]] == [
        (0, 0, 0, 1, 0),
        (1, 0, 1, 0, 1),
        (0, 1, 0, 0, 2),
    ]
    assert [s.next_actions for s in steps] == [(0, 1), (0,), (0,), ()]
    for step in reversed(steps):
        learn_step(tables, step, alpha=0.5, gamma=0.5)
    # the fourth turn's action 1 is masked at its state, so what is bootstrapped there is 0
    third, second = 0.5 * 3, 0.5 * (2 + 0.5 * 1.5)
    first = 0.5 * (1 + 0.5 * second)
    a, b = tables
    assert [a.best(0, (0,)), a.best(1, (0,)), a.best(2, (1,))] == [first, third, 2.0]
    assert b.best(0, (1,)) == second


def test_stock_bootstraps_from_the_levels_own_next_turn():
    from rlhf_ray.algorithms.q_learning import learn_step, table_steps

    tables = [QTable(2, 2), QTable(2, 2)]
    steps = table_steps(turns(four_turns(), ["a", "b"]), tables, "own")
    for step in reversed(steps):
        learn_step(tables, step, alpha=1.0, gamma=0.5)
    assert tables[1].best(0, (1,)) == 2.0  # b has no later turn
    assert tables[0].best(0, (0,)) == 1 + 0.5 * 3.0


def test_two_runs_give_the_same_tables_and_the_seed_matters(ray_session):
    one, same, other = train(), train(), train(seed=8)
    assert one[0] == same[0]
    for name, value in one[1].items():
        assert torch.equal(value, same[1][name]), name
    assert one[0] != other[0]


def test_every_level_has_a_table_of_its_own_and_the_runner_the_learners(ray_session):
    algorithm = make()
    result = algorithm.train()
    module = algorithm.env_runner.module
    assert tuple(module.keys()) == PROBLEM.levels
    tables = [module[level].table for level in PROBLEM.levels]
    assert result["states"] == sum(len(table) for table in tables)
    assert result["updates"] == result["environment_steps"] * (1 + 3 * 64)
    for name, value in level_weights(algorithm).items():
        level, part = int(name.split(".")[1]), name.split(".")[2]
        assert torch.equal(tables[level].tensors()[part], value)
    algorithm.stop()


def test_episodes_of_others_are_replayed(ray_session):
    other, algorithm = make(seed=8), make()
    played = [turns(e, PROBLEM.levels) for e in other.env_runner.sample(num_episodes=5)]
    algorithm.remember(played)
    assert not any(
        value.any() for name, value in level_weights(algorithm).items() if "states" not in name
    )
    met = {(turn.level, *turn.observation["features"]) for episode in played for turn in episode}
    result = algorithm.train()
    assert result["updates"] == PROBLEM.horizon * 4 * (1 + 3 * 64)
    weights = level_weights(algorithm)
    learned = {
        (level, *weights[f"levels.{level}.states"][row].tolist())
        for level in range(3)
        for row in weights[f"levels.{level}.visits"].any(dim=1).nonzero().flatten().tolist()
    }
    assert met <= learned
    algorithm.stop()
    other.stop()


def test_only_valid_actions_are_taken_and_learned(ray_session):
    _, weights = train(epsilon=1.0)
    shape = {"n_levels": 3, "n_features": PROBLEM.n_features, "n_actions": PROBLEM.n_actions}
    from_weights(weights, **shape)
    for level in range(3):
        states = weights[f"levels.{level}.states"][:, 3:-1].argmax(dim=1)
        taken = weights[f"levels.{level}.visits"].bool().numpy()
        assert not (taken & (PROBLEM.mask[states.numpy(), level] == 0)).any()


def test_state_goes_out_and_in(ray_session):
    one, other = make(), make(seed=9)
    one.train()
    other.set_state(one.get_state())
    for name, value in level_weights(one).items():
        assert torch.equal(value, level_weights(other)[name])
    assert other.train()["episodes"] == 8
    one.stop()
    other.stop()


def test_the_learned_policy_is_optimal_also_after_it_was_saved(ray_session, tmp_path):
    problem = random_problem(0, 2, gamma=0.8)
    settings = AlgorithmSettings(gamma=0.8, epsilon=0.1, n_episodes=400, seed=1, alpha=0.5)
    sizes = {"n_features": problem.n_features, "n_actions": problem.n_actions}
    algorithm = build_algorithm(
        "q-learning",
        env_creator=lambda config: known_optimum_env(problem, 1),
        env_config={},
        levels=problem.levels,
        settings=settings,
        **sizes,
    )
    while not algorithm.train()["done"]:
        pass
    policy = Policy(
        levels=problem.levels,
        features=tuple(f"feature {i}" for i in range(problem.n_features)),
        operations=tuple({"name": f"{i}"} for i in range(3)),
        network=network_settings("q-learning", n_levels=2, settings=settings, **sizes),
        weights=level_weights(algorithm),
    )
    algorithm.stop()
    assert policy.kind == "tabular"
    assert score(problem, policy.act) == pytest.approx(1.0)
    loaded = Policy.load(policy.save(tmp_path))
    assert loaded.kind == "tabular"
    assert score(problem, loaded.act) == pytest.approx(1.0)
    features, mask = problem.features(0, 1, 2), np.ones(problem.n_actions, np.int8)
    np.testing.assert_array_equal(
        loaded.values(1, features, mask), policy.values(1, features, mask)
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"alpha": 0.0}, r"alpha must be in \(0, 1\], got alpha=0.0"),
        ({"overrides": {"grad_clip": 1.0}}, "ones that q-learning reads, got 'grad_clip'"),
    ],
)
def test_bad_settings_are_refused(changes, match):
    with pytest.raises(InputError, match=match):
        make(**changes)
