import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import START, SyntheticStages, learns, spec_of, step
from torch import nn

from rlhf_ray.engine.loaded_model import EngineSettings
from rlhf_ray.engine.stages import Engine
from rlhf_ray.errors import InputError
from rlhf_ray.evaluation.baselines import ALWAYS, baselines_for
from rlhf_ray.evaluation.choosing import plan_halving
from rlhf_ray.evaluation.judging import Utility
from rlhf_ray.evaluation.optimum import acting_levels, best_fine_tuning
from rlhf_ray.evaluation.running import choose_and_play
from rlhf_ray.operations import Refit, Skip, Stop, Train, default_operations
from rlhf_ray.outcomes import StageRequest, StageStep
from rlhf_ray.process import (
    ProcessSettings,
    ProcessSpec,
    action_mask,
    advance,
    stage_request,
    start_request,
    start_state,
)
from rlhf_ray.tasks import Suite, Task
from rlhf_ray.tree.stage_tree import LocalStages

TRAIN = [f"train{i}" for i in range(6)]
VAL = ["val0", "val1", "val2"]
TEST = ["test0", "test1"]


def run(stages, names=(), *, spec=None, max_stages=200, seed=0, **kwargs):
    return choose_and_play(
        spec or spec_of(2),
        stages,
        train_tasks=TRAIN,
        val_tasks=VAL,
        test_tasks=TEST,
        names=names,
        replicas=range(2),
        seed=seed,
        max_stages=max_stages,
        **kwargs,
    )


def test_names_resolve_in_the_order_of_reports():
    assert tuple(baselines_for((), ["conv", "head"])) == ALWAYS
    assert tuple(baselines_for(["level:conv", "lp_ft"], ["conv", "head"])) == (
        *ALWAYS, "lp_ft", "level:conv",
    )  # fmt: skip
    everything = baselines_for(["all"], ["conv", "head"])
    assert {"auto_rgn", "level:conv", "level:head"} < set(everything)
    assert not {"optimum", "asha", "tpe"} & set(everything)
    assert "optimum" in baselines_for(["all", "optimum"], ["conv", "head"])


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(InputError, match="Did you mean 'level:conv'"):
        baselines_for(["level:con"], ["conv", "head"])
    with pytest.raises(InputError, match="Did you mean 'lp_ft'"):
        baselines_for(["lpft"], ["conv", "head"])


def test_every_baseline_runs_on_every_test_task_and_seed():
    results = run(SyntheticStages(), ["all", "optimum"])
    for name, runs in results.runs.items():
        assert [(r.task, r.replica) for r in runs] == list(itertools.product(TEST, range(2))), name
        assert all(r.method == name and r.test_metric is not None for r in runs)
        assert results.settings[name]["stages"] >= 0


def test_choices_never_see_the_test_tasks():
    stages = SyntheticStages()
    lines = []

    def note(line: str) -> None:
        lines.append(line)
        if "choosing" in line:
            assert not {r.task for r in stages.asked} & set(TEST)

    run(stages, ["all"], progress=note)
    first = next(i for i, r in enumerate(stages.asked) if r.task in TEST)
    assert {r.task for r in stages.asked[first:]} <= set(TEST)
    assert not any(r.kind == "test" and r.task in TRAIN for r in stages.asked)
    assert {r.replica for r in stages.asked[:first]} == {0}


def test_full_is_chosen_by_utility_and_full_best_by_accuracy():
    # 0.06 at first, then 0.005 more: worth it for accuracy, not at 0.02 per full stage
    def metric(path, task):
        return START + (0.06 if path else 0) + 0.005 * len(path)

    results = run(SyntheticStages(metric))
    assert results.settings["full"]["length"] == 1
    assert results.settings["full_best"]["patience"] == 2
    assert {r.stages for r in results.runs["full"]} == {1}
    assert {r.stages for r in results.runs["full_best"]} == {3}
    # start 0.1 and one stage on two levels, 1.1; the probe is not used, not charged
    assert results.runs["full"][0].cost == pytest.approx(1.2)
    assert results.runs["full_best"][0].cost == pytest.approx(0.1 + 3 * 1.1)


def test_early_stopping_ends_after_two_stages_without_gain_and_pays_for_them():
    def metric(path, task):
        return START + (0.1 if path else 0)

    results = run(SyntheticStages(metric), spec=spec_of(2, horizon=5))
    for found in results.runs["full_best"]:
        assert (found.stages, found.best_length) == (3, 1)
        assert found.cost == pytest.approx(0.1 + 3 * 1.1)


def test_learning_rates_are_chosen_on_val_and_reach_above_the_search():
    def metric(path, task):
        rate = path[0].operation.settings().get("learning_rate", 0.0) if path else 0
        return START + (0.2 if rate == 1e-2 else 0.1) * bool(path)

    results = run(SyntheticStages(metric))
    assert results.settings["head"]["learning_rate"] == 1e-2
    assert results.settings["full"]["learning_rate"] < 1e-2  # single levels only
    assert results.settings["head"]["levels"] == ["head"]


