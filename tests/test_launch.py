import dataclasses
import json
import os
import shlex
import subprocess
import sys
import types
from dataclasses import dataclass, field
from typing import Any

import pytest
from sweep_files import small_suite, write_sweep

from rlhf_ray import launch
from rlhf_ray.commands.command_line import TIME_IS_UP
from rlhf_ray.config import SearchConfig
from rlhf_ray.errors import InputError, StorageError
from rlhf_ray.storage import Storage, open_storage
from rlhf_ray.sweep.results import SearchResult, list_sweeps


@dataclass
class FakeSweep:
    """Stands in for `rlhf_ray.sweep.search`; the suite is a small one."""

    storage: Any
    state: str = "new"
    complete: bool = True
    seconds: float | None = 75.0
    written: dict[str, Any] = field(default_factory=dict)
    raises: BaseException | None = None
    called: dict[str, Any] = field(default_factory=dict)
    n_searches: int = 0

    def plan(self, suite, config, *, fresh, timed=False):
        return types.SimpleNamespace(
            name="small-1",
            directory=f"{self.storage}/small-1",
            complete=self.state == "finished" and not fresh and self.complete,
            state=self.state,
            n_done=1,
            trials=[{"gamma": 0.9}, {"gamma": 0.99}],
            n_stages_estimate=(3840, 400),
            seconds_estimate=self.seconds if timed else None,
            remarks=["without align: align needs source data"],
        )

    def search(self, suite, config, *, fresh, max_minutes, progress):
        print("a library's chatter")
        self.n_searches += 1
        self.called = {"config": config, "fresh": fresh, "max_minutes": max_minutes}
        progress.phase("sweep", total=2)
        progress.update(1, logical=10)
        if self.raises is not None:
            raise self.raises
        write_sweep(self.storage, **self.written)
        return SearchResult(open_storage(self.storage), "small-1")


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    fake = FakeSweep(tmp_path / "runs")
    module = types.SimpleNamespace(plan=fake.plan, search=fake.search)
    monkeypatch.setitem(sys.modules, "rlhf_ray.sweep.search", module)
    monkeypatch.setattr("rlhf_ray.suites.load_suite", lambda name, **_: small_suite())
    return fake


def run_main(sweep, *arguments):
    return launch.main(["--storage-path", str(sweep.storage), *arguments])


