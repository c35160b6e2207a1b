"""What a search leaves behind, read back without Ray.

Under the storage path, per sweep: `sweep.json` (what was asked for, and its state), a folder per
trial with `trial.json` and the policy, `baselines.json`, `summary.json`, and the best policy.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from rlhf_ray.config import SWEPT
from rlhf_ray.errors import InputError, unknown_name
from rlhf_ray.evaluation.judging import front
from rlhf_ray.evaluation.statistics import FIGURES
from rlhf_ray.policies.policy import BEST_POLICY as BEST_POLICY  # a name of the layout above
from rlhf_ray.policies.policy import Policy
from rlhf_ray.storage import Storage, open_storage, parent_of
from rlhf_ray.sweep.driver_lock import driver_died

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from rlhf_ray.report.explain import Explanation

SWEEP_FILE = "sweep.json"
SUMMARY_FILE = "summary.json"
BASELINES_FILE = "baselines.json"
SCHEDULE_FILE = "schedule.json"
WALKS_FILE = "walks.json"

TABLE_COLUMNS = (
    "trial", "status", *SWEPT, "metric", "cost", "switches", "utility", "on_front",
)  # fmt: skip


_RECORDED = {"suite", "state", "trials", "metric"}
"""What `SWEEP_FILE` holds at least."""


def trial_folder(sweep: str, trial: str) -> str:
    """Where a trial's files lie on the storage."""
    return f"{sweep}/trials/{trial}"


def no_sweep(storage: Storage, name: str) -> InputError:
    """The error of a folder that cannot be read as a sweep's."""
    where = f"{name!r} under {storage.shown!r}"
    if storage.exists(f"{name}/{SWEEP_FILE}"):
        return InputError(
            f"a sweep's record must be whole, got a cut {SWEEP_FILE} of {where}. Launch it with "
            "--fresh to begin it anew; its stages are kept."
        )
    return InputError(f"a sweep must be there, got {where}.")


class SearchResult:
    """A search's trials, policies, comparison and account.

    Args:
        storage: holds the sweep.
        name: the sweep's folder on it.

    Raises:
        InputError: there is no sweep of that name, or its record is not whole.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self.name = name
        sweep = storage.read_json(f"{name}/{SWEEP_FILE}")
        if not isinstance(sweep, dict) or not set(sweep) >= _RECORDED:
            raise no_sweep(storage, name)
        self.sweep: dict[str, Any] = sweep
        summary = storage.read_json(f"{name}/{SUMMARY_FILE}")
        self.summary: dict[str, Any] = summary if isinstance(summary, dict) else {}
        self.trials: list[dict[str, Any]] = [
            _trial(storage, name, planned) for planned in sweep["trials"]
        ]

    def __repr__(self) -> str:
        return f"SearchResult({self.directory!r}, {self.state}, trials={len(self.trials)})"

    @classmethod
    def load(cls, path: str | Path) -> "SearchResult":
        """Reads a sweep's folder: `<storage path>/<name>`, a local path or a URI."""
        return cls(*parent_of(path))

    @property
    def directory(self) -> str:
        """The sweep's folder."""
        return self._storage.shown_path(self.name)

    def path_of(self, name: str) -> str:
        """A file or folder of the sweep: "best_policy" -> its path."""
        return self._storage.shown_path(f"{self.name}/{name}")

    @property
    def storage_path(self) -> str:
        """The storage path the sweep lies under."""
        return self._storage.shown

    @property
    def state(self) -> str:
        """One of "running", "interrupted", "failed" and "finished"."""
        return state_of(self._storage, self.name, self.sweep)

    @property
    def finished(self) -> bool:
        """Whether the sweep has run to its end."""
        return self.state == "finished"

    @property
    def failures(self) -> list[dict[str, Any]]:
        """Trials that failed, with their errors."""
        return [trial for trial in self.trials if trial["status"] == "failed"]

    @property
    def best_trial(self) -> str:
        """Name of the trial of highest utility on the val tasks."""
        done = [trial for trial in self.trials if trial["status"] == "done"]
        if not done:
            raise InputError(f"a trial must have ended well, got none in {self.directory!r}.")
        return max(done, key=lambda trial: trial["judged"]["utility"])["name"]

    @property
    def best_policy(self) -> Policy:
        """The policy of `best_trial`."""
        return self.policy(self.best_trial)

    def policy(self, trial: str) -> Policy:
        """The policy that a trial learned.

        Raises:
            InputError: no such trial, or it has no policy.
        """
        names = [known["name"] for known in self.trials]
        if trial not in names:
            raise unknown_name("trial", trial, names)
        return Policy.read(self._storage, f"{trial_folder(self.name, trial)}/policy")

    def table(self) -> pd.DataFrame:
        """A row per trial: its settings and its figures on the val tasks (columns as below).

        Columns: trial, status, the swept settings, metric, cost (full stages), switches, utility,
        on_front; where trials share experience episodes_of_others, which each learned from.
        """
        rows = [_row(trial) for trial in self.trials]
        on_front = front([(row["metric"], row["cost"]) for row in rows], self._higher_is_better)
        for row, on in zip(rows, on_front, strict=True):
            row["on_front"] = on
        table = pd.DataFrame(rows, columns=list(TABLE_COLUMNS))
        learned = [trial.get("experience", {}).get("episodes") for trial in self.trials]
        if any(episodes is not None for episodes in learned):
            table["episodes_of_others"] = pd.array(learned, dtype="Int64")
        return table

    def front(self) -> pd.DataFrame:
        """The trials that no other beats in both metric and cost, cheapest first."""
        table = self.table()
        return table.loc[table["on_front"]].sort_values(by="cost").reset_index(drop=True)

    def methods(self) -> pd.DataFrame:
        """A row per method on the test tasks: policy and baselines, best utility first.

        Columns: `rlhf_ray.evaluation.statistics.summarise`, NaN for None. No rows where nothing was
        compared.
        """
        methods: Mapping[str, Mapping[str, float | None]] = self.summary.get("methods", {})
        index = pd.Index(list(methods), name="method")
        frame = pd.DataFrame(
            list(methods.values()), index=index, columns=list(FIGURES), dtype=float
        )
        return frame.sort_values("utility_mean", ascending=False)

    def plot_front(self) -> "go.Figure":
        """Metric against cost of all trials on the val tasks, their front, and the baselines."""
        from rlhf_ray.report.figures import front_figure
        from rlhf_ray.report.gathering import Gatherer

        return front_figure(self, Gatherer(self._storage, self.name).gather()["val_marks"])

    def explain(self, trial: str | None = None) -> "Explanation":
        """What a policy learned: in words, as paths per task, and what its choices hang on.

        Args:
            trial: whose policy; None: the best.

        Raises:
            InputError: no such trial, or it has not been judged.
        """
        from rlhf_ray.report.gathering import Gatherer

        trial = trial or self.best_trial
        names = [known["name"] for known in self.trials]
        if trial not in names:
            raise unknown_name("trial", trial, names)
        found = Gatherer(self._storage, self.name).explanation(trial)
        if found is None:
            raise InputError(f"a trial must have been judged to be explained, got trial={trial!r}.")
        return found

    def _repr_html_(self) -> str:
        from rlhf_ray.report.figures import result_html

        return result_html(self)

    @property
    def _higher_is_better(self) -> bool:
        return self.sweep["metric"]["higher_is_better"]


