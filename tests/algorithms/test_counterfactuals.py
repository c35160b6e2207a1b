"""What a step implies is what the environment would have given for the same actions."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from synthetic import SyntheticStages, spec_of

from rlhf_ray.algorithms.counterfactuals import counterfactuals
from rlhf_ray.operations import Skip, Stop
from rlhf_ray.policies.observations import Observer
from rlhf_ray.process import (
    ProcessSpec,
    State,
    action_mask,
    advance,
    stage_request,
    start_request,
    start_state,
)

STAGES = SyntheticStages()


def begun(spec: ProcessSpec, level: int = 0) -> State:
    start = STAGES.outcome(start_request("a", 0)).outcome
    return start_state(spec, start, "a", 0, level)


def action_of(spec: ProcessSpec, operation: str, next_level: int) -> int:
    names = [known.name for known in spec.operations]
    return names.index(operation) * spec.n_levels + next_level


def outcome_of(spec: ProcessSpec, state: State, action: int):
    request = stage_request(spec, state, action)
    return None if request is None else STAGES.outcome(request).outcome


@pytest.mark.parametrize("horizon", [1, 3])  # 1: the stage ends the episode
@pytest.mark.parametrize("operation", ["train_low", "train_up", "train_all", "skip", "stop"])
def test_every_implied_transition_is_the_environments_own(operation: str, horizon: int) -> None:
    spec, observer = spec_of(3, horizon=horizon), Observer(groups=("level", "progress", "history"))
    state = begun(spec, level=1)
    next_level = 1 if operation == "stop" or horizon == 1 else 2
    taken = action_of(spec, operation, next_level)
    found = counterfactuals(spec, observer, state, taken, outcome_of(spec, state, taken))
    assert len(found) > 0
    for i in range(len(found)):
        level, action = int(found.level[i]), int(found.action[i])
        here = replace(state, level=level)
        assert action_mask(spec, here)[action] and (level, action) != (1, taken)
        after, step = advance(spec, here, action, outcome_of(spec, here, action))
        assert float(found.reward[i]) == pytest.approx(step.reward)
        assert np.array_equal(found.features[i], observer.observe(spec, here))
        assert float(found.terminated[i]) == float(after.terminated)
        if after.terminated:
            assert not found.next_mask[i].any() and not found.next_features[i].any()
        else:
            assert int(found.next_level[i]) == after.level
            assert np.array_equal(found.next_features[i], observer.observe(spec, after))
            assert np.array_equal(found.next_mask[i], action_mask(spec, after) != 0)


def test_a_stage_implies_all_hand_overs_of_all_levels_that_can_ask_for_it() -> None:
    spec, observer = spec_of(3), Observer(groups=("level", "progress"))
    state = begun(spec, level=1)

    def stages_implied(operation: str) -> set[tuple[int, str, int]]:
        taken = action_of(spec, operation, 2)
        found = counterfactuals(spec, observer, state, taken, outcome_of(spec, state, taken))
        decoded = [spec.decode(int(action)) for action in found.action]
        return {
            (int(level), known.name, to)
            for level, (known, to) in zip(found.level, decoded, strict=True)
            if not isinstance(known, Skip | Stop)
        }

    assert stages_implied("train_low") == {(1, "train_low", 0), (1, "train_low", 1)}
    others = {(level, "train_all", to) for level in (1, 2) for to in range(3)}
    # the first level's "train_up" is the same stage
    assert stages_implied("train_all") == (others - {(1, "train_all", 2)}) | {
        (0, "train_up", to) for to in range(3)
    }
    assert stages_implied("skip") == set()


def test_skips_and_stops_are_implied_wherever_they_are_open() -> None:
    spec, observer = spec_of(3), Observer(groups=("level",))
    state = begun(spec)
    taken = action_of(spec, "train_mid", 0)
    found = counterfactuals(spec, observer, state, taken, outcome_of(spec, state, taken))
    free = [
        (int(level), int(action))
        for level, action in zip(found.level, found.action, strict=True)
        if isinstance(spec.decode(int(action))[0], Skip | Stop)
    ]
    expected = [
        (level, action)
        for level in range(3)
        for action in np.flatnonzero(action_mask(spec, replace(state, level=level))).tolist()
        if isinstance(spec.decode(action)[0], Skip | Stop)
    ]
    assert free == expected and len(free) == 3 * (2 + 1)
    assert found.features.dtype == torch.float32 and found.next_mask.dtype == torch.bool
