import pickle
import types
from pathlib import Path
from typing import Any

import pytest
from lines import Lines
from ray import tune
from ray.tune.callback import CallbackList
from ray.tune.logger import LoggerCallback
from sweep_files import small_suite
from test_search import config

from rlhf_ray.sweep import tuning
from rlhf_ray.sweep.search import search
from rlhf_ray.sweep.tracking import REST, Tolerated

TRIAL = types.SimpleNamespace(trial_id="a", config={})


BUDGET = 0.06
"""Full stages; a second stage of some kinds would exceed it."""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Tracker(LoggerCallback):
    """Fails when told, after so many seconds."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.fails_after_s: float | None = None
        self.logged: list[object] = []

    def _log(self, what: object) -> None:
        self.logged.append(what)
        if self.fails_after_s is not None:
            self.clock.now += self.fails_after_s
            raise ConnectionError("no answer from the server\nand more of this")

    def log_trial_start(self, trial: object) -> None:
        self._log("start")

    def log_trial_result(self, iteration: int, trial: object, result: dict[str, float]) -> None:
        self._log(result["x"])

    def log_trial_end(self, trial: object, failed: bool = False) -> None:
        self._log("failed" if failed else "done")

    def on_experiment_end(self, trials: Any, **info: object) -> None:
        self._log("end")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tracker(clock: Clock) -> Tracker:
    return Tracker(clock)


@pytest.fixture
def said() -> Lines:
    return Lines()


@pytest.fixture
def callbacks(tracker: Tracker, said: Lines, clock: Clock) -> CallbackList:
    """Called as Tune's loop calls them."""
    return CallbackList([Tolerated("mlflow", tracker, said, clock=clock)])


def result(callbacks: CallbackList, x: float) -> None:
    callbacks.on_trial_result(iteration=0, trials=[TRIAL], trial=TRIAL, result={"x": x})


def test_a_tracker_is_told_all_that_happens(
    callbacks: CallbackList, tracker: Tracker, said: Lines
) -> None:
    callbacks.setup(stop=None, num_samples=1)
    callbacks.on_trial_start(iteration=0, trials=[TRIAL], trial=TRIAL)
    result(callbacks, 1.0)
    callbacks.on_trial_complete(iteration=1, trials=[TRIAL], trial=TRIAL)
    callbacks.on_trial_error(iteration=1, trials=[TRIAL], trial=TRIAL)
    callbacks.on_experiment_end(trials=[TRIAL])
    assert tracker.logged == ["start", 1.0, "done", "failed", "end"]
    assert not said.lines


def test_a_tracker_that_fails_is_said_once_and_called_again(
    callbacks: CallbackList, tracker: Tracker, said: Lines
) -> None:
    tracker.fails_after_s = 0.0
    result(callbacks, 1.0)
    result(callbacks, 2.0)
    tracker.fails_after_s = None
    result(callbacks, 3.0)
    assert tracker.logged == [1.0, 2.0, 3.0]
    (line,) = said.lines
    assert line.startswith("the tracker mlflow fails") and line.endswith(
        "no answer from the server"
    )


def test_a_tracker_that_is_slow_to_fail_is_left_alone_for_a_while(
    callbacks: CallbackList, tracker: Tracker, clock: Clock
) -> None:
    tracker.fails_after_s = 60.0
    result(callbacks, 1.0)
    result(callbacks, 2.0)
    callbacks.on_experiment_end(trials=[TRIAL])  # in any case
    assert tracker.logged == [1.0, "end"]
    clock.now += REST * 60.0
    tracker.fails_after_s = None
    result(callbacks, 3.0)
    assert tracker.logged == [1.0, "end", 3.0]


def test_tune_can_pickle_it_with_the_experiment(callbacks: CallbackList) -> None:
    (callback,) = callbacks._callbacks
    assert isinstance(pickle.loads(pickle.dumps(callback)), tune.Callback)


class Gone(LoggerCallback):
    """A tracker whose server goes away after the first result."""

    def log_trial_result(self, iteration: int, trial: object, result: dict[str, float]) -> None:
        raise ConnectionError("no answer from the server")


@pytest.mark.usefixtures("ray_session")
def test_a_sweep_goes_on_without_its_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "tracker_callbacks", lambda *_: {"mlflow": Gone()})
    progress = Lines()
    asked = config(tmp_path, tuning_cost_weight=(0.0,), budget=BUDGET)
    result = search(small_suite(), asked, progress=progress)
    assert result.finished and not result.failures
    assert len([line for line in progress.lines if "tracker mlflow fails" in line]) == 1
    # and no fine-tuning costs more than the budget
    costs = [run["cost"] for run in result.summary["rows"]]
    assert 0.0 < max(costs) <= BUDGET * (1 + 1e-9)
