"""Trackers that go away do not end a sweep: what they miss is said once, and the trials go on."""

import time
from collections.abc import Callable
from typing import Any

from ray import tune

from rlhf_ray.progress import Progress

REST = 9.0
"""How many times as long as a failed call took the tracker is left alone after it: one that answers
late, or after many attempts of its own, holds the sweep up for a tenth of its time at most."""

ENDS = "on_experiment_end"
"""The hook that is called in any case: trackers free there what they hold."""


class Tolerated(tune.Callback):
    """A callback of Tune's that may fail, which Tune takes for the end of the experiment.

    Args:
        name: of the tracker, for the user.
        tracker: its callback, set up once before.
        progress: told when it first fails.
        clock: seconds; for tests.
    """

    def __init__(
        self,
        name: str,
        tracker: tune.Callback,
        progress: Progress,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._tracker = tracker
        self._progress = progress
        self._clock = clock
        self._rests_until = 0.0
        self._told = False

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks with the experiment; this one is never read back

    def _call(self, hook: str, *args: Any, **info: Any) -> None:
        began = self._clock()
        if began < self._rests_until and hook != ENDS:
            return
        try:
            getattr(self._tracker, hook)(*args, **info)
        except Exception as error:
            ended = self._clock()
            self._rests_until = ended + REST * (ended - began)
            self._tell(error)

    def _tell(self, error: Exception) -> None:
        if self._told:
            return
        self._told = True
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        self._progress.message(
            f"the tracker {self._name} fails, and will miss some of this sweep, which goes on: "
            f"{reason}"
        )

    def setup(self, *args: Any, **info: Any) -> None:
        """See `tune.Callback`, as for all that follow."""
        self._call("setup", *args, **info)

    def on_trial_start(self, *args: Any, **info: Any) -> None:
        """A trial starts."""
        self._call("on_trial_start", *args, **info)

    def on_trial_restore(self, *args: Any, **info: Any) -> None:
        """A trial goes on."""
        self._call("on_trial_restore", *args, **info)

    def on_trial_save(self, *args: Any, **info: Any) -> None:
        """A trial has a checkpoint."""
        self._call("on_trial_save", *args, **info)

    def on_trial_result(self, *args: Any, **info: Any) -> None:
        """A trial reports."""
        self._call("on_trial_result", *args, **info)

    def on_trial_complete(self, *args: Any, **info: Any) -> None:
        """A trial has ended well."""
        self._call("on_trial_complete", *args, **info)

    def on_trial_error(self, *args: Any, **info: Any) -> None:
        """A trial has failed."""
        self._call("on_trial_error", *args, **info)

    def on_experiment_end(self, *args: Any, **info: Any) -> None:
        """All have ended."""
        self._call(ENDS, *args, **info)
