"""`python -m rlhf_ray.launch`: runs a sweep, shows what came out, says how to go on.

The flags are the fields of `SearchConfig`, `SuiteOptions` and `LaunchOptions`; what they mean
stands there. torch and Ray are imported late: `--help` and typing errors answer at once.
"""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.commands import command_line
from rlhf_ray.commands.command_line import OK, TIME_IS_UP, TRIALS_FAILED, Flag, SuiteOptions
from rlhf_ray.commands.terminal import Terminal, counted, duration, number
from rlhf_ray.config import SearchConfig, check_observation, with_defaults
from rlhf_ray.errors import InputError, StorageError
from rlhf_ray.uris import shown_word, without_options, without_secrets

if TYPE_CHECKING:
    from rlhf_ray.sweep.results import SearchResult
    from rlhf_ray.sweep.search import SearchPlan
    from rlhf_ray.tasks import Suite

PROG = "python -m rlhf_ray.launch"

DESCRIPTION = (
    "Learns how to fine-tune: sweeps reinforcement-learning policies that decide which level of a "
    "pretrained model to tune, how, and when to stop. The same command resumes an unfinished sweep "
    "and shows a finished one. Swept flags take one or more values. Exit status: 0; 2 bad input; "
    "3 some trials failed; 4 the time was up before the end; 1 all else; 130 interrupted, 143 "
    "terminated."
)

GROUPS: dict[str, tuple[str, ...]] = {
    "suite": tuple(f.name for f in dataclasses.fields(SuiteOptions)),
    "sweep": (
        "gamma", "epsilon", "tuning_cost_weight", "switch_cost_weight", "num_samples",
        "algorithm", "controller", "alpha", "episodes", "warm_up", "decay_fraction", "explore_by",
        "persistence", "schedule", "adherence", "counterfactuals", "relearn", "share_experience",
        "seed", "replicas", "rllib",
    ),
    "episode": (
        "horizon", "budget", "performance", "cost", "start", "observation", "only_operations",
        "steps", "batch_size", "optimizer", "learning_rates", "keep_optimizer_state",
    ),
    "judging": (
        "utility_cost", "utility_switch", "baselines", "search_stages", "val_size",
        "judge_replicas",
    ),
    "storage": ("storage_path", "name", "fresh", "share", "prefill", "replay_only", "weights_gb"),
    "cluster": (
        "address", "dashboard", "num_workers", "cpus_per_worker", "gpus_per_worker",
        "concurrent_trials", "stages_in_flight", "env_runners", "device", "precision",
        "cuda_graphs", "cache_gb",
    ),
    "output": ("mlflow", "wandb", "max_minutes", "list", "dry_run", "json", "quiet", "version"),
}  # fmt: skip
"""Headings of `--help`; a field that is in none stands under "other"."""


MENDED = "A worker died or was killed while|retries remaining, so the task will be retried"
"""What Ray prints of lost processes that it replaces by itself, `log_to_driver` or not."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What this command does, besides what is searched.

    Attributes:
        fresh: start the sweep over; the tree of stages is kept.
        max_minutes: stop cleanly after this many minutes, > 0; the same command resumes. Once all
            trials are done, summing up is carried to its end.
        list: show the sweeps under the storage path, and do nothing else.
        dry_run: show what would run, with estimated stages and time; write nothing.
        json: print exactly summary.json on stdout, or where there is none yet what --list tells of
            the sweep; everything else on stderr.
        quiet: show errors and the result in one line.
        version: show the versions of this package, torch and Ray.
    """

    fresh: bool = False
    max_minutes: float | None = None
    list: bool = False
    dry_run: bool = False
    json: bool = False
    quiet: bool = False
    version: bool = False

    def __post_init__(self) -> None:
        if self.max_minutes is not None and not self.max_minutes > 0:
            raise InputError(
                f"max_minutes must be > 0, got max_minutes={self.max_minutes}. "
                "Leave it out for no bound."
            )


