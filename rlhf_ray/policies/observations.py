"""What a policy sees: named features, all scaled to about [-1, 1].

The table `FEATURE_GROUPS` is the one place that names them; groups can be switched off. Those of
`DISCRETE_GROUPS` have finitely many values, as tables need: "tabular" is the founding document's
state (level, task), "prefix" the level and the stages carried out. They stand by themselves.

Dimension letters: L levels, F features.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import InputError, unknown_name
from rlhf_ray.outcomes import Outcome
from rlhf_ray.process import ProcessSpec, State, start_state

Feature = tuple[str, float]


def _level(spec: ProcessSpec, state: State) -> list[Feature]:
    return [(f"acting:{name}", float(i == state.level)) for i, name in enumerate(spec.levels)]


def _progress(spec: ProcessSpec, state: State) -> list[Feature]:
    budget, horizon = spec.settings.budget, spec.settings.horizon
    left = 1.0 if budget is None else max(0.0, 1 - state.cost / budget)
    return [
        ("stages done / horizon", len(state.path) / horizon),
        ("cost / horizon", state.cost / horizon),
        ("switches / horizon", state.switches / horizon),
        ("budget left", left),
        ("skipped", float(state.skips > 0)),
    ]


def _history(spec: ProcessSpec, state: State) -> list[Feature]:
    found = []
    for level, name in enumerate(spec.levels):
        found.append((f"times tuned / horizon:{name}", state.tuned[level] / spec.settings.horizon))
        age = len(state.path) - state.last_tuned[level]
        found.append((f"freshness:{name}", 0.5**age if state.last_tuned[level] else 0.0))
    return found


def _figures(spec: ProcessSpec, state: State) -> list[Feature]:
    now, start, before = state.outcome, state.start, state.previous
    return [
        ("metric", squash(now.metric)),
        ("metric at the start", squash(start.metric)),
        ("metric, last change", squash(4 * (now.metric - before.metric))),
        ("metric, below the best", squash(4 * (spec.score(state.best) - spec.score(now.metric)))),
        ("val loss", squash_loss(now.loss)),
        ("val loss at the start", squash_loss(start.loss)),
        ("val loss, last change", 2 * (squash_loss(now.loss) - squash_loss(before.loss))),
        ("train loss", squash_loss(now.train_loss)),
        ("train loss at the start", squash_loss(start.train_loss)),
        ("entropy", now.entropy),
        ("entropy at the start", start.entropy),
        ("diverged", float(now.diverged)),
    ]


def _probe(spec: ProcessSpec, state: State) -> list[Feature]:
    found = []
    norms = [math.log(value + 1e-6) for value in state.start.descriptors["gradient_norm"]]
    middle = sum(norms) / len(norms)
    found.append(("gradient norm, mean", squash(middle / 3)))
    for level, name in enumerate(spec.levels):
        found.append((f"gradient norm:{name}", squash((norms[level] - middle) / 2)))
        shift = state.start.descriptors["mean_shift"][level]
        found.append((f"activation shift:{name}", squash(shift)))
        ratio = state.start.descriptors["variance_shift"][level]
        found.append((f"variance shift:{name}", squash(ratio / 2)))
    return found


FEATURE_GROUPS: dict[str, tuple[str, Callable[[ProcessSpec, State], list[Feature]]]] = {
    "level": ("which level acts, one-hot", _level),
    "progress": ("stages done, cost, switches, what is left of the budget", _progress),
    "history": ("how often and when last each level was tuned", _history),
    "figures": ("metric, losses, entropy: now, at the start, last change", _figures),
    "probe": ("at the start: gradient norm and activation shift per level (charged)", _probe),
}
"""Group -> what it says, and the function that gives its features."""


def _prefix(spec: ProcessSpec, state: State) -> list[Feature]:
    done = [
        (spec.operations.index(step.operation), spec.levels[step.levels[0]]) for step in state.path
    ]
    found = []
    for place in range(spec.settings.horizon):
        what, where = done[place] if place < len(done) else (-1, "")
        stage = f"stage {place + 1}"
        for i, operation in enumerate(spec.operations):
            found.append((f"{stage} is:{operation.name}", float(i == what)))
        found += [(f"{stage} at:{name}", float(name == where)) for name in spec.levels]
    return found


DISCRETE_GROUPS = ("tabular", "prefix")
"""Groups for tables; one of them, or both."""


def squash(value: float) -> float:
    """Identity up to 1 in size, logarithmic beyond.

    >>> squash(0.5), squash(-1.0), round(squash(math.e), 6)
    (0.5, -1.0, 2.0)
    """
    if abs(value) <= 1:
        return value
    return math.copysign(min(1 + math.log(abs(value)), 5.0), value)


def squash_loss(value: float) -> float:
    """Losses, of which the small ones differ most: log(1 + loss) / log(10), NaN-free."""
    if not math.isfinite(value):
        return 2.0
    return squash(math.log1p(max(value, 0.0)) / math.log(10)) if value >= 0 else squash(value)


@dataclass(frozen=True, kw_only=True)
class Observer:
    """Turns states into feature vectors.

    Attributes:
        groups: names from `FEATURE_GROUPS`, or from `DISCRETE_GROUPS`.
        tasks: labels of tasks that "tabular" tells apart; unknown ones are all zeros.
        labels: task name -> label, where they differ.
    """

    groups: tuple[str, ...] = tuple(FEATURE_GROUPS)
    tasks: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.groups:
            raise InputError("observation must name at least one group, got none.")
        for group in self.groups:
            if group not in (*FEATURE_GROUPS, *DISCRETE_GROUPS):
                raise unknown_name("observation group", group, (*FEATURE_GROUPS, *DISCRETE_GROUPS))
        discrete = set(self.groups) & set(DISCRETE_GROUPS)
        if discrete and discrete != set(self.groups):
            raise InputError(
                f"observation 'tabular' stands alone, or with 'prefix', got {self.groups}."
            )

    @property
    def discrete(self) -> bool:
        """Whether there are finitely many states, as tables need."""
        return set(self.groups) <= set(DISCRETE_GROUPS)

    @property
    def probed(self) -> bool:
        """Whether the probes of the start are used, and so charged."""
        return "probe" in self.groups

    def features(self, spec: ProcessSpec, state: State) -> list[Feature]:
        """(name, value) of all F features."""
        if self.discrete:
            label = self.labels.get(state.task, state.task)
            tasks = [(f"task:{task}", float(task == label)) for task in self.tasks]
            of_group = {"tabular": tasks, "prefix": _prefix(spec, state)}
            return _level(spec, state) + [f for group in self.groups for f in of_group[group]]
        return [f for group in self.groups for f in FEATURE_GROUPS[group][1](spec, state)]

    def names(self, spec: ProcessSpec) -> tuple[str, ...]:
        """Names of the F features."""
        per_level = (1.0,) * spec.n_levels
        outcome = Outcome(
            key="",
            metric=0.0,
            loss=0.0,
            flops={"probe": 0.0},
            descriptors=dict.fromkeys(("gradient_norm", "mean_shift", "variance_shift"), per_level),
        )
        return tuple(name for name, _ in self.features(spec, start_state(spec, outcome, "", 0, 0)))

    def observe(self, spec: ProcessSpec, state: State) -> NDArray[np.float32]:
        """The feature vector, float32 (F,)."""
        return np.array([value for _, value in self.features(spec, state)], dtype=np.float32)


def as_groups(observation: str | Sequence[str]) -> tuple[str, ...]:
    """Group names of an observation setting: "all", one group, or several."""
    if observation == "all":
        return tuple(FEATURE_GROUPS)
    return (observation,) if isinstance(observation, str) else tuple(observation)