def test_head_pays_its_switch_once():
    results = run(SyntheticStages(), spec=spec_of(4))
    assert {r.switches for r in results.runs["head"]} == {3}


def test_fixed_finds_the_best_schedule():
    # the head at 1e-3 gives most for least; see `learns`: every stage of it is worth 0.1
    results = run(SyntheticStages())
    chosen = results.settings["fixed"]
    assert chosen["levels"] in (["conv"], ["head"])
    assert (chosen["learning_rate"], chosen["length"]) == (1e-3, 3)
    best = 0.5 + 3 * 0.1 - 0.05
    assert all(r.test_metric == pytest.approx(best) for r in results.runs["fixed"])


@pytest.mark.parametrize("max_stages", [1, 7, 30, 100, 1000])
def test_fixed_keeps_within_its_stages_on_the_train_tasks(max_stages):
    stages = SyntheticStages()
    results = run(stages, max_stages=max_stages)
    asked = {
        (
            r.task,
            tuple((s.levels, s.operation.settings().get("learning_rate", 0.0)) for s in r.path),
        )
        for r in stages.stages_asked()
        if r.task in TRAIN
    }
    assert len(asked) <= max_stages
    assert results.settings["fixed"]["tuning_stages"] == len(asked)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 24), st.integers(1, 5), st.integers(0, 3000))
def test_halving_plans_stay_within_their_bound(n_candidates, n_tasks, length, bound):
    plan = plan_halving(n_candidates, n_tasks, length, bound)
    met, alive, stages = 0, plan.n_candidates, 0
    for n, keep in plan.rounds:
        assert met <= n <= n_tasks
        stages += alive * (n - met) * plan.length
        met, alive = n, keep
    assert stages == plan.stages <= bound
    assert 1 <= alive <= 3
    if bound >= n_candidates * n_tasks * length:
        assert plan.n_candidates == n_candidates
        assert plan.length == length


def test_halving_without_a_bound_meets_all_tasks():
    plan = plan_halving(12, 24, 5, None)
    assert plan.rounds == ((24, 6), (24, 3))


def test_random_is_reproducible_and_differs_by_seed_task_and_replica():
    def paths(seed):
        runs = run(SyntheticStages(), spec=spec_of(4, horizon=5), seed=seed).runs["random"]
        return [[s["operation"] + s["level"] for s in r.steps] for r in runs]

    assert paths(0) == paths(0)
    assert paths(0) != paths(1)
    assert len({tuple(path) for path in paths(0)}) > 1


def test_schedules_unfreeze_as_they_say():
    def improving(path, task):
        return START + 0.1 * len(path)

    results = run(SyntheticStages(improving), ["all"], spec=spec_of(4, horizon=5))

    def levels(name):
        return [s["levels"] for s in results.runs[name][0].steps]

    names = ["conv", "mid", "late", "head"]
    assert levels("gradual_last_first") == [names[3:], names[2:], names[1:], names, names]
    assert levels("gradual_first_last") == [names[:1], names[:2], names[:3], names, names]
    assert levels("lp_ft")[0] == ["head"]
    assert levels("lp_ft")[-1] == names
    assert levels("level:mid") == [["mid"]] * 5


def test_lp_ft_trains_all_levels_even_where_the_head_alone_would_do():
    def head_is_enough(path, task):
        return START + 0.1 * min(len(path), 1)

    spec = spec_of(4, horizon=5)
    results = run(SyntheticStages(head_is_enough), ["lp_ft"], spec=spec)
    assert results.settings["lp_ft"]["length"] == 2
    assert [s["levels"] for s in results.runs["lp_ft"][0].steps] == [["head"], list(spec.levels)]


def test_auto_rgn_scales_by_gradient_norm_and_pays_for_the_probe():
    stages = SyntheticStages(norms=(0.5, 2.0))
    results = run(stages, ["auto_rgn"])
    scales = {
        r.path[-1].operation.level_scales
        for r in stages.stages_asked()
        if getattr(r.path[-1].operation, "level_scales", None)
    }
    assert scales == {(0.25, 1.0)}
    auto = results.runs["auto_rgn"][0]
    assert auto.cost == pytest.approx(0.5 + 1.1 * auto.stages)


def test_scales_enter_a_stage_s_identity_only_when_given():
    plain = step(0, 1).operation
    assert "level_scales" not in plain.settings()


def test_lower_is_better_is_chosen_the_other_way_round():
    def error(path, task):
        return 2 * START - learns(path, task)

    results = run(SyntheticStages(error), spec=spec_of(2, higher_is_better=False))
    assert results.settings["full"]["learning_rate"] == 1e-3
    assert results.runs["full"][0].val_metric < START
    assert results.runs["full"][0].utility < 0


def test_a_budget_ends_baselines_as_it_ends_episodes():
    results = run(SyntheticStages(), ["all"], spec=spec_of(2, horizon=5, budget=1.0))
    for name, runs in results.runs.items():
        # the last stage begins below 1.0 and costs at most 1.1
        assert max(r.cost for r in runs) <= 2.1, name


