import json
import random
import re
import shlex
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request

import pytest
from report_sweeps import (
    LEVELS,
    OPERATIONS,
    made_up_run,
    scale_metric,
    write_made_up_sweep,
    write_trial,
)

from rlhf_ray.errors import InputError
from rlhf_ray.report import __main__ as command
from rlhf_ray.report.accounts import effects
from rlhf_ray.report.explain import explain
from rlhf_ray.report.gathering import Gatherer, at
from rlhf_ray.report.live import LivePage, tell_last, write_report
from rlhf_ray.report.page import fragment, version, whole
from rlhf_ray.report.serving import server_of
from rlhf_ray.report.trials import CURVE_POINTS, smoothed, thinned
from rlhf_ray.storage import open_storage
from rlhf_ray.sweep.record import forget
from rlhf_ray.sweep.results import SearchResult

HOSTILE = "<script>alert(1)</script>\"'&日本語 " + "x" * 300


@pytest.fixture
def storage(tmp_path):
    return open_storage(tmp_path / "runs")


class Told:
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)

    def phase(self, name, total=None): ...
    def update(self, done=None, **counters): ...


# -- gathering


def test_gather_counts_states_and_marks_the_front(storage):
    write_made_up_sweep(storage, n_trials=9, n_done=4, n_failed=2, state="running")
    data = Gatherer(storage, "made-up").gather()
    health = data["health"]
    assert [health[s] for s in ("done", "running", "waiting", "failed")] == [4, 0, 3, 2]
    done = [trial for trial in data["trials"] if trial["status"] == "done"]
    assert any(trial["on_front"] for trial in done)
    assert data["best"] == max(done, key=lambda trial: trial["utility"])["name"]
    assert data["comparison"] is None
    assert "apply" not in data["commands"]


def test_a_policy_with_operations_of_ones_own_is_used_from_python(storage):
    write_made_up_sweep(storage)
    commands = Gatherer(storage, "made-up").gather()["commands"]
    assert "rlhf_ray.apply" in commands["apply"] and "policy)  # your model" in commands["python"]
    record = storage.read_json("made-up/sweep.json")
    record["operations"][0]["kind"] = "Shrink"
    storage.write_json("made-up/sweep.json", record)
    data = Gatherer(storage, "made-up").gather()
    assert "apply" not in data["commands"]
    assert "policy, operations=operations)" in data["commands"]["python"]
    assert "rlhf_ray.apply" not in whole(data) and "operations=operations" in whole(data)


def test_gather_of_a_sweep_without_any_trial_done(storage):
    write_made_up_sweep(storage, n_trials=2, n_done=0, state="running")
    data = Gatherer(storage, "made-up").gather()
    assert (data["best"], data["learned"], data["best_paths"]) == (None, None, [])
    assert "No trial has been judged yet." in fragment(data)


def test_the_page_says_which_schedule_policies_start_from(storage):
    write_made_up_sweep(storage, n_trials=2, n_done=0, state="running")
    assert "start from" not in fragment(Gatherer(storage, "made-up").gather())
    storage.write_json("made-up/schedule.json", {"words": "refit, train_up dense x 4"})
    assert "<b>refit, train_up dense x 4</b>" in fragment(Gatherer(storage, "made-up").gather())


@pytest.mark.parametrize(
    ("paid", "words"), [(True, "it may leave it."), (False, "it never leaves")]
)
def test_the_page_says_whether_the_best_policy_may_leave_its_schedule(storage, paid, words):
    write_made_up_sweep(storage, n_trials=2, n_done=2)
    storage.write_json("made-up/schedule.json", {"words": "refit"})
    file = f"made-up/trials/{Gatherer(storage, 'made-up').gather()['best']}/trial.json"
    left = {"gain": 0.0125, "standard_error": 0.002, "n_tasks": 24, "paid": paid}
    storage.write_json(file, {**storage.read_json(file), "departures": left})
    text = fragment(Gatherer(storage, "made-up").gather())
    assert "+1.25 points of utility there (standard error 0.20, 24 tasks" in text and words in text


