import random
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rlhf_ray.algorithms import (
    AlgorithmSettings,
    build_algorithm,
    episodes_of,
    level_weights,
    network_settings,
    notes_of,
)
from rlhf_ray.algorithms.exploration import epsilon_at, exploring_action
from rlhf_ray.algorithms.handover import (
    ReplayBuffer,
    Transitions,
    td_loss,
    td_targets,
    transitions,
    turns,
)
from rlhf_ray.errors import InputError, RlhfRayError
from rlhf_ray.policies.networks import LevelQNetworks, NetworkSettings
from rlhf_ray.testing import known_optimum_env, random_problem

torch.set_num_threads(1)
PROBLEM = random_problem(1, 3, gamma=0.9)


@pytest.fixture(scope="module")
def local_ray():
    import ray

    mine = not ray.is_initialized()
    if mine:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
    yield
    if mine:
        ray.shutdown()


def settings(**changes):
    defaults = {"gamma": 0.9, "epsilon": 0.1, "n_episodes": 24, "seed": 7, "hidden": (16,)}
    return AlgorithmSettings(**{**defaults, **changes})


def make(env_creator=None, name="dqn", **changes):
    return build_algorithm(
        name,
        env_creator=env_creator or (lambda config: known_optimum_env(config["problem"], 7)),
        env_config={"problem": PROBLEM},
        levels=PROBLEM.levels,
        n_features=PROBLEM.n_features,
        n_actions=PROBLEM.n_actions,
        settings=settings(**changes),
    )


def train(n_iterations=3, **changes):
    algorithm = make(**changes)
    records = [record for _ in range(n_iterations) for record in episodes_of(algorithm.train())]
    weights = level_weights(algorithm)
    algorithm.stop()
    return records, weights


def flatten(episode, levels, backup="handover"):
    return transitions(turns(episode, levels), backup)


# --- the backup, by hand -----------------------------------------------------------------------


def observation(value):
    return {
        "features": np.float32([value, 1.0]),
        "action_mask": np.int8([1, value < 2]),
    }


@pytest.fixture
def episode():
    """Turns of a, b, a, a; rewards 1, 2, 3, 4; the third turn's second action is masked."""
    from ray.rllib.env.multi_agent_episode import MultiAgentEpisode

    episode = MultiAgentEpisode(agent_to_module_mapping_fn=lambda agent_id, *a, **k: agent_id)
    order = ["a", "b", "a", "a"]
    episode.add_env_reset(observations={"a": observation(0)})
    for t, name in enumerate(order):
        ended = t == 3
        following = {} if ended else {order[t + 1]: observation(t + 1)}
        episode.add_env_step(
            following, {name: t % 2}, {name: t + 1.0}, terminateds={"__all__": ended}
        )
    return episode


def test_flatten_follows_the_order_of_the_environment(episode):
    flat = flatten(episode, ["a", "b"])
    assert flat.level.tolist() == [0, 1, 0, 0]
    assert flat.action.tolist() == [0, 1, 0, 1]
    assert flat.reward.tolist() == [1, 2, 3, 4]
    assert flat.features[:, 0].tolist() == [0, 1, 2, 3]
    assert flat.next_level.tolist()[:3] == [1, 0, 0]
    assert flat.next_features[:, 0].tolist() == [1, 2, 3, 0]
    assert flat.next_mask.tolist() == [[True, True], [True, False], [True, False], [False, False]]
    assert flat.terminated.tolist() == [0, 0, 0, 1]


def test_own_backup_is_what_rllib_keeps_per_agent(episode):
    flat = flatten(episode, ["a", "b"], backup="own")
    assert flat.next_level.tolist()[0] == 0
    assert flat.next_features[:, 0].tolist() == [2, 0, 3, 0]
    assert flat.terminated.tolist() == [0, 1, 0, 1]
    for level, name in enumerate(["a", "b"]):
        own = episode.agent_episodes[name]
        mine = flat.take(flat.level == level)
        assert mine.reward.tolist() == list(own.get_rewards())
        seen = [float(o["features"][0]) for o in own.get_observations()]
        assert mine.features[:, 0].tolist() == seen[:-1]
        assert mine.next_features[:-1, 0].tolist() == seen[1:-1]


