from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.rllib.env.multi_agent_env import MultiAgentEnv
from ray.rllib.utils.pre_checks.env import check_multiagent_environments
from synthetic import START, SyntheticStages, learns, spec_of

from rlhf_ray.env import EpisodePlan, FineTuningEnv
from rlhf_ray.errors import FailedStageError, StageError
from rlhf_ray.outcomes import StageRequest
from rlhf_ray.policies.observations import Observer
from rlhf_ray.process import ProcessSpec, RewardWeights
from rlhf_ray.tree.tally import Answer, TalliedStages, Tally

TASKS = ("a", "b", "c")


def plan(**changes: Any) -> EpisodePlan:
    settings = {"tasks": TASKS, "replicas": 2, "n_levels": 3, "random_start": False, "seed": 0}
    return EpisodePlan(**{**settings, **changes})


def env_of(stages: Any = None, spec: ProcessSpec | None = None, **changes: Any) -> FineTuningEnv:
    spec = spec or spec_of(3, probed=True)
    return FineTuningEnv(
        {
            "spec": spec,
            "observer": Observer(),
            "plan": plan(n_levels=spec.n_levels, **changes),
            "stages": TalliedStages(stages or SyntheticStages(norms=(0.5, 1.0, 2.0)), Tally()),
        }
    )


def act(env: FineTuningEnv, observations: dict[str, Any], name: str, to: int = 0) -> Any:
    """Takes an operation by name and hands over to a level."""
    (level,) = observations
    number = [o.name for o in env._spec.operations].index(name)
    action = number * env._spec.n_levels + to
    assert observations[level]["action_mask"][action]
    return env.step({level: action})


# -- the plan


@given(seed=st.integers(0, 9), rounds=st.integers(1, 4), n=st.integers(1, 7))
def test_plan_plays_every_task_equally_often(seed: int, rounds: int, n: int) -> None:
    made = plan(tasks=tuple("abcdefg"[:n]), seed=seed)
    counts = Counter(made.draw(episode)[0] for episode in range(rounds * n))
    assert set(counts.values()) == {rounds} and len(counts) == n


def test_plan_is_a_function_of_seed_and_number() -> None:
    episodes = range(60)
    drawn = [plan(random_start=True).draw(n) for n in episodes]
    assert [plan(random_start=True).draw(n) for n in reversed(episodes)] == drawn[::-1]
    assert [plan(random_start=True, seed=1).draw(n) for n in episodes] != drawn
    assert {replica for _, replica, _ in drawn} == {0, 1}
    assert {level for _, _, level in drawn} == {0, 1, 2}
    assert {plan().draw(n)[2] for n in episodes} == {0}


def test_plan_shuffles_each_round_anew() -> None:
    made = plan(tasks=tuple("abcdefgh"))
    rounds = [[made.draw(8 * r + i)[0] for i in range(8)] for r in range(3)]
    assert rounds[0] != rounds[1] != rounds[2]


# -- the environment


def test_env_keeps_rllibs_contract() -> None:
    env = env_of(spec=replace(spec_of(3, probed=True, horizon=3)))
    check_multiagent_environments(env)
    assert isinstance(env, MultiAgentEnv)
    assert env.possible_agents == ["conv", "mid", "late"]


def test_every_observation_lies_in_its_space_and_only_one_level_acts() -> None:
    env = env_of(random_start=True)
    draw = np.random.default_rng(0)
    for episode in range(20):
        observations, _ = env.reset(options={"episode": episode})
        for _ in range(20):
            (level,) = observations
            assert env.observation_spaces[level].contains(observations[level])
            action = int(draw.choice(np.flatnonzero(observations[level]["action_mask"])))
            observations, rewards, ended, truncated, _ = env.step({level: action})
            assert set(rewards) == {level} and not truncated["__all__"]
            if ended["__all__"]:
                break
        assert ended["__all__"]