def run_module(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "rlhf_ray.launch", *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


# -- flags


def test_every_setting_is_a_flag_of_one_group_and_documented():
    groups = launch._flag_groups()
    names = [flag.name for group in groups.values() for flag in group]
    schemas = (launch.SuiteOptions, SearchConfig, launch.LaunchOptions)
    fields = [f.name for schema in schemas for f in dataclasses.fields(schema)]
    assert sorted(names) == sorted(fields)
    assert all(flag.doc for group in groups.values() for flag in group)


def test_help_fits_80_columns_and_answers_without_torch(tmp_path):
    done = run_module("--help", cwd=tmp_path, FORCE_COLOR="1")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in done.stdout
    words = " ".join(done.stdout.split())
    assert "--gamma X [X ...] discount per stage, in [0, 1];" in words
    assert "(default: 0.9 0.99)" in words
    code = "import sys, rlhf_ray.launch as l\ntry: l.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_version_names_the_packages(tmp_path):
    done = run_module("--version", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith("rlhf_ray ")
    assert "ray 2." in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gama 0.5", "got flag='--gama'. Did you mean '--gamma'?"),
        ("--no-shar", "Did you mean '--no-share'?"),
        ("--no-fresh", "flag must be one that exists"),
        ("--gamma high", "--gamma must be X [X ...] (discount per stage"),
        ("--gamma", "--gamma must have at least one value, got none."),
        ("--gamma 0.5 1.5", "gamma must be in [0, 1], got gamma=1.5."),
        ("--tuning-cost-weight -1", "got tuning_cost_weight=-1.0."),
        ("--start firs", "Did you mean 'first'?"),
        ("--algorithm dqm", "Did you mean 'dqn'?"),
        ("--num-workers many", "--num-workers must be N|auto (actors that"),
        ("--episodes 0", "episodes must be at least 1, got episodes=0."),
        ("--horizon 0", "horizon must be at least 1, got horizon=0."),
        ("--seed", "--seed must be N (of the sweep"),
        ("digits", "every value must follow a flag that takes it, got 'digits'"),
        ("--max-minutes 0", "max_minutes must be > 0"),
        ("--rllib lr", "--rllib must be KEY=VALUE pairs, got 'lr'."),
        ("--name ../elsewhere", "name must be that of one folder"),
        ("--name tree", "name must be that of one folder"),
        ("--suite-seed -1", "suite_seed must be at least 0, got suite_seed=-1."),
        ("--n-train-tasks 0", "n_train_tasks must be at least 1, got n_train_tasks=0."),
        ("--n-val-tasks 2.5", "--n-val-tasks must be N (tasks that"),
        ("--fold 3", "fold must be 0, 1 or 2, got fold=3."),
        ("--suite a:b --suite-seed 1 --fold 2", "got --suite-seed --fold with --suite a:b, which"),
        ("--suite mnist-seed --n-test-tasks 3", "got --n-test-tasks with --suite mnist-seed"),
        ("--learning-rates 0.01 0.001 0.1", "learning_rates must ascend (low, middle, high), got"),
        ("--no-share --replay-only", "share must be on where the tree is prefilled or only"),
        ("--no-share --prefill 2", "got share=False, prefill=2, replay_only=False"),
        ("--list --fresh --gamma=0.5", "--json, --quiet, got --fresh --gamma. Leave --list out"),
        ("--suite digitz", "got suite='digitz'. Did you mean 'digits'?"),
        ("--suite nowhere:suite", "no module 'nowhere'"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(arguments, message, tmp_path, capsys):
    storage = tmp_path / "a" / "runs"
    status = launch.main(["--storage-path", str(storage), *arguments.split()])
    error = capsys.readouterr().err
    assert status == 2
    assert error.count("\n") == 1
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mode", ["", " --dry-run"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--baselines level:any fixxed", "got baseline='fixxed'. Did you mean 'fixed'?"),
        ("--algorithm q-learning", "got observation=all. Add --observation tabular."),
        ("--suite digits-4 --algorithm q-learning", "got observation=all."),
        ("--suite mnist-seed --controller single", "controller must be levels for q-learning"),
        ("--precision bf16 --device cpu", "precision 'bf16' needs a CUDA device"),
        ("--device cuda", "device must be there, got device='cuda'. Use 'auto' or 'cpu'."),
    ],
)
def test_what_needs_no_suite_is_refused_before_it_is_loaded(
    arguments, message, mode, tmp_path, monkeypatch, capsys
):
    loaded = []
    monkeypatch.setattr("rlhf_ray.suites.load_suite", lambda name, **_: loaded.append(name))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    storage = str(tmp_path / "runs")
    status = launch.main(["--storage-path", storage, *(arguments + mode).split()])
    error = capsys.readouterr().err
    assert (status, loaded) == (2, [])
    assert error.count("\n") == 1
    assert message in error
    assert not list(tmp_path.iterdir())


def test_an_own_suite_may_want_another_observation(sweep, monkeypatch):
    suite = dataclasses.replace(small_suite(), defaults={"observation": ("tabular",)})
    monkeypatch.setattr("rlhf_ray.suites.load_suite", lambda name, **_: suite)
    assert run_main(sweep, "--suite", "small:made", "--algorithm", "q-learning") == 0
    assert sweep.called["config"].observation == ("tabular",)


