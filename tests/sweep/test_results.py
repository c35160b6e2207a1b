import time
from pathlib import Path

import pytest
import torch
from sweep_files import METHODS, write_sweep

from rlhf_ray.errors import InputError
from rlhf_ray.policies.networks import LevelQNetworks, NetworkSettings
from rlhf_ray.policies.policy import Policy
from rlhf_ray.storage import Storage, open_storage
from rlhf_ray.sweep.driver_lock import STALE_S
from rlhf_ray.sweep.results import (
    TABLE_COLUMNS,
    SearchResult,
    list_sweeps,
    trial_folder,
)

NETWORK = NetworkSettings(n_levels=2, n_features=3, n_actions=4, hidden=(8,))


def policy(seed: int = 0) -> Policy:
    return Policy(
        levels=("low", "head"),
        features=("a", "b", "c"),
        operations=({"kind": "Skip", "name": "skip"}, {"kind": "Stop", "name": "stop"}),
        network=NETWORK,
        weights=LevelQNetworks(NETWORK, seed=seed).state_dict(),
        metadata={"process": {}},
    )


def test_table_has_a_row_per_trial_and_marks_the_front(tmp_path: Path) -> None:
    write_sweep(tmp_path, n_trials=4, failed=(1,), waiting=(3,), state="running")
    result = SearchResult.load(tmp_path / "small-1")
    table = result.table()
    assert tuple(table.columns) == TABLE_COLUMNS
    assert list(table["status"]) == ["done", "failed", "done", "waiting"]
    assert list(table["metric"].isna()) == [False, True, False, True]
    assert list(table["on_front"]) == [True, False, True, False]
    assert list(result.front()["cost"]) == sorted(result.front()["cost"])
    assert [trial["name"] for trial in result.failures] == [table["trial"][1]]
    assert not result.finished and result.methods().empty


def test_best_trial_is_that_of_highest_utility(tmp_path: Path) -> None:
    write_sweep(tmp_path, n_trials=3, failed=(0,))
    result = SearchResult.load(str(tmp_path / "small-1") + "/")
    assert result.best_trial == result.table()["trial"][1]
    assert result.directory == str(tmp_path / "small-1") and result.storage_path == str(tmp_path)
    write_sweep(tmp_path, name="none", failed=(0, 1, 2))
    with pytest.raises(InputError, match="a trial must have ended well, got none"):
        SearchResult.load(tmp_path / "none").best_policy  # noqa: B018


def test_front_follows_the_direction_of_the_metric(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    storage = open_storage(tmp_path)
    sweep = storage.read_json("small-1/sweep.json")
    assert isinstance(sweep, dict)
    sweep["metric"]["higher_is_better"] = False  # the last trial is cheapest and now the best
    storage.write_json("small-1/sweep.json", sweep)
    assert list(SearchResult(storage, "small-1").table()["on_front"]) == [False, False, True]


def test_methods_stand_by_utility(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    methods = SearchResult.load(tmp_path / "small-1").methods()
    assert set(methods.index) == set(METHODS)
    assert methods["utility_mean"].is_monotonic_decreasing


def test_load_takes_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sweep(tmp_path)
    for folder, path in ((tmp_path, "small-1"), (tmp_path / "small-1", ".")):
        monkeypatch.chdir(folder)
        assert SearchResult.load(path).directory == str(tmp_path / "small-1")


@pytest.mark.parametrize("name", ["nothing", "tree"])
def test_what_is_no_sweep_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "tree").mkdir()
    with pytest.raises(InputError, match=f"a sweep must be there, got '{name}'"):
        SearchResult.load(tmp_path / name)


@pytest.mark.parametrize("record", ['{"name": ', "{}", "[]"])
def test_a_record_that_cannot_be_read_hides_no_other_sweep(tmp_path: Path, record: str) -> None:
    write_sweep(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sweep.json").write_text(record)
    found = list_sweeps(str(tmp_path))
    assert [(s["name"], s["state"]) for s in found] == [
        ("broken", "unreadable"),
        ("small-1", "finished"),
    ]
    assert set(found[0]) == set(found[1])
    with pytest.raises(InputError, match=r"must be whole, got a cut sweep.json of 'broken'"):
        SearchResult.load(tmp_path / "broken")


def test_policies_go_through_any_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = open_storage(tmp_path)
    policy().write(storage, "here/policy")
    local = Policy.read(storage, "here/policy")
    monkeypatch.setattr(Storage, "local_path", lambda self, name="": None)
    for found in (local, Policy.read(storage, "here/policy")):
        assert found.levels == ("low", "head")
        for name, value in policy().weights.items():
            assert torch.equal(found.weights[name], value)
    with pytest.raises(InputError, match="policy"):
        Policy.read(storage, "there/policy")


def test_policy_of_any_trial(tmp_path: Path) -> None:
    write_sweep(tmp_path)
    result = SearchResult.load(tmp_path / "small-1")
    second = result.table()["trial"][1]
    policy(3).write(open_storage(tmp_path), trial_folder("small-1", second))
    with pytest.raises(InputError, match=r"trial must be one that exists, got trial='00x'"):
        result.policy("00x")
    with pytest.raises(InputError, match="policy"):
        result.policy(second)  # its folder is there, and holds none
    policy(3).write(open_storage(tmp_path), trial_folder("small-1", second) + "/policy")
    name, value = next(iter(policy(3).weights.items()))
    assert torch.equal(result.policy(second).weights[name], value)


def test_list_of_sweeps_does_not_look_into_the_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(tmp_path, name="two", state="running", failed=(0, 1, 2))
    write_sweep(tmp_path, name="one", waiting=(2,))
    for folder in ("tree/ab", "pretrained"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "sweep.json").write_text("{}")
    (tmp_path / "pretrained" / "sweep.json").unlink()
    monkeypatch.setattr(Storage, "files", lambda *_: pytest.fail("listed everything"))
    found = list_sweeps(str(tmp_path))
    assert [(s["name"], s["state"], s["trials_done"], s["trials"]) for s in found] == [
        ("one", "finished", 2, 3),
        ("two", "running", 0, 3),
    ]
    assert found[0]["utility"] == pytest.approx(0.9 - 0.02 * 0.8) and found[1]["utility"] is None
    assert found[0]["path"] == str(tmp_path / "one")
    assert list_sweeps(str(tmp_path / "nowhere")) == []


@pytest.mark.parametrize("beat_s_ago", [None, 0.0, 2 * STALE_S])
def test_a_sweep_whose_driver_was_killed_is_not_running(
    tmp_path: Path, beat_s_ago: float | None
) -> None:
    write_sweep(tmp_path, state="running")
    if beat_s_ago is not None:
        lock = {"host": "elsewhere", "pid": 1, "token": "x", "time": time.time() - beat_s_ago}
        open_storage(tmp_path).write_json("small-1/lock.json", lock)
    # without a lock: a copy of a sweep that runs elsewhere
    state = "interrupted" if beat_s_ago else "running"
    assert SearchResult.load(tmp_path / "small-1").state == state
    assert [sweep["state"] for sweep in list_sweeps(str(tmp_path))] == [state]


def test_methods_have_their_columns_also_where_nothing_was_compared(tmp_path: Path) -> None:
    write_sweep(tmp_path, state="interrupted", waiting=(0, 1, 2))
    methods = SearchResult.load(tmp_path / "small-1").methods()
    assert len(methods) == 0
    assert list(methods[["metric_mean", "utility_mean"]].columns) == ["metric_mean", "utility_mean"]