def test_a_trial_that_has_ended_is_read_once(storage, monkeypatch):
    write_made_up_sweep(storage, n_trials=3, n_done=2, state="running")
    gatherer = Gatherer(storage, "made-up")
    before = gatherer.gather()
    read = []
    real = storage.read_json
    monkeypatch.setattr(storage, "read_json", lambda name: read.append(name) or real(name))
    trial = before["trials"][2]
    planned = {"name": trial["name"], "values": trial["values"]}
    write_trial(storage, "made-up", planned, 2)
    after = gatherer.gather()
    assert [t["status"] for t in after["trials"]] == ["done"] * 3
    asked = {name.split("/")[2] for name in read if name.endswith("trial.json")}
    assert asked == {trial["name"], after["best"]}
    assert version(before) != version(after) == version(gatherer.gather())


def test_trials_of_a_sweep_begun_afresh_are_not_the_old_ones(storage):
    write_made_up_sweep(storage, n_trials=3)
    gatherer = Gatherer(storage, "made-up")
    assert gatherer.gather()["health"]["done"] == 3
    forget(storage, "made-up")
    write_made_up_sweep(storage, n_trials=3, n_done=0, state="running")
    data = gatherer.gather()
    assert [trial["status"] for trial in data["trials"]] == ["waiting"] * 3
    assert (data["best"], data["comparison"], data["stages"]["distinct"]) == (None, None, 0)


def test_progress_of_the_driver_shows_what_runs_and_when_it_ends(storage):
    write_made_up_sweep(storage, n_trials=4, n_done=1, state="running")
    second = Gatherer(storage, "made-up").gather()["trials"][1]["name"]
    page = LivePage(storage, "made-up", Told(), before=96, total=384)
    page._began -= 100.0
    curves = {second: {"curve": [[32, 0.1], [64, 0.2]]}}
    page.tick({"in_flight": 2, "failed": {"k": "broke"}}, curves, done=160, restarts={second: 1})
    data = Gatherer(storage, "made-up").gather()
    running = data["trials"][1]
    assert (running["status"], running["episodes"]) == ("running", 64)
    assert data["health"]["left_s"] == pytest.approx(350, rel=0.05)
    assert data["health"]["failed_stages"] == ["broke"]
    html = storage.read_bytes("made-up/report.html").decode()
    assert "64 episodes" in html
    assert "started again" in html
    assert data["health"]["in_progress"] == [{"name": second, "episodes": 64}]


def test_nothing_runs_in_a_sweep_whose_driver_was_killed(storage):
    write_made_up_sweep(storage, n_trials=4, n_done=1, state="running")
    names = [trial["name"] for trial in Gatherer(storage, "made-up").gather()["trials"]]
    page = LivePage(storage, "made-up", Told(), total=384)
    page.tick({}, {name: {"curve": [[32, 0.1]]} for name in names[1:3]})
    assert Gatherer(storage, "made-up").gather()["health"]["running"] == 2
    gone = {"host": "elsewhere", "pid": 1, "token": "t", "time": time.time() - 4000}
    storage.write_json("made-up/lock.json", gone)
    data = Gatherer(storage, "made-up").gather()
    assert data["state"] == "interrupted"
    assert [trial["status"] for trial in data["trials"]] == ["done"] + ["waiting"] * 3
    assert (data["health"]["running"], data["health"]["in_progress"]) == (0, [])
    html = fragment(data)
    assert "2 running" not in html and "<option>running</option>" not in html


def test_workers_are_told_while_the_sweep_runs_and_after(storage):
    write_made_up_sweep(storage, n_trials=4, n_done=1, state="running")
    worker = {"pid": 71, "state": "busy", "stage": "stage [a] of 'b'", "executed": 3,
              "seconds_spent": 2.0, "lost": 1}  # fmt: skip
    LivePage(storage, "made-up", Told(), total=384).tick({"workers": [worker]}, {})
    running = fragment(Gatherer(storage, "made-up").gather())
    assert "<td>busy</td>" in running
    assert "lost 1×" in running  # noqa: RUF001
    write_made_up_sweep(storage, n_trials=4)
    ended = fragment(Gatherer(storage, "made-up").gather())
    assert "<td>busy</td>" not in ended
    assert "lost 1×" in ended  # noqa: RUF001


