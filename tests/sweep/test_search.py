"""The whole: sweeps on tiny suites, on one Ray of the run's or as a user starts them."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from lines import Lines
from sweep_files import small_suite
from torch import nn

from rlhf_ray.config import SearchConfig
from rlhf_ray.engine.support import supported
from rlhf_ray.errors import InputError, StageError
from rlhf_ray.operations import Operation, Skip, StageSession, Stop, Train
from rlhf_ray.outcomes import StageRequest
from rlhf_ray.policies.finetuning import finetune
from rlhf_ray.storage import Storage, open_storage
from rlhf_ray.sweep import record
from rlhf_ray.sweep import search as sweep
from rlhf_ray.sweep.results import SearchResult
from rlhf_ray.sweep.search import search
from rlhf_ray.tasks import Metric, Suite, Task
from rlhf_ray.tree.stage_tree import LocalStages
from rlhf_ray.tree.store import TreeStore
from rlhf_ray.tree.tally import Answer

HERE = Path(__file__).parents[1]

FLAGS = {
    "gamma": (0.9,), "epsilon": (0.1,), "tuning_cost_weight": (0.0, 0.05),
    "switch_cost_weight": (0.001,), "episodes": 6, "horizon": 3, "steps": 2, "batch_size": 8,
    "judge_replicas": 2, "num_workers": 1, "cpus_per_worker": 0.5, "concurrent_trials": 1,
    "stages_in_flight": 2,
}  # fmt: skip
"""Two trials of six episodes."""


def config(storage: Path, **changes: Any) -> SearchConfig:
    return SearchConfig(storage_path=str(storage), **{**FLAGS, **changes})


def command(storage: str, suite: str = "sweep_files:small_suite", *more: str) -> list[str]:
    """The same sweep as a user starts it."""
    words = [sys.executable, "-m", "rlhf_ray.launch", "--suite", suite, "--storage-path", storage]
    for name, value in FLAGS.items():
        values = value if isinstance(value, tuple) else (value,)
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    return [*words, *more]


def same(table: pd.DataFrame, other: pd.DataFrame) -> bool:
    pd.testing.assert_frame_equal(table, other, check_exact=True)
    return True


def must_not_run(*_: Any, **__: Any) -> None:
    raise AssertionError("there was nothing to run")


@dataclass(frozen=True)
class Finished:
    storage: Path
    config: SearchConfig
    result: SearchResult


@pytest.fixture(scope="module")
def finished(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """An undisturbed sweep; tests only look at it."""
    storage = tmp_path_factory.mktemp("finished")
    asked = config(storage)
    return Finished(storage, asked, search(small_suite(), asked))


# -- what a search would do


def test_plan_times_warm_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[StageRequest] = []

    class Timed(LocalStages):
        def outcomes(self, requests: Sequence[StageRequest], namespace: str = "") -> list[Answer]:
            cold = not asked
            asked.extend(requests)
            answers = super().outcomes(requests, namespace)
            return [replace(a, outcome=replace(a.outcome, time_s=9.0 if cold else 0.5))
                    for a in answers]  # fmt: skip

    monkeypatch.setattr(sweep, "LocalStages", Timed)
    planned = sweep.plan(small_suite(), config(tmp_path, num_workers=2), timed=True)
    assert len({(r.replica, r.path) for r in asked}) == len(asked)  # none answered from memory
    assert planned.seconds_estimate == pytest.approx(0.25 * planned.n_stages_estimate[1])
    assert planned.state == "new" and not list(tmp_path.iterdir())


def test_plan_counts_what_has_to_be_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    highest, distinct = sweep.plan(small_suite(), config(tmp_path)).n_stages_estimate
    assert 0 < distinct < highest
    apart = sweep.plan(small_suite(), config(tmp_path, share=False))
    assert apart.n_stages_estimate == (highest, highest)
    monkeypatch.setattr(sweep, "LocalStages", must_not_run)
    replayed = sweep.plan(small_suite(), config(tmp_path, replay_only=True), timed=True)
    assert replayed.n_stages_estimate == (highest, 0)
    assert replayed.seconds_estimate == 0


def test_what_rllib_cannot_be_told_is_refused_before_anything_starts(tmp_path: Path) -> None:
    for given, match in (({"foo": 1}, "ones that dqn reads, got 'foo'"),
                         ({"grad_clip": -1}, "grad_clip must be a number > 0 or None"),
                         ({"grad_clop": 1.0}, "Valid: grad_clip, td_error_loss_fn")):  # fmt: skip
        with pytest.raises(InputError, match=match):
            sweep.plan(small_suite(), config(tmp_path, rllib=given))
    sweep.plan(small_suite(), config(tmp_path, rllib={"grad_clip": 1.0}))


def test_plan_knows_the_sweep_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "LocalStages", must_not_run)
    asked, storage = config(tmp_path, name="mine"), open_storage(tmp_path)
    ground = sweep.prepare(small_suite(), asked)
    record.record_sweep(storage, ground)
    storage.write_json(f"mine/trials/{ground.trials[0].name}/trial.json", {"status": "done"})
    begun = sweep.plan(small_suite(), asked)
    assert (begun.state, begun.n_done) == ("running", 1)
    record.set_state(storage, "mine", "finished")
    finished = sweep.plan(small_suite(), asked, timed=True)
    assert (finished.state, finished.seconds_estimate) == ("finished", None)
    other = replace(asked, seed=1)
    with pytest.raises(InputError, match=r"one suite and configuration, got name='mine'"):
        sweep.plan(small_suite(), other)
    assert sweep.plan(small_suite(), other, fresh=True).state == "finished"


# -- what a sweep leaves


def test_result_holds_trials_policies_and_comparison(finished: Finished) -> None:
    result = finished.result
    assert result.finished and not result.failures
    table = result.table()
    assert list(table["status"]) == ["done", "done"] and table["on_front"].any()
    assert list(table["tuning_cost_weight"]) == [0.0, 0.05]
    judged = table["metric"] - 0.02 * table["cost"] - 0.002 * table["switches"]
    pd.testing.assert_series_equal(judged, table["utility"], check_names=False)
    assert result.best_trial == table.loc[table["utility"].idxmax(), "trial"]
    for trial in table["trial"]:
        assert result.policy(trial).levels == ("low", "head")
    assert result.best_policy.metadata["sweep"] == result.name
    methods = result.methods()
    assert set(methods.index) == {"policy", "fixed", "full", "full_best", "head", "random"}


def test_what_was_told_last_are_the_final_counts(finished: Finished) -> None:
    told = json.loads((finished.storage / finished.result.name / "progress.json").read_text())
    assert (told["done"], told["total"], told["trials"]) == (12, 12, {})
    summary = finished.result.summary
    executed = summary["stages"]["executed"] + summary["stages_of_comparison"]["executed"]
    assert told["executed"] == sum(worker["executed"] for worker in told["workers"]) == executed
    assert told["in_flight"] == told["retried"] == 0


def test_summary_keeps_its_contract(finished: Finished) -> None:
    folder = finished.storage / finished.result.name
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["suite"], summary["seed"], summary["n_trials"]) == ("small", 0, 2)
    assert summary["wall_s"] > 0
    assert {"logical", "distinct", "seconds_spent", "seconds_saved"} <= set(summary["stages"])
    assert summary["stages"]["logical"] >= summary["stages"]["distinct"] > 0
    assert summary["stages"]["failed"] == 0
    assert summary["best"]["trial"] == finished.result.best_trial
    assert {"gamma", "epsilon", "tuning_cost_weight", "switch_cost_weight"} <= set(summary["best"])
    figures = {
        "metric_mean", "metric_sd", "cost_mean", "switches_mean", "utility_mean", "rank_mean",
    }  # fmt: skip
    assert all(figures <= set(found) for found in summary["methods"].values())
    minus = summary["policy_minus"]
    assert set(minus) == set(summary["methods"]) - {"policy"}
    for method, difference in minus.items():
        own, other = (summary["methods"][name]["utility_mean"] for name in ("policy", method))
        assert difference["mean"] == pytest.approx(own - other)
        assert difference["n_tasks"] == 1 and difference["low"] is None  # one task: no interval
    rows = {(row["method"], row["task"], row["seed"]) for row in summary["rows"]}
    assert rows == {(m, "test-0", r) for m in summary["methods"] for r in range(2)}
    assert {"methods", "sweep.json", "lock.json"} & {p.name for p in folder.iterdir()} == {
        "sweep.json"
    }
    assert (folder / "best_policy" / "policy.json").exists()


def test_schedule_is_tuned_once_counted_and_followed(finished: Finished) -> None:
    folder = finished.storage / finished.result.name
    record = json.loads((folder / "schedule.json").read_text())
    assert record["stages"]["logical"] >= len(record["moves"])
    assert finished.result.summary["schedule"] == record["moves"]
    network = finished.result.best_policy.network
    assert network is not None and network.schedule is not None
    assert len(network.schedule) == finished.config.horizon
    walks = json.loads((folder / "walks.json").read_text())
    met_by_all = {json.dumps(candidate["moves"]) for candidate in record["candidates"]}
    assert met_by_all <= {json.dumps(walk["moves"]) for walk in walks}
    assert sum(len(walk["outcomes"]) - 1 for walk in walks) == record["stages"]["logical"]


def test_each_trial_says_what_leaving_the_schedule_gave_and_holds_its_policy_to_it(
    finished: Finished,
) -> None:
    n_tasks = len(small_suite().train_tasks)
    for trial in finished.result.trials:
        left = trial["departures"]
        assert left["n_tasks"] == n_tasks
        assert left["paid"] == (left["gain"] > max(left["standard_error"], 0.0))
        network = finished.result.policy(trial["name"]).network
        assert network is not None and network.departs == left["paid"]


def test_policy_fine_tunes_a_task_it_never_saw(finished: Finished) -> None:
    suite = small_suite(task="new")
    tuned = finetune(suite.model, suite.levels, suite.test_tasks[0], finished.result.best_policy)
    assert 0 <= tuned.test_metric <= 1 and tuned.val_metric >= tuned.start_metric


def test_finished_sweep_is_returned_without_work(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_run", must_not_run)
    again = search(small_suite(), replace(finished.config, num_workers=3))
    assert same(again.table(), finished.result.table()) and again.summary == finished.result.summary


def test_baselines_asked_for_later_are_added(finished: Finished) -> None:
    result = search(small_suite(), replace(finished.config, baselines=("lp_ft",)))
    assert set(result.methods().index) == {*finished.result.methods().index, "lp_ft"}
    assert same(result.table(), finished.result.table())
    found = [r.summary["methods"]["policy"] for r in (result, finished.result)]
    # a rank is one among more methods now
    first, second = ({**figures, "rank_mean": 0} for figures in found)
    assert first == second


def test_baselines_that_search_are_run_again_for_other_stages(finished: Finished) -> None:
    for n_stages in (2, 3):
        config = replace(finished.config, baselines=("tpe",), search_stages=n_stages)
        result = search(small_suite(), config)
        assert set(result.methods().index) >= {"tpe", "policy"}
        assert result.summary["baseline_settings"]["tpe"]["search_stages"] == n_stages


def test_other_configuration_under_the_same_name_is_refused(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_run", must_not_run)
    name = finished.result.name
    episodes = r"which holds one of episodes=\d+ \(now 7\)"
    with pytest.raises(InputError, match=rf"{episodes}\. Give another --name, or --fresh"):
        search(small_suite(), replace(finished.config, name=name, episodes=7))
    with pytest.raises(InputError, match="which holds one of another tasks"):
        search(small_suite(task="other"), replace(finished.config, name=name))
    assert SearchResult.load(finished.storage / name).finished


def test_an_unfinished_sweep_with_another_model_is_told_of(tmp_path: Path) -> None:
    asked, storage = config(tmp_path), open_storage(tmp_path)
    first = sweep.prepare(small_suite(), asked)
    assert record.record_sweep(storage, first) == ""
    suite = small_suite()
    with torch.no_grad():
        next(suite.model.parameters()).mul_(1 + 1e-6)
    again = sweep.prepare(suite, asked)
    assert again.name != first.name
    said = record.record_sweep(storage, again)
    assert said.startswith(f"a new sweep: {first.name} (running) has the same settings and tasks")
    assert "but another model; weights that are loaded from a file stay the same" in said
    assert record.record_sweep(storage, again) == ""  # now it goes on
    with pytest.raises(InputError, match="which holds one of another model"):
        record.check_same_sweep({**storage.read_json(f"{first.name}/sweep.json")}, again)
    other = sweep.prepare(small_suite(task="other"), asked)
    assert record.record_sweep(storage, other) == ""


def test_levels_that_leave_parameters_out_are_told_of(tmp_path: Path) -> None:
    suite = small_suite()
    (head,) = suite.levels["head"]
    partial = replace(suite, levels={"head": [head]})
    (line,) = [r for r in sweep.plan(partial, config(tmp_path)).remarks if "no level" in r]
    assert line.startswith("parameters in no level are never trained: 2 (")


def test_a_cluster_that_does_not_answer_is_named_at_once(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        code = (
            "import sys; from rlhf_ray.ray_session import check_answers\n"
            "from rlhf_ray.errors import InputError\n"
            "try: check_answers(sys.argv[1])\n"
            "except InputError as error: print(error)"
        )
        run = subprocess.run(
            [sys.executable, "-c", code, address], capture_output=True, text=True, timeout=60
        )
    assert f"a Ray cluster must answer at the address, got address={address!r}" in run.stdout


def folders(path: Path) -> list[str]:
    return open_storage(path).folders()


def test_a_finished_sweep_is_shown_without_its_cluster(
    finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(address: str | None) -> None:
        raise InputError(f"a Ray cluster must answer at the address, got address={address!r}")

    monkeypatch.setattr(sweep, "check_answers", unreachable)
    gone, before = replace(finished.config, address="127.0.0.1:1"), folders(finished.storage)
    assert search(small_suite(), gone).finished
    with pytest.raises(InputError, match=r"a Ray cluster must answer .* address='127\.0\.0\.1:1'"):
        search(small_suite(), replace(gone, seed=99))
    assert folders(finished.storage) == before


def test_bad_input_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    suite, asked = small_suite(), config(tmp_path)
    no_val = replace(suite, val_tasks=[])
    lower = Metric(name="loss", function=F.cross_entropy, higher_is_better=False)
    mixed = replace(suite, val_tasks=[replace(suite.val_tasks[0], metric=lower)])
    for given, changes, match in (
        (no_val, {}, "a search must have val tasks, got none in 'small'"),
        (mixed, {}, "all tasks' metrics must have one direction, got accuracy, loss"),
        (suite, {"baselines": ("ful",)}, "baseline must be one that exists.*Did you mean 'full'"),
    ):
        with pytest.raises(InputError, match=match):
            search(given, replace(asked, **changes))
    scaled = Train(name="t", learning_rate=1e-3, level_scales=(0.5, 1.0))
    for operations, match in (
        ((scaled, Stop()), "level_scales must hold one factor per trained level, got 2"),
        ((scaled,), "operations must hold one Stop"),
        (["skip"], "operations must hold rlhf_ray.Operation, got 'skip'"),
        (Stop(), r"operations must be a list of rlhf_ray.Operation, got Stop\(name='stop'\)"),
        ((Skip(), Stop()), r"must hold one that changes the model, got \['skip', 'stop'\]"),
    ):
        with pytest.raises(InputError, match=match):
            search(suite, asked, operations=operations)
    with pytest.raises(InputError, match=r"config must be a rlhf_ray.SearchConfig, got a dict"):
        search(suite, {"episodes": 3})  # type: ignore[arg-type]
    with pytest.raises(
        InputError, match=r"suite must be a rlhf_ray.Suite, got a Sequential\. Make"
    ):
        search(suite.model)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_minutes must be > 0, got max_minutes=0"):
        search(suite, asked, max_minutes=0)
    assert list(tmp_path.iterdir()) == []


def test_fresh_forgets_the_sweep_and_keeps_lock_and_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(tmp_path, name="mine")
    seen: list[set[str]] = []

    def look(*_: Any, **__: Any) -> None:
        seen.append({str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()})

    monkeypatch.setattr(sweep, "_run", look)
    for file in ("tree/ab/ab.json", "mine/trials/000/trial.json", "mine/summary.json", "other/x"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    (tmp_path / "mine/sweep.json").write_text('{"identity": "of another"}')
    result = search(small_suite(), asked, fresh=True)
    assert seen == [{"tree/ab/ab.json", "other/x", "mine/sweep.json", "mine/lock.json"}]
    assert {trial["status"] for trial in result.trials} == {"waiting"}


@pytest.mark.parametrize(
    ("error", "state"), [(KeyboardInterrupt(), "interrupted"), (RuntimeError("no"), "failed")]
)
def test_a_sweep_that_raises_says_so_and_goes_on_when_called_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, state: str
) -> None:
    asked, calls = config(tmp_path, name="mine"), []

    def end(storage: Storage, ground: sweep.Ground, **_: Any) -> None:
        calls.append(ground.name)
        if len(calls) == 1:
            raise error

    monkeypatch.setattr(sweep, "_run", end)
    with pytest.raises(type(error)):
        search(small_suite(), asked)
    assert SearchResult.load(tmp_path / "mine").sweep["state"] == state
    assert f">{state}</span>" in (tmp_path / "mine" / "report.html").read_text()
    search(small_suite(), asked)
    assert calls == ["mine", "mine"]


# -- the same again


@pytest.mark.usefixtures("ray_session")
def test_sharing_and_concurrency_change_no_figure(finished: Finished, tmp_path: Path) -> None:
    spread = {"concurrent_trials": 2, "num_workers": 2, "env_runners": 1}
    alone = search(small_suite(), config(tmp_path, share=False, **spread))
    assert same(alone.table(), finished.result.table())
    curves = [[trial["curve"] for trial in r.trials] for r in (alone, finished.result)]
    assert curves[0] == curves[1]
    assert alone.summary["methods"] == finished.result.summary["methods"]
    stages, shared = alone.summary["stages"], finished.result.summary["stages"]
    assert stages["logical"] == shared["logical"] == stages["executed"]
    assert stages["distinct"] == shared["distinct"] >= shared["executed"]
    assert not (tmp_path / "tree").exists()


@pytest.mark.usefixtures("ray_session")
def test_second_trial_learns_from_the_firsts_episodes(tmp_path: Path) -> None:
    asked = config(tmp_path, share_experience=True, warm_up=0.2, decay_fraction=0.4, env_runners=1)
    result = search(small_suite(), asked)
    first, second = result.trials
    assert first["experience"] == {"trials": 0, "episodes": 0, "steps": 0}
    folder = tmp_path / result.name / "trials"
    played = [
        json.loads((folder / trial["name"] / "episodes.json").read_text())
        for trial in result.trials
    ]
    assert [len(episodes) for episodes in played] == [6, 6]
    not_drawn = [actions for _, random, *actions in played[0] if not random]
    learned = second["experience"]["episodes"]
    assert 0 < learned <= len(not_drawn) < 6
    assert second["experience"]["trials"] == 1 and second["experience"]["steps"] >= learned
    assert list(result.table()["episodes_of_others"]) == [0, learned]
    assert result.summary["episodes_of_others"] == {first["name"]: 0, second["name"]: learned}
    operations, _ = supported(small_suite(), asked.operations())
    for trial, episodes in zip(result.trials, played, strict=True):
        taken = [operations[action // 2] for _, _, *actions in episodes for action in actions]
        trained = sum(not isinstance(operation, Stop | Skip) for operation in taken)
        judged = sum(run["stages"] for run in trial["runs"])
        own = trained + judged + trial["departures"]["n_stages"]
        assert trial["stages"]["logical"] == own  # what others asked for is not in it


@pytest.mark.usefixtures("ray_session")
def test_time_is_up_and_the_same_call_goes_on(finished: Finished, tmp_path: Path) -> None:
    stopped = search(small_suite(), config(tmp_path), max_minutes=0.01)
    assert stopped.sweep["state"] == "interrupted" and not stopped.summary
    assert {trial["status"] for trial in stopped.trials} == {"waiting"}
    folder = tmp_path / stopped.name
    assert not (folder / "schedule.json").exists() and not (folder / "tune").exists()
    assert same(search(small_suite(), config(tmp_path)).table(), finished.result.table())


@pytest.mark.usefixtures("ray_session")
def test_failed_trial_is_reported_and_tried_again(finished: Finished, tmp_path: Path) -> None:
    first, second = finished.result.table()["trial"]
    obstacle = tmp_path / finished.result.name / "trials" / first / "policy"
    obstacle.parent.mkdir(parents=True)
    obstacle.write_text("a file where the trial wants a folder")
    result = search(small_suite(), config(tmp_path))
    assert [trial["name"] for trial in result.failures] == [first]
    assert "must be written under" in result.failures[0]["error"]
    assert result.sweep["state"] == "failed" and result.best_trial == second
    assert result.summary["n_failed"] == 1 and result.summary["methods"]["policy"]
    obstacle.unlink()
    again = search(small_suite(), config(tmp_path))
    assert again.finished and same(again.table(), finished.result.table())


# -- other suites and operations


class Shrink(Operation):
    """Halves the acting level's weights."""

    def levels(self, level: int, n_levels: int) -> tuple[int, ...]:
        return (level,)

    def run(self, session: StageSession) -> None:
        for parameter in session.parameters().values():
            parameter.data.mul_(0.5)