def test_ray_keeps_to_itself_what_it_mends_by_itself(tmp_path):
    code = (
        "import rlhf_ray.launch as launch\n"
        "launch.main(['--quiet', '--suite', 'nowhere:suite'])\n"
        "from ray._private.worker import print_to_stdstream\n"
        "for line in ('A worker died or was killed while executing', 'the disk is full'):\n"
        "    data = {'lines': [line], 'pid': 'raylet', 'is_err': False}\n"
        "    print_to_stdstream(data, ignore_prefix=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert "the disk is full" in done.stdout
    assert "A worker died" not in done.stdout


def test_a_bad_flag_in_a_process_of_its_own(tmp_path):
    done = run_module("--gama", "0.5", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: flag must be one that exists")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_storage_path_that_cannot_be_written_is_refused_first(tmp_path, sweep, capsys):
    (tmp_path / "file").write_text("")
    status = launch.main(["--storage-path", str(tmp_path / "file" / "runs")])
    captured = capsys.readouterr()
    assert (status, sweep.n_searches, captured.out) == (2, 0, "")
    assert captured.err.count("\n") == 1


def test_flags_reach_the_search(sweep):
    arguments = (
        "--gamma 0.5 --epsilon 0.1 0.3 --replay-only --num-workers 3 --prefill 2 "
        "--baselines lp_ft level:head --budget=2.5 --name mine --fresh --max-minutes 4 "
        "--concurrent_trials auto --rllib grad_clip=0.5 td_error_loss_fn=mse"
    )
    assert run_main(sweep, *arguments.split()) == 0
    assert sweep.called["fresh"]
    assert sweep.called["max_minutes"] == 4
    assert sweep.called["config"] == SearchConfig(
        storage_path=str(sweep.storage),
        gamma=(0.5,),
        epsilon=(0.1, 0.3),
        replay_only=True,
        num_workers=3,
        prefill=2,
        baselines=("lp_ft", "level:head"),
        budget=2.5,
        name="mine",
        rllib={"grad_clip": 0.5, "td_error_loss_fn": "mse"},
    )


def test_a_suites_own_defaults_are_taken(sweep, monkeypatch):
    suite = dataclasses.replace(small_suite(), defaults={"horizon": 3})
    monkeypatch.setattr("rlhf_ray.suites.load_suite", lambda name, **_: suite)
    assert run_main(sweep) == 0
    assert sweep.called["config"].horizon == 3


# -- what is shown


def test_a_run_shows_header_tables_comparison_and_commands(sweep, capsys):
    assert run_main(sweep, "--suite", "mnist", "--n-test-tasks", "3") == 0
    captured = capsys.readouterr()
    out, lines = captured.out, captured.out.splitlines()
    directory = str(sweep.storage / "small-1")
    assert captured.err == ""
    assert lines[0].startswith("rlhf_ray 0.")
    assert "suite    small: levels low, head; tasks 2 train, 1 val, 1 test" in lines
    assert "sweep    2 trials of 64 episodes with dqn; at most 5 stages each; 3 replica" in out
    assert f"results  {directory}" in lines
    assert "sweep: 1/2 in 0 s; logical 10" in lines
    for title in ("Trials, judged", "Front of accuracy", "Methods on the test tasks"):
        assert title in out
    assert "1.2 points below full_best at 10% of its cost" in " ".join(out.split())
    assert "3,840 asked for, 412 distinct; 31 s spent on them, 3 min 30 s saved" in out
    commands = [shlex.split(c) for c in out.replace("\\\n", " ").splitlines() if c[:2] == "  "]
    assert ["tensorboard", "--logdir", directory] in commands
    assert [f"{directory}/report.html"] in commands
    assert ["python", "-m", "rlhf_ray.report", directory, "--serve"] in commands
    assert [
        "python", "-m", "rlhf_ray.apply", "--policy", f"{directory}/best_policy",
        "--suite", "mnist", "--n-test-tasks", "3", "--task", "test-0",
        "--output", "tuned.safetensors", "--storage-path", str(sweep.storage),
    ] in commands  # fmt: skip
    free = [line for line in lines if directory not in line]
    assert max(map(len, free)) <= 80


def test_json_on_stdout_is_exactly_the_summary_file(sweep, capsys):
    assert run_main(sweep, "--json") == 0
    captured = capsys.readouterr()
    assert captured.out == (sweep.storage / "small-1" / "summary.json").read_text()
    assert "a library's chatter" in captured.err
    assert "Trials, judged" in captured.err


def test_quiet_shows_the_comparison_only(sweep, capsys):
    assert run_main(sweep, "--quiet") == 0
    out = capsys.readouterr().out.replace("a library's chatter\n", "")
    assert out.startswith("On the test tasks the policy reaches")
    assert out.rstrip().endswith("of its cost.")


def test_failed_trials_give_status_3_and_the_tables(sweep, capsys):
    sweep.written = {"failed": (1,), "error": "a [bold]worker\n died"}
    assert run_main(sweep) == 3
    out = capsys.readouterr().out
    assert "trial 001-abcdef failed: a [bold]worker died" in out
    assert "Methods on the test tasks" in out


def test_a_sweep_without_a_policy_says_so(sweep, capsys):
    sweep.written = {"failed": (0, 1, 2), "state": "failed", "methods": {}}
    assert run_main(sweep) == 3
    out = capsys.readouterr().out
    assert "No trial ended well: there is no policy." in out
    assert f"{sweep.storage}/small-1/report.html" in out


def test_the_page_is_told_how_the_suite_was_given(sweep):
    assert run_main(sweep, "--suite", "mnist", "--n-test-tasks", "3") == 0
    told = json.loads((sweep.storage / "small-1" / "suite_flags.json").read_text())
    assert told == {"flags": ["--suite", "mnist", "--n-test-tasks", "3"]}


def test_a_page_that_could_not_be_written_is_not_announced(sweep, monkeypatch, capsys):
    write = Storage.write_bytes

    def full(storage, name, data):
        if name.endswith(("report.html", "suite_flags.json")):
            raise StorageError(f"{name!r} must be written, got: No space left on device.")
        write(storage, name, data)

    monkeypatch.setattr(Storage, "write_bytes", full)
    assert run_main(sweep) == 0
    out = capsys.readouterr().out
    assert "the results page cannot be written: " in out
    assert "Results page, to open in a browser" not in out
    _, _, after = out.replace("\\\n", "").partition("could not be written. This writes it, once ")
    command = shlex.split(after.splitlines()[1])
    assert command == ["python", "-m", "rlhf_ray.report", f"{sweep.storage}/small-1"]


def test_a_finished_sweep_is_said_to_be_shown_again(sweep, capsys):
    sweep.state = "finished"
    assert run_main(sweep) == 0
    assert "This sweep is finished: shown again" in capsys.readouterr().out
    assert run_main(sweep, "--fresh") == 0
    assert "shown again" not in capsys.readouterr().out
    sweep.complete = False
    assert run_main(sweep) == 0
    out = capsys.readouterr().out
    assert "only baselines that it lacks are run" in out and "shown again" not in out


def test_an_interrupt_gives_status_130_and_the_command_that_goes_on(sweep, capsys):
    sweep.raises = KeyboardInterrupt()
    assert run_main(sweep, "--fresh", "--name", "a b") == 130
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    command = error.partition("goes on with it: ")[2]
    assert shlex.split(command)[3:] == ["--storage-path", str(sweep.storage), "--name", "a b"]


def test_what_a_search_refuses_is_one_line(sweep, capsys):
    sweep.raises = InputError("a\nbaseline must exist, got 'x'.")
    assert run_main(sweep) == 2
    assert capsys.readouterr().err == "error: a baseline must exist, got 'x'.\n"


def test_time_is_up(sweep, capsys):
    sweep.written = {"state": "interrupted", "waiting": (2,)}
    assert run_main(sweep, "--max-minutes", "1") == TIME_IS_UP
    out = capsys.readouterr().out
    assert "The time is up: 1 of 3 trials are still to do." in out
    assert f"python -m rlhf_ray.launch --storage-path {sweep.storage} --max-minutes 1" in out


def test_one_of_a_kind_is_not_in_the_plural(sweep, capsys):
    flags = ["--episodes", "1", "--horizon", "1", "--judge-replicas", "1"]
    assert run_main(sweep, *flags) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "2 trials of 1 episode with dqn; at most 1 stage each; 1 replica seed " in out


# -- keys of the storage's URI


URI = "s3://AKID:SEC/RET@bucket/runs?region=eu&session_token=SECRET"
SHOWN = "s3://bucket/runs?region=eu"


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--storage-path", URI, "--fresh"], ["--storage-path", SHOWN]),
        ([f"--storage-path={URI}"], [f"--storage-path={SHOWN}"]),
        (["--rllib", f"where={URI}", "lr=1"], ["--rllib", f"where={SHOWN}", "lr=1"]),
    ],
)
def test_the_command_that_goes_on_holds_no_keys(words, shown):
    assert shlex.split(launch._again(words)) == ["python", "-m", "rlhf_ray.launch", *shown]


