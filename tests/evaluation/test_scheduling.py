from collections import Counter

from synthetic import SyntheticStages, spec_of

from rlhf_ray.evaluation.judging import Utility
from rlhf_ray.evaluation.scheduling import (
    MetSchedule,
    by_weights,
    candidate_moves,
    chosen,
    describe,
    most_walks,
    tuned_schedules,
)
from rlhf_ray.operations import Align, Fit, default_operations
from rlhf_ray.outcomes import StagePath
from rlhf_ray.policies.schedules import decisions

OPERATIONS = [*default_operations(), Align(name="align"), Fit(name="fit")]
SPEC = spec_of(3, horizon=4, operations=OPERATIONS)
TASKS = [f"train{i}" for i in range(8)]
UTILITY = Utility(tuning_cost=0.02, switch_cost=0.002)


def metric(gains: dict[tuple[str, int], float]):  # type: ignore[no-untyped-def]
    """Every stage adds the gain of its operation and lowest level; tasks differ a little."""

    def of(path: StagePath, task: str) -> float:
        spread = 0.001 * int(task[-1]) * len(path)
        found = 0.5 + spread
        for i, stage in enumerate(path):
            again = any(stage == earlier for earlier in path[:i])
            known = gains.get((stage.operation.name, stage.levels[0]), 0.0)
            # what is not training has its effect once
            found += 0.0 if again and not stage.operation.name.startswith("train") else known
        return found

    return of


def tuned(gains: dict[tuple[str, int], float], **changes: object) -> tuple[str, SyntheticStages]:
    stages = SyntheticStages(metric=metric(gains))
    found = tuned_schedules(
        SPEC, lambda name: stages, tasks=TASKS, utility=UTILITY, seed=0, threads=1, **changes,  # type: ignore[arg-type]
    )  # fmt: skip
    return describe(SPEC, chosen(found.candidates, UTILITY)), stages


def test_the_best_training_follows_what_is_worth_doing_before_it() -> None:
    gains = {("train_mid", 2): 0.05, ("train_low", 1): 0.02, ("align", 0): 0.2, ("align", 1): 0.01}
    assert tuned(gains)[0] == "align conv, train_mid late x 3"


def test_a_schedule_is_as_long_as_pays() -> None:
    assert tuned({("fit", 2): 0.2, ("train_high", 2): 0.001})[0].startswith("fit late")
    assert tuned({})[0] == "none"


def test_most_walks_are_as_many_as_there_are_where_all_that_is_tried_helps() -> None:
    trainings, others = candidate_moves(SPEC.operations, 3)
    assert {m.operation.name for m in others} == {"refit", "align", "fit"}
    n_most = most_walks(len(trainings), len(others), n_tasks=len(TASKS), horizon=4)
    gains = {("align", 0): 0.2, ("align", 1): 0.1, ("fit", 2): 0.05, ("train_mid", 2): 0.04}
    for known in ({}, gains, {("refit", 0): 0.2}):
        stages = SyntheticStages(metric=metric(known))
        found = tuned_schedules(
            SPEC, lambda name: stages, tasks=TASKS, utility=UTILITY, seed=0, threads=1,  # noqa: B023
        )  # fmt: skip
        assert len(found.walks) <= n_most
    one = [o for o in OPERATIONS if o.name not in ("refit", "fit", "align")] + [OPERATIONS[-1]]
    spec = spec_of(3, horizon=4, operations=one)
    train = [operation.name for operation in one if operation.name.startswith("train")]
    alike = {(name, level): 0.1 for name in train for level in range(3)}
    stages = SyntheticStages(metric=metric({("fit", 2): 0.2, **alike}))
    tasks = [f"train{i}" for i in range(10)] + [f"other{i}" for i in range(8)]
    found = tuned_schedules(
        spec, lambda name: stages, tasks=tasks, utility=UTILITY, seed=0, threads=1
    )
    trainings, others = candidate_moves(one, 3)
    n_most = most_walks(len(trainings), len(others), n_tasks=len(tasks), horizon=4)
    assert len(others) == 1 and len(found.walks) == n_most


def test_a_race_goes_on_with_those_that_keep_up() -> None:
    """Of all trainings one gains much: no other meets more than the first two tasks."""
    gains = {("train_mid", 2): 0.1, ("train_low", 1): 0.05}
    stages = SyntheticStages(metric=metric(gains))
    found = tuned_schedules(
        SPEC, lambda name: stages, tasks=TASKS, utility=UTILITY, seed=0, threads=1
    )
    met = Counter(describe(SPEC, walk.moves) for walk in found.walks)
    assert met["train_mid late x 4"] == len(TASKS)
    assert {n for words, n in met.items() if words.endswith("x 4")} == {2, len(TASKS)}


def test_without_skip_a_schedule_stays_at_the_first_level() -> None:
    spec = spec_of(3, horizon=4, operations=[o for o in OPERATIONS if o.name != "skip"])
    stages = SyntheticStages(metric=metric({("train_mid", 0): 0.1, ("train_mid", 2): 0.2}))
    found = tuned_schedules(
        spec, lambda name: stages, tasks=TASKS, utility=UTILITY, seed=0, threads=1
    )
    schedule = chosen(found.candidates, UTILITY)
    assert schedule and {move.level for move in schedule} == {0}
    assert {spec.decode(row[0])[0].name for row in decisions(spec, schedule)} <= {
        "train_mid",
        "stop",
    }


def test_no_walk_is_repeated() -> None:
    _, stages = tuned({("train_mid", 2): 0.05, ("fit", 2): 0.1})
    asked = [
        (request.task, tuple((step.operation.name, step.levels) for step in request.path))
        for request in stages.stages_asked()
    ]
    whole = [key for key in asked if len(key[1]) == SPEC.settings.horizon]
    assert len(whole) == len(set(whole))


def test_dearer_switches_and_stages_choose_other_schedules_without_a_stage_more() -> None:
    stages = SyntheticStages(metric=metric({("refit", 0): 0.1, ("train_mid", 2): 0.04}))
    found = tuned_schedules(
        SPEC, lambda name: stages, tasks=TASKS, utility=UTILITY, seed=0, threads=1,
    ).candidates  # fmt: skip
    asked = len(stages.stages_asked())

    def words(**weights: float) -> str:
        return describe(SPEC, by_weights(chosen(found, UTILITY), found, Utility(**weights)))

    assert words(tuning_cost=0.02, switch_cost=0.002) == "refit, train_mid late x 3"
    assert words(tuning_cost=0.02, switch_cost=0.2) == "refit"
    assert words(tuning_cost=5.0, switch_cost=0.0) == "none"
    assert words(tuning_cost=0.065, switch_cost=0.002) == "train_mid late x 4"
    figures = {"scores": (0.5, 0.6), "costs": (0.1, 0.2), "switches": (0.0, 0.0)}
    twins = [MetSchedule(moves=(move,), **figures) for move in chosen(found, UTILITY)[:2]]
    assert by_weights(twins[1].moves, twins, UTILITY) == twins[1].moves  # no better: not another
    assert len(stages.stages_asked()) == asked
    assert chosen((), UTILITY) == ()
