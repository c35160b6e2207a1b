"""Episodes of other trials: what is kept of them, which are taken, and what they become."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import SyntheticStages, spec_of

from rlhf_ray.algorithms.exploration import exploring_action
from rlhf_ray.algorithms.handover import Transitions, Turn, transitions
from rlhf_ray.algorithms.settings import AlgorithmSettings
from rlhf_ray.env import EpisodePlan, FineTuningEnv
from rlhf_ray.evaluation.judging import Utility
from rlhf_ray.evaluation.scheduling import Walk, tuned_schedules
from rlhf_ray.operations import Skip
from rlhf_ray.policies.observations import Observer
from rlhf_ray.process import ProcessSpec, RewardWeights
from rlhf_ray.storage import Storage, open_storage
from rlhf_ray.sweep.experience import (
    PlayedEpisode,
    episodes_of_others,
    is_random,
    learn_from_others,
    learn_from_walks,
    played_episode,
    read_episodes,
    rebuilt,
    write_episodes,
)
from rlhf_ray.tree.tally import TalliedStages, Tally

PLAN = EpisodePlan(tasks=("a", "b"), replicas=2, n_levels=2, random_start=True, seed=3)


def settings(epsilon: float = 0.5, **changes: Any) -> AlgorithmSettings:
    """Twenty episodes, from the first explored with a probability of `epsilon`."""
    shape = {"gamma": 0.9, "n_episodes": 20, "seed": 3, "decay_fraction": 0.0}
    return AlgorithmSettings(**{**shape, "epsilon": epsilon, "explore_by": "episode", **changes})


def weighed(tuning_cost: float, switch_cost: float) -> ProcessSpec:
    spec = spec_of(2, horizon=3, probed=True)
    weights = RewardWeights(tuning_cost=tuning_cost, switch_cost=switch_cost)
    return replace(spec, settings=replace(spec.settings, weights=weights))


def tallied(tally: Tally) -> TalliedStages:
    stages: Any = SyntheticStages()
    return TalliedStages(stages, tally)


def played(spec: ProcessSpec, number: int, actions: tuple[int, ...] = ()) -> list[Turn]:
    """An episode in the environment: along the actions, or along drawn ones."""
    stages = tallied(Tally())
    env = FineTuningEnv({"spec": spec, "observer": Observer(), "plan": PLAN, "stages": stages})
    observations, _ = env.reset(options={"episode": number})
    found: list[Turn] = []
    ended = False
    while not ended:
        ((level, saw),) = observations.items()
        drawn = exploring_action(3, number, len(found), saw["action_mask"], 1.0)
        action = actions[len(found)] if actions else drawn
        assert action is not None
        observations, rewards, over, _, _ = env.step({level: action})
        ended = over["__all__"]
        found.append(
            Turn(
                level=spec.levels.index(level),
                observation=saw,
                action=action,
                reward=rewards[level],
            )
        )
    assert env.episode_notes()["actions"] == [turn.action for turn in found]
    return found


def test_rebuilt_transitions_are_those_of_the_trials_own_weights() -> None:
    others, own = weighed(0.3, 0.1), weighed(0.01, 0.002)
    numbers = range(6)
    theirs = [played(others, number) for number in numbers]
    kept = [
        played_episode(settings(), number, [turn.action for turn in episode])
        for number, episode in zip(numbers, theirs, strict=True)
    ]
    tally = Tally()
    stages = tallied(tally)
    again = rebuilt(own, Observer(), stages, PLAN, kept)
    differ = 0
    for number, one, episode, before in zip(numbers, kept, again, theirs, strict=True):
        expected = transitions(played(own, number, one.actions))
        for name, value in vars(transitions(episode.turns)).items():
            assert torch.equal(value, getattr(expected, name)), name
        differ += not torch.equal(transitions(before).reward, expected.reward)
    assert differ and tally.logical > 0


def test_episodes_are_kept_as_few_numbers_and_a_cut_file_as_none(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    given = ((settings(1.0), 0, [3, 1]), (settings(0.0), 1, [7]))
    kept = [played_episode(*one) for one in given]
    write_episodes(storage, "s", "000-a", kept)
    assert read_episodes(storage, "s", "000-a") == kept
    file = tmp_path / "s" / "trials" / "000-a" / "episodes.json"
    assert file.stat().st_size < 60
    assert json.loads(file.read_text())[1][1] == ""  # not all of it was drawn
    file.write_text("[[0, 1, 3, 1]]")  # as earlier versions wrote it
    assert read_episodes(storage, "s", "000-a") == [replace(kept[0], drawn="")]
    file.write_text(file.read_text()[:9])
    assert read_episodes(storage, "s", "000-a") == read_episodes(storage, "s", "none") == []


@pytest.mark.parametrize("by", ["episode", "step"])
def test_random_episodes_are_those_that_are_drawn_throughout(by: Any) -> None:
    some = settings(0.5, explore_by=by)
    masks = np.ones(5, np.int8)
    for number in range(20):
        drawn = [exploring_action(3, number, t, masks, 0.5, by=by) for t in range(3)]
        assert is_random(some, number, 3) == (None not in drawn)
    assert 0 < sum(is_random(some, number, 2) for number in range(20)) < 20


def write(storage: Storage, trial: str, episodes: dict[int, tuple[int, ...]], eps: float) -> None:
    kept = [played_episode(settings(eps), number, actions) for number, actions in episodes.items()]
    write_episodes(storage, "s", trial, kept)


def test_others_episodes_are_taken_once_and_not_what_a_trial_draws_itself(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    assert episodes_of_others(storage, "s", "000-a", settings(), PLAN) == {}
    drawn = [number for number in range(20) if is_random(settings(0.5), number, 1)]
    greedy = next(number for number in range(20) if not is_random(settings(0.5), number, 1))
    write(storage, "002-c", {drawn[0]: (5,), greedy: (1, 2)}, 0.5)
    write(storage, "001-b", {greedy: (1, 2)}, 0.5)
    write(storage, "000-a", {greedy: (4,)}, 0.5)
    (tmp_path / "s" / "trials" / "003-d").mkdir()  # one that runs

    def taken(trial: str, own: float) -> dict[str, list[tuple[int, tuple[int, ...]]]]:
        found = episodes_of_others(storage, "s", trial, settings(own), PLAN)
        return {name: [(e.number, e.actions) for e in episodes] for name, episodes in found.items()}

    first, second = {"000-a": [(greedy, (4,))]}, {"001-b": [(greedy, (1, 2))]}
    assert taken("003-d", 0.5) == first | second
    assert taken("000-a", 0.5) == second  # its own, of before it was cut off, are not another's
    assert taken("001-b", 0.0) == first | {"002-c": [(drawn[0], (5,)), (greedy, (1, 2))]}


def test_what_trials_with_other_schedules_drew_is_taken(tmp_path: Path) -> None:
    storage, schedule = open_storage(tmp_path), ((0, 1),) * 3
    ours = settings(1.0, schedule=schedule, adherence=0.7)
    for name, theirs in (("000-a", ours), ("001-b", replace(ours, schedule=((2, 3),) * 3))):
        kept = [played_episode(theirs, 4, [int(name[2]), 5])]
        write_episodes(storage, "s", name, kept)
    taken = episodes_of_others(storage, "s", "002-c", replace(ours, gamma=0.8), PLAN)
    assert {name: [e.actions for e in episodes] for name, episodes in taken.items()} == {
        "001-b": [(1, 5)]
    }


class Learner:
    """Takes what it is given."""

    def __init__(self) -> None:
        self.given: list[list[Turn]] = []
        self.implied: list[Transitions] = []

    def remember(self, episodes: list[list[Turn]], implied: Sequence[Transitions] = ()) -> None:
        self.given, self.implied = episodes, list(implied)


def test_what_was_learned_from_is_counted_apart() -> None:
    spec, learner, tally = weighed(0.1, 0.0), Learner(), Tally()
    stages = tallied(Tally())
    actions = tuple(turn.action for turn in played(spec, 2))
    one = PlayedEpisode(number=2, actions=actions, drawn="")
    counts = learn_from_others(
        learner,
        {"000-a": [one], "001-b": [one]},
        spec=spec,
        observer=Observer(),
        stages=stages.within("experience", tally),
        plan=PLAN,
    )
    assert counts == {"trials": 2, "episodes": 2, "steps": 2 * len(actions)}
    assert [len(episode) for episode in learner.given] == [len(actions)] * 2
    assert stages.tally == Tally() and tally.logical > 0


def walked(spec: ProcessSpec) -> tuple[Walk, ...]:
    """What the search for a schedule met on one task."""
    stages = SyntheticStages()
    utility = Utility(tuning_cost=0.02, switch_cost=0.002)
    return tuned_schedules(
        spec, lambda name: stages, tasks=["a"], utility=utility, seed=0, threads=1
    ).walks


def test_walks_are_episodes_under_the_trials_own_weights() -> None:
    others, own, learner = weighed(0.3, 0.1), weighed(0.01, 0.002), Learner()
    walks = walked(others)
    learn_from_walks(learner, walks, spec=own, observer=Observer(), counterfactual=True)
    number = next(n for n in range(20) if PLAN.draw(n) == ("a", 0, 0))
    assert len(learner.given) == len(walks) > len(own.levels)
    for walk, episode in zip(walks, learner.given, strict=True):
        actions = tuple(turn.action for turn in episode)
        operations = [own.decode(action)[0] for action in actions]
        assert [o for o in operations if not isinstance(o, Skip)] == [
            move.operation for move in walk.moves
        ]
        for turn, again in zip(episode, played(own, number, actions), strict=True):
            assert (turn.level, turn.reward) == (again.level, pytest.approx(again.reward))
            np.testing.assert_array_equal(
                turn.observation["features"], again.observation["features"]
            )
    assert sum(map(len, learner.implied)) > sum(map(len, learner.given))


def test_walks_that_were_cut_off_or_that_the_trials_budget_cuts_off_end_with_stop() -> None:
    spec = weighed(0.1, 0.0)
    whole = max(walked(spec), key=lambda walk: len(walk.outcomes))
    cut = replace(whole, outcomes=whole.outcomes[:2])
    poor = replace(spec, settings=replace(spec.settings, budget=1e-6))
    for walk, process, n_stages in ((cut, spec, 1), (whole, poor, 0)):
        learner = Learner()
        learn_from_walks(learner, [walk], spec=process, observer=Observer())
        (episode,) = learner.given
        names = [process.decode(turn.action)[0].name for turn in episode]
        assert (
            names[-1] == "stop" and len([n for n in names if n not in ("skip", "stop")]) == n_stages
        )
