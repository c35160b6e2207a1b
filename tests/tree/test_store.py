import math
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_engine import IDENTITY, request
from torch import Tensor

from rlhf_ray.outcomes import PRETRAINED, LevelState, Outcome
from rlhf_ray.storage import StoredFile, open_storage
from rlhf_ray.tree.store import StateCache, TreeStore

KEY = "ab" + "0" * 62


def outcome(key: str = KEY, metric: float = 0.5) -> Outcome:
    return Outcome(key=key, metric=metric, loss=1.0, versions=(key, PRETRAINED))


def state(**weights: Tensor) -> LevelState:
    return LevelState(weights=weights, optimizer={"step/w": torch.tensor(3.0)}, optimizer_name="x")


def test_put_then_get_and_states(tmp_path: Path) -> None:
    weights = {
        "w": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "half": torch.randn(3).bfloat16(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 2),
    }
    weights["tied"] = weights["w"]
    TreeStore(open_storage(tmp_path)).put(
        outcome(), {0: state(**weights), 2: state(w=weights["w"])}
    )
    store = TreeStore(open_storage(tmp_path))
    assert store.peek(KEY) is None
    assert store.get(KEY) == outcome() == store.peek(KEY)
    found = store.states(KEY)
    assert found is not None and set(found) == {0, 2}
    assert found[0].optimizer_name == "x" and found[0].optimizer["step/w"] == 3
    for name, value in weights.items():
        torch.testing.assert_close(found[0].weights[name], value, rtol=0, atol=0)
    assert set(found[2].weights) == {"w"}
    assert open_storage(tmp_path).list() == [f"tree/ab/{KEY}.json", f"tree/ab/{KEY}.safetensors"]


def test_outcome_not_finite_survives(tmp_path: Path) -> None:
    odd = replace(outcome(), loss=math.nan, metric=-math.inf)
    TreeStore(open_storage(tmp_path)).put(odd, {})
    assert repr(TreeStore(open_storage(tmp_path)).get(KEY)) == repr(odd)


def test_first_committed_outcome_stands(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    TreeStore(storage).put(outcome(), {0: state(w=torch.ones(2))})
    before = storage.read_bytes(f"tree/ab/{KEY}.safetensors")
    late = TreeStore(storage).put(outcome(metric=0.9), {0: state(w=torch.zeros(2))})
    assert late == outcome()
    assert storage.read_bytes(f"tree/ab/{KEY}.safetensors") == before


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_cut_file_counts_as_absent_at_every_length(tmp_path: Path, ending: str) -> None:
    storage = open_storage(tmp_path)
    TreeStore(storage).put(outcome(), {0: state(w=torch.ones(2))})
    name = f"tree/ab/{KEY}.{ending}"
    whole = storage.read_bytes(name)
    assert whole is not None
    for n in range(len(whole)):
        storage.write_bytes(name, whole[:n])
        fresh = TreeStore(storage)
        assert (fresh.get(KEY) if ending == "json" else fresh.states(KEY)) is None


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_altered_file_never_gives_something_else(tmp_path: Path, ending: str) -> None:
    storage = open_storage(tmp_path)
    TreeStore(storage).put(outcome(), {0: state(w=torch.arange(2.0))})
    name = f"tree/ab/{KEY}.{ending}"
    whole = storage.read_bytes(name)
    assert whole is not None
    for n in range(len(whole)):
        altered = bytearray(whole)
        altered[n] ^= 1
        storage.write_bytes(name, bytes(altered))
        fresh = TreeStore(storage)
        if ending == "json":
            assert fresh.get(KEY) in (None, outcome())  # a blank may change, a figure may not
        else:
            states = fresh.states(KEY)
            assert states is None or torch.equal(states[0].weights["w"], torch.arange(2.0))


def test_file_of_another_key_is_not_taken(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    TreeStore(storage).put(outcome(), {0: state(w=torch.ones(2))})
    other = "cd" + KEY[2:]
    for ending in ("json", "safetensors"):
        data = storage.read_bytes(f"tree/ab/{KEY}.{ending}")
        assert data is not None
        storage.write_bytes(f"tree/cd/{other}.{ending}", data)
    store = TreeStore(storage)
    assert store.get(other) is None and store.states(other) is None


def test_weights_least_recently_used_are_evicted_outcomes_never(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    keys = [f"{i:02d}" + "0" * 62 for i in range(4)]
    states = {0: state(w=torch.ones(100))}
    TreeStore(storage).put(outcome(keys[0]), states)
    size = storage.size_bytes(f"tree/00/{keys[0]}.safetensors")
    assert size is not None
    # another process, which finds the first on the storage
    store = TreeStore(storage, max_weight_bytes=2 * size + size // 2)
    store.put(outcome(keys[1]), states)
    assert store.states(keys[0]) is not None  # now used later than the second
    store.put(outcome(keys[2]), states)
    assert [store.states(key) is not None for key in keys[:3]] == [True, False, True]
    store.use([keys[0], keys[3]])  # the last does not exist
    store.put(outcome(keys[3]), states)
    assert [store.states(key) is not None for key in keys] == [True, False, False, True]
    fresh = TreeStore(storage)
    assert [fresh.get(key) is not None for key in keys] == [True] * 4


def test_outcomes_in_memory_are_at_hand_while_weights_are_listed(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    store = TreeStore(storage, max_weight_bytes=1 << 20)
    store.remember(outcome())
    listing, listed = threading.Event(), threading.Event()

    def slowly(folder: str) -> list[StoredFile]:
        listing.set()
        assert listed.wait(30)
        return []

    storage.files = slowly  # type: ignore[method-assign]
    thread = threading.Thread(target=store.use, args=([KEY],))
    thread.start()
    assert listing.wait(30) and store.peek(KEY) == outcome()
    listed.set()
    thread.join()


def test_outcomes_in_memory_are_bounded(tmp_path: Path) -> None:
    store = TreeStore(open_storage(tmp_path), max_outcomes=2)
    keys = [IDENTITY.key(request(0, task=i)) for i in range(3)]
    for key in keys:
        store.put(outcome(key), {})
    assert [store.peek(key) is not None for key in keys] == [False, True, True]
    assert all(store.get(key) == outcome(key) for key in keys)


def test_state_cache_drops_least_recently_used() -> None:
    cache = StateCache(max_bytes=2 * state(w=torch.ones(100)).n_bytes())
    for version in "abc":
        cache.put("", version, {0: state(w=torch.ones(100))})
        cache.get("", "a", 0)
    assert [cache.get("", version, 0) is not None for version in "abc"] == [True, False, True]
    cache.put("", "a", {0: state(w=torch.zeros(100))})
    assert cache.get("", "c", 0) is not None
    cache.keep("", {"c"})
    assert [cache.get("", version, 0) is not None for version in "abc"] == [False, False, True]
    cache.put("", "big", {level: state(w=torch.ones(1000)) for level in range(2)})
    assert all(cache.get("", "big", level) is not None for level in range(2))
    assert cache.get("", "c", 0) is None
    cache.put("", "a", {0: state(w=torch.ones(100))})
    assert cache.get("", "big", 0) is None and cache.get("", "a", 0) is not None