def test_flatten_refuses_an_episode_that_did_not_end():
    unfinished = SimpleNamespace(is_terminated=False)
    with pytest.raises(RlhfRayError, match="must end by terminateds"):
        flatten(unfinished, ["a"])


class Fixed(torch.nn.Module):
    """Networks with given values: level 0 and level 1 have two actions each."""

    def __init__(self, values):
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(values))
        self.settings = NetworkSettings(n_levels=2, n_features=1, n_actions=2)

    def forward(self, features, level):
        return self.table[level].unsqueeze(0)


@pytest.mark.parametrize(
    ("double_q", "expected"),
    # online prefers action 0 of level 1 (5 > 4), target values it 10; alone it would take 20.
    # The second transition hands to level 0, where action 0 alone is valid: target 1.
    [(True, [1 + 0.5 * 10, 2 + 0.5 * 1, 3]), (False, [1 + 0.5 * 20, 2 + 0.5 * 1, 3])],
)
def test_target_is_the_next_levels_value(double_q, expected):
    batch = Transitions(
        features=torch.zeros(3, 1),
        level=torch.tensor([0, 1, 0]),
        action=torch.tensor([0, 1, 1]),
        reward=torch.tensor([1.0, 2.0, 3.0]),
        next_features=torch.zeros(3, 1),
        next_mask=torch.tensor([[True, True], [True, False], [False, False]]),
        next_level=torch.tensor([1, 0, 0]),
        terminated=torch.tensor([0.0, 0.0, 1.0]),
    )
    online, target = Fixed([[2.0, 3.0], [5.0, 4.0]]), Fixed([[1.0, 30.0], [10.0, 20.0]])
    goal = td_targets(batch, online, target, gamma=0.5, double_q=double_q)
    assert goal.tolist() == [expected]
    loss = td_loss(batch, online, target, gamma=0.5, double_q=double_q, huber=False)
    taken = np.array([2.0, 4.0, 3.0])
    assert loss.loss.item() == pytest.approx(np.mean((taken - expected) ** 2))
    assert loss.td_error.item() == pytest.approx(np.mean(np.abs(taken - expected)))
    loss.loss.backward()
    assert target.table.grad is None


def test_buffer_draws_by_its_seed_and_from_everything(episode):
    def drawn(seed):
        buffer = ReplayBuffer(seed)
        buffer.add(flatten(episode, ["a", "b"]))
        buffer.add(flatten(episode, ["a", "b"], backup="own"))
        assert len(buffer) == 8
        return torch.stack([batch.reward for batch in buffer.sample(5, 8)])

    assert drawn(1).shape == (5, 8)
    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))
    assert set(drawn(1).flatten().tolist()) == {1, 2, 3, 4}


def test_buffer_draws_what_is_rare_as_often_as_asked(episode):
    played = flatten(episode, ["a", "b"])
    common = [1]
    buffer = ReplayBuffer(0)
    buffer.add(played)

    def rare(**options):
        batches = list(buffer.sample(200, 8, **options))
        return torch.stack([~torch.isin(b.action, torch.tensor(common)) for b in batches]).sum(1)

    plain, more = rare(), rare(rare_share=0.75, common_actions=common)
    assert plain.min() < 6
    assert more.min() == 6
    everything = {"rare_share": 0.75, "common_actions": played.action.tolist()}
    assert len(list(buffer.sample(5, 8, **everything))) == 5  # nothing is rare: drawn as they come


# --- exploration -------------------------------------------------------------------------------


def test_larger_epsilon_only_adds_random_actions_and_keeps_them():
    mask = np.int8([1, 0, 1, 1])
    for episode in range(50):
        few, many = (exploring_action(3, episode, 2, mask, epsilon) for epsilon in (0.2, 0.7))
        assert few is None or few == many
        assert many is None or mask[many]
    every = [exploring_action(3, episode, 2, mask, 1.0) for episode in range(50)]
    assert set(every) == {0, 2, 3}


