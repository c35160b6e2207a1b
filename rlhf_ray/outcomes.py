"""What identifies a stage, and what a stage returns.

A model state is identified by (pretrained model and levels, task, precision, replica seed,
executed path). Hand-overs and skips are not in the path, so whoever reaches the same weights
shares the node.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from rlhf_ray.digests import digest
from rlhf_ray.operations import Operation

SCHEMA_VERSION = 2
"""Part of every key: outcomes of another schema are never mistaken for this one's."""

PRETRAINED = "pretrained"
"""The version of a level that no stage has changed."""


@dataclass(frozen=True, kw_only=True)
class StageStep:
    """One executed operation with the levels it changed (ascending, not empty)."""

    operation: Operation
    levels: tuple[int, ...]


StagePath = tuple[StageStep, ...]


@dataclass(frozen=True, kw_only=True)
class StageRequest:
    """Asks for a model state's outcome: the last stage of `path`, or the start if it is empty.

    Attributes:
        task: name of the suite's task.
        replica: replica seed, >= 0; the start is the same for all.
        path: the stages executed since the pretrained model, the last one being asked for.
        kind: "stage": carry out the stage, judged on val; "test": report the state's test metric.
    """

    task: str
    replica: int = 0
    path: StagePath = ()
    kind: Literal["stage", "test"] = "stage"

    def parent(self) -> "StageRequest":
        """The state that the last stage starts from."""
        return StageRequest(task=self.task, replica=self.replica, path=self.path[:-1])

    def as_kind(self, kind: Literal["stage", "test"]) -> "StageRequest":
        """The same state, asked for something else."""
        return StageRequest(task=self.task, replica=self.replica, path=self.path, kind=kind)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What all keys of a suite have in common.

    Attributes:
        model: digest of the pretrained weights, the structure and the level split.
        levels: level names, input side first.
        tasks: task name -> digest of its data, loss and metric.
        precision: "fp32" or "bf16".
        val_size: how many val examples decisions use.
        source: digest of the source data; "": there are none.
    """

    model: str
    levels: tuple[str, ...]
    tasks: Mapping[str, str]
    precision: str
    val_size: int
    source: str = ""

    def key(self, request: StageRequest) -> str:
        """The digest under which a request's answer is kept."""
        drawn = self.drawn_by(request)
        told = not request.path or any("source" in s.operation.needs for s in request.path)
        return digest(drawn, self.source) if told and self.source else drawn

    def drawn_by(self, request: StageRequest) -> str:
        """What a request's random draws derive from: its key, whatever the source data are."""
        steps = [
            [step.operation.settings(), [self.levels[level] for level in step.levels]]
            for step in request.path
        ]
        return digest(
            SCHEMA_VERSION,
            request.kind,
            self.model,
            self.tasks[request.task],
            self.precision,
            self.val_size,
            request.replica if request.path else 0,
            steps,
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a stage returns. All figures are of the state it leads to.

    Attributes:
        key: identifies the state.
        kind: "stage" or "test"; a "test" outcome has `metric`, `loss` and `time_s` only.
        metric: on val (or on test); in the metric's own direction.
        loss: on val (or on test).
        entropy: mean entropy of the predicted class distribution over its maximum, [0, 1]; 0 where
            the outputs are not class scores.
        train_loss: mean over the second half of the stage's steps; the loss of the gradient probe
            at the start.
        diverged: the stage met NaN or infinity; weights and figures are its parent's.
        flops: executed by a stand-alone fine-tuning: "train", "evaluate", "fill", "probe".
        time_s: measured seconds of the stage on one worker.
        versions: per level, the key of the stage that last changed it.
        descriptors: per-level figures of the start: "gradient_norm", "mean_shift",
            "variance_shift".
        meta: versions and device that computed it; not part of its identity.
    """

    key: str
    kind: Literal["stage", "test"] = "stage"
    metric: float
    loss: float
    entropy: float = 0.0
    train_loss: float = 0.0
    diverged: bool = False
    flops: Mapping[str, float] = field(default_factory=dict)
    time_s: float = 0.0
    versions: tuple[str, ...] = ()
    descriptors: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    meta: Mapping[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Plain data, for the store."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Outcome":
        """Reads what `as_json` gave."""
        lists = {name: tuple(values) for name, values in data["descriptors"].items()}
        return cls(**{**data, "versions": tuple(data["versions"]), "descriptors": lists})


@dataclass(frozen=True, kw_only=True, eq=False)
class LevelState:
    """One level's part of a model state.

    Attributes:
        weights: full names -> parameters and buffers.
        optimizer: state tensors of the level's optimizer as "<slot>/<parameter name>"
            ("exp_avg/0.weight"), empty where none is kept.
        optimizer_name: the optimizer they belong to ("" if none).
    """

    weights: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    optimizer_name: str = ""

    def n_bytes(self) -> int:
        """Memory the tensors take."""
        tensors = [*self.weights.values(), *self.optimizer.values()]
        return sum(value.numel() * value.element_size() for value in tensors)
