"""A sweep's record: what it is known by, and whether one that is there is the same."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.config import SearchConfig
from rlhf_ray.digests import digest, source_digest
from rlhf_ray.engine.stages import suite_identity
from rlhf_ray.errors import InputError
from rlhf_ray.operations import Operation, operation_as_json
from rlhf_ray.provenance import git_revision, library_versions
from rlhf_ray.storage import Storage
from rlhf_ray.sweep.driver_lock import LOCK_FILE
from rlhf_ray.sweep.plan import PlannedTrial
from rlhf_ray.sweep.results import SWEEP_FILE, SearchResult
from rlhf_ray.tasks import SPLITS, Metric, Suite

MAX_LOOKED_AT = 20
"""Sweeps of a suite that are held against a new one."""


@dataclass(frozen=True, kw_only=True)
class Ground:
    """All that is settled about a sweep before Ray starts.

    Attributes:
        suite: checked.
        config: with the suite's own defaults.
        name: of the sweep's folder.
        identity: digest of suite, configuration and operations.
        parts: digests of "model", "tasks" and "operations", to name what differs.
        trials: planned.
        operations: of the process.
        remarks: lines on what the suite does not allow, or that is seldom meant.
        metric: of the suite's tasks; they agree on its direction.
    """

    suite: Suite
    config: SearchConfig
    name: str
    identity: str
    parts: dict[str, str]
    trials: list[PlannedTrial]
    operations: tuple[Operation, ...]
    remarks: list[str]
    metric: Metric


def sweep_identity(
    suite: Suite, config: SearchConfig, operations: Sequence[Operation]
) -> tuple[str, dict[str, str]]:
    """Digest of all that a sweep's results depend on, and those of its parts but the settings."""
    identity = suite_identity(suite, config.engine_settings())
    roles = [
        [(task.name, task.known_as) for task in getattr(suite, f"{role}_tasks")] for role in SPLITS
    ]
    tasks = dict(identity.tasks), identity.source, roles
    done = (
        [operation_as_json(operation) for operation in operations],
        [source_digest(type(operation)) for operation in operations],
    )
    parts = {"model": identity.model, "tasks": digest(*tasks), "operations": digest(*done)}
    return digest(config.digest(), identity.model, *tasks, *done), parts


def record_sweep(storage: Storage, ground: Ground) -> str:
    """Writes the sweep's record, or holds an earlier one of the name against this call.

    Returns:
        A line for the user, or "".
    """
    earlier = storage.read_json(f"{ground.name}/{SWEEP_FILE}")
    if isinstance(earlier, dict):
        check_same_sweep(earlier, ground)
        return ""
    almost = _almost(storage, ground)
    record = {
        "name": ground.name,
        "identity": ground.identity,
        "parts": ground.parts,
        "state": "running",
        "suite": ground.suite.name,
        "levels": list(ground.suite.levels),
        "metric": {
            "name": ground.metric.name,
            "higher_is_better": ground.metric.higher_is_better,
        },
        "tasks": {
            role: [task.name for task in getattr(ground.suite, f"{role}_tasks")] for role in SPLITS
        },
        "operations": [operation_as_json(operation) for operation in ground.operations],
        "trials": [{"name": trial.name, "values": trial.values} for trial in ground.trials],
        "config": ground.config.as_json(),
        "versions": library_versions(),
        "git_revision": git_revision(),
        "created": time.time(),
    }
    storage.write_json(f"{ground.name}/{SWEEP_FILE}", record)
    return almost


def _almost(storage: Storage, ground: Ground) -> str:
    """A line about a sweep of the same suite and settings; "" if there is none.

    A model that is pretrained anew has other weights whenever torch rounds differently.
    """
    if ground.config.name:
        return ""
    settings = ground.config.that_count()
    unnamed = re.compile(re.escape(ground.suite.name) + "-[0-9a-f]{8}")
    for name in [n for n in storage.folders() if unnamed.fullmatch(n)][:MAX_LOOKED_AT]:
        there = storage.read_json(f"{name}/{SWEEP_FILE}")
        if not isinstance(there, dict):
            continue
        config, parts = there.get("config", {}), there.get("parts", {})
        others = [part for part, value in ground.parts.items() if value != parts.get(part)]
        alike = all(config.get(n) == value for n, value in settings.items())
        if alike and others and "tasks" not in others:
            line = (
                f"a new sweep: {name} ({there['state']}) has the same settings and tasks, but "
                f"another {' and other '.join(others)}"
            )
            keep = "; weights that are loaded from a file stay the same"
            return line + keep if "model" in others else line
    return ""


def check_same_sweep(earlier: Mapping[str, Any], ground: Ground) -> None:
    """Raises InputError, which says what differs, unless a record is that of this sweep."""
    if earlier["identity"] != ground.identity:
        before = earlier["config"]
        others = [f"{name}={before.get(name)!r} (now {value!r})"
                  for name, value in ground.config.that_count().items()
                  if before.get(name) != value]  # fmt: skip
        there = earlier.get("parts", {})
        parts = [name for name, value in ground.parts.items() if there.get(name, value) != value]
        held = "another suite, model, data or code"
        if others or parts:
            held = f"one of {', '.join(others + [f'another {part}' for part in parts])}"
        raise InputError(
            "a sweep's folder must belong to one suite and configuration, got "
            f"name={ground.name!r}, which holds {held}. Give another --name, or --fresh."
        )


def set_state(storage: Storage, name: str, state: str) -> None:
    """Notes in the record how a sweep stands."""
    record = SearchResult(storage, name).sweep
    storage.write_json(f"{name}/{SWEEP_FILE}", {**record, "state": state})


def forget(storage: Storage, name: str) -> None:
    """Deletes all of a sweep but the lock, which this process holds.

    Raises:
        InputError: the folder holds something else.
    """
    record, lock = f"{name}/{SWEEP_FILE}", f"{name}/{LOCK_FILE}"
    folders = storage.folders(name)
    if not storage.exists(record):
        if folders or any(file != lock for file in storage.list(name)):
            raise InputError(
                f"fresh must be given for a sweep's folder, got {storage.shown_path(name)!r}, "
                f"which holds other things and no {SWEEP_FILE}. Give another --name, or empty it."
            )
        return
    for folder in folders:
        storage.delete_prefix(f"{name}/{folder}")
    for file in storage.list(name):
        if file not in (record, lock):
            storage.delete(file)
    storage.delete(record)  # last: as long as anything is left, the folder is known for a sweep's
