"""What one stage tells about actions that were not taken: exact transitions without a stage.

A stage's outcome depends on the path alone; who asked for it and to whom was handed over enter the
reward, the acting level and the mask in ways that are known. So a step whose stage has been carried
out implies the transitions of

- the same stage with every other hand-over;
- the same stage asked for by another level, where an operation of it comes to that (`train_all`);
- `skip`, from every level to every other, and `stop`.

With four levels that is some twenty transitions for the price of one, and what differs between them
is just what a level must learn to hand over well. (Hindsight relabelling, of hand-overs instead of
goals: Andrychowicz et al. 2017.) No Ray here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_ray.algorithms.handover import Transitions
from rlhf_ray.operations import Skip, Stop
from rlhf_ray.outcomes import Outcome
from rlhf_ray.policies.observations import Observer
from rlhf_ray.process import ProcessSpec, State, action_mask, advance


@dataclass(frozen=True, kw_only=True, eq=False)
class _Implied:
    features: NDArray[np.float32]
    level: int
    action: int
    reward: float
    after: State


def counterfactuals(
    spec: ProcessSpec, observer: Observer, state: State, action: int, outcome: Outcome | None
) -> Transitions:
    """The transitions that a step implies, its own left out.

    Args:
        spec: the process, of two levels at least; rewards are weighed by its settings.
        observer: what policies see.
        state: the step was taken in, of any level.
        action: that was taken.
        outcome: of its stage; None for `skip` and `stop`.

    Returns:
        N >= 1 transitions, ordered by level, then action.
    """
    implied = list(_implied(spec, observer, state, action, outcome))
    ended = torch.tensor([float(found.after.terminated) for found in implied])
    blank = np.zeros(spec.n_actions, dtype=bool)

    def next_mask(after: State) -> NDArray[np.bool_]:
        return blank if after.terminated else action_mask(spec, after) != 0

    def next_features(after: State) -> NDArray[np.float32]:
        seen = observer.observe(spec, after)
        return np.zeros_like(seen) if after.terminated else seen

    return Transitions(
        features=torch.from_numpy(np.stack([found.features for found in implied])),
        level=torch.tensor([found.level for found in implied]),
        action=torch.tensor([found.action for found in implied]),
        reward=torch.tensor([found.reward for found in implied], dtype=torch.float32),
        next_features=torch.from_numpy(np.stack([next_features(f.after) for f in implied])),
        next_mask=torch.from_numpy(np.stack([next_mask(f.after) for f in implied])),
        next_level=torch.tensor(
            [0 if found.after.terminated else found.after.level for found in implied]
        ),
        terminated=ended,
    )


def _implied(
    spec: ProcessSpec, observer: Observer, state: State, action: int, outcome: Outcome | None
) -> Iterator[_Implied]:
    taken = spec.effects[action // spec.n_levels][state.level]
    for level in range(spec.n_levels):
        here = replace(state, level=level)
        features = observer.observe(spec, here)
        for other in np.flatnonzero(action_mask(spec, here)).tolist():
            if level == state.level and other == action:
                continue
            operation, _ = spec.decode(other)
            free = isinstance(operation, Stop | Skip)
            if not free and spec.effects[other // spec.n_levels][level] != taken:
                continue
            after, step = advance(spec, here, other, None if free else outcome)
            yield _Implied(
                features=features, level=level, action=other, reward=step.reward, after=after
            )
