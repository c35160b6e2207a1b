"""What baselines work with and give back: the bench, a schedule, a baseline that has chosen."""

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rlhf_ray.evaluation.judging import Player, Utility
from rlhf_ray.evaluation.rollouts import THREADS, Episode, Stages, walk
from rlhf_ray.operations import Train
from rlhf_ray.outcomes import StagePath, StageRequest, StageStep
from rlhf_ray.process import ProcessSpec, State
from rlhf_ray.tree.tally import Answer

SEARCH_STAGES = 20
"""Stages that a search on one task may carry out, where nothing else is said."""


class CountedStages:
    """A provider of stages that counts the distinct ones asked for. Thread-safe."""

    def __init__(self, stages: Stages) -> None:
        self._stages = stages
        self._lock = threading.Lock()
        self._keys: set[str] = set()

    @property
    def distinct(self) -> int:
        """Distinct stages asked for, whoever carried them out and when."""
        return len(self._keys)

    def outcome(self, request: StageRequest) -> Answer:
        """Answers one request."""
        answer = self._stages.outcome(request)
        if request.path and request.kind == "stage":
            with self._lock:
                self._keys.add(answer.outcome.key)
        return answer


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What baselines have to work with: everything but the test tasks.

    Attributes:
        spec: the process; its probes are not used, so not charged.
        stages: carries stages out.
        train_tasks: names; `fixed` is tuned on them.
        val_tasks: names; everything is chosen on them.
        utility: what is chosen by.
        seed: of the random and the searching baselines, and of the order of train tasks.
        max_stages: distinct stages that tuning on the train tasks may ask for; None: no bound.
        search_stages: distinct stages that a search on one task may ask for.
        train: steps, batch size and optimizer of all training.
        learning_rates: the grid, ascending.
        threads: walks in flight at once.
    """

    spec: ProcessSpec
    stages: Stages
    train_tasks: tuple[str, ...]
    val_tasks: tuple[str, ...]
    utility: Utility
    seed: int
    max_stages: int | None
    train: Train
    learning_rates: tuple[float, ...]
    search_stages: int = SEARCH_STAGES
    threads: int = THREADS

    @property
    def horizon(self) -> int:
        """Stages of a fine-tuning at most."""
        return self.spec.settings.horizon

    @property
    def level_sets(self) -> tuple[tuple[int, ...], ...]:
        """What may be trained together: one level, or all from one up."""
        n = self.spec.n_levels
        return *((level,) for level in range(n)), *(tuple(range(low, n)) for low in range(n - 1))

    def stage(self, learning_rate: float, levels: Iterable[int]) -> StageStep:
        """A stage that trains levels."""
        levels = tuple(levels)
        which = {self.spec.n_levels: " all", 1: ""}.get(len(levels), f" {len(levels)} levels")
        name = f"train{which} at {learning_rate:g}"
        operation = replace(self.train, name=name, learning_rate=learning_rate)
        return StageStep(operation=operation, levels=levels)

    def rates(self, levels: Sequence[int]) -> tuple[float, ...]:
        """The grid; its highest rate for single levels only: on several it was the worst."""
        return self.learning_rates if len(levels) == 1 else self.learning_rates[:-1]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A schedule to the horizon.

    Attributes:
        settings: what it is, JSON-able, for reports.
        path: (task, replica seed) -> its stages.
        patience: end after so many stages without a better val metric; None: at a length that is
            the same for all tasks.
        probed: it uses the probes of the start, which are then charged.
        least: the shortest length at which it is what its name says, >= 1.
    """

    settings: Mapping[str, Any]
    path: Callable[[str, int], StagePath]
    patience: int | None = None
    probed: bool = False
    least: int = 1

    def walk(
        self, bench: Bench, task: str, replica: int, length: int | None = None
    ) -> list[Episode]:
        """The fine-tunings after 0, 1, ... stages, to `length` or where patience ends."""

        def stop(state: State) -> bool:
            idle = len(state.path) - len(state.best_path)
            return self.patience is not None and idle >= self.patience

        spec = replace(bench.spec, probed=self.probed)
        path = self.path(task, replica)[:length]
        return walk(spec, bench.stages, task, replica, path, stop=stop)


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A baseline that has made its choices.

    Attributes:
        player: how it fine-tunes a task.
        settings: what it chose, JSON-able.
    """

    player: Player
    settings: Mapping[str, Any] = field(default_factory=dict)


Baseline = Callable[[Bench], Chosen]
