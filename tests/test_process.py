import contextlib
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import SyntheticStages, price, spec_of

from rlhf_ray.errors import InputError
from rlhf_ray.operations import Align, Operation, Skip, Stop, Train, default_operations
from rlhf_ray.process import (
    ProcessSettings,
    RewardWeights,
    State,
    action_mask,
    advance,
    check_operations,
    stage_request,
    start_request,
    start_state,
)

NAMES = [operation.name for operation in default_operations()]


def begin(spec, stages, task="a", level=0) -> State:
    outcome = stages.outcome(start_request(task, 0)).outcome
    return start_state(spec, outcome, task, 0, level)


def act(spec, stages, state, operation: str, next_level: int):
    action = [o.name for o in spec.operations].index(operation) * spec.n_levels + next_level
    assert action_mask(spec, state)[action], f"{operation} to {next_level} is closed"
    request = stage_request(spec, state, action)
    outcome = None if request is None else stages.outcome(request).outcome
    return advance(spec, state, action, outcome)


def open_actions(spec, state) -> set[tuple[str, int]]:
    found = [spec.decode(action) for action in np.flatnonzero(action_mask(spec, state))]
    return {(operation.name, level) for operation, level in found}


def test_mask_at_the_start_opens_each_effect_once():
    spec = spec_of(2)
    state = begin(spec, SyntheticStages())
    names = {name for name, _ in open_actions(spec, state)}
    # at the bottom "up" is "all": the first of the two stands for both
    assert names == {"train_low", "train_mid", "train_high", "train_up", "refit", "skip", "stop"}


def test_mask_opens_operations_to_the_levels_that_they_apply_to():
    operations = [Align(name="align"), *default_operations()]
    spec, stages = spec_of(3, operations=operations), SyntheticStages()
    opened = [
        {name for name, _ in open_actions(spec, begin(spec, stages, level=level))}
        for level in range(3)
    ]
    assert ["align" in names for names in opened] == [True, True, False]
    assert all("refit" in names for names in opened)


def test_mask_at_the_head_closes_up_which_is_the_level_itself():
    spec = spec_of(2)
    state = begin(spec, SyntheticStages(), level=1)
    names = {name for name, _ in open_actions(spec, state)}
    assert "train_up" not in names  # same effect as train_mid
    assert "train_all" in names


def test_mask_gives_stop_one_next_level_and_skip_all_others():
    spec = spec_of(3)
    opened = open_actions(spec, begin(spec, SyntheticStages(), level=1))
    assert {level for name, level in opened if name == "stop"} == {1}
    assert {level for name, level in opened if name == "skip"} == {0, 2}
    assert {level for name, level in opened if name == "train_mid"} == {0, 1, 2}


def test_mask_closes_skip_after_all_levels_have_looked():
    spec, stages = spec_of(3), SyntheticStages()
    state = begin(spec, stages)
    for level in (1, 2):
        state, _ = act(spec, stages, state, "skip", level)
    assert "skip" not in {name for name, _ in open_actions(spec, state)}
    state, _ = act(spec, stages, state, "train_mid", 0)
    assert "skip" in {name for name, _ in open_actions(spec, state)}


def test_mask_with_one_level_has_no_skip():
    spec = spec_of(1)
    assert "skip" not in {n for n, _ in open_actions(spec, begin(spec, SyntheticStages()))}


def test_mask_before_the_last_stage_closes_hand_overs_of_stages_only():
    spec, stages = spec_of(2, horizon=2), SyntheticStages()
    state, _ = act(spec, stages, begin(spec, stages), "train_mid", 1)
    opened = open_actions(spec, state)
    assert {level for name, level in opened if name.startswith("train")} == {1}
    assert ("skip", 0) in opened


def test_mask_with_spent_budget_opens_stop_alone():
    spec, stages = spec_of(2, budget=0.5), SyntheticStages()
    state = begin(spec, stages)
    assert len(open_actions(spec, state)) > 1
    state, _ = act(spec, stages, state, "train_mid", 1)
    assert state.cost == pytest.approx(0.7)
    assert open_actions(spec, state) == {("stop", 1)}


def test_mask_closes_stages_whose_price_exceeds_what_is_left_of_the_budget():
    stages = SyntheticStages()
    spec = replace(spec_of(3, budget=1.3, horizon=9), price=price)
    state = begin(spec, stages)
    names = {name for name, _ in open_actions(spec, state)}
    # all levels cost 1.6
    assert names == {"train_low", "train_mid", "train_high", "skip", "stop"}
    state, _ = act(spec, stages, state, "train_mid", 2)
    assert "train_mid" in {name for name, _ in open_actions(spec, state)}  # 0.7 + 0.6: just so
    state, _ = act(spec, stages, state, "train_mid", 1)
    assert state.cost == pytest.approx(1.3)
    spec = replace(spec, settings=replace(spec.settings, budget=1.5))
    assert {name for name, _ in open_actions(spec, state)} == {"skip", "stop"}


