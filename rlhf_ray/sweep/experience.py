"""What trials learn from without having played it, with rewards weighed anew. No Ray.

From the walks that the sweep's schedule was chosen by: their outcomes are kept. And, where trials
share their experience, from each other: a trial that is done leaves its episodes under its folder,
a few numbers each; the plan says which task, replica and first level an episode has, and what its
stages gave lies in the tree. Whoever learns from either walks the process along its actions with
reward weights of its own.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.algorithms.counterfactuals import counterfactuals
from rlhf_ray.algorithms.exploration import epsilon_at, exploring_action
from rlhf_ray.algorithms.handover import Transitions, Turn
from rlhf_ray.algorithms.settings import AlgorithmSettings
from rlhf_ray.digests import digest
from rlhf_ray.evaluation.choosing import REPLICA
from rlhf_ray.evaluation.rollouts import Decide, Stages, concurrently, play
from rlhf_ray.evaluation.scheduling import Walk
from rlhf_ray.operations import Stop
from rlhf_ray.outcomes import Outcome, StageRequest
from rlhf_ray.policies.observations import Observer
from rlhf_ray.policies.schedules import decisions
from rlhf_ray.process import ProcessSpec, State
from rlhf_ray.storage import Storage
from rlhf_ray.sweep.results import trial_folder
from rlhf_ray.tree.tally import Answer

if TYPE_CHECKING:
    from rlhf_ray.env import EpisodePlan

EPISODES_FILE = "episodes.json"
"""Beside a trial's record, where trials share their experience."""


@dataclass(frozen=True, kw_only=True)
class PlayedEpisode:
    """An episode of a trial; with the sweep's plan, all there is to know of it.

    Attributes:
        number: of the episode, in every trial's plan.
        actions: as taken.
        drawn: how all of them were drawn (`drawing`); empty where not all were.
    """

    number: int
    actions: tuple[int, ...]
    drawn: str


def played_episode(
    settings: AlgorithmSettings, number: int, actions: Sequence[int]
) -> PlayedEpisode:
    """An episode that a trial with these settings has played."""
    drawn = drawing(settings) if is_random(settings, number, len(actions)) else ""
    return PlayedEpisode(number=number, actions=tuple(actions), drawn=drawn)


def drawing(settings: AlgorithmSettings) -> str:
    """A digest of what drawn actions depend on, epsilon apart: trials' schedules may differ."""
    return digest(
        settings.seed,
        settings.explore_by,
        settings.persistence,
        settings.adherence,
        settings.schedule,
    )[:8]


def is_random(settings: AlgorithmSettings, number: int, n_steps: int) -> bool:
    """Whether a trial with these settings draws all actions of an episode of so many steps."""
    epsilon = epsilon_at(
        number,
        final=settings.epsilon,
        n_episodes=settings.n_episodes,
        decay_fraction=settings.decay_fraction,
        warm_up=settings.warm_up,
    )
    any_mask = np.ones(1, np.int8)  # which actions are open says nothing of whether one is drawn
    return all(
        exploring_action(settings.seed, number, t, any_mask, epsilon, by=settings.explore_by)
        is not None
        for t in range(n_steps)
    )


# -- on the storage


def write_episodes(
    storage: Storage, sweep: str, trial: str, episodes: Sequence[PlayedEpisode]
) -> None:
    """Leaves a trial's episodes to the others."""
    data = [[episode.number, episode.drawn, *episode.actions] for episode in episodes]
    text = json.dumps(data, separators=(",", ":")) + "\n"
    storage.write_bytes(f"{trial_folder(sweep, trial)}/{EPISODES_FILE}", text.encode())


def read_episodes(storage: Storage, sweep: str, trial: str) -> list[PlayedEpisode]:
    """What `write_episodes` wrote; none where a trial has not come so far."""
    data = storage.read_json(f"{trial_folder(sweep, trial)}/{EPISODES_FILE}")
    return [
        # earlier versions wrote 0 or 1: that all were drawn does not say how
        PlayedEpisode(
            number=number, drawn=drawn if isinstance(drawn, str) else "", actions=tuple(actions)
        )
        for number, drawn, *actions in (data if isinstance(data, list) else [])
    ]


def episodes_of_others(
    storage: Storage,
    sweep: str,
    trial: str,
    settings: AlgorithmSettings,
    plan: "EpisodePlan",
) -> dict[str, list[PlayedEpisode]]:
    """By trial, in their order, what the others that are done played and this one may not.

    Left out is what this trial draws alike (common random numbers), and of fine-tunings that went
    alike all but the first: stages are deterministic, so that they tell the same.

    Args:
        storage: holds the sweep.
        sweep: its folder.
        trial: who asks.
        settings: its own.
        plan: of the sweep.
    """
    found: dict[str, list[PlayedEpisode]] = {}
    own = drawing(settings)
    seen: set[tuple[Any, ...]] = set()
    for other in storage.folders(trial_folder(sweep, "").rstrip("/")):
        if other == trial:
            continue  # it was cut off after it had played
        for episode in read_episodes(storage, sweep, other):
            if episode.drawn == own and is_random(settings, episode.number, len(episode.actions)):
                continue
            went = (*plan.draw(episode.number), episode.actions)
            if went not in seen:
                seen.add(went)
                found.setdefault(other, []).append(episode)
    return found


