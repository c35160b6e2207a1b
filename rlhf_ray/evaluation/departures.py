"""Whether a policy may leave its schedule: only if that has paid on the train tasks. No Ray here.

What its networks promise of a departure is learned from a few dozen episodes; what it gives is
measured. Most of its stages were carried out while the policy learned.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_ray.evaluation.choosing import REPLICA
from rlhf_ray.evaluation.judging import Utility
from rlhf_ray.evaluation.rollouts import THREADS, Stages, concurrently, roll_out
from rlhf_ray.policies.observations import Observer
from rlhf_ray.policies.policy import Policy
from rlhf_ray.process import ProcessSpec, State


@dataclass(frozen=True, kw_only=True)
class Departures:
    """What leaving its schedule gave a policy, as utility under its own cost weights.

    Attributes:
        gain: against the schedule followed to its end, mean over tasks; probes are charged.
        standard_error: of that mean; 0 with one task.
        n_tasks: how many there were.
        n_stages: what both ways asked for; most was carried out before.
    """

    gain: float
    standard_error: float
    n_tasks: int
    n_stages: int

    @property
    def paid(self) -> bool:
        """Whether the gain is more than its standard error."""
        return self.gain > self.standard_error


def departures(
    policy: Policy,
    spec: ProcessSpec,
    observer: Observer,
    stages: Stages,
    *,
    tasks: Sequence[str],
    utility: Utility,
    threads: int = THREADS,
) -> Departures:
    """Plays a policy on tasks as it decides, and as its schedule says, on the first replica seed.

    Args:
        policy: with a schedule; may leave it.
        spec: the process it was made for.
        observer: what it sees.
        stages: carries the stages out.
        tasks: names, at least one; those that it learned on.
        utility: by the cost weights that it learned under; on val splits.
        threads: fine-tunings in flight at once.
    """

    def played(one: Policy, task: str) -> State:
        return roll_out(one.as_charged(spec), observer, one.act, stages, task, REPLICA)[0]

    faithful = policy.faithful()
    asked = [(one, task) for task in tasks for one in (policy, faithful)]
    ends = concurrently(lambda pair: played(*pair), asked, threads=threads)
    found = [utility.of(spec.score(end.best), end.cost, end.switches) for end in ends]
    gains = [left - kept for left, kept in zip(found[::2], found[1::2], strict=True)]
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    return Departures(
        gain=statistics.mean(gains),
        standard_error=spread / math.sqrt(len(gains)),
        n_tasks=len(gains),
        n_stages=sum(len(end.path) for end in ends),
    )
