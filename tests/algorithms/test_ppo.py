import numpy as np
import pytest
import torch

from rlhf_ray.algorithms import (
    AlgorithmSettings,
    build_algorithm,
    episodes_of,
    level_weights,
    network_settings,
)
from rlhf_ray.algorithms.exploration import gumbel_noise
from rlhf_ray.algorithms.handover import turns
from rlhf_ray.errors import InputError
from rlhf_ray.policies.policy import Policy
from rlhf_ray.testing import known_optimum_env, random_problem, score

torch.set_num_threads(1)
PROBLEM = random_problem(1, 3, gamma=0.9)


def settings_of(**changes):
    defaults = {"gamma": 0.9, "epsilon": 0.0, "n_episodes": 24, "seed": 7, "hidden": (16,)}
    return AlgorithmSettings(**{**defaults, **changes})


def make(problem=PROBLEM, **changes):
    return build_algorithm(
        "ppo",
        env_creator=lambda config: known_optimum_env(problem, 7),
        env_config={},
        levels=problem.levels,
        n_features=problem.n_features,
        n_actions=problem.n_actions,
        settings=settings_of(**changes),
    )


def train(n_iterations=3, **changes):
    algorithm = make(**changes)
    records = [record for _ in range(n_iterations) for record in episodes_of(algorithm.train())]
    weights = level_weights(algorithm)
    algorithm.stop()
    return records, weights


def assert_same(one, other):
    assert one[0] == other[0]
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]), name


def test_gumbel_noise_samples_the_softmax_and_is_fixed_by_its_place():
    probabilities = np.array([0.5, 0.3, 0.2])
    counts = np.zeros(3)
    for episode in range(4000):
        counts[(np.log(probabilities) + gumbel_noise(1, episode, 0, 3)).argmax()] += 1
    np.testing.assert_allclose(counts / 4000, probabilities, atol=0.025)
    np.testing.assert_array_equal(gumbel_noise(1, 2, 3, 4), gumbel_noise(1, 2, 3, 4))
    assert not np.array_equal(gumbel_noise(1, 2, 3, 4), gumbel_noise(1, 2, 4, 4))


def test_two_runs_give_the_same_weights_and_the_seed_matters(ray_session):
    one, same, other = train(), train(), train(seed=8)
    assert_same(one, same)
    assert one[0] != other[0]


def test_results_do_not_depend_on_how_many_play_at_once(ray_session):
    assert_same(train(num_envs_per_runner=1), train(num_envs_per_runner=4))


def test_trials_that_differ_by_gamma_begin_with_the_same_actions(ray_session):
    def first(**changes):
        algorithm = make(**changes)
        episodes = algorithm.env_runner.sample(num_episodes=4)
        algorithm.stop()
        return [[turn.action for turn in turns(e, PROBLEM.levels)] for e in episodes]

    assert first(gamma=0.5) == first(gamma=0.99)
    assert len({tuple(actions) for actions in first()}) > 1  # sampled, not greedy


def test_actions_are_valid_and_greedy_when_not_exploring(ray_session):
    algorithm = make()
    for explore in (True, False):
        episodes = algorithm.env_runner.sample(num_episodes=8, explore=explore)
        for turn in (turn for e in episodes for turn in turns(e, PROBLEM.levels)):
            assert turn.observation["action_mask"][turn.action]
            module = algorithm.env_runner.module[PROBLEM.levels[turn.level]]
            assert explore or turn.action == module.act(turn.observation)
    algorithm.stop()


def test_actor_and_critic_learn_and_what_keeps_it_random_falls(ray_session):
    algorithm = make(episodes_per_iteration=4)
    before = level_weights(algorithm)
    critic = [p.clone() for p in algorithm.learner_group._learner.module.critic.parameters()]
    results = [algorithm.train() for _ in range(6)]
    after = level_weights(algorithm)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    learned = algorithm.learner_group._learner.module.critic.parameters()
    assert all(not torch.equal(old, new) for old, new in zip(critic, learned, strict=True))
    assert results[-1]["entropy_coeff"] == pytest.approx(0.15 * 0.1)
    assert results[0]["updates"] == 12  # 24 steps: one minibatch in each of 12 passes
    assert {result["epsilon"] for result in results} == {0.0}
    module = algorithm.env_runner.module
    for name, value in module.networks.state_dict().items():
        assert torch.equal(value, after[name]), name  # the runner plays with the learner's weights
    algorithm.stop()


def test_stock_learns_otherwise(ray_session):
    plain, stock = train(), train(stock=True)
    assert any(not torch.equal(value, stock[1][name]) for name, value in plain[1].items())


def test_the_learned_policy_is_near_the_optimum_also_after_it_was_saved(ray_session, tmp_path):
    problem = random_problem(0, 2, gamma=0.8)
    changes = {"gamma": 0.8, "n_episodes": 640, "seed": 1, "hidden": (32, 32)}
    algorithm = make(problem, **changes)
    while not algorithm.train()["done"]:
        pass
    policy = Policy(
        levels=problem.levels,
        features=tuple(f"feature {i}" for i in range(problem.n_features)),
        operations=tuple({"name": f"{i}"} for i in range(3)),
        network=network_settings(
            "ppo",
            n_levels=2,
            n_features=problem.n_features,
            n_actions=problem.n_actions,
            settings=settings_of(**changes),
        ),
        weights=level_weights(algorithm),
    )
    algorithm.stop()
    reached = score(problem, policy.act)
    assert reached > 0.9
    assert score(problem, Policy.load(policy.save(tmp_path)).act) == reached


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"epsilon": 0.1}, "epsilon must be 0 for ppo, got epsilon=0.1.*entropy_coeff"),
        ({"overrides": {"kl_coeff": 1.0}}, "ones that ppo reads, got 'kl_coeff'"),
        (
            {"overrides": {"entropy_cofef": 1.0}},
            "got 'entropy_cofef'. Valid: clip_param, entropy",
        ),
    ],
)
def test_bad_settings_are_refused(changes, match):
    with pytest.raises(InputError, match=match):
        make(**changes)


def test_episodes_of_others_are_refused(ray_session):
    algorithm = make()
    with pytest.raises(InputError, match=r"must be off-policy.*Take dqn or q-learning"):
        algorithm.remember([])
    algorithm.stop()


def test_rllib_settings_can_be_overridden(ray_session):
    algorithm = make(overrides={"entropy_coeff": 0.5, "num_epochs": 2, "lambda_": 0.5})
    result = algorithm.train()
    assert result["updates"] == 2 and result["entropy_coeff"] > 0.3
    algorithm.stop()