def test_no_path_of_open_actions_exceeds_the_budget_where_prices_are_known():
    spec, stages = replace(spec_of(2, budget=2.0, horizon=9), price=price), SyntheticStages()
    rng = np.random.default_rng(0)
    for _ in range(20):
        state = begin(spec, stages)
        while not state.terminated:
            action = int(rng.choice(np.flatnonzero(action_mask(spec, state))))
            request = stage_request(spec, state, action)
            outcome = None if request is None else stages.outcome(request).outcome
            state, _ = advance(spec, state, action, outcome)
        assert state.cost <= 2.0 * (1 + 1e-9)


def test_reward_terms_are_recorded_apart_and_weighed():
    weights = RewardWeights(performance=2.0, tuning_cost=0.1, switch_cost=0.01)
    spec, stages = spec_of(3, weights=weights), SyntheticStages()
    state, step = act(spec, stages, begin(spec, stages), "train_mid", 2)
    assert step.performance == pytest.approx(0.1)
    assert step.tuning_cost == pytest.approx(0.6)
    assert step.switch_cost == 2
    assert step.reward == pytest.approx(2 * 0.1 - 0.1 * 0.6 - 0.01 * 2)
    assert (step.level, step.levels, step.next_level, state.level) == (0, (0,), 2, 2)


def test_gain_is_of_the_best_so_far_and_never_negative():
    falling = SyntheticStages(lambda path, task: [0.5, 0.4, 0.45, 0.7][len(path)])
    spec = spec_of(2)
    state, gains = begin(spec, falling), []
    for _ in range(3):
        state, step = act(spec, falling, state, "train_mid", 0)
        gains.append(step.performance)
    assert gains == pytest.approx([0, 0, 0.2])
    assert state.best_path == state.path


def test_performance_value_is_the_metric_at_every_step_skips_included():
    spec, stages = spec_of(2, performance="value"), SyntheticStages()
    state, step = act(spec, stages, begin(spec, stages), "skip", 1)
    assert step.performance == pytest.approx(0.5)
    _, step = act(spec, stages, state, "train_mid", 1)
    assert step.performance == pytest.approx(0.6)


def test_lower_is_better_turns_gain_and_best():
    errors = SyntheticStages(lambda path, task: [0.5, 0.3, 0.4][len(path)])
    spec = spec_of(2, higher_is_better=False)
    state, step = act(spec, errors, begin(spec, errors), "train_mid", 0)
    assert step.performance == pytest.approx(0.2)
    state, step = act(spec, errors, state, "train_mid", 0)
    assert step.performance == 0
    assert state.best == 0.3
    assert len(state.best_path) == 1


def test_stop_ends_without_cost_or_switch():
    spec, stages = spec_of(2), SyntheticStages()
    state, step = act(spec, stages, begin(spec, stages), "stop", 0)
    assert state.terminated
    assert (step.tuning_cost, step.switch_cost, step.reward, state.path) == (0, 0, 0, ())


def test_horizon_terminates_and_skips_do_not_count():
    spec, stages = spec_of(2, horizon=2), SyntheticStages()
    state, _ = act(spec, stages, begin(spec, stages), "skip", 1)
    state, _ = act(spec, stages, state, "train_mid", 1)
    assert not state.terminated
    state, _ = act(spec, stages, state, "train_high", 1)
    assert state.terminated
    assert (state.tuned, state.last_tuned) == ((0, 2), (0, 2))


def test_start_charges_the_probe_only_where_it_is_used():
    stages = SyntheticStages()
    assert begin(spec_of(2, probed=True), stages).cost == pytest.approx(0.5)
    assert begin(spec_of(2, probed=False), stages).cost == pytest.approx(0.1)
    assert begin(spec_of(2, cost="seconds"), stages).cost == 1.0