@pytest.mark.parametrize("found", [[], ["one"]])
def test_list_shows_no_keys(found, tmp_path, monkeypatch, capsys):
    for name in found:
        write_sweep(tmp_path, name=name)
    there = list_sweeps(str(tmp_path))
    monkeypatch.setattr("rlhf_ray.sweep.results.list_sweeps", lambda location: there)
    assert launch.main(["--list", "--storage-path", URI]) == 0
    out = capsys.readouterr().out
    assert f"under {SHOWN}" in out
    assert "AKID" not in out and "RET" not in out


def test_next_steps_show_no_keys(tmp_path, capsys):
    write_sweep(tmp_path)
    result = SearchResult(open_storage(tmp_path), "small-1")
    config = SearchConfig(storage_path=URI)
    launch._show_next_steps(launch.Terminal(sys.stdout), result, launch.SuiteOptions(), config)
    out = capsys.readouterr().out
    assert f"--storage-path '{SHOWN}'" in " ".join(out.replace("\\\n", "").split())
    assert "AKID" not in out and "RET" not in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([URI], f"must follow a flag that takes it, got {SHOWN} (see --help)."),
        (
            ["--fresh", URI.replace("bucket", "b" * 80)],
            "must follow a flag that takes it, got --fr",
        ),
        (["--storage-path", URI, "stray"], f"got --storage-path {SHOWN} stray (see --help)."),
        (["--horizon", URI], f"got --horizon={SHOWN}."),
        ([f"--horizon={URI}"], f"got --horizon={SHOWN}."),
    ],
)
def test_what_is_said_of_a_misplaced_uri_shows_no_keys(words, message, capsys):
    assert launch.main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "AKID" not in error and "RET" not in error