class Broken(Operation):
    """Fails whenever it is carried out."""

    def levels(self, level: int, n_levels: int) -> tuple[int, ...]:
        return (level,)

    def run(self, session: StageSession) -> None:
        raise RuntimeError("no such luck")


def regression_suite() -> Suite:
    rng = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 1, generator=rng)
    mse = Metric(name="mse", function=F.mse_loss, higher_is_better=False)

    def task(name: str, slope: float) -> Task:
        x = torch.randn(48, 5, generator=rng)
        data = (x, slope * (x @ weights))
        return Task(name=name, train=data, val=data, test=data, loss=F.mse_loss, metric=mse)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1))
    return Suite(
        name="slopes",
        model=model,
        levels={"low": ["0"], "head": ["2"]},
        train_tasks=[task("a", 1.0), task("b", -1.0)],
        val_tasks=[task("c", 0.5)],
        test_tasks=[task("d", 2.0)],
    )


@pytest.mark.usefixtures("ray_session")
def test_own_operations_one_that_fails_and_a_metric_of_which_less_is_better(
    tmp_path: Path,
) -> None:
    operations = (
        Train(name="train", learning_rate=1e-2, steps=4, batch_size=16),
        Shrink(name="shrink"),
        Broken(name="broken"),
        Skip(),
        Stop(),
    )
    progress = Lines()
    result = search(regression_suite(), config(tmp_path), operations=operations, progress=progress)
    assert result.finished
    table = result.table()
    judged = -table["metric"] - 0.02 * table["cost"] - 0.002 * table["switches"]
    pd.testing.assert_series_equal(judged, table["utility"], check_names=False)
    assert result.best_trial == table.loc[table["utility"].idxmax(), "trial"]
    start = result.summary["methods"]["policy"]["metric_mean"]
    assert start > 0
    # the operation that raises is a stage that diverged: counted, said, and never an end
    assert result.summary["stages"]["failed"] > 0
    assert any("RuntimeError: no such luck" in line for line in progress.lines)
    (early,) = [line for line in progress.lines if line.startswith("stages fail and count as")]
    (total,) = [line for line in progress.lines if "stages failed and count as" in line]
    assert progress.lines.index(early) < progress.lines.index(total)


