"""What a trial's algorithm is told, and what its policy records of the process. No Ray."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rlhf_ray.algorithms.settings import AlgorithmSettings
from rlhf_ray.evaluation.judging import Utility
from rlhf_ray.evaluation.scheduling import by_weights
from rlhf_ray.operations import Skip, Stop
from rlhf_ray.policies.schedules import PROGRESS, decisions

if TYPE_CHECKING:
    from rlhf_ray.sweep.trial import TrialContext

N_MEMBERS, PESSIMISM, WEIGHT_DECAY = 10, 0.5, 0.1
"""A policy's ensemble, the deviations over it that are taken off its mean, and its networks' decay:
on tasks of unseen families seeds differ less with them (see experiments/LOG.md)."""

BATCH_SIZE, UPDATES_PER_STEP = 128, 1.5
"""With three times as many, trials on `digits` ended lower and shared less."""


def process_record(context: "TrialContext") -> dict[str, Any]:
    """What `finetune` needs of the process a policy was learned in."""
    settings, config = context.spec.settings, context.config
    return {
        "horizon": settings.horizon,
        "performance": settings.performance,
        "cost": settings.cost,
        "budget": settings.budget,
        "groups": list(context.observer.groups),
        "tasks": list(context.observer.tasks),
        "precision": config.precision,
        "val_size": config.val_size,
    }


def own_utility(values: Mapping[str, float]) -> Utility:
    """By the cost weights that a trial learns under."""
    return Utility(
        tuning_cost=values["tuning_cost_weight"], switch_cost=values["switch_cost_weight"]
    )


def algorithm_settings(context: "TrialContext", values: Mapping[str, float]) -> AlgorithmSettings:
    """What a trial's algorithm is told."""
    config, spec = context.config, context.spec
    schedule, progress = None, 0
    if context.schedule is not None:
        own = by_weights(context.schedule, context.candidates, own_utility(values))
        schedule = decisions(spec, own)
        progress = context.observer.names(spec).index(PROGRESS)
    in_flight = min(config.stages_in_flight, config.episodes)
    return AlgorithmSettings(
        gamma=values["gamma"],
        epsilon=values["epsilon"],
        alpha=config.alpha,
        n_episodes=config.episodes,
        warm_up=config.warm_up,
        decay_fraction=config.decay_fraction,
        explore_by=config.explore_by,
        persistence=config.persistence,
        schedule=schedule,
        progress=progress,
        adherence=config.adherence,
        controller=config.controller,
        batch_size=BATCH_SIZE,
        weight_decay=WEIGHT_DECAY,
        n_members=N_MEMBERS,
        pessimism=PESSIMISM,
        updates_per_step=UPDATES_PER_STEP,
        relearn=config.relearn,
        free_actions=tuple(
            action
            for action in range(spec.n_actions)
            if isinstance(spec.decode(action)[0], Skip | Stop)
        ),
        seed=config.seed,
        # ppo learns from what it played once, and so plays more at a time by itself
        episodes_per_iteration=None if config.algorithm == "ppo" else in_flight,
        num_env_runners=config.env_runners,
        num_envs_per_runner=in_flight,
        overrides=config.rllib,
    )
