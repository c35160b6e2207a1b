import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.engine.batches import batch_order


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(n=st.integers(1, 40), steps=st.integers(1, 12), size=st.integers(1, 50))
def test_batches_go_through_the_split_evenly(n: int, steps: int, size: int) -> None:
    batches = list(batch_order(n, steps, size, generator()))
    assert [len(batch) for batch in batches] == [size] * steps
    counts = torch.bincount(torch.cat(batches), minlength=n)
    assert int(counts.max() - counts.min()) <= 1


@given(n=st.integers(1, 40), size=st.integers(1, 50))
def test_one_epoch_is_every_example_once(n: int, size: int) -> None:
    batches = list(batch_order(n, None, size, generator()))
    assert sorted(torch.cat(batches).tolist()) == list(range(n))
    assert all(len(batch) == size for batch in batches[:-1])


def test_order_follows_the_generator() -> None:
    first, second, other = (
        torch.cat(list(batch_order(20, 4, 5, generator(seed)))) for seed in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
