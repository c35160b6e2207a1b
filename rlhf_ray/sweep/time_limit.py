"""When a sweep is to stop, and stages that no longer answer then. No Ray."""

import time
from dataclasses import dataclass

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.evaluation.rollouts import Stages
from rlhf_ray.outcomes import StageRequest
from rlhf_ray.tree.tally import Answer


class TimeIsUpError(RlhfRayError):
    """A sweep has run as long as it may. What it has carried out is in the tree."""


def is_over(ends: float | None) -> bool:
    """Whether a time on the monotonic clock has come; None: it never does."""
    return ends is not None and time.monotonic() >= ends


@dataclass(frozen=True)
class StagesUntil:
    """Answers requests until the time is up: those under way are waited for, no other begins.

    Attributes:
        stages: carries them out.
        ends: on the monotonic clock; None: no bound.
    """

    stages: Stages
    ends: float | None

    def outcome(self, request: StageRequest) -> Answer:
        """Answers one request.

        Raises:
            TimeIsUpError: it came too late.
        """
        if is_over(self.ends):
            raise TimeIsUpError
        return self.stages.outcome(request)
