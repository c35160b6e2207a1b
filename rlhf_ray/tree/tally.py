"""The account of a search: stages asked for, carried out, and what sharing them saved.

Clients keep tallies; those of several processes are merged. A stage counts as such if it has a
path: evaluations of the start and test reports enter the seconds only.
"""

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rlhf_ray.errors import FailedStageError
from rlhf_ray.outcomes import Outcome, StageRequest

if TYPE_CHECKING:
    from rlhf_ray.tree.stage_tree import Stages


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a provider of stages answers.

    Attributes:
        outcome: the one that stands, whoever carried it out.
        executed: this call carried the request out.
        carried_out: keys of all stages that this call carried out, missing ancestors included.
        recomputed: keys of stages run again for their evicted weights; not in `carried_out`.
        spent_s: seconds of everything that this call ran, recomputations included.
    """

    outcome: Outcome
    executed: bool = False
    carried_out: tuple[str, ...] = ()
    recomputed: tuple[str, ...] = ()
    spent_s: float = 0.0


@dataclass(kw_only=True)
class Tally:
    """Sums over answers; add and merge in any order.

    Attributes:
        logical: stages asked for.
        executed: stages carried out for this client.
        recomputed: stages run again for their evicted weights.
        logical_s: seconds that all requests would have taken without sharing.
        spent_s: seconds of what was run for this client.
        failed: stages asked for that failed, or that go on from one that did.
        failure: why the first of them did; "" if none.
        keys: of the stages met; their number is that of distinct stages.
    """

    logical: int = 0
    executed: int = 0
    recomputed: int = 0
    logical_s: float = 0.0
    spent_s: float = 0.0
    failed: int = 0
    failure: str = ""
    keys: set[str] = field(default_factory=set)

    @property
    def distinct(self) -> int:
        """Distinct stages met."""
        return len(self.keys)

    @property
    def saved_s(self) -> float:
        """Seconds that sharing saved."""
        return self.logical_s - self.spent_s

    def add(self, request: StageRequest, answer: Answer) -> None:
        """Counts one answered request."""
        if request.path and request.kind == "stage":
            self.logical += 1
            self.keys.add(answer.outcome.key)
        self.logical_s += answer.outcome.time_s
        self.executed += len(answer.carried_out)
        self.keys.update(answer.carried_out)
        self.recomputed += len(answer.recomputed)
        self.spent_s += answer.spent_s

    def add_failure(self, error: FailedStageError) -> None:
        """Counts one request for a stage that failed."""
        self.logical += 1
        self.failed += 1
        self.failure = self.failure or str(error)

    def merge(self, other: "Tally") -> None:
        """Adds another client's tally to this one."""
        self.logical += other.logical
        self.executed += other.executed
        self.recomputed += other.recomputed
        self.logical_s += other.logical_s
        self.spent_s += other.spent_s
        self.failed += other.failed
        self.failure = self.failure or other.failure
        self.keys |= other.keys

    @classmethod
    def total(cls, tallies: Iterable["Tally"]) -> "Tally":
        """The sum of tallies."""
        result = cls()
        for tally in tallies:
            result.merge(tally)
        return result

    def as_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it."""
        return {**vars(self), "keys": sorted(self.keys)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Tally":
        """Reads what `as_json` gave."""
        return cls(**{**data, "keys": set(data["keys"])})

    def summary(self) -> dict[str, float]:
        """The figures that reports show."""
        return {
            "logical": self.logical,
            "distinct": self.distinct,
            "executed": self.executed,
            "recomputed": self.recomputed,
            "failed": self.failed,
            "seconds_spent": self.spent_s,
            "seconds_saved": self.saved_s,
        }


class TalliedStages:
    """A provider of stages that keeps a tally of what goes through it. Thread-safe.

    Args:
        stages: who answers.
        tally: where it is counted.
        namespace: which requests follow one another along a path (see `LocalStages.outcome`).
    """

    def __init__(self, stages: "Stages", tally: Tally, namespace: str = "") -> None:
        self._stages = stages
        self._namespace = namespace
        self._lock = threading.Lock()
        self.tally = tally

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def within(self, name: str, tally: Tally) -> "TalliedStages":
        """The same provider in a namespace inside this one's, counted in a tally of its own."""
        return TalliedStages(self._stages, tally, f"{self._namespace}/{name}")

    def outcome(self, request: StageRequest) -> Answer:
        """Answers one request and counts it.

        A stage that fails is answered as one that diverged: with its parent's outcome, flagged and
        free of charge, for nothing of it is kept. What goes on from it fails like it.
        """
        try:
            answer = self._stages.outcome(request, self._namespace)
        except FailedStageError as error:
            if not request.path or request.kind == "test":
                raise  # there is nothing to go on with
            return self._failed(request, error)
        with self._lock:
            self.tally.add(request, answer)
        return answer

    def _failed(self, request: StageRequest, error: FailedStageError) -> Answer:
        with self._lock:
            self.tally.add_failure(error)
        parent = request.parent()
        while True:
            try:
                outcome = self._stages.outcome(parent, self._namespace).outcome
            except FailedStageError:
                if not parent.path:
                    raise
                parent = parent.parent()
                continue
            free = dict.fromkeys(outcome.flops, 0.0)
            return Answer(outcome=replace(outcome, diverged=True, flops=free, time_s=0.0))