def test_an_interrupted_sweep_says_how_it_goes_on(storage):
    write_made_up_sweep(storage, n_trials=4, n_done=1, state="interrupted")
    html = fragment(Gatherer(storage, "made-up").gather())
    assert "the same launch command goes on with the trials that wait" in html


def test_the_command_names_the_suite_as_launch_was_given_it(storage):
    write_made_up_sweep(storage, suite="sensors")
    gatherer = Gatherer(storage, "made-up")
    assert "--suite package.module:function" in gatherer.gather()["commands"]["apply"]
    flags = ["--suite", "sensors:suite", "--n-test-tasks", "3"]
    storage.write_json("made-up/suite_flags.json", {"flags": flags})
    words = shlex.split(gatherer.gather()["commands"]["apply"].replace("\\\n", " "))
    assert words[5:9] == flags
    assert words[-2:] == ["--storage-path", str(storage.local_path())]


def test_the_page_shows_the_configuration_as_flags_and_values(storage):
    write_made_up_sweep(storage)
    sweep = storage.read_json("made-up/sweep.json")
    sweep["config"] |= {"rllib": {"lr": 0.5, "<b>": [1, None]}, "gamma": [0.9, 0.99]}
    storage.write_json("made-up/sweep.json", sweep)
    page = fragment(Gatherer(storage, "made-up").gather())
    for flag, value in (
        ("gamma", "0.9 0.99"), ("num-samples", "–"), ("share", "yes"), ("dashboard", "no"),  # noqa: RUF001
        ("baselines", "–"), ("rllib", "lr=0.5 &lt;b&gt;=[1, null]"),  # noqa: RUF001
    ):  # fmt: skip
        assert f'>--{flag}</th><td class="way">{value}</td>' in page
    assert '>torch</th><td class="way">2.15.0</td>' in page


def test_the_last_figures_stand_when_all_trials_have_ended(storage):
    write_made_up_sweep(storage, n_trials=4, n_failed=1)
    failed = Gatherer(storage, "made-up").gather()["trials"][0]["name"]
    page = LivePage(storage, "made-up", Told(), total=384)
    worker = {"pid": 71, "state": "busy", "stage": "a stage", "executed": 3, "seconds_spent": 2.0,
              "lost": 0}  # fmt: skip
    page.tick({"workers": [worker], "executed": 3}, {failed: {"curve": [[32, 0.1]]}}, done=128)
    html = fragment(Gatherer(storage, "made-up").gather())
    assert '<td class="n">3</td>' in html and "last seen at" in html
    idle = worker | {"state": "idle", "stage": "", "executed": 5}
    page.end({"workers": [idle], "executed": 5}, done=384, restarts={failed: 2})
    told = storage.read_json("made-up/progress.json")
    assert (told["done"], told["total"], told["executed"], told["trials"]) == (384, 384, 5, {})
    data = Gatherer(storage, "made-up").gather()
    assert data["health"]["failed"] == 1 and data["health"]["running"] == 0
    assert "last seen at" not in fragment(data)  # no worker is at a stage
    tell_last(storage, "made-up", {"workers": [idle | {"executed": 8}], "executed": 8})
    assert storage.read_json("made-up/progress.json")["done"] == 384
    assert '<td class="n">8</td>' in fragment(Gatherer(storage, "made-up").gather())


