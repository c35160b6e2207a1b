"""What a learned policy is held against: schedules in the same engine, under the same account.

One small function per baseline; it chooses its learning rate and length on the val tasks and gives
back how it fine-tunes a task. The test tasks are met once, when all have chosen.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.digests import derive_seed
from rlhf_ray.errors import InputError, unknown_name
from rlhf_ray.evaluation.choosing import (
    ACCURACY,
    REPLICA,
    Bench,
    Candidate,
    Choice,
    CountedStages,
    choose,
    plan_halving,
    race,
    settle,
)
from rlhf_ray.evaluation.judging import Player, Run, Utility, compare, summary_of
from rlhf_ray.evaluation.optimum import best_fine_tuning
from rlhf_ray.evaluation.rollouts import THREADS, Episode, Stages, play
from rlhf_ray.operations import Train
from rlhf_ray.outcomes import StagePath, StageStep
from rlhf_ray.process import ProcessSpec, State, start_request

ALWAYS = ("fixed", "full", "full_best", "head", "random")
"""The baselines that every report holds."""

PATIENCE = 2
"""Stages without a better val metric after which early stopping stops."""


PULLS = (1e-3, 1e-2, 1e-1)
"""Strengths of L2-SP that are tried."""


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """A baseline that has made its choices.

    Attributes:
        player: how it fine-tunes a task.
        settings: what it chose, JSON-able.
    """

    player: Player
    settings: Mapping[str, Any] = field(default_factory=dict)


Baseline = Callable[[Bench], Chosen]


# -- schedules -------------------------------------------------------------------------------------


def _train(bench: Bench, learning_rate: float, levels: Iterable[int]) -> StageStep:
    operation = replace(
        bench.train, name=f"train at {learning_rate:g}", learning_rate=learning_rate
    )
    return StageStep(operation=operation, levels=tuple(levels))


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
            path=_always([_train(bench, rate, levels)] * bench.horizon),
            patience=patience,
        )
        for rate in _rates(bench, levels)
    ]


def _rates(bench: Bench, levels: Sequence[int]) -> tuple[float, ...]:
    """The grid; its highest rate only for single levels (on several it was worst throughout)."""
    return bench.learning_rates if len(levels) == 1 else bench.learning_rates[:-1]


def _growing(bench: Bench, sets: Sequence[Sequence[int]]) -> list[Candidate]:
    """One set of levels after another, the last one to the horizon; one per learning rate."""
    sets = [*sets, *[sets[-1]] * bench.horizon][: bench.horizon]
    return [
        Candidate(
            settings={"learning_rate": rate},
            path=_always([_train(bench, rate, levels) for levels in sets]),
        )
        for rate in _rates(bench, sets[-1])
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
    """One set of levels, learning rate and length for all tasks, tuned on the train tasks.

    The levels: one, from one up, or all. Successive halving spends at most `max_stages` distinct
    stages on the train tasks; the three best are settled on the val tasks.
    """
    n = bench.spec.n_levels
    sets = [(level,) for level in range(n)] + [tuple(range(level, n)) for level in range(n - 1)]
    candidates = [candidate for levels in sets for candidate in _repeated(bench, levels)]
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
                [_train(bench, first, [n - 1])] * k
                + [_train(bench, rate, range(n))] * (bench.horizon - k)
            ),
        )
        for first in bench.learning_rates[-2:]
        for rate in _rates(bench, range(n))
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
            step = _train(bench, rate, levels)
            assert isinstance(step.operation, Train)
            operation = replace(step.operation, level_scales=scales)
            return (StageStep(operation=operation, levels=step.levels),) * bench.horizon

        return path

    return _chosen(
        bench,
        [
            Candidate(settings={"learning_rate": rate}, path=scaled(rate), probed=True)
            for rate in _rates(bench, levels)
        ],
    )


def l2_sp(bench: Bench) -> Chosen:
    """All levels, pulled towards the pretrained weights (Li et al. 2018)."""
    levels = range(bench.spec.n_levels)
    candidates = []
    for pull, rate in itertools.product(PULLS, _rates(bench, levels)):
        step = _train(bench, rate, levels)
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
    "optimum": optimum,
}
"""Name -> baseline; besides, there is `level:<name>` for every level."""


def baselines_for(names: Iterable[str], levels: Sequence[str]) -> dict[str, Baseline]:
    """The baselines always shown and those asked for, in the order of reports.

    Args:
        names: of baselines; "all": all but `optimum`, which carries out whole trees.
        levels: the suite's level names.

    Raises:
        InputError: no such baseline; names the nearest.
    """
    known = dict(BASELINES)
    for i, level in enumerate(levels):
        known[f"level:{level}"] = lambda bench, i=i: single_level(bench, i)
    wanted = set(ALWAYS)
    for name in names:
        if name != "all" and name not in known:
            raise unknown_name("baseline", name, ("all", *known))
        wanted |= set(known) - {"optimum"} if name == "all" else {name}
    return {name: baseline for name, baseline in known.items() if name in wanted}


# -- running them ----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class BaselineResults:
    """What the baselines did.

    Attributes:
        runs: method -> its runs on the test tasks, ordered by task, then replica seed.
        settings: method -> what it chose, `stages`: distinct stages it asked for to choose, and of
            those that choose, `val`: its figures on the val tasks (see `summary_of`), on seed 0.
    """

    runs: Mapping[str, list[Run]]
    settings: Mapping[str, Mapping[str, Any]]


def run_baselines(
    spec: ProcessSpec,
    stages: Stages,
    *,
    train_tasks: Sequence[str],
    val_tasks: Sequence[str],
    test_tasks: Sequence[str],
    names: Iterable[str] = (),
    replicas: Iterable[int] = (0,),
    utility: Utility | None = None,
    seed: int = 0,
    max_stages: int | None = None,
    threads: int = THREADS,
    progress: Callable[[str], None] | None = None,
) -> BaselineResults:
    """Lets every baseline choose on train and val tasks, then plays all on the test tasks.

    Args:
        spec: the decision process of the search; horizon, budget and cost hold for all.
        stages: carries stages out; those in the tree cost nothing new.
        train_tasks: names; `fixed` is tuned on them.
        val_tasks: names; decisions on their val split, figures on their test split.
        test_tasks: names; asked for only when everything is chosen.
        names: baselines besides those always shown; "all".
        replicas: replica seeds of the test tasks; choices are made on seed 0.
        utility: what is chosen by.
        seed: of the random baseline and the order of train tasks.
        max_stages: distinct stages that `fixed` may use on the train tasks; None: no bound.
        threads: fine-tunings in flight at once; 1 for a provider that is not thread-safe.
        progress: called with short lines.

    Raises:
        InputError: no such baseline, or no train or val task to choose on.
    """
    baselines = baselines_for(names, spec.levels)
    if not (train_tasks and val_tasks):
        raise InputError("baselines must have train and val tasks to choose on, got "
                         f"{len(train_tasks)} and {len(val_tasks)}.")  # fmt: skip
    tell = progress or (lambda line: None)
    template, rates = _training_of(spec)
    bench = Bench(
        spec=replace(spec, probed=False),
        stages=stages,
        train_tasks=tuple(train_tasks),
        val_tasks=tuple(val_tasks),
        utility=utility or Utility(),
        seed=seed,
        max_stages=max_stages,
        train=template,
        learning_rates=rates,
        threads=threads,
    )
    chosen: dict[str, Chosen] = {}
    settings: dict[str, Mapping[str, Any]] = {}
    for name, baseline in baselines.items():
        tell(f"baseline {name}: choosing its settings")
        counted = CountedStages(stages)
        chosen[name] = baseline(replace(bench, stages=counted))
        settings[name] = {**chosen[name].settings, "stages": counted.distinct}
        if "val_utility" in settings[name]:  # all of it was carried out to choose: nothing new
            settings[name] = {**settings[name], "val": _on_val(bench, name, chosen[name].player)}
    tell(f"{len(chosen)} baselines on {len(test_tasks)} test tasks")
    runs = compare(
        {name: choice.player for name, choice in chosen.items()},
        bench.spec,
        stages,
        tasks=test_tasks,
        replicas=replicas,
        utility=bench.utility,
        threads=threads,
    )
    return BaselineResults(runs=runs, settings=settings)


def _on_val(bench: Bench, name: str, player: Player) -> dict[str, float]:
    """The figures of a chosen baseline on the val tasks, at the seed that choices are made on."""
    runs = compare(
        {name: player},
        bench.spec,
        bench.stages,
        tasks=bench.val_tasks,
        replicas=(REPLICA,),
        utility=bench.utility,
        threads=bench.threads,
    )
    return summary_of(runs[name])


def _training_of(spec: ProcessSpec) -> tuple[Train, tuple[float, ...]]:
    """How the search trains, and its learning rates with one higher."""
    found = [operation for operation in spec.operations if isinstance(operation, Train)]
    if not found:
        names = [operation.name for operation in spec.operations]
        raise InputError(f"baselines need an operation that trains, got operations={names}. "
                         "Add an rlhf_ray.Train.")  # fmt: skip
    rates = sorted({operation.learning_rate for operation in found})
    higher = float(f"{rates[-1] * 10 / 3:.3g}")
    return found[0], (*rates, higher)
