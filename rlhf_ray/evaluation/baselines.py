"""What a learned policy is held against: schedules in the same engine, under the same account.

One small function per baseline; it chooses its learning rate and length on the val tasks and gives
back how it fine-tunes a task. Running them is left to `running`.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.digests import derive_seed
from rlhf_ray.errors import unknown_name
from rlhf_ray.evaluation.bench import Baseline, Bench, Candidate, Chosen, CountedStages
from rlhf_ray.evaluation.choosing import ACCURACY, Choice, choose, plan_halving, race, settle
from rlhf_ray.evaluation.judging import Utility
from rlhf_ray.evaluation.optimum import best_fine_tuning
from rlhf_ray.evaluation.rollouts import Episode, play
from rlhf_ray.evaluation.task_search import asha, check_installed, tpe
from rlhf_ray.operations import Train
from rlhf_ray.outcomes import StagePath, StageStep
from rlhf_ray.policies.schedules import moves
from rlhf_ray.process import State, start_request

ALWAYS = ("fixed", "full", "full_best", "head", "random")
"""The baselines that every report holds."""

SEARCHING = ("asha", "tpe")
"""Those that search on the test tasks themselves; they need the extra `search`."""

ON_REQUEST = (*SEARCHING, "optimum")
"""Not among "all": they carry out many stages on every test task."""

PATIENCE = 2
"""Stages without a better val metric after which early stopping stops."""

PULLS = (1e-3, 1e-2, 1e-1)
"""Strengths of L2-SP that are tried."""


# -- schedules -------------------------------------------------------------------------------------


def _always(path: Sequence[StageStep]) -> Callable[[str, int], StagePath]:
    return lambda task, replica: tuple(path)


def _repeated(
    bench: Bench, levels: Sequence[int], *, patience: int | None = None
) -> list[Candidate]:
    """The same levels in every stage, one candidate per learning rate."""
    return [
        Candidate(
            settings={
                "levels": [bench.spec.levels[level] for level in levels],
                "learning_rate": rate,
            },
            path=_always([bench.stage(rate, levels)] * bench.horizon),
            patience=patience,
        )
        for rate in bench.rates(levels)
    ]


def _others(bench: Bench) -> list[Candidate]:
    """The search's operations that do not train, at every level that they are open to."""
    names = bench.spec.levels
    others = [o for o in bench.spec.operations if not isinstance(o, Train)]
    return [
        Candidate(
            settings={
                "levels": [names[i] for i in move.step(len(names)).levels],
                "operation": move.operation.name,
            },
            path=_always([move.step(len(names))] * bench.horizon),
        )
        for move in moves(others, len(names))
    ]


def _growing(bench: Bench, sets: Sequence[Sequence[int]]) -> list[Candidate]:
    """One set of levels after another, the last one to the horizon; one per learning rate."""
    sets = [*sets, *[sets[-1]] * bench.horizon][: bench.horizon]
    return [
        Candidate(
            settings={"learning_rate": rate},
            path=_always([bench.stage(rate, levels) for levels in sets]),
        )
        for rate in bench.rates(sets[-1])
    ]


def _as_chosen(bench: Bench, choice: Choice, **more: Any) -> Chosen:
    candidate = choice.candidate
    length = bench.horizon if candidate.patience else choice.length
    ending = {"patience": candidate.patience} if candidate.patience else {"length": length}

    def player(task: str, replica: int) -> Episode:
        return candidate.walk(bench, task, replica, length)[-1]

    settings = {**candidate.settings, **ending, "val_utility": choice.utility, **more}
    return Chosen(player=player, settings=settings)


def _chosen(
    bench: Bench, candidates: Sequence[Candidate], utility: Utility | None = None
) -> Chosen:
    return _as_chosen(bench, choose(bench, candidates, utility or bench.utility))


# -- the baselines ---------------------------------------------------------------------------------


def fixed(bench: Bench) -> Chosen:
    """One operation, learning rate and length for all tasks, tuned on the train tasks.

    Training one level, from one up, or all; or any other operation of the search. Successive
    halving spends at most `max_stages` distinct stages on the train tasks; the three best are
    settled on the val tasks.
    """
    trainings = (_repeated(bench, levels) for levels in bench.level_sets)
    candidates = [*itertools.chain.from_iterable(trainings), *_others(bench)]
    plan = plan_halving(len(candidates), len(bench.train_tasks), bench.horizon, bench.max_stages)
    rng = np.random.default_rng(derive_seed(bench.seed, "fixed"))
    order = [bench.train_tasks[i] for i in rng.permutation(len(bench.train_tasks))]
    runners = sorted(rng.permutation(len(candidates))[: plan.n_candidates].tolist())
    counted = CountedStages(bench.stages)
    finalists = race(
        replace(bench, stages=counted),
        [candidates[i] for i in runners],
        order,
        plan.rounds,
        bench.utility,
        length=plan.length,
    )
    choice = settle(bench, finalists, bench.utility)
    return _as_chosen(bench, choice, tuning_stages=counted.distinct)


def full(bench: Bench) -> Chosen:
    """All levels, chosen by utility."""
    return _chosen(bench, _repeated(bench, range(bench.spec.n_levels)))


def full_best(bench: Bench) -> Chosen:
    """All levels, chosen by accuracy, with early stopping on val; every stage counts."""
    candidates = _repeated(bench, range(bench.spec.n_levels), patience=PATIENCE)
    return _chosen(bench, candidates, ACCURACY)