@pytest.mark.parametrize(
    ("factor", "method", "minus"),
    [(1e-4, ("9.18e-05", "4e-07"), "+1.36e-06"), (1e9, ("9.18e+08", "4e+06"), "+1.36e+07")],
)
def test_a_metric_of_any_size_can_be_read(factor, method, minus, storage, tmp_path):
    write_made_up_sweep(storage, n_trials=3)
    scale_metric(storage, factor)
    page = fragment(Gatherer(storage, "made-up").gather())
    mean, sd = (f'<td class="n">{figure}</td>' for figure in method)
    assert f'<th scope="row">policy</th>{mean}{sd}<td class="n">0.62</td>' in page
    assert f'<td class="n">{minus} <small>' in page
    start = f"{0.45 * factor:.4g}"
    assert f'<td class="n">{start}</td>' in page and f"val mse {start} to " in page
    assert not re.search(r">[+-]?\d{4,}\.\d", page)
    explanation = SearchResult.load(tmp_path / "runs" / "made-up").explain()._repr_html_()
    assert explanation.count(f"<td>{start}</td>") == 8


def test_one_that_diverged_does_not_hide_the_figures_of_others(storage):
    write_made_up_sweep(storage, n_trials=3)
    scale_metric(storage, 1e-4)
    name = Gatherer(storage, "made-up").gather()["trials"][0]["name"]
    record = storage.read_json(f"made-up/trials/{name}/trial.json")
    record["judged"] |= {"metric": 1234567.0, "utility": -1234567.0}
    storage.write_json(f"made-up/trials/{name}/trial.json", record)
    page = fragment(Gatherer(storage, "made-up").gather())
    assert ">1.235e+06</td>" in page and ">9.18e-05</td>" in page


def test_one_replica_seed_or_task_has_no_spread_on_the_page(storage):
    write_made_up_sweep(storage, n_trials=2)
    summary = storage.read_json("made-up/summary.json")
    for figures in summary["methods"].values():
        figures["metric_sd"] = None
    storage.write_json("made-up/summary.json", summary)
    storage.write_json("made-up/schedule.json", {"words": "refit"})
    file = f"made-up/trials/{Gatherer(storage, 'made-up').gather()['best']}/trial.json"
    left = {"gain": 0.0125, "standard_error": 0.0, "n_tasks": 1, "paid": True}
    storage.write_json(file, {**storage.read_json(file), "departures": left})
    page = fragment(Gatherer(storage, "made-up").gather())
    assert '<td class="n">0.918</td><td class="n">–</td>' in page  # noqa: RUF001
    assert "points of utility there (one task, its own cost weights)" in page


def test_the_page_states_the_utility_as_it_is_where_lower_is_better(storage):
    write_made_up_sweep(storage)
    page = fragment(Gatherer(storage, "made-up").gather())
    assert "utility = accuracy − 0.02 × cost" in page  # noqa: RUF001
    assert "policy − it: points of utility" in page and ">+1.4 <" in page  # noqa: RUF001
    sweep = storage.read_json("made-up/sweep.json")
    sweep["metric"] = {"name": "rmse", "higher_is_better": False}
    storage.write_json("made-up/sweep.json", sweep)
    page = fragment(Gatherer(storage, "made-up").gather())
    assert "utility = −rmse − 0.02 × cost" in page  # noqa: RUF001
    assert "policy − it: utility" in page and ">+0.014 <" in page  # noqa: RUF001
    assert "points" not in page


def test_swept_values_are_told_apart_on_the_page_and_in_notebooks(storage, tmp_path):
    write_made_up_sweep(storage, n_trials=2)
    sweep = storage.read_json("made-up/sweep.json")
    for trial, gamma in zip(sweep["trials"], (0.9995, 0.99993333), strict=True):
        trial["values"]["gamma"] = gamma
        write_trial(storage, "made-up", trial, 1)
    storage.write_json("made-up/sweep.json", sweep)
    page = fragment(Gatherer(storage, "made-up").gather())
    assert page.count(">0.9995</td>") == page.count(">0.999933</td>") == 2  # trials, effects
    assert '"gamma": 0.99993333' in page  # charts find it among the effect's values
    result = SearchResult.load(tmp_path / "runs" / "made-up")
    assert re.search(r"<td>0\.999(5|933)</td>", result._repr_html_())
    hovers = str(result.plot_front())
    assert "gamma 0.9995<br>" in hovers and "gamma 0.999933<br>" in hovers