def state_of(storage: Storage, name: str, sweep: Mapping[str, Any]) -> str:
    """A sweep's state by its record; a driver that was killed could not say so in it."""
    died = sweep["state"] == "running" and driver_died(storage, name)
    return "interrupted" if died else sweep["state"]


def list_sweeps(storage_path: str) -> list[dict[str, Any]]:
    """The sweeps under a storage path: name, suite, state, trials, best utility, path.

    One whose record cannot be read is in the state "unreadable".
    """
    storage = open_storage(storage_path)
    found = []
    for name in storage.folders():
        if not storage.exists(f"{name}/{SWEEP_FILE}"):
            continue
        try:
            found.append(listed(SearchResult(storage, name)))
        except InputError:
            found.append(_unreadable(name, storage.shown_path(name)))
    return found


def _unreadable(name: str, path: str) -> dict[str, Any]:
    nothing = {"suite": "", "trials_done": 0, "trials": 0, "utility": None}
    return {"name": name, "state": "unreadable", **nothing, "path": path}


def listed(result: SearchResult) -> dict[str, Any]:
    """What a list of sweeps tells of one: see `list_sweeps`."""
    done = [trial for trial in result.trials if trial["status"] == "done"]
    return {
        "name": result.name,
        "suite": result.sweep["suite"],
        "state": result.state,
        "trials_done": len(done),
        "trials": len(result.trials),
        "utility": max((trial["judged"]["utility"] for trial in done), default=None),
        "path": result.directory,
    }


def _trial(storage: Storage, sweep: str, planned: Mapping[str, Any]) -> dict[str, Any]:
    record = storage.read_json(f"{trial_folder(sweep, planned['name'])}/trial.json")
    waiting = {"name": planned["name"], "values": planned["values"], "status": "waiting"}
    return record if isinstance(record, dict) else waiting


def _row(trial: Mapping[str, Any]) -> dict[str, Any]:
    judged = trial.get("judged") or {}
    figures = {name: judged.get(name) for name in ("metric", "cost", "switches", "utility")}
    return {"trial": trial["name"], "status": trial["status"], **trial["values"], **figures}
