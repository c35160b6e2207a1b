"""The true optimum of a task: the best fine-tuning in its whole tree to a small depth."""

from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_ray.evaluation.exhaustive import distinct_steps
from rlhf_ray.evaluation.judging import Utility
from rlhf_ray.evaluation.rollouts import THREADS, Episode, Stages, concurrently, walk
from rlhf_ray.outcomes import StageRequest, StageStep
from rlhf_ray.process import ProcessSpec, State, affordable, start_request, start_state, with_stage

MAX_DEPTH = 3
"""Stages: a tree has (effects)^depth nodes, 7^3 for two levels and the default operations."""


@dataclass(frozen=True, kw_only=True)
class _Node:
    """A state, and the cheapest way to be there with each level acting last.

    Attributes:
        state: its level and switches are not used.
        ways: last acting level -> (switches so far, acting level of each stage).
    """

    state: State
    ways: Mapping[int, tuple[int, tuple[int, ...]]]

    @property
    def cheapest(self) -> tuple[int, tuple[int, ...]]:
        """The way of fewest switches."""
        return min(self.ways.values())

    def reach(self, level: int) -> tuple[int, tuple[int, ...]]:
        """The cheapest hand-over to a level."""
        switches, acting = min((n + abs(level - at), path) for at, (n, path) in self.ways.items())
        return switches, (*acting, level)


def acting_levels(spec: ProcessSpec, step: StageStep) -> list[int]:
    """The levels at which some operation of the process does what a stage does."""
    wanted = step.operation.settings()
    return [
        level
        for level in range(spec.n_levels)
        if any(
            operation.applies(level, spec.n_levels)
            and operation.levels(level, spec.n_levels) == step.levels
            and operation.settings() == wanted
            for operation in spec.operations
        )
    ]


def best_fine_tuning(
    spec: ProcessSpec,
    stages: Stages,
    utility: Utility,
    task: str,
    replica: int,
    *,
    depth: int = MAX_DEPTH,
    threads: int = THREADS,
) -> Episode:
    """The fine-tuning of up to `depth` stages that has the highest utility on val.

    Args:
        spec: the process; its horizon and budget hold.
        stages: carries the tree out, layer by layer.
        utility: what is best.
        task: name of the task.
        replica: replica seed.
        depth: stages at most.
        threads: stages in flight at once.
    """
    start = stages.outcome(start_request(task, replica)).outcome
    root = _Node(state=start_state(spec, start, task, replica, level=0), ways={0: (0, ())})
    steps = distinct_steps(spec.operations, spec.n_levels)
    moves = [(step, acting_levels(spec, step)) for step in steps]

    def expand(item: tuple[_Node, tuple[StageStep, list[int]]]) -> _Node:
        node, (step, acting) = item
        path = (*node.state.path, step)
        outcome = stages.outcome(StageRequest(task=task, replica=replica, path=path)).outcome
        return _Node(
            state=with_stage(spec, node.state, step.operation, step.levels, outcome),
            ways={level: node.reach(level) for level in acting},
        )

    def value(node: _Node) -> float:
        state = node.state
        return utility.of(spec.score(state.best), state.cost, node.cheapest[0])

    nodes, layer = [root], [root]
    for _ in range(min(depth, spec.settings.horizon)):
        items = [
            (node, move)
            for node in layer
            for move in moves
            if affordable(spec, node.state, move[0])
        ]
        layer = concurrently(expand, items, threads=threads)
        nodes += layer
    best = max(nodes, key=value)
    return walk(spec, stages, task, replica, best.state.path, acting=best.cheapest[1])[-1]
