import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import SyntheticStages, spec_of, step

from rlhf_ray.errors import InputError
from rlhf_ray.evaluation.rollouts import walk
from rlhf_ray.policies.observations import FEATURE_GROUPS, Observer, as_groups, squash, squash_loss
from rlhf_ray.process import start_state


def states(n_levels=2, metric=lambda path, task: 0.5 + 0.1 * len(path), **settings):
    stages = SyntheticStages(metric, norms=(0.3,) * n_levels)
    spec = spec_of(n_levels, probed=True, **settings)
    path = [step(0), step(n_levels - 1), step(*range(n_levels))]
    return spec, [episode.state for episode in walk(spec, stages, "a", 0, path)]


@pytest.mark.parametrize("n_levels", [1, 2, 4])
def test_names_are_unique_and_fit_the_vector(n_levels):
    spec, found = states(n_levels)
    for groups in [tuple(FEATURE_GROUPS), *[(group,) for group in FEATURE_GROUPS]]:
        observer = Observer(groups=groups)
        names = observer.names(spec)
        assert len(set(names)) == len(names)
        for state in found:
            vector = observer.observe(spec, state)
            assert vector.shape == (len(names),)
            assert vector.dtype == np.float32


def test_values_stay_near_one_on_an_ordinary_path():
    for n_levels in (1, 2, 4):
        spec, found = states(n_levels)
        for state in found:
            assert np.abs(Observer().observe(spec, state)).max() <= 2


def test_values_stay_finite_when_figures_do_not():
    spec, found = states(metric=lambda path, task: 1e9 if path else -1e9)
    for loss in (math.nan, math.inf, -3.0, 1e30):
        bad = replace(found[1].outcome, loss=loss, train_loss=loss, diverged=True)
        vector = Observer().observe(spec, replace(found[1], outcome=bad))
        assert np.isfinite(vector).all()
        assert np.abs(vector).max() <= 20


def test_features_say_what_happened():
    spec, found = states(2)
    values = dict(Observer().features(spec, found[2]))
    assert values["acting:conv"] == 0
    assert values["acting:head"] == 1
    assert values["stages done / horizon"] == pytest.approx(2 / 3)
    assert values["switches / horizon"] == pytest.approx(1 / 3)
    assert values["freshness:conv"] == 0.5
    assert values["freshness:head"] == 1
    assert values["times tuned / horizon:head"] == pytest.approx(1 / 3)
    assert values["metric, last change"] == pytest.approx(0.4)
    assert values["metric at the start"] == pytest.approx(0.5)


def test_budget_left_falls_to_zero():
    spec, found = states(2, budget=1.0)
    left = [dict(Observer().features(spec, state))["budget left"] for state in found]
    assert left == pytest.approx([0.5, 0.0])  # the walk ends where the budget does


def test_groups_can_be_switched_off_and_the_probe_is_then_not_charged():
    assert Observer().probed
    assert not Observer(groups=("level", "figures")).probed


def test_tabular_tells_tasks_apart_and_knows_no_others():
    spec, found = states(2)
    observer = Observer(groups=("tabular",), tasks=("a", "b"))
    assert observer.names(spec) == ("acting:conv", "acting:head", "task:a", "task:b")
    assert observer.observe(spec, found[0]).tolist() == [1, 0, 1, 0]
    unseen = start_state(spec, found[0].start, "c", 0, 1)
    assert observer.observe(spec, unseen).tolist() == [0, 1, 0, 0]


def test_tabular_takes_tasks_of_one_label_for_one():
    spec, found = states(2)
    observer = Observer(groups=("tabular",), tasks=("a",), labels={"a-val": "a", "a": "a"})
    judged = start_state(spec, found[0].start, "a-val", 0, 0)
    np.testing.assert_array_equal(observer.observe(spec, judged), observer.observe(spec, found[0]))


def test_prefix_tells_the_stages_carried_out_and_not_the_task():
    spec, found = states(2, horizon=3)
    path = (step(1).__class__(operation=spec.operations[0], levels=(1,)),)
    observer = Observer(groups=("prefix",), tasks=("a",))
    assert not any(name.startswith("task:") for name in observer.names(spec))
    shown = dict(observer.features(spec, replace(found[0], path=path)))
    first = f"stage 1 is:{spec.operations[0].name}"
    hot = {name for name, value in shown.items() if value}
    assert hot == {"acting:conv", first, "stage 1 at:head"}
    both = Observer(groups=("tabular", "prefix"), tasks=("a",))
    assert set(observer.names(spec)) | {"task:a"} == set(both.names(spec))
    assert both.discrete and observer.discrete and not Observer().discrete


def test_unknown_and_mixed_groups_are_refused():
    with pytest.raises(InputError, match="Did you mean 'figures'"):
        Observer(groups=("figure",))
    with pytest.raises(InputError, match="stands alone"):
        Observer(groups=("tabular", "level"))
    with pytest.raises(InputError, match="at least one group"):
        Observer(groups=())


def test_as_groups_takes_all_one_or_several():
    assert as_groups("all") == tuple(FEATURE_GROUPS)
    assert as_groups("level") == ("level",)
    assert as_groups(["level", "probe"]) == ("level", "probe")


@given(a=st.floats(-1e30, 1e30), b=st.floats(-1e30, 1e30))
def test_squash_is_odd_monotone_and_bounded(a, b):
    assert squash(-a) == -squash(a)
    assert abs(squash(a)) <= 5
    if a <= b:
        assert squash(a) <= squash(b)


@given(a=st.floats(0, 1e30), b=st.floats(0, 1e30))
def test_squash_loss_is_monotone(a, b):
    if a <= b:
        assert squash_loss(a) <= squash_loss(b)
    assert squash_loss(math.inf) >= 2
    assert 0 <= squash_loss(a) <= 5
