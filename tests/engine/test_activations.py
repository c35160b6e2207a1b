import torch

from rlhf_ray.engine.activations import ActivationCache, Key
from rlhf_ray.engine.segments import SegmentPlan, Values


def key(boundary: int, *versions: str, task: str = "t") -> Key:
    return (task, "train", boundary, versions)


def values(n: int, fill: float = 0.0) -> Values:
    """n float32 numbers."""
    return {"x": torch.full((n,), fill)}


SIZE = SegmentPlan.n_bytes(values(10))


def test_cache_gives_back_what_was_put_under_the_very_key() -> None:
    cache = ActivationCache(10 * SIZE)
    cache.put(key(1, "a"), values(10, 1.0))
    found = cache.get(key(1, "a"))
    assert found is not None and torch.equal(found["x"], torch.ones(10))
    for other in (key(1, "b"), key(2, "a"), key(1, "a", "a"), key(1, "a", task="u")):
        assert cache.get(other) is None


def test_cache_drops_the_least_recently_used_over_its_bound() -> None:
    cache = ActivationCache(2 * SIZE)
    for i in range(2):
        cache.put(key(i), values(10))
    cache.get(key(0))
    cache.put(key(2), values(10))
    assert [cache.get(key(i)) is not None for i in range(3)] == [True, False, True]
    assert cache.n_bytes == 2 * SIZE


def test_values_over_the_bound_are_not_kept_and_push_nothing_out() -> None:
    cache = ActivationCache(2 * SIZE)
    cache.put(key(0), values(10))
    cache.put(key(1), values(30))
    assert cache.get(key(0)) is not None and cache.get(key(1)) is None
    nothing = ActivationCache(0)
    nothing.put(key(0), values(10))
    assert nothing.get(key(0)) is None and nothing.n_bytes == 0


def test_values_under_a_key_are_counted_once() -> None:
    cache = ActivationCache(3 * SIZE)
    for _ in range(5):
        cache.put(key(0), values(10))
    assert cache.n_bytes == SIZE
