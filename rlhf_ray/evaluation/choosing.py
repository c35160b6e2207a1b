"""How a baseline's settings are chosen: candidates walked over tasks, halved, and settled on val.

Frugal with stages: a candidate is walked once to the horizon and every length is read off; the
weaker half is dropped before the others meet more tasks. Knows no test task: there is none here.

Dimension letters: C candidates, T tasks, N lengths.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.evaluation.bench import Bench, Candidate
from rlhf_ray.evaluation.judging import Utility, finite_report
from rlhf_ray.evaluation.rollouts import concurrently

REPLICA = 0
"""The replica seed that settings are chosen on."""

FINALISTS = 3
"""Candidates that a race on train tasks leaves for the val tasks."""

ACCURACY = Utility(tuning_cost=0.0, switch_cost=0.0)
"""The metric alone, whatever it cost."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A candidate with its length, and the utility it was chosen for."""

    candidate: Candidate
    length: int
    utility: float


def utilities(
    bench: Bench,
    candidates: Sequence[Candidate],
    tasks: Sequence[str],
    utility: Utility,
    *,
    length: int,
    on_test: bool,
) -> NDArray[np.float64]:
    """Utility of every candidate on every task at every length from 1.

    Args:
        bench: what there is to work with.
        candidates: C of them.
        tasks: T names.
        utility: what counts.
        length: walk this far, N.
        on_test: on the tasks' test splits, as judging does; else on their val splits.

    Returns:
        float64 (C, T, N); a walk that ended early keeps its last value. Minus infinity at lengths
        below a candidate's least.
    """

    def judged(pair: tuple[Candidate, str]) -> list[float]:
        candidate, task = pair
        found = candidate.walk(bench, task, REPLICA, length)
        tested: dict[int, float] = {}
        values = []
        for n in range(1, length + 1):
            if n < candidate.least:
                values.append(-math.inf)
                continue
            # under patience there is one way to end, and that is where the walk has ended
            state = found[-1 if candidate.patience else min(n, len(found) - 1)].state
            best = len(state.best_path)
            if on_test and best not in tested:
                tested[best] = finite_report(bench.stages, state)
            metric = tested[best] if on_test else state.best
            values.append(utility.of(bench.spec.score(metric), state.cost, state.switches))
        return values

    pairs = list(itertools.product(candidates, tasks))
    values = concurrently(judged, pairs, threads=bench.threads)
    return np.array(values).reshape(len(candidates), len(tasks), length)


def settle(bench: Bench, candidates: Sequence[Candidate], utility: Utility) -> Choice:
    """The best candidate and length by mean utility on the val tasks (their test splits)."""
    values_CTN = utilities(
        bench, candidates, bench.val_tasks, utility, length=bench.horizon, on_test=True
    )
    values_CN = values_CTN.mean(1)
    # ties go to the earlier candidate and the shorter length
    best, n = divmod(int(np.argmax(values_CN)), bench.horizon)
    return Choice(candidate=candidates[best], length=n + 1, utility=float(values_CN[best, n]))


def race(
    bench: Bench,
    candidates: Sequence[Candidate],
    tasks: Sequence[str],
    rounds: Sequence[tuple[int, int]],
    utility: Utility,
    *,
    length: int,
) -> list[Candidate]:
    """Drops the weaker candidates round by round, judged on the tasks' val splits.

    Args:
        bench: what there is to work with.
        candidates: who runs.
        tasks: in the order in which they are met.
        rounds: (tasks met so far, candidates that stay) after each round.
        utility: what counts, at each candidate's best length.
        length: walk this far.

    Returns:
        Those left, in the order given.
    """
    alive = list(candidates)
    met = 0
    values_CTN = np.zeros((len(alive), 0, length))
    for n_tasks, n_keep in rounds:
        new = utilities(bench, alive, tasks[met:n_tasks], utility, length=length, on_test=False)
        values_CTN, met = np.concatenate([values_CTN, new], axis=1), n_tasks
        figures_C = values_CTN.mean(1).max(1)
        kept = sorted(np.argsort(-figures_C, kind="stable")[:n_keep].tolist())
        alive, values_CTN = [alive[i] for i in kept], values_CTN[kept]
    return alive


def choose(bench: Bench, candidates: Sequence[Candidate], utility: Utility) -> Choice:
    """Halves the candidates on half of the val tasks, then settles on all of them."""
    half = [(math.ceil(len(bench.val_tasks) / 2), math.ceil(len(candidates) / 2))]
    rounds = half if len(candidates) > 2 else []
    alive = race(bench, candidates, bench.val_tasks, rounds, utility, length=bench.horizon)
    return settle(bench, alive, utility)


@dataclass(frozen=True, kw_only=True)
class Halving:
    """A plan for `race` within a bound of stages: so many candidates, walks of this length."""

    n_candidates: int
    length: int
    rounds: tuple[tuple[int, int], ...]
    stages: int


def plan_halving(
    n_candidates: int, n_tasks: int, length: int, max_stages: int | None, keep: int = FINALISTS
) -> Halving:
    """Successive halving (Jamieson and Talwalkar 2016): half the candidates, twice the tasks.

    Gives up tasks first when stages are short, then length, then candidates.

    Args:
        n_candidates: who would run.
        n_tasks: tasks there are.
        length: stages of a full walk.
        max_stages: bound on all walks together; None: no bound.
        keep: candidates left at the end.
    """
    bound = n_candidates * n_tasks * length if max_stages is None else max_stages
    options = itertools.product(
        range(n_candidates, 0, -1), range(length, 0, -1), range(n_tasks, 0, -1)
    )
    for candidates, steps, first in options:
        plan = _halving(candidates, steps, first, n_tasks, bound, keep)
        if plan.stages <= bound:
            return plan
    return Halving(n_candidates=min(keep, n_candidates), length=length, rounds=(), stages=0)


def _halving(
    n_candidates: int, length: int, first: int, n_tasks: int, bound: int, keep: int
) -> Halving:
    sizes, met, stages = [n_candidates], [0], 0
    while sizes[-1] > keep:
        met.append(min(n_tasks, first * 2 ** (len(met) - 1)))
        stages += sizes[-1] * (met[-1] - met[-2]) * length
        sizes.append(max(keep, math.ceil(sizes[-1] / 2)))
    if len(met) > 1 and stages <= bound:  # what is left goes to the last round
        price = sizes[-2] * length
        more = min((bound - stages) // price, n_tasks - met[-1])
        met[-1] += more
        stages += more * price
    rounds = tuple(zip(met[1:], sizes[1:], strict=True))
    return Halving(n_candidates=n_candidates, length=length, rounds=rounds, stages=stages)
