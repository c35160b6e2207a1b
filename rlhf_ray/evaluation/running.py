"""Runs the baselines: all choose on train and val tasks first, then all meet the test tasks."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_ray.errors import InputError
from rlhf_ray.evaluation.baselines import baselines_for
from rlhf_ray.evaluation.bench import SEARCH_STAGES, Bench, Chosen, CountedStages
from rlhf_ray.evaluation.choosing import REPLICA
from rlhf_ray.evaluation.judging import Player, Run, Utility, compare, summary_of
from rlhf_ray.evaluation.rollouts import THREADS, Stages
from rlhf_ray.operations import Operation, Train, default_operations
from rlhf_ray.process import ProcessSpec


@dataclass(frozen=True, kw_only=True)
class BaselineResults:
    """What the baselines did.

    Attributes:
        runs: method -> its runs on the test tasks, ordered by task, then replica seed.
        settings: method -> what it chose, `stages`: distinct stages it asked for to choose, and of
            those that choose, `val`: its figures on the val tasks (see `summary_of`), on seed 0.
        failures: a line per stage that failed, which counts as diverged; in a sweep its tally
            counts them instead.
    """

    runs: Mapping[str, list[Run]]
    settings: Mapping[str, Mapping[str, Any]]
    failures: tuple[str, ...] = ()


def choose_and_play(
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
    search_stages: int = SEARCH_STAGES,
    training: Sequence[Operation] | None = None,
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
        seed: of the random and the searching baselines, and of the order of train tasks.
        max_stages: distinct stages that `fixed` may use on the train tasks; None: no bound.
        search_stages: distinct stages that `asha` and `tpe` may carry out on a task, >= 1; their
            cost is that of all of them.
        training: operations that say how baselines train where none of the search's does; None:
            the package's own.
        threads: fine-tunings in flight at once; 1 for a provider that is not thread-safe.
        progress: called with short lines.

    Raises:
        InputError: no such baseline, no package for it, or no train or val task to choose on.
    """
    baselines = baselines_for(names, spec.levels)
    if not (train_tasks and val_tasks):
        raise InputError("baselines must have train and val tasks to choose on, got "
                         f"{len(train_tasks)} and {len(val_tasks)}.")  # fmt: skip
    tell = progress or (lambda line: None)
    template, rates = _training_of(spec.operations, training or default_operations())
    bench = Bench(
        spec=replace(spec, probed=False),
        stages=stages,
        train_tasks=tuple(train_tasks),
        val_tasks=tuple(val_tasks),
        utility=utility or Utility(),
        seed=seed,
        max_stages=max_stages,
        search_stages=search_stages,
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


def _training_of(
    operations: Sequence[Operation], otherwise: Sequence[Operation]
) -> tuple[Train, tuple[float, ...]]:
    """How the search trains, or else others do, and the learning rates with one higher."""
    found = _trainings(operations) or _trainings(otherwise)
    rates = sorted({operation.learning_rate for operation in found})
    higher = float(f"{rates[-1] * 10 / 3:.3g}")
    # scales would not fit other levels, and a pull is what `l2_sp` is about
    return replace(found[0], level_scales=None, l2_sp=0.0), (*rates, higher)


def _trainings(operations: Sequence[Operation]) -> list[Train]:
    return [operation for operation in operations if isinstance(operation, Train)]
