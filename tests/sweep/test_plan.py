import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.config import SWEPT, SearchConfig
from rlhf_ray.sweep.plan import plan_trials


def test_default_is_a_balanced_half_of_the_grid() -> None:
    config = SearchConfig()
    trials = plan_trials(config)
    assert len(trials) == 8
    for name in SWEPT:
        assert set(Counter(t.values[name] for t in trials).values()) == {4}
    for pair in itertools.combinations(SWEPT, 2):
        counts = Counter(tuple(t.values[name] for name in pair) for t in trials)
        assert len(counts) == 4 and set(counts.values()) == {2}


def test_given_values_make_the_whole_grid_in_order() -> None:
    config = SearchConfig(gamma=(0.5, 0.9), epsilon=0.1, tuning_cost_weight=(0.0, 0.1))  # type: ignore[arg-type]
    points = [tuple(t.values[name] for name in SWEPT) for t in plan_trials(config)]
    weights = SearchConfig().switch_cost_weight
    assert points == list(itertools.product((0.5, 0.9), (0.1,), (0.0, 0.1), weights))


def test_ppo_sweeps_all_but_epsilon() -> None:
    trials = plan_trials(SearchConfig(algorithm="ppo"))
    assert len(trials) == 8
    assert {t.values["epsilon"] for t in trials} == {0.0}


@settings(max_examples=25)
@given(n=st.integers(1, 30), seed=st.integers(0, 5))
def test_random_samples_lie_in_their_ranges(n: int, seed: int) -> None:
    config = SearchConfig(num_samples=n, seed=seed, gamma=(0.5, 0.7, 0.6), epsilon=(0.1,))
    trials = plan_trials(config)
    assert len(trials) == n
    for trial in trials:
        assert 0.5 <= trial.values["gamma"] <= 0.7 and trial.values["epsilon"] == 0.1
    assert plan_trials(config) == trials
    # a longer search goes on from the shorter one
    longer = SearchConfig(num_samples=n + 1, seed=seed, gamma=(0.5, 0.7, 0.6), epsilon=(0.1,))
    assert plan_trials(longer)[:n] == trials


@given(st.integers(1, 40))
def test_names_are_unique_and_fit_for_folders(n: int) -> None:
    names = [t.name for t in plan_trials(SearchConfig(num_samples=n))]
    assert len(set(names)) == n and names == sorted(names)
    assert all(name.replace("-", "").isalnum() for name in names)
