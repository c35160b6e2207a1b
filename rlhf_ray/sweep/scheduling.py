"""The schedules of a sweep: met once for all trials, kept in the sweep's folder."""

from dataclasses import asdict, replace

from rlhf_ray.evaluation.scheduling import Candidate, chosen, describe, tuned_schedules
from rlhf_ray.policies.schedules import PROGRESS, as_json, from_json
from rlhf_ray.progress import NO_PROGRESS, Progress
from rlhf_ray.storage import Storage
from rlhf_ray.sweep.results import SCHEDULE_FILE
from rlhf_ray.sweep.trial import TrialContext
from rlhf_ray.tree.tally import TalliedStages, Tally


def scheduled(context: TrialContext, progress: Progress = NO_PROGRESS) -> TrialContext:
    """The context with a schedule, where the configuration wants one: tuned now, or read."""
    config, spec = context.config, context.spec
    # what they meet depends on no swept setting; q-learning and ppo have no use for one
    if not config.schedule or config.algorithm != "dqn" or spec.n_levels < 2:
        return context
    if PROGRESS not in context.observer.names(spec):
        progress.message("no schedule: policies would need the features of progress to follow it")
        return context
    name = f"{context.sweep}/{SCHEDULE_FILE}"
    record = context.storage.read_json(name)
    if not isinstance(record, dict):
        progress.phase("schedule for all tasks")
        tallies: list[Tally] = []

        def walk(name: str) -> TalliedStages:
            tally = Tally()
            tallies.append(tally)  # append is atomic
            return TalliedStages(context.stages, tally, namespace=f"schedule/{name}")

        candidates = tuned_schedules(
            spec,
            walk,
            tasks=context.plan.tasks,
            utility=context.utility,
            seed=config.seed,
        )
        found = chosen(candidates, context.utility)
        words = describe(spec, found)
        progress.message(f"schedule: {words}")
        record = {
            "moves": as_json(spec, found),
            "words": words,
            "candidates": [
                {**asdict(candidate), "moves": as_json(spec, candidate.moves)}
                for candidate in candidates
            ],
            "stages": Tally.total(tallies).as_json(),
        }
        context.storage.write_json(name, record)
    return replace(
        context,
        schedule=from_json(spec, record["moves"]),
        candidates=tuple(
            Candidate(
                moves=from_json(spec, candidate["moves"]),
                scores=tuple(candidate["scores"]),
                costs=tuple(candidate["costs"]),
                switches=tuple(candidate["switches"]),
            )
            for candidate in record["candidates"]
        ),
    )


def schedule_tally(storage: Storage, sweep: str) -> Tally:
    """What tuning the schedule asked for; empty where there is none."""
    record = storage.read_json(f"{sweep}/{SCHEDULE_FILE}")
    return Tally.from_json(record["stages"]) if isinstance(record, dict) else Tally()
