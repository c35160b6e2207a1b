"""A provider of stages with made-up figures: exact numbers, and a record of what was asked."""

import threading
from collections.abc import Callable, Sequence

from rlhf_ray.digests import digest
from rlhf_ray.operations import Operation, Train, default_operations
from rlhf_ray.outcomes import Outcome, StagePath, StageRequest, StageStep
from rlhf_ray.process import ProcessSettings, ProcessSpec
from rlhf_ray.tree.tally import Answer

START = 0.5
"""Val metric of the pretrained model; its evaluation costs 0.1 full stages, the probes 0.4."""


def spec_of(
    n_levels: int = 2,
    *,
    horizon: int = 3,
    operations: Sequence[Operation] | None = None,
    probed: bool = False,
    higher_is_better: bool = True,
    **settings: object,
) -> ProcessSpec:
    """A process whose full stage has 100 FLOPs."""
    return ProcessSpec(
        levels=("conv", "mid", "late", "head")[:n_levels] if n_levels != 2 else ("conv", "head"),
        operations=tuple(operations or default_operations()),
        reference_flops=100.0,
        probed=probed,
        higher_is_better=higher_is_better,
        settings=ProcessSettings(horizon=horizon, **settings),  # type: ignore[arg-type]
    )


def step(*levels: int, rate: float = 1e-3) -> StageStep:
    """A stage that trains levels."""
    return StageStep(operation=Train(name=f"train {rate:g}", learning_rate=rate), levels=levels)


def price(task: str, path: StagePath) -> float:
    """What the last stage of a path costs below, in FLOPs."""
    return 50.0 * len(path[-1].levels) + 10.0


def learns(path: StagePath, task: str) -> float:
    """0.1 per stage on the head at rate 1e-3, less elsewhere; falls after the third stage."""
    metric = START
    for number, stage in enumerate(path):
        rate = stage.operation.settings().get("learning_rate")  # none to align or fit
        gain = 0.1 if stage.levels[-1] == stage.levels[0] else 0.06
        metric += (gain if rate == 1e-3 else 0.02) * (1 if number < 3 else -1)
    return metric


class SyntheticStages:
    """Answers by a function of path and task; a stage costs 0.5 per level and 0.1 to evaluate.

    Args:
        metric: (path, task) -> val metric; on test 0.05 less.
        diverges: (path) -> whether the last stage does.
    """

    def __init__(
        self,
        metric: Callable[[StagePath, str], float] = learns,
        diverges: Callable[[StagePath], bool] = lambda path: False,
        norms: tuple[float, ...] = (0.5, 1.0),
    ) -> None:
        self._metric = metric
        self._diverges = diverges
        self._norms = norms
        self._lock = threading.Lock()
        self.asked: list[StageRequest] = []

    def outcome(self, request: StageRequest, namespace: str = "") -> Answer:
        with self._lock:
            self.asked.append(request)
        metric = self._metric(request.path, request.task)
        if request.kind == "test":
            return Answer(outcome=Outcome(key="", kind="test", metric=metric - 0.05, loss=1.0))
        flops = {"train": 0.0, "fill": 0.0, "evaluate": 10.0, "probe": 40.0}
        if request.path:
            flops |= {"train": 50.0 * len(request.path[-1].levels), "probe": 0.0}
        outcome = Outcome(
            key=digest(
                request.task,
                request.replica,
                [[s.operation.settings(), list(s.levels)] for s in request.path],
            ),
            metric=metric,
            loss=1 - metric,
            entropy=0.5,
            train_loss=0.7,
            diverged=bool(request.path) and self._diverges(request.path),
            flops=flops,
            time_s=2.0 if request.path else 1.0,
            descriptors={
                "gradient_norm": self._norms,
                "mean_shift": (0.0,) * len(self._norms),
                "variance_shift": (0.0,) * len(self._norms),
            },
        )
        return Answer(outcome=outcome, executed=True)

    def stages_asked(self) -> list[StageRequest]:
        """Requests that carry out a stage, in order."""
        return [r for r in self.asked if r.path and r.kind == "stage"]
