"""The end of a sweep: the best policy and the baselines on the test tasks, and the account."""

from typing import Any

from rlhf_ray.evaluation.judging import judge
from rlhf_ray.evaluation.running import choose_and_play
from rlhf_ray.evaluation.statistics import against, rows, summarise
from rlhf_ray.policies.finetuning import METHOD
from rlhf_ray.policies.schedules import as_json
from rlhf_ray.progress import Progress
from rlhf_ray.sweep.results import BASELINES_FILE, BEST_POLICY, SearchResult
from rlhf_ray.sweep.scheduling import schedule_tally
from rlhf_ray.sweep.trial import TrialContext
from rlhf_ray.tasks import Suite
from rlhf_ray.tree.tally import TalliedStages, Tally


def sum_up(
    context: TrialContext,
    suite: Suite,
    result: SearchResult,
    stages: TalliedStages,
    *,
    progress: Progress,
) -> dict[str, Any]:
    """Compares on the test tasks, which nothing has touched before, and sums the sweep up.

    Args:
        context: of the sweep.
        suite: gives the tasks.
        result: with its trials done.
        stages: of the driver; its tally counts what the comparison needs.
        progress: told what is under way.

    Returns:
        What `summary.json` holds, but for the wall time.
    """
    config = context.config
    replicas = range(config.judge_replicas)
    test_tasks = [task.name for task in suite.test_tasks]
    best = next(trial for trial in result.trials if trial["name"] == result.best_trial)
    policy = result.best_policy
    policy.write(context.storage, f"{context.sweep}/{BEST_POLICY}")
    trials = [trial for trial in result.trials if trial["status"] == "done"]
    searched = Tally.total(
        [
            schedule_tally(context.storage, context.sweep),
            *(Tally.from_json(trial["stages"]) for trial in trials),
        ]
    )
    progress.phase("baselines")
    baselines = choose_and_play(
        context.spec,
        stages,
        train_tasks=[task.name for task in suite.train_tasks],
        val_tasks=[task.name for task in suite.val_tasks],
        test_tasks=test_tasks,
        names=config.baselines,
        replicas=replicas,
        utility=context.utility,
        seed=config.seed,
        max_stages=searched.distinct,
        search_stages=config.search_stages,
        training=config.all_operations(),
        progress=progress.message,
    )
    progress.phase("policy on the test tasks", total=len(test_tasks) * len(replicas))
    runs = judge(
        policy.as_charged(context.spec),
        context.observer,
        policy.act,
        stages,
        tasks=test_tasks,
        replicas=replicas,
        utility=context.utility,
        method=METHOD,
        progress=lambda done, _: progress.update(done=done),
    )
    n_failed = searched.failed + stages.tally.failed
    if n_failed:
        why = searched.failure or stages.tally.failure
        progress.message(f"{n_failed} stages failed and count as diverged; the first: {why}")
    by_method = {METHOD: runs, **baselines.runs}
    context.storage.write_json(
        f"{context.sweep}/{BASELINES_FILE}",
        {
            "settings": baselines.settings,
            "runs": {name: [run.as_json() for run in mine] for name, mine in by_method.items()},
        },
    )
    return {
        "suite": suite.name,
        "name": context.sweep,
        "seed": config.seed,
        "n_trials": len(result.trials),
        "n_failed": len(result.failures),
        "stages": searched.summary(),
        **_experience(result),
        "stages_of_comparison": stages.tally.summary(),
        "schedule": as_json(context.spec, context.schedule or ()),
        "best": {"trial": best["name"], **best["values"], **best["judged"]},
        "utility": {"tuning_cost": config.utility_cost, "switch_cost": config.utility_switch},
        "methods": summarise(by_method),
        "policy_minus": against(by_method, METHOD),
        "rows": rows(by_method),
        "baseline_settings": baselines.settings,
    }


def _experience(result: SearchResult) -> dict[str, Any]:
    """How many episodes of others each trial learned from, where trials share experience."""
    found = {
        trial["name"]: trial["experience"]["episodes"]
        for trial in result.trials
        if "experience" in trial
    }
    return {"episodes_of_others": found} if found else {}
