import importlib.util
import itertools
from dataclasses import replace

import pytest
from synthetic import START, SyntheticStages, learns, price, spec_of

from rlhf_ray.errors import InputError
from rlhf_ray.evaluation import task_search
from rlhf_ray.evaluation.baselines import baselines_for
from rlhf_ray.evaluation.running import choose_and_play

BOTH = ("asha", "tpe")
TEST = ["test0", "test1"]


def run(stages, *, search_stages=12, seed=0, spec=None, threads=4):
    return choose_and_play(
        spec or spec_of(3, horizon=4),
        stages,
        train_tasks=["train0"],
        val_tasks=["val0"],
        test_tasks=TEST,
        names=BOTH,
        replicas=range(2),
        seed=seed,
        search_stages=search_stages,
        threads=threads,
    )


def alone(monkeypatch, name):
    """Leaves one baseline, so that what is asked for is its own."""
    found = baselines_for([name], ())[name]
    monkeypatch.setattr(
        "rlhf_ray.evaluation.running.baselines_for", lambda names, levels: {name: found}
    )


def distinct(stages):
    """(task, replica) -> the distinct paths that were carried out."""
    found = {}
    for request in stages.stages_asked():
        found.setdefault((request.task, request.replica), set()).add(request.path)
    return found


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("bound", [1, 7, 20])
def test_a_search_keeps_its_bound_and_pays_for_every_stage(monkeypatch, name, bound):
    alone(monkeypatch, name)
    stages = SyntheticStages()
    results = run(stages, search_stages=bound)
    paths = distinct(stages)
    assert set(paths) == set(itertools.product(TEST, range(2)))
    for found in results.runs[name]:
        mine = paths[found.task, found.replica]
        assert len(mine) == found.stages == bound
        # the start 0.1; a stage 0.5 per level and 0.1 to evaluate, abandoned ones too
        assert found.cost == pytest.approx(
            0.1 + sum(0.1 + 0.5 * len(path[-1].levels) for path in mine)
        )
        assert found.time_s == 1.0 + 2.0 * bound
        assert len(found.steps) < bound or bound == 1
        assert found.switches == sum(step["switches"] for step in found.steps)
    assert results.settings[name] == {"search_stages": bound, "stages": 0}


@pytest.mark.parametrize("name", BOTH)
def test_the_best_that_was_met_on_val_is_returned(monkeypatch, name):
    alone(monkeypatch, name)

    class OnlyTheReturnedIsTested(SyntheticStages):
        def outcome(self, request, namespace=""):
            assert request.kind == "stage" or request.path == best[request.task, request.replica]
            return super().outcome(request)

    stages = OnlyTheReturnedIsTested()
    best = {}
    original = task_search._search

    def recorded(bench, study, task, replica, proposes_length):
        episode = original(bench, study, task, replica, proposes_length)
        best[task, replica] = episode.state.best_path
        return episode

    monkeypatch.setattr(task_search, "_search", recorded)
    for found in run(stages).runs[name]:
        paths = distinct(stages)[found.task, found.replica]
        assert found.val_metric == max(START, *(learns(path, found.task) for path in paths))
        assert found.best_length == len(found.steps)  # no stage after the best


@pytest.mark.parametrize("name", BOTH)
def test_same_seed_same_result_and_another_seed_another(monkeypatch, name):
    alone(monkeypatch, name)
    one, same, other = (
        [run_.as_json() for run_ in run(SyntheticStages(), seed=seed, threads=n).runs[name]]
        for seed, n in ((0, 4), (0, 1), (1, 4))
    )
    assert one == same
    assert one != other
    assert one[0]["steps"] != one[1]["steps"] or one[0]["cost"] != one[1]["cost"]  # replicas differ


def test_asha_drops_what_falls_behind(monkeypatch):
    alone(monkeypatch, "asha")
    stages = SyntheticStages()
    run(stages, search_stages=30)
    lengths = [
        len(path)
        for paths in distinct(stages).values()
        for path in paths
        if not any(other[: len(path)] == path and other != path for other in paths)
    ]
    assert 1 in lengths  # dropped at the first rung
    assert 4 in lengths  # carried to the horizon


def test_a_search_ends_where_there_is_nothing_new(monkeypatch):
    alone(monkeypatch, "tpe")
    # one level, one stage, two learning rates
    runs = run(SyntheticStages(norms=(1.0,)), spec=spec_of(1, horizon=1), search_stages=500).runs
    assert all(1 <= found.stages <= 4 for found in runs["tpe"])


def test_a_spent_budget_ends_a_search(monkeypatch):
    alone(monkeypatch, "asha")
    runs = run(SyntheticStages(), spec=spec_of(3, horizon=4, budget=2.0)).runs["asha"]
    assert all(2.0 <= found.cost <= 2.0 + 1.6 for found in runs)


def test_a_search_stays_within_a_budget_where_prices_are_known(monkeypatch):
    alone(monkeypatch, "asha")
    spec = replace(spec_of(3, horizon=4, budget=2.0), price=price)
    runs = run(SyntheticStages(), spec=spec).runs["asha"]
    assert all(0.5 < found.cost <= 2.0 * (1 + 1e-9) for found in runs)


def test_without_optuna_they_are_refused_by_name_and_others_are_not(monkeypatch):
    monkeypatch.setattr(task_search, "find_spec", lambda name: None)
    assert importlib.util.find_spec("optuna")
    for name in BOTH:
        with pytest.raises(InputError, match=rf"baseline {name} must .*rlhf_ray\[search\]"):
            baselines_for([name], ["conv"])
    assert not set(BOTH) & set(baselines_for(["all"], ["conv"]))