# -- list, dry run


def test_list_shows_the_sweeps(tmp_path, capsys):
    write_sweep(tmp_path, name="one")
    write_sweep(tmp_path, name="two", state="running", failed=(0, 1, 2))
    assert launch.main(["--list", "--storage-path", str(tmp_path)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["one", "small", "finished", "3/3", "0.884"] in rows
    assert ["two", "small", "running", "0/3", "-"] in rows
    assert launch.main(["--list", "--json", "--storage-path", str(tmp_path)]) == 0
    assert [s["name"] for s in json.loads(capsys.readouterr().out)] == ["one", "two"]


def test_list_of_nothing_writes_nothing(tmp_path, capsys):
    assert launch.main(["--list", "--storage-path", str(tmp_path / "none")]) == 0
    assert "There are no sweeps" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_dry_run_shows_the_plan_and_writes_nothing(tmp_path, sweep, capsys):
    assert run_main(sweep, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(": loading torch, Ray and the suite")
    out = " ".join(lines)
    assert "At most 3,840 stages to learn, about 400 of them distinct; about 1 min 15 s" in out
    assert "  gamma 0.99" in out
    assert "without align: align needs source data" in lines
    assert (sweep.n_searches, list(tmp_path.iterdir())) == (0, [])
    assert run_main(sweep, "--dry-run", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["stages_at_most"], told["stages_distinct"]) == (3840, 400)


@pytest.mark.parametrize(
    ("state", "flags", "expected"),
    [
        ("finished", "", "(finished; 1 of 2 trials are done): it would be shown again, not run."),
        ("finished", "--fresh", "it would be started over. In all at most 3,840 stages"),
        ("interrupted", "", "(interrupted; 1 of 2 trials are done): it would go on from there."),
        ("new", "--replay-only", "stages to learn, all of them from the tree: nothing new is"),
        ("new", "--no-share", "each carried out, as nothing is shared; about 1 min 15 s for"),
    ],
)
def test_dry_run_says_what_is_there_and_what_is_carried_out(state, flags, expected, sweep, capsys):
    sweep.state = state
    assert run_main(sweep, "--dry-run", *flags.split()) == 0
    assert expected in " ".join(capsys.readouterr().out.split())


def test_a_flag_that_is_given_stands_whatever_the_suite_wants(sweep, monkeypatch, capsys):
    own = {"algorithm": "q-learning", "observation": ("tabular",), "horizon": 3}
    suite = dataclasses.replace(small_suite(), defaults=own)
    monkeypatch.setattr("rlhf_ray.suites.load_suite", lambda name, **_: suite)
    assert run_main(sweep, "--algorithm", "dqn", "--horizon=5") == 0
    config = sweep.called["config"]
    assert (config.algorithm, config.observation, config.horizon) == ("dqn", ("tabular",), 5)
    assert "defaults of the suite: observation tabular" in capsys.readouterr().out
    assert dict(suite.defaults) == own


def test_json_of_a_sweep_that_the_time_cut_off_tells_where_it_is(sweep, capsys):
    sweep.written = {"state": "interrupted", "waiting": (2,)}
    assert run_main(sweep, "--max-minutes", "1", "--json") == TIME_IS_UP
    told = json.loads(capsys.readouterr().out)
    assert (told["state"], told["trials_done"], told["trials"]) == ("interrupted", 2, 3)