@pytest.mark.usefixtures("ray_session")
def test_a_search_without_training_ends_with_baselines_that_train_as_configured(
    tmp_path: Path,
) -> None:
    asked = config(tmp_path, tuning_cost_weight=(0.0,), learning_rates=(0.1, 0.2, 0.5))
    operations = (Shrink(name="shrink"), Skip(), Stop())
    result = search(small_suite(), asked, operations=operations)
    assert result.finished and not result.failures
    assert result.summary["baseline_settings"]["head"]["learning_rate"] in (0.1, 0.2, 0.5, 1.67)


@pytest.mark.usefixtures("ray_session")
def test_a_model_that_is_one_level_of_any_name_is_searched_too(tmp_path: Path) -> None:
    suite = replace(small_suite(), levels={"whole/model:1.": ["0", "1", "2"]})
    result = search(suite, config(tmp_path, tuning_cost_weight=(0.0,)))
    assert result.finished and not result.failures
    assert result.best_policy.levels == ("whole/model:1.",)
    assert result.table()["switches"].eq(0).all()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_replaying_what_is_not_there_fails_with_a_clear_line(tmp_path: Path) -> None:
    line = "every stage must be in the tree when replaying"
    with pytest.raises(StageError, match=line):  # the schedule comes first
        search(small_suite(), config(tmp_path, replay_only=True))
    result = search(small_suite(), config(tmp_path, replay_only=True, schedule=False))
    assert len(result.failures) == 2 and not result.summary
    assert line in result.failures[0]["error"]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_filled_tree_serves_any_weights_without_new_stages(tmp_path: Path) -> None:
    few = {"horizon": 1, "judge_replicas": 1}
    filled = search(small_suite(), config(tmp_path, prefill=1, **few))
    n_files = len(list((tmp_path / "tree").rglob("*.json")))
    other = config(tmp_path, gamma=(0.5,), prefill=1, replay_only=True, **few)
    replayed = search(small_suite(), other)
    assert filled.finished and replayed.finished and replayed.name != filled.name
    assert replayed.summary["stages"]["executed"] == 0
    assert len(list((tmp_path / "tree").rglob("*.json"))) == n_files