def test_reset_plays_the_episode_asked_for_or_the_next() -> None:
    stages = SyntheticStages(norms=(0.5, 1.0, 2.0))
    env = env_of(stages, random_start=True)
    for options in (None, {"episode": 7}, None):
        env.reset(options=options)
    expected = [plan(random_start=True).draw(n) for n in (0, 7, 8)]
    assert [(r.task, r.replica) for r in stages.asked] == [(t, r) for t, r, _ in expected]


def test_reward_and_end_are_those_of_the_process() -> None:
    spec = spec_of(2, horizon=2, probed=True)
    weights = RewardWeights(tuning_cost=0.1, switch_cost=0.01)
    spec = replace(spec, settings=replace(spec.settings, weights=weights))
    env = env_of(SyntheticStages(), spec)
    observations, _ = env.reset()
    observations, rewards, ended, _, _ = act(env, observations, "train_mid", to=1)
    assert list(observations) == ["head"] and not ended["__all__"]
    assert rewards == {"conv": pytest.approx(0.1 - 0.1 * 0.6 - 0.01)}
    observations, rewards, ended, _, _ = act(env, observations, "stop", to=1)
    assert rewards == {"head": 0.0} and ended["__all__"]


def test_notes_are_of_this_episode_alone() -> None:
    env = env_of(SyntheticStages(), spec_of(2, horizon=2, probed=True))
    for _ in range(2):
        observations, _ = env.reset()
        assert env.episode_notes()["actions"] == []
        observations, *_ = act(env, observations, "train_mid", to=1)
        act(env, observations, "stop", to=1)
        notes = env.episode_notes()
        assert len(notes["actions"]) == 2 and notes["tally"].logical == 1
    assert env._all_stages.tally == Tally()


def test_step_before_reset_is_a_bug_of_the_caller() -> None:
    with pytest.raises(AssertionError, match="reset comes before step"):
        env_of().step({"conv": 0})


# -- stages that fail


class FailingStages(SyntheticStages):
    """One learning rate raises every time."""

    def __init__(self, error: StageError) -> None:
        super().__init__(learns)
        self._error = error

    def outcome(self, request: StageRequest, namespace: str = "") -> Answer:
        if any(step.operation.settings()["learning_rate"] == 3e-3 for step in request.path):
            raise self._error
        return super().outcome(request)


def test_stage_that_always_fails_counts_as_diverged_and_the_episode_goes_on() -> None:
    env = env_of(FailingStages(FailedStageError("a stage must run, got OOM")), spec_of(probed=True))
    observations, _ = env.reset()
    observations, *_ = act(env, observations, "train_mid", to=1)
    observations, rewards, ended, _, _ = act(env, observations, "train_high", to=0)
    assert not ended["__all__"] and rewards["head"] == pytest.approx(-0.002)  # the hand-over alone
    state = env._state
    assert state is not None and state.outcome.diverged
    assert (state.outcome.metric, len(state.path), len(state.best_path)) == (START + 0.1, 2, 1)
    _, _, ended, _, _ = act(env, observations, "train_mid")  # fails like what it goes on from
    tally = env.episode_notes()["tally"]
    assert ended["__all__"] and (tally.logical, tally.distinct, tally.failed) == (3, 1, 2)
    assert tally.failure == "a stage must run, got OOM" and tally.summary()["failed"] == 2
    assert Tally.from_json(tally.as_json()) == tally


def test_other_errors_of_the_tree_reach_the_caller() -> None:
    env = env_of(FailingStages(StageError("every stage must be in the tree")), spec_of(probed=True))
    observations, _ = env.reset()
    with pytest.raises(StageError, match="must be in the tree"):
        act(env, observations, "train_high")


def test_failing_test_evaluation_is_no_outcome() -> None:
    class NoTest(SyntheticStages):
        def outcome(self, request: StageRequest, namespace: str = "") -> Answer:
            if request.kind == "test":
                raise FailedStageError("a stage must run, got no test")
            return super().outcome(request)

    stages = TalliedStages(NoTest(), Tally())
    with pytest.raises(FailedStageError, match="no test"):
        stages.outcome(StageRequest(task="a", kind="test"))