def test_optimum_is_the_best_of_all_episodes_of_the_process():
    values = {}

    def metric(path, task):
        key = tuple((s.levels, s.operation.settings().get("learning_rate", 0.0)) for s in path)
        return values.setdefault(key, 0.5 + (hash(key) % 1000) / 5000)

    spec, stages, utility = spec_of(2, horizon=2), SyntheticStages(metric), Utility(switch_cost=0.1)
    best = best_fine_tuning(spec, stages, utility, "a", 0)

    def episodes(state):
        if state.terminated:
            yield state
            return
        for action in action_mask(spec, state).nonzero()[0]:
            request = stage_request(spec, state, int(action))
            outcome = None if request is None else stages.outcome(request).outcome
            yield from episodes(advance(spec, state, int(action), outcome)[0])

    start = stages.outcome(start_request("a", 0)).outcome
    expected = max(
        utility.of(state.best, state.cost, state.switches)
        for state in episodes(start_state(spec, start, "a", 0, 0))
    )
    found = utility.of(best.state.best, best.state.cost, best.state.switches)
    assert found == pytest.approx(expected)


def test_acting_levels_of_all_are_all_levels():
    spec = spec_of(4)
    assert acting_levels(spec, step(0, 1, 2, 3)) == [0, 1, 2, 3]
    assert acting_levels(spec, step(2)) == [2]
    assert acting_levels(spec, step(1, 2, 3)) == [1]


def trainings(stages):
    """The settings of all training that was asked for."""
    found = [s.operation for r in stages.stages_asked() for s in r.path]
    return [operation for operation in found if isinstance(operation, Train)]


def test_baselines_of_a_search_that_does_not_train_do_so_all_the_same():
    spec = spec_of(2, operations=(Refit(name="refit"), Skip(), Stop()))
    stages = SyntheticStages()
    run(stages, spec=spec)
    assert {t.learning_rate for t in trainings(stages)} == {3e-4, 1e-3, 3e-3, 1e-2}
    stages, training = SyntheticStages(), (Train(name="t", learning_rate=0.03, steps=7), Stop())
    run(stages, spec=spec, training=training)
    assert {(t.learning_rate, t.steps) for t in trainings(stages)} == {(0.03, 7), (0.1, 7)}


def test_baselines_take_over_neither_scales_nor_a_pull():
    own = Train(name="t", learning_rate=1e-2, steps=7, level_scales=(0.1,), l2_sp=0.5)
    stages = SyntheticStages()
    run(stages, spec=spec_of(2, operations=(own, Stop())))
    assert {(t.steps, t.level_scales, t.l2_sp) for t in trainings(stages) if t != own} == {
        (7, None, 0.0)
    }


def test_missing_tasks_are_refused():
    with pytest.raises(InputError, match="train and val tasks to choose on, got 0 and 1"):
        choose_and_play(
            spec_of(2), SyntheticStages(), train_tasks=[], val_tasks=["v"], test_tasks=[]
        )


def tiny_suite() -> Suite:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

    def task(name: str) -> Task:
        x = torch.randn(24, 4, generator=generator)
        y = torch.randint(0, 3, (24,), generator=generator)
        return Task(name=name, train=(x, y), val=(x, y), test=(x, y))

    return Suite(
        name="tiny",
        model=model,
        levels={"low": ["0"], "high": ["2"]},
        train_tasks=[task("train0"), task("train1")],
        val_tasks=[task("val0")],
        test_tasks=[task("test0")],
    )


def test_all_baselines_run_on_the_engine():
    engine = Engine(tiny_suite(), EngineSettings(device="cpu", probe_size=8))
    spec = ProcessSpec(
        levels=("low", "high"),
        operations=default_operations(steps=2, batch_size=8),
        reference_flops=engine.reference_flops(),
        settings=ProcessSettings(horizon=2),
    )
    results = choose_and_play(
        spec,
        LocalStages(engine),
        train_tasks=["train0", "train1"],
        val_tasks=["val0"],
        test_tasks=["test0"],
        names=["all", "optimum", "asha", "tpe"],
        max_stages=40,
        search_stages=4,
        threads=1,
    )
    best = results.runs["optimum"][0].val_utility
    for name, (found,) in results.runs.items():
        assert found.cost > 0, name
        if name == "random":
            assert found.val_utility <= best


def test_level_scales_reach_the_optimizer():
    engine = Engine(tiny_suite(), EngineSettings(device="cpu", probe_size=8))
    stages = LocalStages(engine)
    operation = Train(name="scaled", learning_rate=1e-2, steps=2, level_scales=(0.0, 1.0))
    path = (StageStep(operation=operation, levels=(0, 1)),)
    before = stages.state_dict(StageRequest(task="val0"))
    after = stages.state_dict(StageRequest(task="val0", path=path))
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["2.weight"], after["2.weight"])