@pytest.mark.parametrize(
    ("metric", "head"), [("accuracy", "Accuracy"), ("mAP@0.5", "mAP@0.5"), ("RMSE", "RMSE")]
)
def test_heads_spell_the_metric_as_it_is_spelled(metric, head, storage):
    write_made_up_sweep(storage)
    sweep = storage.read_json("made-up/sweep.json")
    sweep["metric"] = {"name": metric, "higher_is_better": True}
    storage.write_json("made-up/sweep.json", sweep)
    page = fragment(Gatherer(storage, "made-up").gather())
    assert f"<h2>{head} against cost</h2>" in page
    assert f'<a href="#front">{head} and cost</a>' in page


def test_a_page_that_cannot_be_written_is_told_once_and_harms_nothing(storage, monkeypatch):
    write_made_up_sweep(storage)
    told = Told()
    page = LivePage(storage, "made-up", told)
    monkeypatch.setattr(storage, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("full")))
    page.write()
    page.write()
    assert told.lines == ["the results page cannot be written: full"]


def test_curves_are_smoothed_and_thinned_to_the_last_point():
    assert smoothed([]) == []
    assert smoothed([1.0, 3.0]) == [[1, 1.0], [2, 3.0]]
    assert smoothed([1.234567e-7]) == [[1, 1.2346e-7]]
    curve = smoothed([float(i) for i in range(500)])
    assert len(curve) <= CURVE_POINTS
    assert curve[-1] == [500, 491.5]
    assert thinned([[1, 2]]) == [[1, 2]]


def test_effects_of_few_and_of_many_values():
    def trial(gamma, epsilon, utility):
        values = {"gamma": gamma, "epsilon": epsilon, "tuning_cost_weight": 0.0,
                  "switch_cost_weight": 0.0}  # fmt: skip
        return {"values": values, "utility": utility}

    found = effects([trial(0.9 + 0.1 * (i % 2), i / 10, i / 10) for i in range(8)])
    assert [e["setting"] for e in found] == ["gamma", "epsilon"]
    low, high = found[0]["values"]
    assert (low["n"], low["mean"], high["mean"]) == (4, pytest.approx(0.3), pytest.approx(0.4))
    assert found[1]["correlation"] == pytest.approx(1.0)


# -- explanation


def run_of(task, decisions, replica=0):
    """A run from (level, operation) pairs; what trains raises the metric by 0.1."""
    steps, metric = [], 0.5
    for level, operation in decisions:
        trains = operation.startswith("train")
        metric += 0.1 * trains
        steps.append({"level": level, "operation": operation, "next_level": level,
                      "levels": [level] if trains else [], "metric": metric,
                      "diverged": False})  # fmt: skip
    n = sum(bool(step["levels"]) for step in steps)
    return {"task": task, "replica": replica, "start_metric": 0.5, "val_metric": metric,
            "cost": 0.3 * n, "stages": n, "best_length": n, "steps": steps}  # fmt: skip


def explained(runs, drivers=()):
    operations = [{"name": name, "kind": kind} for name, kind in OPERATIONS]
    return explain(runs, [], levels=LEVELS, operations=operations, horizon=5, metric="accuracy",
                   drivers=drivers)  # fmt: skip


def test_words_group_tasks_by_the_way_they_go():
    inward = [("conv", "train_mid"), ("conv", "train_mid"), ("dense", "stop")]
    onward = [("conv", "skip"), ("dense", "train_high"), ("dense", "stop")]
    runs = [run_of("blur-0.55", inward), run_of("noise-0.3", inward), run_of("swap-0.9", onward)]
    text = str(explained(runs))
    assert "2 different ways on 3 tasks" in text
    assert (
        "blur, noise (2 tasks): conv train_mid x2, then stop; val accuracy 0.500 to 0.700" in text
    )
    assert "swap-0.9 (1 task): conv skip, dense train_high, then stop" in text
    assert "1.7 stages on average, of 5 at most; in all of its runs it stops by itself" in text


