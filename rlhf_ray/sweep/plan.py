"""Which trials a sweep has, before any of them runs. No Ray."""

import itertools
from dataclasses import dataclass

import numpy as np

from rlhf_ray.config import SWEPT, SearchConfig, default_of
from rlhf_ray.digests import derive_seed, digest

TrialConfig = dict[str, float]
"""One value for each of `SWEPT`."""


@dataclass(frozen=True, kw_only=True)
class PlannedTrial:
    """A trial to be.

    Attributes:
        name: of its folder: its number, and a digest of its values.
        values: of the swept settings.
    """

    name: str
    values: TrialConfig


def plan_trials(config: SearchConfig) -> list[PlannedTrial]:
    """The trials of a sweep, in a fixed order.

    The grid of all values; for the default values (2 each) the half of it in which the number of
    high values is even: every setting, and every pair of settings, is still balanced. With
    `num_samples`, uniform draws between the lowest and the highest value of each setting.
    """
    values = list(config.swept.values())
    if config.num_samples is not None:
        generator = np.random.default_rng(derive_seed(config.seed, "samples"))
        points = [
            tuple(float(generator.uniform(min(v), max(v))) for v in values)
            for _ in range(config.num_samples)
        ]
    else:
        points = list(itertools.product(*values))
        if _all_default(config) and all(len(v) == 2 for v in values):
            points = [p for p in points if _n_high(p, values) % 2 == 0]
    trials = []
    for number, point in enumerate(points):
        chosen: TrialConfig = dict(zip(SWEPT, map(float, point), strict=True))
        trials.append(PlannedTrial(name=f"{number:03d}-{digest(chosen)[:6]}", values=chosen))
    return trials


def _all_default(config: SearchConfig) -> bool:
    return all(getattr(config, name) == default_of(name) for name in SWEPT)


def _n_high(point: tuple[float, ...], values: list[tuple[float, ...]]) -> int:
    return sum(value == max(options) for value, options in zip(point, values, strict=True))