@settings(max_examples=60, deadline=None)
@given(n_levels=st.integers(1, 4), horizon=st.integers(1, 4), data=st.data())
def test_random_episodes_end_and_keep_their_account(n_levels, horizon, data):
    values: dict[tuple[int, ...], float] = {}

    def metric(path, task):
        key = tuple(level for stage in path for level in stage.levels)
        return values.setdefault(key, data.draw(st.floats(0, 1)))

    stages = SyntheticStages(metric)
    spec = spec_of(n_levels, horizon=horizon)
    state, steps = begin(spec, stages), []
    while not state.terminated:
        mask = action_mask(spec, state)
        action = data.draw(st.sampled_from(np.flatnonzero(mask).tolist()))
        request = stage_request(spec, state, action)
        outcome = None if request is None else stages.outcome(request).outcome
        state, step = advance(spec, state, action, outcome)
        steps.append(step)
    assert len(steps) <= (horizon + 1) * n_levels
    assert len(state.path) <= horizon
    assert state.switches == sum(step.switch_cost for step in steps)
    assert state.cost == pytest.approx(0.1 + sum(step.tuning_cost for step in steps))
    gains = sum(step.performance for step in steps)
    assert state.best - state.start.metric == pytest.approx(gains)
    assert state.best >= state.start.metric
    assert state.best_path == state.path[: len(state.best_path)]


@pytest.mark.parametrize("name", ["performance", "tuning_cost", "switch_cost"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_weights_out_of_range_are_refused(name, value):
    with pytest.raises(InputError, match=f"{name} weight must be finite"):
        RewardWeights(**{name: value})


def test_settings_and_operations_out_of_range_are_refused():
    with pytest.raises(InputError, match="horizon must be at least 1, got horizon=0"):
        ProcessSettings(horizon=0)
    with pytest.raises(InputError, match="budget must be > 0"):
        ProcessSettings(budget=0.0)
    train = Train(name="train", learning_rate=1e-3)
    with pytest.raises(InputError, match="must hold one Stop"):
        spec_of(2, operations=(train, Skip()))
    with pytest.raises(InputError, match="names of their own"):
        spec_of(2, operations=(train, train, Stop()))


@dataclass(frozen=True, kw_only=True)
class Gives(Operation):
    """An operation of a user's own, with whatever levels."""

    found: object

    def levels(self, level, n_levels):
        return self.found if level else (0,)

    def run(self, session):
        raise AssertionError


@pytest.mark.parametrize("found", [1, [1], (2,), (-1,), (1, 0), (0, 0), (True,), ("1",), None])
def test_levels_of_own_operations_must_be_those_there_are(found):
    with pytest.raises(InputError, match=r"'own' must give a tuple .* in \[0, 1\].*for level=1"):
        spec_of(2, operations=(Gives(name="own", found=found), Stop()))
    if not isinstance(found, list):  # refused for what it is
        spec_of(1, operations=(Gives(name="own", found=found), Stop()))  # level 1 is none of it


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -0.5, "1"])
def test_scales_out_of_range_are_refused(scale):
    scaled = Train(name="t", learning_rate=1e-3, level_scales=(scale,))
    with pytest.raises(InputError, match="level_scales must be finite and >= 0, got level_scales="):
        spec_of(1, operations=(scaled, Stop()))


@pytest.mark.parametrize(
    ("scope", "n_scales", "n_levels", "match"),
    [
        ("level", 1, 3, None),
        ("all", 3, 3, None),
        ("up", 1, 1, None),
        ("level", 3, 3, "got 3 for 't', which trains 1 of 3 levels when level 0 acts"),
        ("all", 2, 3, "got 2 for 't', which trains 3 of 3 levels when level 0 acts"),
        ("up", 3, 3, "got 3 for 't', which trains 2 of 3 levels when level 1 acts"),
    ],
)
def test_scales_must_fit_the_levels_that_are_trained(scope, n_scales, n_levels, match):
    scaled = Train(name="t", learning_rate=1e-3, scope=scope, level_scales=(0.5,) * n_scales)
    expected = contextlib.nullcontext() if match is None else pytest.raises(InputError, match=match)
    with expected:
        spec_of(n_levels, operations=(scaled, Stop()))


def test_scales_need_not_fit_levels_that_an_operation_is_not_open_to():
    class Lowest(Train):
        def applies(self, level: int, n_levels: int) -> bool:
            return level == 0

    lowest = Lowest(name="t", learning_rate=1e-3, scope="up", level_scales=(0.1, 0.5, 1.0))
    assert spec_of(3, operations=(lowest, Stop())).n_levels == 3


def test_operations_hold_one_stop_and_at_most_one_skip():
    check_operations(default_operations(), 2)
    with pytest.raises(InputError, match="must hold at most one Skip, got"):
        check_operations((*default_operations(), Skip(name="skip too")), 2)
    with pytest.raises(InputError, match="must hold one Stop, got"):
        check_operations((*default_operations(), Stop(name="stop too")), 2)


def test_operations_can_be_keys():
    @dataclass(frozen=True, kw_only=True)
    class Listed(Train):
        rates: list[float]

    listed = Listed(name="listed", learning_rate=1e-3, rates=[1.0])
    with pytest.raises(InputError, match=r"operations must be hashable, got 'listed'.*tuples"):
        check_operations((*default_operations(), listed), 2)