# -- as a user starts it


class Launched:
    """A sweep in a process of its own; knows all processes that come from it."""

    def __init__(self, words: list[str], folder: Path, **environment: str) -> None:
        self._mark = f"RLHF_RAY_TEST={uuid.uuid4().hex}".encode()
        name, value = self._mark.decode().split("=")
        self.log = folder / f"{value}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                words,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                env={**os.environ, **environment, name: value, "PYTHONUNBUFFERED": "1"},
                # not ignored, as it is by what a shell runs in the background
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def family(self) -> list[int]:
        """Ids of the processes that live, Ray's among them."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                alive = ") Z " not in (folder / "stat").read_text()
                if alive and self._mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
            except OSError:
                continue
        return found

    def wait_until(self, condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
        end = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < end, self.log.read_text()[-2000:]
            assert self.process.poll() is None, self.log.read_text()[-2000:]
            time.sleep(0.05)

    def ends(self, timeout_s: float = 300.0, *, family_s: float = 30.0) -> int:
        """Waits for the exit status, and for the last of the family."""
        status = self.process.wait(timeout_s)
        end = time.monotonic() + family_s
        while self.family():
            assert time.monotonic() < end, f"left behind: {self.family()}"
            time.sleep(0.2)
        return status


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., Launched]]:
    started: list[Launched] = []

    def launch(words: list[str], **environment: str) -> Launched:
        started.append(Launched(words, tmp_path, **environment))
        return started[-1]

    yield launch
    for one in started:
        for pid in one.family():
            os.kill(pid, signal.SIGKILL)


def stages_in(tree: Path) -> set[str]:
    """Keys of the committed stages (not: of starts, of test figures)."""
    storage = TreeStore(open_storage(tree.parent))
    outcomes = [storage.get(file.stem) for file in tree.rglob("*.json")]
    return {o.key for o in outcomes if o is not None and o.kind == "stage" and not o.descriptors}


def executed(folder: Path) -> int:
    """Stages that the schedule and the trials which ended well carried out."""
    files = [*folder.glob("schedule.json"), *folder.glob("trials/*/trial.json")]
    records = [json.loads(file.read_text()) for file in files]
    return sum(record["stages"]["executed"] for record in records)


SUITE = """
import torch
from torch import nn
import rlhf_ray as rr


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.head = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.low(x)))