# -- through the process


def learn_from_others(
    algorithm: Any,
    episodes: Mapping[str, Sequence[PlayedEpisode]],
    *,
    spec: ProcessSpec,
    observer: Observer,
    stages: Stages,
    plan: "EpisodePlan",
    counterfactual: bool = False,
) -> dict[str, int]:
    """Gives an algorithm others' episodes to learn from, and says how many.

    Args:
        algorithm: a `HandoverAlgorithm` that has not begun.
        episodes: by trial, as `episodes_of_others` gives them.
        spec: see `rebuilt`.
        observer: likewise.
        stages: likewise.
        plan: likewise.
        counterfactual: also give it what the episodes imply.

    Returns:
        "trials" and "episodes" learned from, and "steps" in them.
    """
    chosen = [episode for played in episodes.values() for episode in played]
    _remembered(algorithm, rebuilt(spec, observer, stages, plan, chosen), counterfactual)
    n_steps = sum(len(episode.actions) for episode in chosen)
    return {"trials": len(episodes), "episodes": len(chosen), "steps": n_steps}


def learn_from_walks(
    algorithm: Any,
    walks: Sequence[Walk],
    *,
    spec: ProcessSpec,
    observer: Observer,
    counterfactual: bool = False,
) -> None:
    """Gives an algorithm the walks of schedules to learn from; no stage is asked for.

    Args:
        algorithm: a `HandoverAlgorithm` that has not begun.
        walks: of any schedules.
        spec: the process, with the trial's own reward weights.
        observer: what policies see.
        counterfactual: also give it what the walks imply.
    """
    tables = {moves: decisions(spec, moves) for moves in {walk.moves for walk in walks}}
    stop = next(i for i, found in enumerate(spec.operations) if isinstance(found, Stop))

    def one(walk: Walk) -> Rebuilt:
        def decide(state: State, mask_A: NDArray[np.int8]) -> int:
            action = tables[walk.moves][len(state.path)][state.level]
            # a walk ends before its schedule where the budget has no room
            known = len(state.path) + 1 < len(walk.outcomes)
            return action if known and mask_A[action] else stop * spec.n_levels + state.level

        return _rebuilt(spec, observer, _Known(walk.outcomes), decide, walk.task, REPLICA, level=0)

    _remembered(algorithm, [one(walk) for walk in walks], counterfactual)  # nobody is waited for


@dataclass(frozen=True)
class _Known:
    """Answers with the outcomes of one path."""

    outcomes: Sequence[Outcome]

    def outcome(self, request: StageRequest) -> Answer:
        return Answer(outcome=self.outcomes[len(request.path)])


@dataclass(frozen=True, kw_only=True)
class Rebuilt:
    """An episode of others under one's own rewards: its turns, and what each implies."""

    turns: list[Turn]
    implied: list[Transitions]


def rebuilt(
    spec: ProcessSpec,
    observer: Observer,
    stages: Stages,
    plan: "EpisodePlan",
    episodes: Sequence[PlayedEpisode],
) -> list[Rebuilt]:
    """Episodes as a trial would have had them that has this process.

    Args:
        spec: the process, with the trial's own reward weights.
        observer: what policies see.
        stages: answers; all that is asked has been asked before.
        plan: of the sweep.
        episodes: of any trials.
    """

    def one(episode: PlayedEpisode) -> Rebuilt:
        actions = iter(episode.actions)
        task, replica, level = plan.draw(episode.number)
        return _rebuilt(
            spec, observer, stages, lambda state, mask_A: next(actions), task, replica, level=level
        )

    return concurrently(one, episodes)


def _remembered(algorithm: Any, episodes: Sequence[Rebuilt], counterfactual: bool) -> None:
    implied = [part for one in episodes for part in one.implied] if counterfactual else []
    algorithm.remember([one.turns for one in episodes], implied)


def _rebuilt(
    spec: ProcessSpec,
    observer: Observer,
    stages: Stages,
    choose: Decide,
    task: str,
    replica: int,
    *,
    level: int,
) -> Rebuilt:
    observed: list[Mapping[str, NDArray[Any]]] = []
    states: list[State] = []
    actions: list[int] = []

    def decide(state: State, mask_A: NDArray[np.int8]) -> int:
        states.append(state)
        observed.append({"features": observer.observe(spec, state), "action_mask": mask_A})
        actions.append(choose(state, mask_A))
        return actions[-1]

    end = play(spec, decide, stages, task, replica, level=level)
    played = list(zip(end.steps, actions, strict=True))
    after = [*states[1:], end.state]
    return Rebuilt(
        turns=[
            Turn(level=step.level, observation=dict(saw), action=action, reward=step.reward)
            for (step, action), saw in zip(played, observed, strict=True)
        ],
        implied=[
            counterfactuals(
                spec, observer, state, action, following.outcome if step.levels else None
            )
            for (step, action), state, following in zip(played, states, after, strict=True)
        ],
    )