def test_words_tell_numbered_tasks_apart():
    inward = [("conv", "train_mid"), ("dense", "stop")]
    onward = [("dense", "train_high"), ("dense", "stop")]
    runs = [run_of(f"sensor-{i}", inward if i < 11 else onward) for i in range(8, 12)]
    text = str(explained(runs))
    assert "sensor-8, sensor-9, sensor-10 (3 tasks): conv train_mid" in text
    assert "sensor-11 (1 task): dense train_high" in text


def test_a_policy_that_looks_at_nothing_is_called_a_schedule():
    same = [("conv", "train_mid")] * 5
    text = str(explained([run_of("a", same), run_of("b", same)]))
    assert "the same on all 2 tasks: a schedule" in text
    assert "in none of its runs it stops by itself" in text


def test_a_policy_that_does_otherwise_with_some_seeds_is_not_called_a_schedule():
    usual, other = [("conv", "train_mid")], [("conv", "train_low"), ("conv", "train_high")]
    runs = [run_of(task, usual if seed else other, seed) for task in "ab" for seed in range(3)]
    text = str(explained(runs))
    assert "schedule" not in text
    assert "In 67% of its runs it does the same, whatever the task, but not in the others" in text
    runs += [run_of("c", usual * 2, seed) for seed in range(3)]
    text = str(explained(runs))
    assert "It goes 3 different ways on 3 tasks: what it does depends on them." in text


def test_the_map_and_paths_hold_what_was_done():
    first = [("conv", "train_mid"), ("dense", "train_high"), ("dense", "stop")]
    found = explained([run_of("a", first), run_of("a", first, 1), run_of("a", first[-1:], 2)])
    (path,) = found.paths
    assert (path["replicas"], path["alike"]) == (3, 2)
    assert [step["returned"] for step in path["steps"]] == [False, True, False]
    conv, dense = found.level_map["rows"]
    assert conv["cells"][0] == {"share": 2 / 3, "operation": "train_mid"}
    assert dense["cells"][1] == {"share": 2 / 3, "operation": "train_high"}
    assert found.level_map["ended"] == [0.0, 1 / 3, 1 / 3]
    html = found._repr_html_()
    assert "conv train_mid, dense train_high, then stop" in html


def test_stages_after_the_returned_model_are_told():
    run = run_of("a", [("conv", "train_mid")] * 4)
    assert "50% of its stages came after the model" in str(explained([{**run, "best_length": 2}]))


def test_shares_that_are_nearly_nothing_or_all_are_told_as_such():
    runs = [run_of(f"t{i}", [("conv", "train_mid")] * 4) for i in range(200)]
    text = str(explained([{**runs[0], "best_length": 3}, *runs[1:]]))
    assert "\nLess than 1% of its stages came after the model that it returns" in text
    assert "All its stages are train_mid at conv's turn." in text
    short = run_of("u", [("dense", "train_low"), ("dense", "stop")])
    text = str(explained([*runs, short]))
    assert "train_mid at conv's turn (more than 99% of all stages)" in text
    assert "in less than 1% of its runs it stops by itself" in text


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        ({"decisions": 0, "features": []}, "dense never acts."),
        ({"decisions": 1, "features": []}, "dense acted once only"),
        ({"decisions": 9, "features": []}, "No single feature would change dense's choice."),
        ({"decisions": 9, "features": None},
         "What dense's choice hangs on is not told: a table knows states as a whole"),
        ({"decisions": 0, "features": None}, "dense never acts."),
        ({"decisions": 9, "features": [{"name": "val loss", "changed": 0.25}]},
         "dense's choice hangs most on val loss (25%)."),
    ],
)  # fmt: skip
def test_drivers_in_words(driver, words):
    assert words in str(explained([], [{"level": "dense", **driver}]))


# -- the page


