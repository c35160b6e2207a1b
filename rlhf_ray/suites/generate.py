"""Draws the tasks of a suite: which shift, how severe, on which images.

A task follows from (seed, role, index) alone: asking for more tasks leaves the first as they are. A
name that a task of another role has already is counted up.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from rlhf_ray.digests import derive_seed
from rlhf_ray.suites.images import Images, Pools
from rlhf_ray.suites.shifts import FAMILIES, N_GROUPS, Family
from rlhf_ray.tasks import SPLITS, Task

KINDS = (
    "input", "geometric", "output", "composite", "input", "composite", "geometric", "input",
)  # fmt: skip
"""Tasks take these kinds in turn; a composite is an input or geometric shift and an output one."""

SEVERITIES = (0.45, 1.0)
"""Severities are drawn uniformly between these."""


@dataclass(frozen=True, kw_only=True)
class SplitSizes:
    """Examples per split of one task; never more than its pool holds."""

    train: int = 256
    val: int = 256
    test: int = 1000


def make_tasks(
    role: str,
    n_tasks: int,
    *,
    pools: Pools,
    seed: int,
    fold: int = 0,
    sizes: SplitSizes,
    names: Collection[str] = (),
) -> tuple[Task, ...]:
    """The first `n_tasks` tasks of a role.

    Args:
        role: "train", "val" or "test"; with the fold it chooses the families (`groups`).
        n_tasks: how many, >= 1.
        pools: where images are drawn from.
        seed: of all draws.
        fold: 0, 1 or 2; rotates which families are the test tasks'.
        sizes: examples per split.
        names: that other roles' tasks have.

    Returns:
        Tasks named for their shifts, `noise-0.62` or `shear-0.81+swap-0.47` (severities).
    """
    tasks: list[Task] = []
    taken = set(names)
    for index in range(n_tasks):
        rng = Generator().manual_seed(derive_seed("task", seed, role, index))
        shifts = [(family, _severity(rng)) for family in _families(role, index, fold, seed)]
        label = "+".join(f"{family.name}-{severity:.2f}" for family, severity in shifts)
        name, again = label, 2
        while name in taken:  # the earlier tasks decide, so that later ones change nothing
            name, again = f"{label}-{again}", again + 1
        taken.add(name)
        data = _draw(pools, sizes, rng)
        for family, severity in shifts:
            data = _shifted(data, family, severity, rng)
        train, val, test = data
        tasks.append(Task(name=name, train=train, val=val, test=test))
    return tuple(tasks)


def _severity(rng: Generator) -> float:
    low, high = SEVERITIES
    return round(low + (high - low) * float(torch.rand((), generator=rng)), 2)


def groups(role: str, fold: int) -> tuple[int, ...]:
    """The groups of families of a role's tasks: one is the test tasks' alone.

    Train and val tasks share all others, that policies learn on as many families as there are; what
    they have in common with the test tasks is nothing but the kinds.

    >>> [groups(role, 0) for role in ("train", "val", "test")]
    [(0, 1), (0, 1), (2,)]
    """
    tested = (N_GROUPS - 1 + fold) % N_GROUPS
    return (tested,) if role == "test" else tuple(g for g in range(N_GROUPS) if g != tested)


def _families(role: str, index: int, fold: int, seed: int) -> tuple[Family, ...]:
    """The families of the index-th task; every round of a kind uses each of its families once."""
    rounds, place = divmod(index, len(KINDS))
    kind = KINDS[place]
    count = rounds * KINDS.count(kind) + KINDS[:place].count(kind)
    mine = [family for family in FAMILIES if family.group in groups(role, fold)]
    outputs = [family for family in mine if family.kind == "output"]
    if kind == "composite":
        others = [family for family in mine if family.kind != "output"]
        return (_in_turn(others, count, (seed, role, kind)), _in_turn(outputs, count, (seed, role)))
    same = [family for family in mine if family.kind == kind]
    return (_in_turn(same, count, (seed, role, kind)),)


def _in_turn(families: list[Family], count: int, key: tuple[object, ...]) -> Family:
    bag, place = divmod(count, len(families))
    rng = Generator().manual_seed(derive_seed("families", *key, bag))
    return families[int(torch.randperm(len(families), generator=rng)[place])]


def _draw(pools: Pools, sizes: SplitSizes, rng: Generator) -> list[Images]:
    data: list[Images] = []
    for split in SPLITS:
        x, y = getattr(pools, split)
        chosen = torch.randperm(len(y), generator=rng)[: getattr(sizes, split)]
        data.append((x[chosen], y[chosen]))
    return data


def _shifted(data: list[Images], family: Family, severity: float, rng: Generator) -> list[Images]:
    """One shift over all three splits at once, so that its direction or mask is the same in all.

    Inputs are shifted in float64 and rounded to multiples of 2**-20: the same on every processor.
    """
    if family.kind == "output":
        permutation: Tensor = family.apply(severity, rng)
        return [(x, permutation[y]) for x, y in data]
    x = family.apply(torch.cat([x for x, _ in data]).double(), severity, rng)
    x = ((x * 2**20 + 0.37).floor() / 2**20).float()  # many lie halfway: 0.5 would part them
    parts = x.split([len(y) for _, y in data])
    # clones: a view would drag the images of the other splits along wherever it is sent
    return [(part.clone(), y) for part, (_, y) in zip(parts, data, strict=True)]
