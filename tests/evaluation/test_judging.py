import json
import math
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import SyntheticStages, spec_of, step

from rlhf_ray.errors import InputError
from rlhf_ray.evaluation.judging import (
    Run,
    Utility,
    compare,
    front,
    judge,
    report,
    run_of,
    summary_of,
)
from rlhf_ray.evaluation.rollouts import Episode, concurrently, play, roll_out, walk
from rlhf_ray.evaluation.statistics import ranks, rows, summarise
from rlhf_ray.policies.observations import Observer

UTILITY = Utility()


def action(spec, operation: str, next_level: int) -> int:
    return [o.name for o in spec.operations].index(operation) * spec.n_levels + next_level


def scripted(spec, *moves: tuple[str, int]):
    left = list(moves)
    return lambda *_: action(spec, *left.pop(0))


def test_walk_of_the_head_pays_one_switch_of_the_whole_distance():
    spec = spec_of(4)
    found = walk(spec, SyntheticStages(), "a", 0, [step(3)] * 3)
    assert [episode.state.switches for episode in found] == [0, 3, 3, 3]
    # start 0.1 (no probe), then 0.5 for one level and 0.1 for the evaluation
    assert [episode.state.cost for episode in found] == pytest.approx([0.1, 0.7, 1.3, 1.9])
    assert [len(episode.state.path) for episode in found] == [0, 1, 2, 3]


def test_walk_counts_several_levels_at_the_lowest():
    spec = spec_of(4)
    path = [step(0, 1, 2, 3), step(2, 3), step(3), step(1, 2, 3)]
    found = walk(spec, SyntheticStages(), "a", 0, path)
    assert [episode.state.switches for episode in found] == [0, 0, 2, 3, 5]
    assert [record.switch_cost for record in found[-1].steps] == [0, 2, 1, 2]


def test_walk_with_acting_levels_counts_those():
    spec = spec_of(4)
    found = walk(spec, SyntheticStages(), "a", 0, [step(3), step(0, 1, 2, 3)], acting=[3, 3])
    assert found[-1].state.switches == 3


def test_walk_ends_where_told_and_where_the_budget_does():
    stages = SyntheticStages()
    stopped = walk(spec_of(2), stages, "a", 0, [step(1)] * 3, stop=lambda state: state.best >= 0.69)
    assert len(stopped) == 3
    assert len(walk(spec_of(2, budget=0.65), stages, "a", 0, [step(1)] * 3)) == 2


def test_walk_returns_the_best_state_the_start_included():
    spec = spec_of(2)
    bad = SyntheticStages(lambda path, task: 0.5 - 0.1 * len(path))
    state = walk(spec, bad, "a", 0, [step(1)] * 2)[-1].state
    assert (state.best, state.best_path) == (0.5, ())
    assert report(bad, state) == pytest.approx(0.45)
    assert bad.asked[-1].path == ()
    assert bad.asked[-1].kind == "test"


def test_run_holds_the_hand_computed_account():
    spec, stages = spec_of(2), SyntheticStages()
    episode = walk(spec, stages, "a", 1, [step(1), step(0, 1)])[-1]
    run = run_of(spec, "lp_ft", episode, utility=UTILITY, test_metric=0.61)
    # start 0.1, head 0.6, both 1.1; switches 0 -> 1 -> 0; metric 0.5 + 0.1 + 0.06
    assert run.cost == pytest.approx(1.8)
    assert run.switches == 2
    assert run.val_metric == pytest.approx(0.66)
    assert run.utility == pytest.approx(0.61 - 0.02 * 1.8 - 0.002 * 2)
    assert run.val_utility == pytest.approx(0.66 - 0.02 * 1.8 - 0.002 * 2)
    assert (run.stages, run.best_length, run.diverged, run.time_s) == (2, 2, 0, 5.0)
    assert run.steps[1]["levels"] == ["conv", "head"]
    assert run.steps[1]["level"] == "conv"
    assert run.steps[1]["gain"] == pytest.approx(0.06)


def test_run_survives_json():
    spec, stages = spec_of(2), SyntheticStages()
    episode = walk(spec, stages, "a", 1, [step(1)])[-1]
    run = run_of(spec, "head", episode)
    assert Run.from_json(json.loads(json.dumps(run.as_json()))) == run
    assert run.utility is None