def test_the_page_says_that_what_tables_look_at_is_not_told(storage):
    write_made_up_sweep(storage, n_trials=1)
    note = "How often a level would choose otherwise"
    assert note in fragment(Gatherer(storage, "made-up").gather())
    file = f"made-up/trials/{Gatherer(storage, 'made-up').gather()['best']}/trial.json"
    drivers = [{"level": "conv", "decisions": 24, "features": None},
               {"level": "dense", "decisions": 0, "features": None}]  # fmt: skip
    storage.write_json(file, {**storage.read_json(file), "drivers": drivers})
    html = fragment(Gatherer(storage, "made-up").gather())
    assert "This is not told: a table knows states as a whole" in html and "It never acts." in html
    assert note not in html and "No single feature" not in html


def test_hostile_names_are_text_in_page_and_data(storage):
    level = "</script><img src=x onerror=alert(1)>"
    write_made_up_sweep(storage, n_trials=4, n_failed=1, suite=HOSTILE, levels=(level, "b"),
                        tasks=(HOSTILE, "{{ 7*7 }}"), error=HOSTILE)  # fmt: skip
    html = fragment(Gatherer(storage, "made-up").gather())
    assert "<script>alert" not in html
    assert "<img" not in html
    assert "{{ 7*7 }}" in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert html.count("<script") == html.count("</script>") == 1
    (data,) = re.findall(r'<script type="application/json" id="data">(.*)</script>', html)
    assert "<" not in data
    assert json.loads(data)["trials"]


def test_the_page_asks_the_network_for_nothing(storage):
    write_made_up_sweep(storage)
    html = whole(Gatherer(storage, "made-up").gather())
    own = html[: html.index("<script>")]
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", own)
    assert "default-src 'none'" in own
    assert "plotly.js v" in html


def test_five_hundred_trials_stay_small(storage):
    write_made_up_sweep(storage, n_trials=500, continuous=True)
    write_report(storage, "made-up")
    assert storage.size_bytes("made-up/report.html") < 8e6


# -- the command and the server


def test_the_command_writes_the_page(storage, tmp_path, capsys):
    write_made_up_sweep(storage)
    assert command.main([str(tmp_path / "runs" / "made-up")]) == 0
    assert f"{tmp_path}/runs/made-up/report.html" in capsys.readouterr().out
    assert (tmp_path / "runs" / "made-up" / "report.html").stat().st_size > 4e6


def test_a_file_of_a_sweep_stands_for_the_sweep(storage, tmp_path, monkeypatch):
    write_made_up_sweep(storage)
    write_report(storage, "made-up")
    folder = tmp_path / "runs" / "made-up"
    monkeypatch.chdir(folder)
    uri = f"file://{folder}/report.html"
    for path in (folder, folder / "report.html", "report.html", "sweep.json", uri):
        found, name = at(path)
        assert (found.local_path(), name) == (tmp_path / "runs", "made-up")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/"], "the folder must be a sweep's (with sweep.json), got '/'. See --list of launch."),
        (["other.txt"], "the folder must be a sweep's (with sweep.json), got 'other.txt'. It"),
        ([], "the sweep's folder must be given first, got none."),
        (["nowhere"], "the folder must be a sweep's (with sweep.json), got 'nowhere'."),
        (["."], "It holds the sweeps made-up."),
        (["made-up", "--port", "70000"], "port must lie in [0, 65535], got port=70000."),
        (["made-up", "--server"], "Did you mean '--serve'?"),
    ],
)
def test_bad_input_is_one_line(arguments, message, storage, tmp_path, monkeypatch, capsys):
    write_made_up_sweep(storage)
    storage.write_bytes("other.txt", b"")
    monkeypatch.chdir(tmp_path / "runs")
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_keys_of_a_folder_that_is_no_sweeps_are_not_shown(storage, monkeypatch, capsys):
    monkeypatch.setattr("rlhf_ray.report.gathering.parent_of", lambda path: (storage, "absent"))
    uri = "s3://AKID:SEC/RET@bucket/absent"
    for arguments in ([uri], [uri, "--serve"], ["--serve", uri]):  # the folder must come first
        assert command.main(arguments) == 2
        error = capsys.readouterr().err
        assert "s3://bucket/absent" in error
        assert "AKID" not in error and "RET" not in error


