"""The schedules of a sweep: met once for all trials, kept in the sweep's folder."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from rlhf_ray.config import SearchConfig
from rlhf_ray.evaluation.scheduling import MetSchedule, Walk, chosen, describe, tuned_schedules
from rlhf_ray.outcomes import Outcome
from rlhf_ray.policies.schedules import PROGRESS, as_json, from_json
from rlhf_ray.process import ProcessSpec
from rlhf_ray.progress import NO_PROGRESS, Progress
from rlhf_ray.storage import Storage
from rlhf_ray.sweep.results import SCHEDULE_FILE, WALKS_FILE
from rlhf_ray.sweep.time_limit import StagesUntil
from rlhf_ray.sweep.trial import TrialContext
from rlhf_ray.tree.tally import TalliedStages, Tally


def has_schedule(config: SearchConfig, n_levels: int) -> bool:
    """Whether a sweep looks for a schedule: `q-learning` and `ppo` have no use for one."""
    return config.schedule and config.algorithm == "dqn" and n_levels > 1


def scheduled(
    context: TrialContext, progress: Progress = NO_PROGRESS, *, ends: float | None = None
) -> TrialContext:
    """The context with a schedule, where the configuration wants one: tuned now, or read.

    Args:
        context: what the trials share.
        progress: told what happens.
        ends: on the monotonic clock; None: no bound.

    Raises:
        TimeIsUpError: it was not tuned by then.
    """
    config, spec = context.config, context.spec
    if not has_schedule(config, spec.n_levels):
        return context
    if PROGRESS not in context.observer.names(spec):
        progress.message("no schedule: policies would need the features of progress to follow it")
        return context
    name = f"{context.sweep}/{SCHEDULE_FILE}"
    record = context.storage.read_json(name)
    if not isinstance(record, dict):
        progress.phase("schedule for all tasks")
        tallies: list[Tally] = []

        def walk(name: str) -> StagesUntil:
            tally = Tally()
            tallies.append(tally)  # append is atomic
            stages = TalliedStages(context.stages, tally, namespace=f"schedule/{name}")
            return StagesUntil(stages, ends)

        tuned = tuned_schedules(
            spec,
            walk,
            tasks=context.plan.tasks,
            utility=context.utility,
            seed=config.seed,
        )
        found = chosen(tuned.candidates, context.utility)
        words = describe(spec, found)
        progress.message(f"schedule: {words}")
        record = {
            "moves": as_json(spec, found),
            "words": words,
            "candidates": [
                {**asdict(candidate), "moves": as_json(spec, candidate.moves)}
                for candidate in tuned.candidates
            ],
            "stages": Tally.total(tallies).as_json(),
        }
        # the schedule last: where it is, the walks are
        context.storage.write_json(f"{context.sweep}/{WALKS_FILE}", _as_json(spec, tuned.walks))
        context.storage.write_json(name, record)
    return replace(
        context,
        schedule=from_json(spec, record["moves"]),
        candidates=tuple(
            MetSchedule(
                moves=from_json(spec, candidate["moves"]),
                scores=tuple(candidate["scores"]),
                costs=tuple(candidate["costs"]),
                switches=tuple(candidate["switches"]),
            )
            for candidate in record["candidates"]
        ),
        walks=_walks(spec, context.storage.read_json(f"{context.sweep}/{WALKS_FILE}")),
    )


def _as_json(spec: ProcessSpec, walks: Sequence[Walk]) -> list[dict[str, Any]]:
    return [
        {
            "moves": as_json(spec, walk.moves),
            "task": walk.task,
            "outcomes": [outcome.as_json() for outcome in walk.outcomes],
        }
        for walk in walks
    ]


def _walks(spec: ProcessSpec, data: Any) -> tuple[Walk, ...]:
    return tuple(
        Walk(
            moves=from_json(spec, walk["moves"]),
            task=walk["task"],
            outcomes=tuple(map(Outcome.from_json, walk["outcomes"])),
        )
        for walk in (data or ())  # none in a sweep begun by a version that did not keep them
    )


def schedule_tally(storage: Storage, sweep: str) -> Tally:
    """What tuning the schedule asked for; empty where there is none."""
    record = storage.read_json(f"{sweep}/{SCHEDULE_FILE}")
    return Tally.from_json(record["stages"]) if isinstance(record, dict) else Tally()