def test_exploring_by_episode_is_random_altogether_or_greedy_altogether():
    mask = np.int8([1, 0, 1, 1])
    episodes = [
        [exploring_action(3, episode, step, mask, 0.4, by="episode") for step in range(5)]
        for episode in range(200)
    ]
    explored = [actions for actions in episodes if actions[0] is not None]
    assert all(len({action is None for action in actions}) == 1 for actions in episodes)
    assert len(explored) / len(episodes) == pytest.approx(0.4, abs=0.1)
    assert all(len(set(actions)) > 1 for actions in explored[:3])


def test_a_random_action_repeats_the_last_operation_as_often_as_asked_where_it_is_open():
    mask = np.int8([1, 0, 1, 1])

    def drawn(episode, **more):
        return exploring_action(3, episode, 2, mask, 1.0, by="episode", **more)

    plain = [drawn(episode) for episode in range(300)]
    again = [drawn(episode, again=3, persistence=0.6) for episode in range(300)]
    assert all(action in (before, 3) for before, action in zip(plain, again, strict=True))
    others = [action for before, action in zip(plain, again, strict=True) if before != 3]
    assert others.count(3) / len(others) == pytest.approx(0.6, abs=0.1)
    assert [drawn(episode, again=1, persistence=0.6) for episode in range(300)] == plain  # closed
    assert exploring_action(3, 0, 2, mask, 0.0, again=3, persistence=0.6) is None


def test_epsilon_falls_over_the_fraction_asked_for():
    shape = {"final": 0.1, "n_episodes": 100}
    assert epsilon_at(0, decay_fraction=0.5, **shape) == 1.0
    assert epsilon_at(25, decay_fraction=0.5, **shape) == pytest.approx(0.55)
    assert epsilon_at(50, decay_fraction=0.5, **shape) == pytest.approx(0.1)
    assert epsilon_at(0, decay_fraction=0.0, **shape) == pytest.approx(0.1)


# --- the algorithm -----------------------------------------------------------------------------


def sleepy(config):
    """The environment, with steps that take a random time; counts the threads inside."""
    env = known_optimum_env(config["problem"], 7)
    plain_step = env.step

    def step(action):
        with LOCK:
            INSIDE.append(INSIDE[-1] + 1)
        time.sleep(random.uniform(0.0, 0.01))
        with LOCK:
            INSIDE.append(INSIDE[-1] - 1)
        return plain_step(action)

    env.step = step
    return env


LOCK, INSIDE = threading.Lock(), [0]


def assert_same(one, other):
    assert one[0] == other[0]
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]), name


def test_two_runs_give_the_same_weights_and_the_seed_matters(local_ray):
    one, same, other = train(), train(), train(seed=8)
    assert_same(one, same)
    assert one[0] != other[0]


def test_results_do_not_depend_on_timing_or_on_how_many_play_at_once(local_ray):
    plain = train(num_envs_per_runner=1)
    INSIDE[:] = [0]
    slow = train(num_envs_per_runner=4, env_creator=sleepy)
    assert max(INSIDE) >= 3  # several stages of one trial were in flight
    assert_same(plain, slow)
    assert [record["episode"] for record in plain[0]] == list(range(12))


def test_results_do_not_depend_on_who_plays(local_ray):
    def creator(config):
        return known_optimum_env(config["problem"], 7)

    local = train(episodes_per_iteration=5, n_iterations=2)
    remote = train(episodes_per_iteration=5, n_iterations=2, num_env_runners=2, env_creator=creator)
    assert_same(local, remote)


def test_trials_with_another_epsilon_meet_the_same_random_actions(local_ray):
    def actions(**changes):
        algorithm = make(**changes)
        episodes = algorithm.env_runner.sample(num_episodes=4)
        algorithm.stop()
        return [flatten(episode, PROBLEM.levels) for episode in episodes]

    for one, other in zip(actions(epsilon=0.0), actions(epsilon=1.0), strict=True):
        assert torch.equal(one.features[0], other.features[0])
    first = [flat.action.tolist() for flat in actions(epsilon=0.0, decay_fraction=1.0)]
    assert first[0] == actions(epsilon=1.0)[0].action.tolist()  # all random in episode 0


