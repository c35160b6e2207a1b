"""What stages will cost, before they are carried out: plain data that travels between processes.

The account is that of `costs`, so a price is what the outcome will say, but for two things that are
known afterwards only: what an operation charges for work of its own (`StageSession.charge`), and
that a stage which leaves levels as they were (`Align`) is evaluated from above them.
"""

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rlhf_ray.engine.costs import FlopModel, stage_flops
from rlhf_ray.outcomes import StagePath


@dataclass(frozen=True, kw_only=True, eq=False)
class FlopTable:
    """FLOPs per example as a `FlopModel` counted them; see there."""

    usable: tuple[bool, ...]
    forwards: Mapping[tuple[int, int], float]
    train_steps: Mapping[tuple[int, ...], float]
    output: float
    aligns: Mapping[tuple[int, ...], tuple[float, float]]

    def forward(self, start: int, stop: int) -> float:
        """Of an eval-mode run between usable boundaries; stop = L: the output."""
        return 0.0 if start == stop else self.forwards[start, stop]

    def train_step(self, levels: tuple[int, ...]) -> float:
        """Of a training step of some levels."""
        return self.train_steps[levels]

    def output_step(self) -> float:
        """Of the loss and its gradient as functions of the output layer alone."""
        return self.output

    def align(self, levels: tuple[int, ...]) -> tuple[float, float]:
        """Of aligning levels in turn, each where it helps: per example, and once."""
        return self.aligns[levels]


@dataclass(frozen=True, kw_only=True, eq=False)
class StagePrices:
    """FLOPs of a path's last stage: `prices(task, path)`.

    Attributes:
        tables: per task.
        sizes: per task: examples in the train split, and those evaluated after each stage.
    """

    tables: Mapping[str, FlopTable]
    sizes: Mapping[str, tuple[int, int]]

    def __call__(self, task: str, path: StagePath) -> float:
        """The price of a path's last stage on a task; the path is not empty."""
        n_train, n_val = self.sizes[task]
        table, last = self.tables[task], path[-1]
        return stage_flops(
            table,
            [step.operation.passes(step.levels, n_train) for step in path],
            n_train=n_train,
            n_val=n_val,
            own=last.operation.flops(table, last.levels, n_train),
        ).total


def flop_table(
    flops: FlopModel,
    level_sets: Iterable[tuple[int, ...]],
    aligned: Iterable[tuple[int, ...]],
) -> FlopTable:
    """Counts all that a stage may run that trains, or aligns, one of some sets of levels."""
    ends = [*(b for b, can in enumerate(flops.usable) if can), len(flops.usable)]
    return FlopTable(
        usable=flops.usable,
        forwards={pair: flops.forward(*pair) for pair in itertools.combinations(ends, 2)},
        train_steps={levels: flops.train_step(levels) for levels in level_sets},
        output=flops.output_step(),
        aligns={levels: flops.align(levels) for levels in aligned},
    )
