"""A schedule: one sequence of operations for all tasks, and what a level does to follow it.

What a careful engineer would settle on for a family of tasks without looking at the single one. A
policy with a schedule departs from it where its values say so surely (`networks`). No Ray here.

Dimension letters: L levels, H stages of the horizon, A actions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_ray.digests import digest
from rlhf_ray.operations import Operation, Skip, Stop
from rlhf_ray.outcomes import StagePath, StageStep
from rlhf_ray.process import ProcessSpec

PROGRESS = "stages done / horizon"
"""The feature that tells how far a schedule has been carried out."""


@dataclass(frozen=True, kw_only=True)
class Move:
    """One stage of a schedule: an operation at the level that acts."""

    operation: Operation
    level: int

    def step(self, n_levels: int) -> StageStep:
        """The stage."""
        return StageStep(
            operation=self.operation, levels=self.operation.levels(self.level, n_levels)
        )


Schedule = tuple[Move, ...]


def moves(operations: Sequence[Operation], n_levels: int) -> list[Move]:
    """All stages that a level can ask for, those alike in effect once, by operation, then level."""
    found: dict[str, Move] = {}
    for operation in operations:
        for level in range(n_levels):
            levels = operation.levels(level, n_levels)
            if levels and operation.applies(level, n_levels):
                effect = digest(operation.settings(), list(levels))
                found.setdefault(effect, Move(operation=operation, level=level))
    return list(found.values())


def placed(schedule: Sequence[Move], n_levels: int) -> Schedule:
    """The same stages, each asked for where it takes the fewest switches, from level 0 on.

    An operation may change the same levels whichever of several acts (`Fit`, "all").
    """
    found: list[Move] = []
    for move in schedule:
        here = found[-1].level if found else 0
        levels = move.operation.levels(move.level, n_levels)
        alike = [
            level
            for level in range(n_levels)
            if move.operation.applies(level, n_levels)
            and move.operation.levels(level, n_levels) == levels
        ]
        level = min(alike, key=lambda level: abs(level - here))
        found.append(Move(operation=move.operation, level=level))
    return tuple(found)


def path_of(schedule: Schedule, n_levels: int) -> StagePath:
    """The stages of a schedule."""
    return tuple(move.step(n_levels) for move in schedule)


def decisions(spec: ProcessSpec, schedule: Schedule) -> tuple[tuple[int, ...], ...]:
    """The action that follows a schedule, by stages done (H rows) and acting level (L).

    The level of the next stage carries it out and keeps the turn; others skip to it, or stop where
    there is no `skip`; behind the end all stop. So a switch is decided on, and paid for, when what
    came before it is known.
    """
    n_levels = spec.n_levels
    place = {
        kind: i
        for i, operation in enumerate(spec.operations)
        for kind in (Stop, Skip)
        if isinstance(operation, kind)
    }

    def action(done: int, level: int) -> int:
        move = schedule[done] if done < len(schedule) else None
        if move is None or (move.level != level and Skip not in place):
            return place[Stop] * n_levels + level
        if move.level != level:
            return place[Skip] * n_levels + move.level
        return spec.operations.index(move.operation) * n_levels + level

    done_H = range(spec.settings.horizon)
    return tuple(tuple(action(i, level) for level in range(n_levels)) for i in done_H)


def as_json(spec: ProcessSpec, schedule: Schedule) -> list[dict[str, Any]]:
    """A schedule as plain data, with names, for records and reports."""
    return [
        {"operation": move.operation.name, "level": spec.levels[move.level]} for move in schedule
    ]


def from_json(spec: ProcessSpec, data: Sequence[dict[str, Any]]) -> Schedule:
    """Reads what `as_json` gave."""
    operations = {operation.name: operation for operation in spec.operations}
    return tuple(
        Move(operation=operations[move["operation"]], level=spec.levels.index(move["level"]))
        for move in data
    )
