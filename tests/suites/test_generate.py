"""Pools, shifts and tasks drawn from them."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.suites.generate import KINDS, SplitSizes, make_tasks
from rlhf_ray.suites.images import Pools, digits_pools, split_indices
from rlhf_ray.suites.shifts import FAMILIES, N_GROUPS, Family
from rlhf_ray.tasks import SPLITS, Task

SIZES = SplitSizes(train=32, val=16, test=24)
SHIFTS = [family for family in FAMILIES if family.kind != "output"]
RELABELLINGS = [family for family in FAMILIES if family.kind == "output"]
NAMES = [family.name for family in FAMILIES]


@pytest.fixture(scope="module")
def pools() -> Iterator[Pools]:
    torch.set_num_threads(1)
    yield digits_pools()


def families_of(tasks: tuple[Task, ...]) -> set[str]:
    return {part.split("-")[0] for task in tasks for part in task.name.split("+")}


def rows(x: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in x}


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@given(
    sizes=st.lists(st.integers(0, 50), min_size=1, max_size=5),
    more=st.integers(0, 9),
    seed=st.integers(0, 2**62),
)
def test_split_indices_are_disjoint(sizes: list[int], more: int, seed: int) -> None:
    parts = split_indices(sum(sizes) + more, sizes, seed)
    assert [len(part) for part in parts] == sizes
    assert len(set(torch.cat(parts).tolist())) == sum(sizes)


def test_digits_pools_share_no_image(pools: Pools) -> None:
    parts = [getattr(pools, name) for name in ("pretrain", "train", "val", "test")]
    assert sum(len(y) for _, y in parts) == 1797
    test = rows(pools.test[0])
    assert not any(test & rows(x) for x, _ in parts[:3])


def test_families_of_every_kind_are_in_every_group() -> None:
    assert len(set(NAMES)) == len(NAMES)
    for group in range(N_GROUPS):
        kinds = {family.kind for family in FAMILIES if family.group == group}
        assert kinds == {"input", "geometric", "output"}


@pytest.mark.parametrize("fold", range(N_GROUPS))
def test_families_of_the_test_tasks_are_theirs_alone(pools: Pools, fold: int) -> None:
    used = [
        families_of(make_tasks(role, 24, pools=pools, seed=0, fold=fold, sizes=SIZES))
        for role in SPLITS
    ]
    train, val, test = used
    assert train == val
    assert not train & test
    assert train | test == set(NAMES)


def test_folds_test_on_every_family_once(pools: Pools) -> None:
    tested = [
        families_of(make_tasks("test", 24, pools=pools, seed=0, fold=fold, sizes=SIZES))
        for fold in range(N_GROUPS)
    ]
    assert sorted(name for part in tested for name in part) == sorted(NAMES)


@settings(max_examples=8, deadline=None)
@given(n_tasks=st.integers(1, 40), seed=st.integers(0, 9))
def test_any_number_of_tasks_begins_with_the_same(pools: Pools, n_tasks: int, seed: int) -> None:
    tasks = make_tasks("train", n_tasks, pools=pools, seed=seed, sizes=SIZES)
    first = make_tasks("train", n_tasks // 2 + 1, pools=pools, seed=seed, sizes=SIZES)
    assert len(tasks) == n_tasks
    assert len({task.name for task in tasks}) == n_tasks
    assert [(t.name, t.digest) for t in first] == [(t.name, t.digest) for t in tasks[: len(first)]]


def test_names_stay_unique_where_severities_repeat(pools: Pools) -> None:
    tasks = make_tasks("train", 200, pools=pools, seed=0, sizes=SplitSizes(train=2, val=2, test=2))
    names = [task.name for task in tasks]
    assert len(set(names)) == 200
    assert any(name.endswith("-2") for name in names)


def test_names_of_other_roles_are_not_taken_again(pools: Pools) -> None:
    sizes = SplitSizes(train=2, val=2, test=2)
    train = [t.name for t in make_tasks("train", 24, pools=pools, seed=6, sizes=sizes)]
    val = make_tasks("val", 6, pools=pools, seed=6, sizes=sizes)
    assert {t.name for t in val} & set(train) == {"pixelate-0.47"}
    apart = make_tasks("val", 6, pools=pools, seed=6, sizes=sizes, names=train)
    assert {t.name for t in apart} - {t.name for t in val} == {"pixelate-0.47-2"}
    assert [t.digest for t in apart] == [t.digest for t in val]


def test_another_seed_draws_other_tasks(pools: Pools) -> None:
    digests = [
        {task.digest for task in make_tasks("test", 8, pools=pools, seed=seed, sizes=SIZES)}
        for seed in (0, 1)
    ]
    assert not digests[0] & digests[1]


def test_kinds_come_in_turn(pools: Pools) -> None:
    kind = {family.name: family.kind for family in FAMILIES}
    tasks = make_tasks("test", 2 * len(KINDS), pools=pools, seed=0, sizes=SIZES)
    for task, expected in zip(tasks, KINDS * 2, strict=True):
        kinds = [kind[part.split("-")[0]] for part in task.name.split("+")]
        assert kinds == [expected] if expected != "composite" else kinds[1:] == ["output"]


def test_splits_are_drawn_from_their_own_pools(pools: Pools) -> None:
    tasks = make_tasks("train", 8, pools=pools, seed=0, sizes=SplitSizes())
    # output shifts leave the images as they are
    task = next(task for task in tasks if task.name.startswith("permute"))
    for split in SPLITS:
        x, y = task.split(split)
        assert isinstance(x, Tensor)
        assert rows(x) <= rows(getattr(pools, split)[0])
        assert len(y) == min(getattr(SplitSizes(), split), len(getattr(pools, split)[1]))


def test_splits_of_a_task_do_not_share_memory(pools: Pools) -> None:
    for task in make_tasks("test", 8, pools=pools, seed=0, sizes=SIZES):
        for split in SPLITS:
            x, _ = task.split(split)
            assert isinstance(x, Tensor) and x.dtype == torch.float32
            assert x.untyped_storage().nbytes() == x.nbytes


@pytest.mark.parametrize("family", SHIFTS, ids=lambda f: f.name)
@pytest.mark.parametrize("severity", [0.0, 0.45, 1.0])
def test_input_shifts_keep_shape_and_range(pools: Pools, family: Family, severity: float) -> None:
    x = pools.test[0][:40].double()
    before = x.clone()
    shifted = family.apply(x, severity, rng())
    assert torch.equal(x, before)
    assert shifted.shape == x.shape and shifted.dtype == torch.float64
    assert shifted.min() >= 0 and shifted.max() <= 1
    assert torch.equal(shifted, family.apply(x, severity, rng()))
    if severity:
        assert (shifted - x).abs().mean() > 0.01


@pytest.mark.parametrize("family", RELABELLINGS, ids=lambda f: f.name)
@given(severity=st.floats(0.3, 1), seed=st.integers(0, 2**62))
def test_output_shifts_permute_the_classes(family: Family, severity: float, seed: int) -> None:
    p = family.apply(severity, torch.Generator().manual_seed(seed))
    assert sorted(p.tolist()) == list(range(10))
    n_moved = int((p != torch.arange(10)).sum())
    n_chosen = round(1 + 9 * severity)
    # pairs: an odd class stays
    assert n_moved == (n_chosen // 2 * 2 if family.name == "swap" else n_chosen)


def test_swap_is_its_own_inverse() -> None:
    swap = next(family for family in FAMILIES if family.name == "swap")
    p = swap.apply(1.0, rng())
    assert torch.equal(p[p], torch.arange(10))