def test_run_of_a_lower_is_better_metric_turns_the_utility():
    spec = spec_of(2, higher_is_better=False)
    stages = SyntheticStages(lambda path, task: [0.5, 0.3, 0.4][len(path)])
    episode = walk(spec, stages, "a", 0, [step(0)] * 2)[-1]
    run = run_of(spec, "m", episode, utility=UTILITY, test_metric=0.25)
    assert (run.val_metric, run.best_length) == (0.3, 1)
    assert run.utility == pytest.approx(-0.25 - 0.02 * 1.3)


def test_diverged_stages_are_charged_and_counted():
    spec, stages = spec_of(2), SyntheticStages(diverges=lambda path: len(path) == 2)
    episode = walk(spec, stages, "a", 0, [step(1)] * 2)[-1]
    run = run_of(spec, "m", episode)
    assert run.diverged == 1
    assert run.cost == pytest.approx(1.3)


def test_roll_out_follows_the_policy_and_records_every_step():
    spec, stages = spec_of(2), SyntheticStages()
    seen = []
    state, steps = roll_out(
        spec,
        Observer(groups=("level", "figures")),
        scripted(spec, ("skip", 1), ("train_mid", 1), ("stop", 1)),
        stages,
        "a",
        0,
        on_step=lambda state, record: seen.append(record.operation),
    )
    assert seen == ["skip", "train_mid", "stop"] == [record.operation for record in steps]
    assert (state.switches, len(state.path)) == (1, 1)
    assert state.best == pytest.approx(0.6)


def test_roll_out_and_walk_agree_on_one_path():
    spec, stages = spec_of(2), SyntheticStages()
    decide = scripted(spec, ("skip", 1), ("train_mid", 1), ("train_low", 1), ("stop", 1))
    episode = play(spec, decide, stages, "a", 0)
    walked = walk(spec, stages, "a", 0, episode.state.path)[-1]
    for name in ("cost", "switches", "best", "best_path", "tuned", "last_tuned"):
        assert getattr(walked.state, name) == getattr(episode.state, name)
    assert run_of(spec, "m", walked).val_utility == pytest.approx(
        run_of(spec, "m", episode).val_utility
    )


def test_play_refuses_a_closed_action():
    spec = spec_of(2)
    with pytest.raises(InputError, match="must be an open action, got action="):
        play(spec, scripted(spec, ("skip", 0)), SyntheticStages(), "a", 0)


def test_judge_keeps_the_order_of_tasks_and_seeds_and_reports_progress():
    spec, stages = spec_of(2), SyntheticStages()
    ticks = []
    runs = judge(
        spec,
        Observer(groups=("level",)),
        lambda level, features, mask: action(spec, "stop", level),
        stages,
        tasks=["b", "a"],
        replicas=range(2),
        utility=UTILITY,
        progress=lambda done, of_all: ticks.append((done, of_all)),
    )
    assert [(run.task, run.replica) for run in runs] == [("b", 0), ("b", 1), ("a", 0), ("a", 1)]
    assert sorted(ticks) == [(n, 4) for n in range(1, 5)]
    assert all(run.test_metric == pytest.approx(0.45) for run in runs)
    summary = summary_of(runs)
    assert summary["metric"] == pytest.approx(0.45)
    assert summary["utility"] == pytest.approx(0.45 - 0.002)


def test_a_test_metric_that_is_no_number_is_refused():
    spec, stages = spec_of(2), SyntheticStages(metric=lambda path, task: math.nan)
    with pytest.raises(InputError, match="task 'a': the metric must give a finite number on test"):
        judge(
            spec,
            Observer(groups=("level",)),
            lambda level, features, mask: action(spec, "stop", level),
            stages,
            tasks=["a"],
            replicas=[0],
            utility=UTILITY,
        )


def test_concurrently_has_several_in_flight_and_passes_failures_on():
    barrier = threading.Barrier(3, timeout=10)
    assert concurrently(lambda n: (barrier.wait(), n)[1], range(3), threads=3) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="division by zero"):
        concurrently(lambda n: 1 / n, [1, 0, 2])
    here = concurrently(lambda n: threading.get_ident(), [1, 2], threads=1)
    assert here == [threading.get_ident()] * 2


def made(method: str, figures: dict[tuple[str, int], tuple[float, float]]) -> list[Run]:
    """Runs from (task, seed) -> (test metric, utility)."""
    return [
        Run(
            method=method, task=task, replica=seed, start_metric=0.5, val_metric=metric,
            test_metric=metric, cost=2.0, time_s=1.0, switches=3, stages=2, best_length=1,
            diverged=0, utility=utility, val_utility=utility, steps=(),
        )
        for (task, seed), (metric, utility) in figures.items()
    ]  # fmt: skip


