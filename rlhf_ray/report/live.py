"""The page while a sweep runs: written again and again, beside the work and never in its way."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rlhf_ray.progress import Progress
from rlhf_ray.report.gathering import PROGRESS_FILE, Gatherer
from rlhf_ray.report.page import PAGE_FILE, whole
from rlhf_ray.storage import Storage

PERIOD_S = 10.0
"""Between two writings of the page at least."""

SHARE = 0.05
"""Of the time at most is spent on writing the page."""


def write_report(storage: Storage, name: str) -> str:
    """Writes a sweep's results page into its folder.

    Args:
        storage: holds the sweep.
        name: of the sweep's folder.

    Returns:
        Where the page is.

    Raises:
        InputError: there is no such sweep.
        StorageError: the page cannot be written.
    """
    return _write(storage, name, Gatherer(storage, name))


def _write(storage: Storage, name: str, gatherer: Gatherer) -> str:
    storage.write_bytes(f"{name}/{PAGE_FILE}", whole(gatherer.gather()).encode())
    return storage.shown_path(f"{name}/{PAGE_FILE}")


def tell_last(storage: Storage, name: str, stats: Mapping[str, Any]) -> None:
    """Puts the tree's last figures into what the driver has told of a sweep.

    Args:
        storage: holds the sweep.
        name: of the sweep's folder.
        stats: of the tree's actor (see `TreeActor.stats`).

    Raises:
        StorageError: they cannot be written.
    """
    told = storage.read_json(f"{name}/{PROGRESS_FILE}")
    record = {**(told if isinstance(told, dict) else {}), **_figures(stats)}
    storage.write_json(f"{name}/{PROGRESS_FILE}", record)


def _figures(stats: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "time": time.time(),
        "in_flight": stats.get("in_flight"),
        "executed": stats.get("executed"),
        "retried": stats.get("retried"),
        "failed_stages": sorted(set(stats.get("failed", {}).values()))[:20],
        "workers": stats.get("workers", []),
    }


class LivePage:
    """Writes the page at intervals, together with what the driver knows of running trials.

    Whatever goes wrong here is told once and does not touch the sweep.

    Args:
        storage: holds the sweep.
        name: of the sweep's folder.
        progress: told when the page cannot be written.
        before: episodes of trials that an earlier run had ended.
        total: episodes of all trials.
    """

    def __init__(
        self, storage: Storage, name: str, progress: Progress, *, before: int = 0, total: int = 0
    ) -> None:
        self._storage, self._name, self._progress = storage, name, progress
        self._gatherer = Gatherer(storage, name)
        self._counts = {"before": before, "done": before, "total": total}
        self._began = time.monotonic()
        self._next = self._began
        self._failed = False

    def tick(self, stats: Mapping[str, Any], running: Mapping[str, Any], **counts: Any) -> None:
        """Writes the page if it is time to.

        Args:
            stats: of the tree's actor (see `TreeActor.stats`); {} when it does not answer.
            running: trial -> `curve`: (episodes, mean return) pairs so far.
            counts: `done` episodes of all trials, `restarts` of each trial.
        """
        began = time.monotonic()
        if began < self._next:
            return
        self._guarded(lambda: self._tell(stats, running, counts), self._write)
        now = time.monotonic()
        self._next = now + max(PERIOD_S, (now - began) / SHARE)

    def write(self) -> bool:
        """Writes the page now; returns whether that went well."""
        return self._guarded(self._write)

    def end(self, stats: Mapping[str, Any], **counts: Any) -> None:
        """Keeps the last figures, as `tick` takes them, now that no trial runs any more.

        They are on the page when it is written next.
        """
        self._guarded(lambda: self._tell(stats, {}, counts))

    def _tell(
        self, stats: Mapping[str, Any], running: Mapping[str, Any], counts: Mapping[str, Any]
    ) -> None:
        self._counts |= counts
        elapsed_s = time.monotonic() - self._began
        record = {**self._counts, "elapsed_s": elapsed_s, "trials": dict(running)}
        self._storage.write_json(f"{self._name}/{PROGRESS_FILE}", {**record, **_figures(stats)})

    def _write(self) -> None:
        _write(self._storage, self._name, self._gatherer)

    def _guarded(self, *actions: Callable[[], object]) -> bool:
        try:
            for action in actions:
                action()
        except Exception as error:  # hours of work must not hang on a page about them
            if not self._failed:
                self._progress.message(f"the results page cannot be written: {error}")
            self._failed = True
            return False
        return True