def main(
    argv: Sequence[str] | None = None, *, on_sweep: Callable[[str], object] | None = None
) -> int:
    """Runs the command; returns its exit status.

    Args:
        argv: the arguments; None: those of the process.
        on_sweep: told the sweep's name before it runs.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    stopped = f"interrupted. What is done is kept; this goes on with it: {_again(arguments)}"
    return command_line.run(lambda: _launch(arguments, on_sweep), on_interrupt=stopped)


def read_flags(arguments: Sequence[str]) -> tuple[LaunchOptions, SuiteOptions, SearchConfig]:
    """What the arguments ask for.

    Raises:
        InputError: they cannot be worked with.
    """
    values = command_line.parse(
        arguments, prog=PROG, description=DESCRIPTION, groups=_flag_groups()
    )
    values["rllib"] = _as_mapping(values["rllib"])
    return (
        command_line.pick(LaunchOptions, values),
        command_line.pick(SuiteOptions, values),
        command_line.pick(SearchConfig, values),
    )


def _launch(arguments: list[str], on_sweep: Callable[[str], object] | None) -> int:
    options, suite_options, config = read_flags(arguments)
    given = command_line.fields_in(arguments)
    if options.version:
        print(_versions())
        return OK
    if options.list:
        _check_list(arguments)
    stdout = sys.stdout
    with contextlib.ExitStack() as stack:
        if options.json:  # what suites or libraries print must not come between
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        terminal = stack.enter_context(Terminal(sys.stdout, quiet=options.quiet))
        if options.list:
            answer, status = _list(config, terminal), OK
        elif options.dry_run:
            answer, status = _dry_run(options, suite_options, config, given, terminal), OK
        else:
            again = _again(arguments)
            answer, status = _search(
                options, suite_options, config, given, terminal, again, on_sweep
            )
    if options.json:
        stdout.write(json.dumps(answer, indent=1) + "\n")
    return status


# -- what the command can do -----------------------------------------------------------------------


def _list(config: SearchConfig, terminal: Terminal) -> list[dict[str, Any]]:
    from rlhf_ray.commands.tables import sweeps_table
    from rlhf_ray.sweep.results import list_sweeps

    sweeps = list_sweeps(config.storage_path)
    where = without_secrets(config.storage_path)
    if sweeps:
        terminal.show(sweeps_table(sweeps))
        terminal.show_lines(f"under {where}")
    else:
        terminal.message(f"There are no sweeps under {where}.")
    return sweeps


def _dry_run(
    options: LaunchOptions,
    suite_options: SuiteOptions,
    config: SearchConfig,
    given: set[str],
    terminal: Terminal,
) -> dict[str, Any]:
    _say_loading(terminal)
    _check_before_loading(suite_options, config, given)
    with _scratch_copy(config.storage_path) as scratch:
        suite = suite_options.load(scratch, terminal.message).without_defaults(given)
    from rlhf_ray.sweep.search import plan

    config = with_defaults(config, suite.defaults)
    terminal.message("timing each operation")
    planned = plan(suite, config, fresh=options.fresh, timed=True)
    _show_header(terminal, suite, config, planned)
    for line in planned.remarks:
        terminal.message(line)
    terminal.message(_prospect(planned, config, fresh=options.fresh))
    for trial in planned.trials:
        terminal.message("  " + ", ".join(f"{name} {value:.4g}" for name, value in trial.items()))
    terminal.message("Nothing was run and nothing written.")
    highest, carried_out = planned.n_stages_estimate
    return {
        "directory": str(planned.directory),
        "state": planned.state,
        "trials": planned.trials,
        "trials_done": planned.n_done,
        "stages_at_most": highest,
        "stages_distinct": carried_out,
        "seconds": planned.seconds_estimate,
    }


def _search(
    options: LaunchOptions,
    suite_options: SuiteOptions,
    config: SearchConfig,
    given: set[str],
    terminal: Terminal,
    again: str,
    on_sweep: Callable[[str], object] | None,
) -> tuple[dict[str, Any], int]:
    from rlhf_ray.trackers import check_extras

    check_extras(config)
    _check_storage(config.storage_path)
    _say_loading(terminal)
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", MENDED)  # read when Ray is imported
    _check_before_loading(suite_options, config, given)
    suite = suite_options.load(_pretrained_at(config.storage_path), terminal.message)
    suite = suite.without_defaults(given)
    from rlhf_ray.sweep.results import listed
    from rlhf_ray.sweep.search import plan, search

    config = with_defaults(config, suite.defaults)
    planned = plan(suite, config, fresh=options.fresh)
    _show_header(terminal, suite, config, planned)
    if on_sweep is not None:
        on_sweep(planned.name)
    if planned.complete:
        terminal.message("This sweep is finished: shown again, not run (--fresh starts it over).")
    elif planned.state == "finished" and not options.fresh:
        terminal.message("This sweep is finished: only baselines that it lacks are run.")
    result = search(
        suite, config, fresh=options.fresh, max_minutes=options.max_minutes, progress=terminal
    )
    terminal.end_phase()
    written = _complete_page(result, suite_options, config, terminal)
    _show_result(terminal, result, suite_options, config, page_written=written)
    waiting = sum(trial["status"] == "waiting" for trial in result.trials)
    if waiting:
        terminal.say(f"The time is up: {waiting} of {len(result.trials)} trials are still to do.")
        terminal.show_lines("This goes on with the rest:", f"  {again}")
    answer = result.summary or listed(result)
    return answer, TIME_IS_UP if waiting else TRIALS_FAILED if result.failures else OK


# -- what the command shows ------------------------------------------------------------------------


def _say_loading(terminal: Terminal) -> None:
    terminal.message(f"rlhf_ray {version('rlhf_ray')}: loading torch, Ray and the suite")


def _show_header(
    terminal: Terminal, suite: "Suite", config: SearchConfig, planned: "SearchPlan"
) -> None:
    levels = ", ".join(suite.levels)
    tasks = ", ".join(
        f"{len(getattr(suite, f'{role}_tasks'))} {role}" for role in ("train", "val", "test")
    )
    terminal.message(f"suite    {suite.name}: levels {levels}; tasks {tasks}")
    terminal.message(
        f"sweep    {counted(len(planned.trials), 'trial')} of "
        f"{counted(config.episodes, 'episode')} with {config.algorithm}; "
        f"at most {counted(config.horizon, 'stage')} each; "
        f"{counted(config.judge_replicas, 'replica seed')}"
    )
    if suite.defaults:
        own = (f"{name} {_words(getattr(config, name))}" for name in suite.defaults)
        terminal.message(f"defaults of the suite: {', '.join(own)}")
    terminal.show_lines(f"results  {planned.directory}")


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _prospect(planned: "SearchPlan", config: SearchConfig, *, fresh: bool) -> str:
    """What would be run, and for how long."""
    highest, carried_out = map(number, planned.n_stages_estimate)
    there, estimate = "", f"At most {highest} stages to learn, "
    if planned.state != "new":
        there = f"{planned.n_done} of {len(planned.trials)} trials are done"
        there = f"A sweep of this name is there ({planned.state}; {there}): it would "
        if planned.complete:
            return f"{there}be shown again, not run."
        if not fresh and planned.state == "finished":
            return f"{there}be shown again; only baselines that it lacks would be run."
        there += "be started over. " if fresh else "go on from there. "
        estimate = f"In all at most {highest} stages to learn, "
    if config.replay_only:
        return f"{there}{estimate}all of them from the tree: nothing new is carried out."
    needed_s = planned.seconds_estimate
    time = "time not measured" if needed_s is None else f"about {duration(needed_s)} for them"
    if not config.share:
        return f"{there}{estimate}each carried out, as nothing is shared; {time}."
    return (
        f"{there}{estimate}about {carried_out} of them distinct; {time}. "
        "What the tree holds already is not carried out again."
    )


def _show_result(
    terminal: Terminal,
    result: "SearchResult",
    options: SuiteOptions,
    config: SearchConfig,
    *,
    page_written: bool,
) -> None:
    from rlhf_ray.commands.tables import (
        comparison,
        copyable,
        differences_table,
        front_table,
        methods_table,
        stages_account,
        trials_table,
    )
    from rlhf_ray.report.page import PAGE_FILE

    about = result.sweep["metric"]
    metric, better = str(about["name"]), bool(about["higher_is_better"])
    unit = "seconds" if config.cost == "seconds" else "full stages"
    done = any(trial["status"] == "done" for trial in result.trials)
    best = result.best_trial if done else None
    terminal.show("")
    terminal.show(trials_table(result.table(), best, metric=metric))
    for failure in result.failures[:3]:
        reason = str(failure["error"])[:300]
        terminal.message(f"trial {failure['name']} failed: {reason}")
    if done:
        terminal.show("")
        terminal.show(front_table(result.front(), metric=metric, unit=unit))
    methods = result.summary.get("methods", {})
    if methods:
        terminal.show("")
        terminal.show(methods_table(result.methods(), metric=metric, unit=unit))
        if "policy_minus" in result.summary:
            terminal.show("")
            minus = result.summary["policy_minus"]
            terminal.show(differences_table(minus, metric=metric, higher_is_better=better))
        terminal.show("")
        terminal.say(comparison(methods, metric=metric, higher_is_better=better))
    if "stages" in result.summary:
        terminal.message(stages_account(result.summary["stages"]))
    if not methods and len(result.failures) == len(result.trials):
        terminal.say("No trial ended well: there is no policy.")
    if page_written:
        page = result.path_of(PAGE_FILE)
        terminal.show_lines("", "Results page, to open in a browser:", f"  {page}")
    else:
        later = copyable(["python", "-m", "rlhf_ray.report", result.directory])
        why = "The results page could not be written. This writes it, once that is possible:"
        terminal.show_lines("", why, *(f"  {line}" for line in later))
    if methods:
        _show_next_steps(terminal, result, options, config)


def _show_next_steps(
    terminal: Terminal, result: "SearchResult", options: SuiteOptions, config: SearchConfig
) -> None:
    from rlhf_ray.commands.tables import copyable
    from rlhf_ray.sweep.results import BEST_POLICY

    directory = str(result.directory)
    rows = result.summary.get("rows", [])
    task = str(next((row["task"] for row in rows if row["method"] == "policy"), "TASK"))
    apply = [
        "python", "-m", "rlhf_ray.apply", "--policy", result.path_of(BEST_POLICY),
        *_suite_flags(options), "--task", task, "--output", "tuned.safetensors",
    ]  # fmt: skip
    if config.storage_path != SearchConfig.storage_path:
        apply += ["--storage-path", without_secrets(config.storage_path)]
    steps = {
        "TensorBoard:": ["tensorboard", "--logdir", without_options(directory)],
        "Results page, live:": ["python", "-m", "rlhf_ray.report", directory, "--serve"],
        "Fine-tune one task with the policy:": apply,
    }
    terminal.show_lines(f"Everything is written under {directory}")
    for what, command in steps.items():
        terminal.show_lines(what, *(f"  {line}" for line in copyable(command)))


def _complete_page(
    result: "SearchResult", options: SuiteOptions, config: SearchConfig, terminal: Terminal
) -> bool:
    """The page's command names the suite as this one was given it, which `search` cannot know.

    Returns whether the page could be written.
    """
    from rlhf_ray.report.gathering import SUITE_FLAGS_FILE
    from rlhf_ray.report.live import LivePage
    from rlhf_ray.storage import open_storage

    storage = open_storage(config.storage_path)
    with contextlib.suppress(StorageError):  # the sweep is shown, also where the disk is full
        storage.write_json(f"{result.name}/{SUITE_FLAGS_FILE}", {"flags": _suite_flags(options)})
    return LivePage(storage, result.name, terminal).write()


def _suite_flags(options: SuiteOptions) -> list[str]:
    return options.changed_flags() or ["--suite", options.suite]


# -- input -----------------------------------------------------------------------------------------


def _flag_groups() -> dict[str, list[Flag]]:
    flags: dict[str, Flag] = {}
    for schema in (SuiteOptions, SearchConfig, LaunchOptions):
        flags |= command_line.flags_of(schema)
    grouped = {name for names in GROUPS.values() for name in names}
    groups = {title: [flags[name] for name in names] for title, names in GROUPS.items()}
    other = [flag for name, flag in flags.items() if name not in grouped]
    return {**groups, "other": other} if other else groups


def _check_list(arguments: Sequence[str]) -> None:
    """A list runs nothing: who gives it a run's flags thinks that it does."""
    allowed = ("--list", "--storage-path", "--json", "--quiet")
    idle = dict.fromkeys(flag for flag in command_line.flags_in(arguments) if flag not in allowed)
    if idle:
        raise InputError(
            f"--list must stand alone or with {', '.join(allowed[1:])}, got {' '.join(idle)}. "
            "Leave --list out to run."
        )


