"""A sweep's files as one plain dictionary, which the page and notebooks show. No Ray.

Reads what is there while a sweep runs; trials that have ended are read once and remembered.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.commands.tables import comparison, copyable, in_points
from rlhf_ray.errors import InputError
from rlhf_ray.evaluation.judging import front
from rlhf_ray.operations import KINDS
from rlhf_ray.report import accounts
from rlhf_ray.report.explain import Explanation, explain
from rlhf_ray.report.trials import digest_of, unfinished
from rlhf_ray.storage import Storage, parent_of
from rlhf_ray.sweep.results import (
    BASELINES_FILE,
    BEST_POLICY,
    SCHEDULE_FILE,
    SUMMARY_FILE,
    SWEEP_FILE,
    no_sweep,
    state_of,
    trial_folder,
)
from rlhf_ray.uris import without_options, without_secrets

PROGRESS_FILE = "progress.json"
"""What the driver says while it runs: written by `live`."""

SUITE_FLAGS_FILE = "suite_flags.json"
"""How the launch command was given the suite, which only it knows."""

BUILT_IN = ("digits", "mnist", "fashion-mnist")
"""Suites whose name is their flag, alone or with an ending."""


def at(path: str | Path) -> tuple[Storage, str]:
    """The storage and the sweep's name of a sweep's folder, or of a file in it.

    Raises:
        InputError: there is no sweep.
    """
    storage, name = parent_of(path)
    if name and storage.exists(name):  # the page itself, as a shell completes it
        storage, name = parent_of(_without_name(str(path)))
    if name and storage.exists(f"{name}/{SWEEP_FILE}"):
        return storage, name
    inside = _sweeps_in(storage, name)
    hint = f"It holds the sweeps {', '.join(inside[:8])}." if inside else "See --list of launch."
    got = without_secrets(str(path))
    raise InputError(f"the folder must be a sweep's (with {SWEEP_FILE}), got {got!r}. {hint}")


def _without_name(path: str) -> str:
    uri, mark, options = path.partition("?")
    if "://" not in uri:
        return str(Path(path).parent)
    return uri.rstrip("/").rpartition("/")[0] + mark + options


def _sweeps_in(storage: Storage, folder: str) -> list[str]:
    """Names of the sweeps right in a folder ("": the root)."""
    inside = f"{folder}/" if folder else ""
    return [f for f in storage.folders(folder) if storage.exists(f"{inside}{f}/{SWEEP_FILE}")]


class Gatherer:
    """Reads a sweep again and again.

    Args:
        storage: holds the sweep.
        name: of the sweep's folder.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._name = name
        self._seen: dict[str, tuple[tuple[int, float], dict[str, Any]]] = {}

    def gather(self) -> dict[str, Any]:
        """What there is to show now: plain data, JSON-able.

        Raises:
            InputError: there is no such sweep.
        """
        sweep = self._read(SWEEP_FILE)
        if not sweep:
            raise no_sweep(self._storage, self._name)
        sweep = {**sweep, "state": state_of(self._storage, self._name, sweep)}
        progress, summary = self._read(PROGRESS_FILE), self._read(SUMMARY_FILE)
        trials = self._trials(sweep, progress)
        done = [trial for trial in trials if trial["status"] == "done"]
        best = max(done, key=lambda trial: trial["utility"])["name"] if done else None
        baselines = self._read(BASELINES_FILE)
        explanation = self._explanation(sweep, best, baselines)
        metric, higher = str(sweep["metric"]["name"]), bool(sweep["metric"]["higher_is_better"])
        methods = summary.get("methods", {})
        config = sweep.get("config", {})
        return {
            "name": self._name,
            "suite": sweep["suite"],
            "state": sweep["state"],
            "created": sweep.get("created"),
            "generated": time.time(),
            "directory": self._storage.shown_path(self._name),
            "metric": metric,
            "higher_is_better": higher,
            "in_points": in_points(metric, higher_is_better=higher),
            "unit": "seconds" if config.get("cost") == "seconds" else "full stages",
            "levels": sweep.get("levels", []),
            "tasks": {role: len(names) for role, names in sweep.get("tasks", {}).items()},
            "config": config,
            "versions": sweep.get("versions", {}),
            "utility": {
                "cost": config.get("utility_cost"), "switches": config.get("utility_switch"),
            },
            "trials": trials,
            "best": best,
            "methods": accounts.methods(methods, summary.get("policy_minus", {})),
            "comparison": comparison(methods, metric=metric, higher_is_better=higher)
            if methods else None,
            "val_marks": accounts.val_marks(baselines),
            "schedule": self._read(SCHEDULE_FILE).get("words"),
            "departures": self._read(f"trials/{best}/trial.json").get("departures")
            if best else None,
            "learned": None if explanation is None else vars(explanation),
            "effects": accounts.effects(done),
            "stages": accounts.account(done, self._seen.values(), summary),
            "best_paths": accounts.best_paths(done, baselines, sweep),
            "health": accounts.health(sweep, trials, progress),
            "commands": self._commands(sweep, bool(methods)),
        }  # fmt: skip

    def explanation(self, trial: str) -> Explanation | None:
        """What a trial's policy learned; None if it has not been judged."""
        best = self.gather()["best"]
        baselines = self._read(BASELINES_FILE) if trial == best else {}
        return self._explanation(self._read(SWEEP_FILE), trial, baselines)

    # -- reading -----------------------------------------------------------------------------------

    def _read(self, file: str) -> dict[str, Any]:
        found = self._storage.read_json(f"{self._name}/{file}")
        return found if isinstance(found, dict) else {}

    def _trials(
        self, sweep: Mapping[str, Any], progress: Mapping[str, Any]
    ) -> list[dict[str, Any]]:
        self._look(sweep)
        # a driver that was killed could not take back what it had told
        running = progress.get("trials", {}) if sweep["state"] == "running" else {}
        trials = []
        for planned in sweep["trials"]:
            name = planned["name"]
            known = self._seen[name][1] if name in self._seen else None
            if known is None or (known["status"] == "failed" and name in running):
                trials.append(unfinished(planned, running.get(name)))
            else:
                trials.append(dict(known))
        higher = sweep["metric"]["higher_is_better"]
        marks = front([(trial["metric"], trial["cost"]) for trial in trials], higher)
        for trial, on in zip(trials, marks, strict=True):
            trial["on_front"] = on
        return trials

    def _look(self, sweep: Mapping[str, Any]) -> None:
        """Reads the records that are new, and forgets those that are gone."""
        ending, folder = "/trial.json", f"{self._name}/trials"
        there = {
            file.name.removeprefix(f"{folder}/").removesuffix(ending): file
            for file in self._storage.files(folder)
            if file.name.endswith(ending)
        }
        # a sweep that is begun afresh has trials of the same names
        self._seen = {name: seen for name, seen in self._seen.items() if name in there}
        for name, file in there.items():
            mark = (file.size_bytes, file.modified_s)
            if self._seen.get(name, (None,))[0] != mark:
                record = self._storage.read_json(file.name)
                if isinstance(record, dict):
                    self._seen[name] = (mark, digest_of(record, sweep))

    def _explanation(
        self, sweep: Mapping[str, Any], trial: str | None, baselines: Mapping[str, Any]
    ) -> Explanation | None:
        if trial is None:
            return None
        record = self._storage.read_json(f"{trial_folder(self._name, trial)}/trial.json")
        if not isinstance(record, dict) or not record.get("runs"):
            return None
        return explain(
            record["runs"],
            baselines.get("runs", {}).get("policy", []),
            levels=sweep["levels"],
            operations=sweep["operations"],
            horizon=sweep["config"]["horizon"],
            metric=sweep["metric"]["name"],
            drivers=record.get("drivers", []),
        )

    def _commands(self, sweep: Mapping[str, Any], compared: bool) -> dict[str, str]:
        directory = self._storage.shown_path(self._name)
        suite = str(sweep["suite"])
        unknown = suite if suite.startswith(BUILT_IN) else "package.module:function"
        flags = self._read(SUITE_FLAGS_FILE).get("flags") or ["--suite", unknown]
        tasks = sweep.get("tasks", {}).get("test", [])
        policy = self._storage.shown_path(f"{self._name}/{BEST_POLICY}")
        own = {entry["kind"] for entry in sweep.get("operations", [])} - KINDS.keys()
        operations = ", operations=operations" if own else ""
        apply = [
            "python", "-m", "rlhf_ray.apply", "--policy", policy, *flags,
            "--task", str(tasks[0]) if tasks else "TASK", "--output", "tuned.safetensors",
            "--storage-path", self._storage.shown,
        ]  # fmt: skip
        python = (
            "import rlhf_ray as rr\n\n"
            f"policy = rr.Policy.load({policy!r})\n"
            f"tuned = rr.finetune(model, levels, task, policy{operations})"
            "  # your model, levels and task"
        )
        board = ["tensorboard", "--logdir", without_options(directory)]
        serve = ["python", "-m", "rlhf_ray.report", directory, "--serve"]
        commands = {"tensorboard": _shell(board), "serve": _shell(serve)}
        if not compared:
            return commands
        # operations of one's own can be had from one's own code alone
        return commands | {"python": python} | ({} if own else {"apply": _shell(apply)})


def _shell(words: Sequence[str]) -> str:
    return "\n".join(copyable(words, columns=96))
