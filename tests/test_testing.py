import itertools

import numpy as np
import pytest

from rlhf_ray.errors import InputError
from rlhf_ray.testing import (
    Problem,
    known_optimum_env,
    policy_value,
    random_problem,
    random_value,
    score,
    solve,
)


def play(problem, decide, episode, seed=0):
    """The discounted return of one episode in the environment."""
    env = known_optimum_env(problem, seed)
    observations, _ = env.reset(options={"episode": episode})
    total, discount, ended = 0.0, 1.0, False
    while not ended:
        ((name, seen),) = observations.items()
        assert env.observation_spaces[name].contains(seen)
        action = decide(problem.levels.index(name), seen["features"], seen["action_mask"])
        assert seen["action_mask"][action]
        observations, rewards, ended, _, _ = env.step({name: action})
        assert list(rewards) == [name]
        total += discount * rewards[name]
        discount *= problem.gamma
        ended = ended["__all__"]
    return total


@pytest.mark.parametrize("n_levels", [2, 3, 6])
def test_optimum_has_score_one_and_a_level_on_its_own_has_less(n_levels):
    problem = random_problem(5, n_levels)
    value, best = solve(problem)
    assert policy_value(problem, best) == pytest.approx(value)
    assert score(problem, best) == pytest.approx(1.0)
    assert score(problem, lambda level, features, mask: int(level)) < 0.8  # linger


def test_value_agrees_with_play_in_the_environment():
    problem = random_problem(2, 2, n_states=3)
    _, best = solve(problem)
    by_start = {}
    for episode in range(100):
        by_start.setdefault(problem.start(0, episode), play(problem, best, episode))
    assert len(by_start) == 6
    assert np.mean(list(by_start.values())) == pytest.approx(solve(problem)[0])


def test_solution_equals_exhaustive_search():
    problem = random_problem(4, 2, n_states=2, n_operations=2, horizon=3, chain=2, gamma=0.8)

    def best_from(state, level, step, discount):
        if step == problem.horizon:
            return 0.0
        returns = []
        for operation, following in itertools.product(range(2), range(2)):
            if problem.mask[state, level, operation * 2 + following]:
                here = (state, level, operation)
                after = best_from(problem.next_state[here], following, step + 1, discount * 0.8)
                returns.append(discount * problem.reward[here] + after)
        return max(returns)

    starts = [best_from(state, level, 0, 1.0) for state in range(2) for level in range(2)]
    assert solve(problem)[0] == pytest.approx(np.mean(starts))


def test_random_value_is_the_mean_over_valid_actions():
    problem = Problem(
        levels=("a", "b"),
        gamma=0.5,
        horizon=1,
        next_state=np.zeros((1, 2, 1), int),
        reward=np.array([[[1.0], [3.0]]]),
        ends=np.zeros((1, 2, 1), bool),
        mask=np.ones((1, 2, 2), np.int8),
    )
    assert random_value(problem) == 2.0


def test_equal_seeds_give_equal_problems():
    one, same, other = (random_problem(seed, 3) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.reward, same.reward)
    assert not np.array_equal(one.reward, other.reward)


def test_random_problem_refuses_what_has_no_hand_over():
    with pytest.raises(InputError, match="n_levels >= 2"):
        random_problem(0, 1)