def _as_mapping(pairs: Sequence[str]) -> dict[str, Any]:
    """Reads KEY=VALUE pairs; values are JSON, or text where they are not."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise InputError(
                f"--rllib must be KEY=VALUE pairs, got {pair!r}. Write grad_clip=5.0, for example."
            )
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found


def _check_before_loading(options: SuiteOptions, config: SearchConfig, given: set[str]) -> None:
    """Checks all that hangs on no level or task: loading the suite may pretrain for minutes."""
    from rlhf_ray.algorithms import check_overrides
    from rlhf_ray.evaluation.baselines import baselines_for
    from rlhf_ray.suites import suite_defaults

    baselines_for([name for name in config.baselines if not name.startswith("level:")], levels=())
    settings = config.engine_settings()
    if not config.cluster:
        settings.check_device()
    defaults = suite_defaults(options.suite)
    if defaults is not None:  # one's own suite may want another algorithm or observation
        wanted = {name: value for name, value in defaults.items() if name not in given}
        as_wanted = with_defaults(config, wanted)
        check_observation(as_wanted)
        check_overrides(as_wanted.algorithm, as_wanted.rllib)


def _check_storage(location: str) -> None:
    """Tries to write; folders made on the way do not outlive a run that is refused later."""
    from rlhf_ray.storage import open_storage

    local = open_storage(location).local_path()
    missing = [p for p in (local, *local.parents) if not p.exists()] if local is not None else []
    open_storage(location, check=True)
    with contextlib.suppress(OSError):  # another process has begun to use it
        for folder in missing:
            folder.rmdir()


def _pretrained_at(location: str) -> str:
    """Where pretrained weights are kept: a local folder also where the storage is a bucket."""
    from rlhf_ray.storage import open_storage

    return str(open_storage(location).local_path() or SearchConfig.storage_path)


@contextlib.contextmanager
def _scratch_copy(location: str) -> Iterator[str]:
    """A throw-away storage path with the pretrained weights that are kept already."""
    kept = Path(_pretrained_at(location)) / "pretrained"
    with tempfile.TemporaryDirectory() as scratch:
        if kept.is_dir():
            shutil.copytree(kept, Path(scratch) / "pretrained")
        yield scratch


def _again(arguments: Sequence[str]) -> str:
    """The command that goes on where this one ended; keys of a URI are left to be put in again."""
    rest = [shown_word(word) for word in arguments if word != "--fresh"]
    return shlex.join([*PROG.split(), *rest])


def _versions() -> str:
    found: Mapping[str, str] = {name: version(name) for name in ("rlhf_ray", "torch", "ray")}
    own, *others = (f"{name} {number_}" for name, number_ in found.items())
    return f"{own} ({', '.join(others)})"


if __name__ == "__main__":
    sys.exit(main())
