"""Baselines that search on the new task itself: ASHA and TPE, by Optuna. They know nothing before.

Both look for a schedule: which levels (one, from one up, all), which learning rate, how many
stages. They decide by utility on the task's val split. What was carried out is sunk: they return
the best model met, at the cost of all that they tried. Optuna is asked and told in this thread: a
Tune run per task would start processes for seconds of work. It comes with the extra `search` and is
imported when a search begins.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING

from rlhf_ray.digests import derive_seed
from rlhf_ray.errors import InputError
from rlhf_ray.evaluation.bench import Bench, Chosen
from rlhf_ray.evaluation.rollouts import Episode, Tried, walk
from rlhf_ray.outcomes import StagePath
from rlhf_ray.process import State, affordable

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.study import Study
    from optuna.trial import Trial

REDUCTION = 2
"""Of the schedules that reach a rung of ASHA (1, 2, 4, ... stages), one in so many goes on."""

IDLE = 20
"""Proposals in a row that ask for nothing new, after which a search ends."""

Method = Callable[[int], "tuple[BaseSampler, BasePruner]"]
"""A seed -> what proposes schedules, and what cuts them short."""


def check_installed(baseline: str) -> None:
    """Raises InputError unless Optuna is there for a baseline that needs it."""
    if find_spec("optuna") is None:
        raise InputError(
            f"baseline {baseline} must have its package installed, got no module 'optuna'. "
            "Install it: pip install 'rlhf_ray[search]'."
        )


def asha(bench: Bench) -> Chosen:
    """Asynchronous successive halving (Li et al. 2020) of random schedules, a stage at a time.

    Optuna's variant: a schedule that falls behind at a rung is dropped for good.
    """

    def method(seed: int) -> "tuple[BaseSampler, BasePruner]":
        from optuna.pruners import SuccessiveHalvingPruner
        from optuna.samplers import RandomSampler

        halving = SuccessiveHalvingPruner(min_resource=1, reduction_factor=REDUCTION)
        return RandomSampler(seed=seed), halving

    return _searching(bench, "asha", method, proposes_length=False)


def tpe(bench: Bench) -> Chosen:
    """Tree-structured Parzen estimator (Bergstra et al. 2011); a fifth of the stages at random."""

    def method(seed: int) -> "tuple[BaseSampler, BasePruner]":
        from optuna.pruners import NopPruner
        from optuna.samplers import TPESampler

        n_random = max(1, bench.search_stages // 5)
        return TPESampler(seed=seed, n_startup_trials=n_random), NopPruner()

    return _searching(bench, "tpe", method, proposes_length=True)


def _searching(bench: Bench, name: str, method: Method, *, proposes_length: bool) -> Chosen:
    def player(task: str, replica: int) -> Episode:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it tells of every study
        sampler, pruner = method(derive_seed(bench.seed, name, task, replica) % 2**32)
        study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
        return _search(bench, study, task, replica, proposes_length)

    return Chosen(player=player, settings={"search_stages": bench.search_stages})


def _search(
    bench: Bench, study: "Study", task: str, replica: int, proposes_length: bool
) -> Episode:
    """The best fine-tuning that was met, charged with everything that was tried."""
    tried = Tried(bench.spec, bench.stages)
    best, idle = walk(bench.spec, tried, task, replica, ())[0], 0
    while idle < IDLE and not _spent(bench, tried):
        n_before, trial = tried.n_stages, study.ask()
        path = _proposed(bench, trial, proposes_length)
        found = walk(
            bench.spec, tried, task, replica, path, stop=_ending(bench, trial, path, tried)
        )
        study.tell(trial, _utility(bench, found[-1].state))
        # of equals the first, so the shortest; what was tried costs the same whichever it is
        best = max([best, *found], key=lambda episode: _utility(bench, episode.state, sunk=True))
        idle = 0 if tried.n_stages > n_before else idle + 1
    return tried.charged(best)


def _proposed(bench: Bench, trial: "Trial", proposes_length: bool) -> StagePath:
    sets = bench.level_sets
    levels = sets[trial.suggest_categorical("levels", tuple(range(len(sets))))]
    place = trial.suggest_int("learning_rate", 0, len(bench.learning_rates) - 1)
    rates = bench.rates(levels)  # a grid, so that searches share stages with other baselines
    length = trial.suggest_int("length", 1, bench.horizon) if proposes_length else bench.horizon
    return (bench.stage(rates[min(place, len(rates) - 1)], levels),) * length


def _ending(bench: Bench, trial: "Trial", path: StagePath, tried: Tried) -> Callable[[State], bool]:
    """Where to leave a schedule: dropped at a rung, or no stage left for the next step."""

    def stop(state: State) -> bool:
        done = len(state.path)
        if done:
            trial.report(_utility(bench, state), done)
            if trial.should_prune():
                return True
        if path[: done + 1] in tried:
            return False
        sunk = replace(state, cost=tried.cost)
        return _spent(bench, tried) or not affordable(bench.spec, sunk, path[done])

    return stop


def _spent(bench: Bench, tried: Tried) -> bool:
    budget = bench.spec.settings.budget
    over = budget is not None and tried.cost >= budget
    return over or tried.n_stages >= bench.search_stages


def _utility(bench: Bench, state: State, *, sunk: bool = False) -> float:
    """On val; `sunk`: its cost is paid already."""
    cost = 0.0 if sunk else state.cost
    return bench.utility.of(bench.spec.score(state.best), cost, state.switches)