def score(outputs, targets):
    return (outputs.argmax(1) == targets).float().mean()


def make():
    torch.manual_seed(0)
    x = torch.randn(32, 4)
    data = (x, x[:, :3].argmax(1))
    tasks = [rr.Task(name=n, train=data, val=data, test=data, metric=score) for n in "abc"]
    return rr.Suite(
        name="own", model=Net(), levels={"low": ["low"], "head": ["head"]},
        train_tasks=tasks[:1], val_tasks=tasks[1:2], test_tasks=tasks[2:],
    )
"""


def test_suite_of_a_users_own_module_and_a_relative_storage_path(
    launch: Callable[..., Launched], tmp_path: Path
) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "suites.py").write_text(SUITE)
    words = command("runs/here", "mine.suites:make", "--name", "first")
    run = launch(words)
    assert run.ends() == 0, run.log.read_text()
    result = SearchResult.load(tmp_path / "runs/here/first")
    assert result.finished and result.summary["suite"] == "own"
    assert sorted(p.name for p in (tmp_path / "runs/here").iterdir()) == ["first", "tree"]
    assert "Traceback" not in run.log.read_text()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupt_ends_all_processes_and_leaves_what_is_done(
    launch: Callable[..., Launched], tmp_path: Path, number: int, status: int
) -> None:
    storage = tmp_path / "runs"
    run = launch(command(str(storage), "sweep_files:small_suite", "--name", "mine"),
                 PYTHONPATH=str(HERE))  # fmt: skip
    run.wait_until(lambda: any((storage / "tree").rglob("*.json")))
    with pytest.raises(InputError, match=f"held by process {run.process.pid}"):
        search(small_suite(), config(storage, name="mine"))
    run.process.send_signal(number)
    assert run.ends() == status
    said = run.log.read_text()
    assert "this goes on with it: python -m rlhf_ray.launch" in said and "Traceback" not in said
    assert SearchResult.load(storage / "mine").sweep["state"] == "interrupted"
    assert not (storage / "mine" / "lock.json").exists()


def kill_and_go_on(
    finished: Finished, launch: Callable[..., Launched], folder: Path, kills: int
) -> None:
    """kill -9 of the driver at random instants; then the same command."""
    draw = random.Random(kills)
    storage, name = folder / "runs", finished.result.name
    words = command(str(storage))

    def n_files() -> int:
        return len(list((storage / "tree").rglob("*.json")))

    for _ in range(kills):
        wanted = n_files() + draw.randint(1, 12)
        run = launch(words, PYTHONPATH=str(HERE))
        run.wait_until(lambda wanted=wanted: n_files() >= wanted)
        time.sleep(draw.uniform(0, 0.3))
        run.process.kill()
        assert run.ends(family_s=120.0) == -signal.SIGKILL  # Ray's monitors look now and then
    committed, before = stages_in(storage / "tree"), executed(storage / name)
    contents = {file: file.read_bytes() for file in (storage / "tree").rglob("*.json")}
    run = launch(words, PYTHONPATH=str(HERE))
    assert run.ends() == 0, run.log.read_text()
    result = SearchResult.load(storage / name)
    assert same(result.table(), finished.result.table())
    assert result.summary["methods"] == finished.result.summary["methods"]
    new = stages_in(storage / "tree") - committed
    n_executed = executed(storage / name) - before
    assert n_executed + result.summary["stages_of_comparison"]["executed"] == len(new)
    assert all(file.read_bytes() == content for file, content in contents.items())


def test_killed_driver_loses_nothing_committed(
    finished: Finished, launch: Callable[..., Launched], tmp_path: Path
) -> None:
    kill_and_go_on(finished, launch, tmp_path, kills=1)


@pytest.mark.slow
def test_driver_killed_again_and_again_loses_nothing_committed(
    finished: Finished, launch: Callable[..., Launched], tmp_path: Path
) -> None:
    kill_and_go_on(finished, launch, tmp_path, kills=4)


def test_fresh_leaves_folders_alone_that_are_no_sweeps(tmp_path: Path) -> None:
    photo = tmp_path / "mine" / "photos" / "one.jpg"
    photo.parent.mkdir(parents=True)
    photo.write_bytes(b"x")
    with pytest.raises(InputError, match=r"holds other things and no sweep\.json"):
        search(small_suite(), config(tmp_path, name="mine"), fresh=True)
    assert photo.read_bytes() == b"x" and not (tmp_path / "mine" / "sweep.json").exists()


def test_a_sweep_that_is_half_forgotten_is_still_known_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in ("sweep.json", "trials/000/trial.json", "summary.json", "suite_flags.json"):
        (tmp_path / "mine" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / file).write_text("{}")
    storage, delete = open_storage(tmp_path), Storage.delete

    def broken(self: Storage, name: str) -> None:
        if name.endswith("summary.json"):
            raise KeyboardInterrupt
        delete(self, name)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Storage, "delete", broken)
        record.forget(storage, "mine")
    assert storage.exists("mine/sweep.json") and storage.folders("mine") == []
    record.forget(storage, "mine")
    assert storage.list("mine") == []