def test_the_report_needs_no_ray():
    code = (
        "import sys, rlhf_ray.report.live, rlhf_ray.report.serving, rlhf_ray.report.__main__\n"
        "assert 'ray' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def served(storage):
    write_made_up_sweep(storage, n_trials=3, n_done=1, state="running")
    server = server_of(Gatherer(storage, "made-up"), 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_the_server_gives_page_and_changes_on_this_machine_only(served, storage):
    with urllib.request.urlopen(f"{served}/") as answer:
        page = answer.read().decode()
    (have,) = re.findall(r'data-version="(\w+)"', page)
    with urllib.request.urlopen(f"{served}/content?have={have}") as answer:
        assert answer.status == 204
    planned = Gatherer(storage, "made-up").gather()["trials"][1]
    write_trial(storage, "made-up", {k: planned[k] for k in ("name", "values")}, 1)
    with urllib.request.urlopen(f"{served}/content?have={have}") as answer:
        assert "2 of 3 trials judged" in answer.read().decode()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{served}/sweep.json")
    foreign = urllib.request.Request(f"{served}/", headers={"Host": "example.com"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(foreign)
    port = int(served.rpartition(":")[2])
    with pytest.raises(InputError, match="port must be a free one"):
        server_of(Gatherer(storage, "made-up"), port)


@pytest.mark.parametrize(
    "part", ["GET / HTTP/1.1\r\n", "GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"]
)
def test_a_browser_that_leaves_while_a_page_loads_is_no_error(part, storage, monkeypatch):
    write_made_up_sweep(storage, n_trials=2)
    server = server_of(Gatherer(storage, "made-up"), 0)
    server.daemon_threads = False  # closing the server waits for the answers
    errors = []
    monkeypatch.setattr(server, "handle_error", lambda *_: errors.append(sys.exception()))
    with server, socket.create_connection(("127.0.0.1", server.server_port)) as browser:
        browser.sendall(part.encode())
        server.handle_request()
        if part.endswith("\r\n\r\n"):
            browser.recv(1000)  # the answer, of megabytes, has begun
        reset = struct.pack("ii", 1, 0)
        browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
    assert errors == []


# -- notebooks


def test_a_result_shows_itself_in_a_notebook(storage, tmp_path):
    write_made_up_sweep(storage, n_trials=4, n_failed=1, tasks=(HOSTILE, "b"))
    result = SearchResult.load(tmp_path / "runs" / "made-up")
    assert "On the test tasks the policy reaches accuracy 0.918" in result._repr_html_()
    figure = result.plot_front()
    assert {trace.name for trace in figure.data} == {"trials", "front", "baselines"}
    assert "<script" not in result.explain()._repr_html_()
    assert result.explain(result.best_trial).words == result.explain().words
    with pytest.raises(InputError, match="must have been judged"):
        result.explain(result.failures[0]["name"])
    with pytest.raises(InputError, match="trial must be one that exists"):
        result.explain("nobody")


def test_made_up_runs_have_the_fields_of_real_ones():
    from rlhf_ray.evaluation.judging import Run

    Run.from_json(made_up_run(random.Random(0), "policy", "t", 0, LEVELS, 0.0))


def test_page_says_how_many_episodes_of_others_each_trial_learned_from(storage):
    write_made_up_sweep(storage, n_trials=2)
    assert "others' episodes" not in whole(Gatherer(storage, "made-up").gather())
    for name, episodes in zip(storage.folders("made-up/trials"), (0, 112), strict=True):
        file = f"made-up/trials/{name}/trial.json"
        record = storage.read_json(file)
        storage.write_json(file, record | {"experience": {"trials": 1, "episodes": episodes}})
    shown = whole(Gatherer(storage, "made-up").gather())
    assert "others' episodes" in shown
    assert '<td class="n" data-v="0">0</td>' in shown
    assert '<td class="n" data-v="112">112</td>' in shown
