"""`rr.run_baselines`: the baselines alone, in this process, on a suite of the user's choice."""

from collections.abc import Callable, Iterable, Sequence

from rlhf_ray.config import SearchConfig, with_defaults
from rlhf_ray.engine.stages import Engine
from rlhf_ray.engine.support import supported
from rlhf_ray.evaluation.judging import Utility
from rlhf_ray.evaluation.running import BaselineResults
from rlhf_ray.evaluation.running import run_baselines as run_on
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
        Per baseline its runs on the tasks, and the settings that it chose.

    Raises:
        InputError: no such task or baseline, or no val tasks to choose on.
    """
    config = with_defaults(config or SearchConfig(), suite.defaults)
    chosen = [suite.task(name).name for name in tasks or [t.name for t in suite.test_tasks]]
    engine = Engine(suite, config.engine_settings())
    metric = suite.train_tasks[0].metric
    assert isinstance(metric, Metric)
    spec = process_spec(
        tuple(suite.levels),
        supported(suite, config.operations(), asked=config.only_operations)[0],
        engine,
        metric,
        config.observer(suite),
        config.process_settings(),
    )
    store = TreeStore(open_storage(config.storage_path, check=True))
    return run_on(
        spec,
        LocalStages(engine, store),
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