def test_every_level_is_an_rl_module_and_the_encoder_is_one(local_ray):
    algorithm = make()
    module = algorithm.env_runner.module
    assert tuple(module.keys()) == PROBLEM.levels
    encoders = {id(module[level].q.encoder) for level in PROBLEM.levels}
    assert len(encoders) == 1
    before = level_weights(algorithm)
    algorithm.train()
    after = level_weights(algorithm)
    assert all(not torch.equal(before[name], after[name]) for name in before)
    for name, value in module.networks.state_dict().items():
        assert torch.equal(value, after[name]), name  # the runner plays with the learner's weights
    algorithm.stop()


@pytest.mark.parametrize("name", ["dqn", "ppo", "q-learning"])
def test_a_stopped_algorithm_leaves_no_directory(local_ray, name):
    algorithm = make(name=name, epsilon=0.0 if name == "ppo" else 0.1)
    assert Path(algorithm.logdir).is_dir()
    algorithm.stop()
    assert not Path(algorithm.logdir).exists()


@pytest.mark.parametrize("name", ["dqn", "ppo", "q-learning"])
def test_levels_may_have_names_that_rllib_refuses(local_ray, name):
    odd = replace(PROBLEM, levels=("encoder/block:1", 'head?"<|>\\*', "out. "))

    def results(problem):
        algorithm = build_algorithm(
            name,
            env_creator=lambda config: known_optimum_env(problem, 7),
            env_config={},
            levels=problem.levels,
            n_features=problem.n_features,
            n_actions=problem.n_actions,
            settings=settings(epsilon=0.0 if name == "ppo" else 0.1),
        )
        result, weights = algorithm.train(), level_weights(algorithm)
        algorithm.stop()
        return result["return_mean"], weights

    (reached, weights), (as_usual, others) = results(odd), results(PROBLEM)
    assert reached == as_usual and list(weights) == list(others)
    assert all(torch.equal(value, others[key]) for key, value in weights.items())


def test_learned_weights_fit_the_networks_without_ray(local_ray):
    algorithm = make(encoder="separate", n_members=2, pessimism=1.0)
    algorithm.train()
    shape = network_settings(
        "dqn",
        n_levels=3,
        n_features=PROBLEM.n_features,
        n_actions=PROBLEM.n_actions,
        settings=settings(encoder="separate", n_members=2, pessimism=1.0),
    )
    LevelQNetworks(shape).load_state_dict(level_weights(algorithm))
    algorithm.stop()


def test_state_goes_out_and_in(local_ray):
    one, other = make(), make(seed=9)
    one.train()
    other.set_state(one.get_state())
    assert other.env_runner.next_episode == one.env_runner.next_episode == 4
    for name, value in level_weights(one).items():
        assert torch.equal(value, level_weights(other)[name])
    assert other.train()["episodes"] == 8
    one.stop()
    other.stop()


def test_metrics_are_few_and_flat_and_hold_the_environments_own(local_ray):
    def creator(config):
        env = known_optimum_env(config["problem"], 7)
        env.episode_metrics = lambda: {"cost": 2.5}
        return env

    algorithm = make(env_creator=creator)
    result = algorithm.train()
    algorithm.stop()
    assert {record["cost"] for record in episodes_of(result)} == {2.5}
    assert result["episodes"] == 4
    assert result["environment_steps"] == 4 * PROBLEM.horizon
    assert result["updates"] == 3 * result["environment_steps"]
    assert result["epsilon"] > 0.7
    assert "env_runners" not in result
    assert "learners" not in result


def test_notes_of_the_environment_come_with_the_episodes(local_ray):
    def creator(config):
        env = known_optimum_env(config["problem"], 7)
        reset, taken = env.reset, []

        def noted(**kwargs):
            taken[:] = [kwargs["options"]["episode"]]
            return reset(**kwargs)

        env.reset, env.episode_notes = noted, lambda: {"episode": list(taken)}
        return env

    for runners in (0, 2):
        algorithm = make(env_creator=creator, num_env_runners=runners)
        assert notes_of(algorithm.train()) == [{"episode": [n]} for n in range(4)]
        algorithm.stop()