def head(bench: Bench) -> Chosen:
    """The last level only."""
    return single_level(bench, bench.spec.n_levels - 1)


def single_level(bench: Bench, level: int) -> Chosen:
    """One level only."""
    return _chosen(bench, _repeated(bench, [level]))


def random(bench: Bench) -> Chosen:
    """Uniformly random open actions of the process."""

    def player(task: str, replica: int) -> Episode:
        rng = np.random.default_rng(derive_seed(bench.seed, "random", task, replica))

        def decide(state: State, mask: NDArray[np.int8]) -> int:
            return int(rng.choice(np.flatnonzero(mask)))

        return play(bench.spec, decide, bench.stages, task, replica)

    return Chosen(player=player)


def lp_ft(bench: Bench) -> Chosen:
    """The head first, then all levels at no higher a learning rate (Kumar et al. 2022)."""
    n = bench.spec.n_levels
    candidates = [
        Candidate(
            settings={"head_rate": first, "learning_rate": rate, "head_stages": k},
            path=_always(
                [bench.stage(first, [n - 1])] * k
                + [bench.stage(rate, range(n))] * (bench.horizon - k)
            ),
            least=min(k + 1, bench.horizon),
        )
        for first in bench.learning_rates[-2:]
        for rate in bench.rates(range(n))
        for k in (1, 2)
        if rate <= first and k < max(bench.horizon, 2)
    ]
    return _chosen(bench, candidates)


def gradual_last_first(bench: Bench) -> Chosen:
    """Gradual unfreezing from the head down (Howard and Ruder 2018)."""
    n = bench.spec.n_levels
    return _chosen(bench, _growing(bench, [range(level, n) for level in reversed(range(n))]))


def gradual_first_last(bench: Bench) -> Chosen:
    """Gradual unfreezing from the input up (Lee et al. 2023)."""
    n = bench.spec.n_levels
    return _chosen(bench, _growing(bench, [range(level + 1) for level in range(n)]))


def auto_rgn(bench: Bench) -> Chosen:
    """All levels, learning rates scaled by relative gradient norm over its maximum.

    Auto-RGN of Lee et al. 2023 ("Surgical fine-tuning improves adaptation to distribution
    shifts"), per level instead of per tensor and with the norms of the start, charged as a probe.
    """
    levels = range(bench.spec.n_levels)

    def scaled(rate: float) -> Callable[[str, int], StagePath]:
        def path(task: str, replica: int) -> StagePath:
            start = bench.stages.outcome(start_request(task, replica)).outcome
            norms = start.descriptors["gradient_norm"]
            top = max(norms) or 1.0
            # three decimals: what differs by rounding only must stay one stage
            scales = tuple(round(norm / top, 3) for norm in norms)
            step = bench.stage(rate, levels)
            assert isinstance(step.operation, Train)
            operation = replace(step.operation, level_scales=scales)
            return (StageStep(operation=operation, levels=step.levels),) * bench.horizon

        return path

    return _chosen(
        bench,
        [
            Candidate(settings={"learning_rate": rate}, path=scaled(rate), probed=True)
            for rate in bench.rates(levels)
        ],
    )


def l2_sp(bench: Bench) -> Chosen:
    """All levels, pulled towards the pretrained weights (Li et al. 2018)."""
    levels = range(bench.spec.n_levels)
    candidates = []
    for pull, rate in itertools.product(PULLS, bench.rates(levels)):
        step = bench.stage(rate, levels)
        assert isinstance(step.operation, Train)
        operation = replace(step.operation, l2_sp=pull)
        candidates.append(
            Candidate(
                settings={"learning_rate": rate, "l2_sp": pull},
                path=_always([StageStep(operation=operation, levels=step.levels)] * bench.horizon),
            )
        )
    return _chosen(bench, candidates)


def optimum(bench: Bench) -> Chosen:
    """Per task the best of all paths of up to 3 stages, by utility on val: knows by hindsight."""

    def player(task: str, replica: int) -> Episode:
        return best_fine_tuning(
            bench.spec, bench.stages, bench.utility, task, replica, threads=bench.threads
        )

    return Chosen(player=player)


BASELINES: dict[str, Baseline] = {
    "fixed": fixed,
    "full": full,
    "full_best": full_best,
    "head": head,
    "random": random,
    "lp_ft": lp_ft,
    "gradual_last_first": gradual_last_first,
    "gradual_first_last": gradual_first_last,
    "auto_rgn": auto_rgn,
    "l2_sp": l2_sp,
    "asha": asha,
    "tpe": tpe,
    "optimum": optimum,
}
"""Name -> baseline; besides, there is `level:<name>` for every level."""


def baselines_for(names: Iterable[str], levels: Sequence[str]) -> dict[str, Baseline]:
    """The baselines always shown and those asked for, in the order of reports.

    Args:
        names: of baselines; "all": all but `ON_REQUEST`.
        levels: the suite's level names.

    Raises:
        InputError: no such baseline, with the nearest; or the package that it needs is missing.
    """
    known = dict(BASELINES)
    for i, level in enumerate(levels):
        known[f"level:{level}"] = lambda bench, i=i: single_level(bench, i)
    wanted = set(ALWAYS)
    for name in names:
        if name != "all" and name not in known:
            raise unknown_name("baseline", name, ("all", *known))
        if name in SEARCHING:
            check_installed(name)
        wanted |= set(known) - set(ON_REQUEST) if name == "all" else {name}
    return {name: baseline for name, baseline in known.items() if name in wanted}