def test_summary_means_over_all_and_spreads_over_seeds():
    runs = made(
        "m",
        {("a", 0): (0.8, 0.7), ("b", 0): (0.6, 0.5), ("a", 1): (0.9, 0.8), ("b", 1): (0.9, 0.8)},
    )
    row = summarise({"m": runs})["m"]
    assert row["metric_mean"] == pytest.approx(0.8)
    assert row["metric_sd"] == pytest.approx(np.std([0.7, 0.9], ddof=1))
    assert row["utility_mean"] == pytest.approx(0.7)
    assert (row["cost_mean"], row["switches_mean"], row["rank_mean"]) == (2.0, 3.0, 1.0)
    assert summarise({"m": runs[:2]})["m"]["metric_sd"] is None


def test_ranks_share_the_mean_of_a_tie():
    place = ("a", 0)
    utilities = {"p": 0.9, "q": 0.1 + 0.2, "r": 0.3, "s": 0.1}
    runs = {name: made(name, {place: (u, u)}) for name, u in utilities.items()}
    found = {name: by_place[place] for name, by_place in ranks(runs).items()}
    assert found == {"p": 1.0, "q": 2.5, "r": 2.5, "s": 4.0}


def test_ranks_refuse_methods_with_other_tasks():
    runs = {"p": made("p", {("a", 0): (1, 1)}), "q": made("q", {("b", 0): (1, 1)})}
    with pytest.raises(InputError, match="the same tasks and seeds"):
        ranks(runs)


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=5))
def test_ranks_sum_to_the_same_at_every_place(utilities):
    runs = {
        f"m{i}": made(f"m{i}", {(t, 0): (u, u) for t, u in zip("abc", mine, strict=True)})
        for i, mine in enumerate(utilities)
    }
    found, n = ranks(runs), len(utilities)
    for task in "abc":
        assert sum(found[m][task, 0] for m in runs) == pytest.approx(n * (n + 1) / 2)


def test_rows_are_flat_and_json_able():
    runs = {"p": made("p", {("a", 0): (1, 1)}), "q": made("q", {("a", 0): (0.5, 0.4)})}
    found = json.loads(json.dumps(rows(runs)))
    assert [(r["method"], r["task"], r["seed"], r["rank"]) for r in found] == [
        ("p", "a", 0, 1.0),
        ("q", "a", 0, 2.0),
    ]


def test_summary_refuses_runs_without_test_figures():
    spec, stages = spec_of(2), SyntheticStages()
    episode = Episode(state=walk(spec, stages, "a", 0, [])[0].state)
    with pytest.raises(InputError, match="must have been reported"):
        summary_of([run_of(spec, "m", episode)])


def test_compare_keeps_methods_apart():
    spec, stages = spec_of(2), SyntheticStages()
    players = {
        f"m{n}": lambda task, replica, n=n: walk(spec, stages, task, replica, [step(1)] * n)[-1]
        for n in (1, 2)
    }
    runs = compare(players, spec, stages, tasks=["a"], replicas=[0, 1], utility=UTILITY)
    assert {m: [run.stages for run in mine] for m, mine in runs.items()} == {
        "m1": [1, 1],
        "m2": [2, 2],
    }


points = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12)


@given(points, st.booleans())
def test_front_holds_exactly_what_no_other_beats(found, higher):
    sign = 1 if higher else -1
    on = front(found, higher)
    assert any(on)
    for (m, c), shown in zip(found, on, strict=True):
        beaten = any(
            sign * n >= sign * m and d <= c and (sign * n > sign * m or d < c) for n, d in found
        )
        assert shown != beaten


@pytest.mark.parametrize("performance", ["gain", "value"])
def test_a_walk_is_rewarded_as_what_a_policy_plays(performance):
    spec, stages = spec_of(2, performance=performance), SyntheticStages()
    played, steps = roll_out(
        spec, Observer(), scripted(spec, ("train_mid", 0), ("train_mid", 0), ("stop", 0)), stages,
        "a", 0,
    )  # fmt: skip
    walked = walk(spec, stages, "a", 0, played.path, acting=[0, 0])[-1]
    assert walked.steps == steps[:2]