def test_learning_anew_begins_at_the_initial_weights_and_plays_nothing(local_ray):
    def trained(relearn):
        algorithm, initial, updates = make(relearn=relearn), level_weights(make()), []
        while True:
            result = algorithm.train()
            updates.append(result["updates"])
            if result["done"]:
                break
        learned = level_weights(algorithm)
        algorithm._learner.start_over()
        for name, value in level_weights(algorithm).items():
            assert torch.equal(value, initial[name]), name
        algorithm.stop()
        return updates, learned

    (plain_updates, plain), (updates, anew) = trained(False), trained(True)
    assert updates[:-1] == plain_updates[:-1]
    assert updates[-1] == 2 * plain_updates[-1]
    assert all(not torch.equal(plain[name], anew[name]) for name in plain)


def test_episodes_of_others_are_replayed_and_make_no_updates_of_their_own(local_ray):
    def learned(n_others):
        other = make(seed=8)
        episodes = [turns(e, PROBLEM.levels) for e in other.env_runner.sample(num_episodes=5)]
        other.stop()
        algorithm = make()
        algorithm.remember(episodes[:n_others])
        result = algorithm.train()
        assert len(algorithm.local_replay_buffer) == PROBLEM.horizon * (n_others + 4)
        assert (result["episodes"], result["updates"]) == (4, 3 * 4 * PROBLEM.horizon)
        weights = level_weights(algorithm)
        algorithm.stop()
        return weights

    alone, one, same = learned(0), learned(5), learned(5)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], alone[name]) for name in one)


def test_learning_anew_makes_updates_for_what_others_played_too(local_ray):
    other = make(seed=8)
    episodes = [turns(e, PROBLEM.levels) for e in other.env_runner.sample(num_episodes=5)]
    other.stop()
    algorithm = make(n_episodes=4, relearn=True)
    algorithm.remember(episodes)
    assert algorithm.train()["updates"] == 3 * PROBLEM.horizon * (4 + (4 + 5))
    algorithm.stop()


def test_a_trial_plays_its_episodes_and_no_more(local_ray):
    algorithm = make(n_episodes=6)
    results = [algorithm.train() for _ in range(2)]
    assert [result["done"] for result in results] == [False, True]
    assert [record["episode"] for record in episodes_of(results[1])] == [4, 5]
    with pytest.raises(RlhfRayError, match="all were played"):
        algorithm.train()
    algorithm.stop()


def test_an_error_of_the_environment_reaches_the_caller(local_ray):
    def creator(config):
        env = known_optimum_env(config["problem"], 7)

        def step(action):
            raise RlhfRayError("the stage could not be carried out")

        env.step = step
        return env

    algorithm = make(env_creator=creator)
    with pytest.raises(RlhfRayError, match="stage could not"):
        algorithm.train()
    algorithm.stop()


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "dqm"}, "algorithm must be one that exists.*Did you mean 'dqn'"),
        (
            {"overrides": {"grad_clop": 1.0}},
            "that dqn reads, got 'grad_clop'. Valid: grad_clip",
        ),
        ({"overrides": {"n_step": 3}}, "ones that dqn reads, got 'n_step'"),
        ({"gamma": 1.1}, r"gamma must be in \[0, 1\], got gamma=1.1"),
        ({"n_episodes": 0}, "n_episodes must be at least 1"),
        ({"tau": 0.0}, r"tau must be in \(0, 1\]"),
    ],
)
def test_bad_settings_are_refused(changes, match):
    with pytest.raises(InputError, match=match):
        make(**changes)


def test_rllib_settings_can_be_overridden(local_ray):
    algorithm = make(overrides={"grad_clip": 0.5, "td_error_loss_fn": "mse"})
    assert algorithm.config.grad_clip == 0.5
    algorithm.train()
    algorithm.stop()
