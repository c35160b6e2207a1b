"""`rr.run_baselines`: the baselines alone, in this process, on a suite of the user's choice."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from rlhf_ray.config import SearchConfig, with_defaults
from rlhf_ray.engine.stages import Engine
from rlhf_ray.engine.support import supported
from rlhf_ray.errors import InputError
from rlhf_ray.evaluation.judging import Utility
from rlhf_ray.evaluation.rollouts import TolerantStages
from rlhf_ray.evaluation.running import BaselineResults, choose_and_play
from rlhf_ray.policies.finetuning import process_spec
from rlhf_ray.storage import open_storage
from rlhf_ray.tasks import Metric, Suite
from rlhf_ray.tree.stage_tree import LocalStages
from rlhf_ray.tree.store import TreeStore


def run_baselines(
    suite: Suite,
    *,
    tasks: Sequence[str] | None = None,
    names: Iterable[str] = (),
    config: SearchConfig | None = None,
    max_stages: int | None = 200,
    progress: Callable[[str], None] | None = None,
) -> BaselineResults:
    """Fine-tunes tasks by fixed schedules, in the engine and under the account of a search.

    Needs no Ray. Stages that a search on the same storage path carried out are not run again.

    Args:
        suite: settings are chosen on its train and val tasks.
        tasks: names of the tasks to report on; None: the suite's test tasks.
        names: baselines besides those always shown, or "all".
        config: horizon, operations, utility, replica seeds, storage path, stages of searching
            baselines; as for `search`.
        max_stages: distinct stages that `fixed` may use on the train tasks; None: no bound.
        progress: called with short lines.

    Returns:
        Per baseline its runs on the tasks, and the settings that it chose; the stages that failed,
        each of which counts as diverged.

    Raises:
        InputError: no such task or baseline, no val tasks to choose on, or metrics of two
            directions.
        FailedStageError: a task's start, or a report on its test split, fails.
    """
    check_kinds(suite, config)
    config = with_defaults(config or SearchConfig(), suite.defaults)
    names_of_tasks = [task.name for task in suite.test_tasks] if tasks is None else tasks
    chosen = [suite.task(name).name for name in names_of_tasks]
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"tasks must be distinct, at least one, got tasks={list(chosen)}.")
    metric = common_metric(suite)
    engine = Engine(suite, config.engine_settings())
    spec = process_spec(
        tuple(suite.levels),
        supported(suite, config.operations(), asked=config.only_operations)[0],
        engine,
        metric,
        config.observer(suite),
        config.process_settings(),
    )
    store = TreeStore(open_storage(config.storage_path, check=True))
    stages = TolerantStages(LocalStages(engine, store, retry=False))
    results = choose_and_play(
        spec,
        stages,
        train_tasks=[task.name for task in suite.train_tasks],
        val_tasks=[task.name for task in suite.val_tasks],
        test_tasks=chosen,
        names=(*config.baselines, *names),
        replicas=range(config.judge_replicas),
        utility=Utility(tuning_cost=config.utility_cost, switch_cost=config.utility_switch),
        seed=config.seed,
        max_stages=max_stages,
        search_stages=config.search_stages,
        training=config.all_operations(),
        threads=1,  # one engine, one thread
        progress=progress,
    )
    if stages.failures and progress is not None:
        n, first = len(stages.failures), stages.failures[0]
        progress(f"{n} stages failed and count as diverged; the first: {first}")
    return replace(results, failures=stages.failures)


def check_kinds(suite: object, config: object) -> None:
    """Raises InputError unless they are a suite and a configuration, or None for the default."""
    given = [("suite", suite, Suite)]
    given += [] if config is None else [("config", config, SearchConfig)]
    for name, value, kind in given:
        if not isinstance(value, kind):
            raise InputError(
                f"{name} must be a rlhf_ray.{kind.__name__}, got a {type(value).__name__}. "
                f"Make one: rlhf_ray.{kind.__name__}(...)."
            )


def common_metric(suite: Suite) -> Metric:
    """The metric of a suite's first task; raises InputError unless all have its direction."""
    metrics = [task.metric for task in suite.tasks() if isinstance(task.metric, Metric)]
    if len({metric.higher_is_better for metric in metrics}) > 1:
        names = sorted({metric.name for metric in metrics})
        raise InputError(f"all tasks' metrics must have one direction, got {', '.join(names)}.")
    return metrics[0]
