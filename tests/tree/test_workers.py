import contextlib
import copy
import functools
import os
import pickle
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from fake_engine import IDENTITY, FakeEngine, ran, request
from lines import Lines

from rlhf_ray.errors import InputError, StageError
from rlhf_ray.outcomes import StageRequest
from rlhf_ray.storage import open_storage
from rlhf_ray.tree import pool
from rlhf_ray.tree.client import RayStages
from rlhf_ray.tree.pool import StagesHandle
from rlhf_ray.tree.stage_tree import LocalStages
from rlhf_ray.tree.store import TreeStore
from rlhf_ray.tree.workers import start_workers

pytestmark = pytest.mark.usefixtures("ray_session")

Start = Callable[..., StagesHandle]


def started(folder: Path, **options: Any) -> StagesHandle:
    options = {"num_workers": 2, "cpus_per_worker": 0.5, **options}
    return start_workers(functools.partial(FakeEngine, folder), folder / "runs", **options)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts workers of a test's own, where it needs other settings or harms them for good."""
    handles: list[StagesHandle] = []

    def start(**options: Any) -> StagesHandle:
        handles.append(started(tmp_path, **options))
        return handles[-1]

    yield start
    for handle in handles:
        handle.stop()


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="module")
def shared_handle(ray_session: None, shared_folder: Path) -> Iterator[StagesHandle]:
    with started(shared_folder) as handle:
        yield handle


@pytest.fixture
def handle(shared_handle: StagesHandle, shared_folder: Path) -> Iterator[StagesHandle]:
    """Two workers that tests share; each test asks for a replica of its own."""
    yield shared_handle
    for name in ("slow", "gate", "fail"):
        (shared_folder / name).unlink(missing_ok=True)
    wait_until(lambda: all(w["state"] == "idle" for w in shared_handle.stats()["workers"]))


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def busy_pid(handle: StagesHandle) -> int:
    found: list[int] = []
    wait_until(lambda: bool(found.extend(
        w["pid"] for w in handle.stats()["workers"] if w["state"] == "busy") or found))  # fmt: skip
    return found[0]


def tree_pid(handle: StagesHandle) -> int:
    def pid(actor: Any) -> int:
        return os.getpid()

    return ray.get(handle.stages._tree.__ray_call__.remote(pid))


def in_thread(stages: RayStages, *asked: StageRequest) -> Callable[..., Any]:
    """Starts asking; the result waits for the answers, or for an error of the kind given."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(stages.outcomes, asked)
    pool.shutdown(wait=False)

    def result(error: type[Exception] | None = None) -> Any:
        return future.exception(120) if error else future.result(120)

    return result


def count(folder: Path, *asked: StageRequest) -> list[int]:
    keys = Counter(ran(folder))
    return [keys[IDENTITY.key(one)] for one in asked]


def test_outcomes_equal_those_of_one_process(handle: StagesHandle, tmp_path: Path) -> None:
    asked = [request(0), request(0, 1), request(2, task=1), request(0, -1, 2), request(1, task=2)]
    asked.append(request(0, 1).as_kind("test"))
    answers = handle.stages.outcomes(asked)
    local = LocalStages(FakeEngine(tmp_path))
    assert [a.outcome for a in answers] == [a.outcome for a in local.outcomes(asked)]
    carried_out = Counter(key for a in answers for key in a.carried_out)
    assert len(carried_out) == 6 and set(carried_out.values()) == {1}
    expected = local.state_dict(request(0, 1))
    for name, value in handle.stages.state_dict(request(0, 1)).items():
        assert torch.equal(value, expected[name])
    stats = handle.stats()
    assert stats["executed"] == 6 and stats["in_flight"] == 0 and stats["failed"] == {}


def test_two_askers_wait_for_one_run(handle: StagesHandle, shared_folder: Path) -> None:
    (shared_folder / "gate").touch()
    other: RayStages = pickle.loads(pickle.dumps(copy.deepcopy(handle.stages)))
    asked = request(0, 1, replica=1)
    results = [in_thread(stages, asked) for stages in (handle.stages, other, handle.stages)]
    busy_pid(handle)
    (shared_folder / "gate").unlink()
    answers = [result()[0] for result in results]
    assert count(shared_folder, request(0, replica=1), asked) == [1, 1]
    assert sum(a.executed for a in answers) == 1
    assert sum(len(a.carried_out) for a in answers) == 2


def test_several_requests_are_in_flight_at_once(handle: StagesHandle, shared_folder: Path) -> None:
    (shared_folder / "gate").touch()
    asked = [request(0, task=i, replica=2) for i in range(3)]
    result = in_thread(handle.stages, *asked)
    wait_until(lambda: sum(count(shared_folder, *asked)) == 2)
    stats = handle.stats()
    assert (stats["in_flight"], stats["waiting"]) == (2, 1)
    (shared_folder / "gate").unlink()
    assert all(a.executed for a in result())


def test_failing_stage_is_set_aside_in_one_line(handle: StagesHandle, shared_folder: Path) -> None:
    (shared_folder / "fail").write_text("task5")
    asked = [request(0, replica=3), request(0, 1, task=5, replica=3)]
    for _ in range(2):
        with pytest.raises(StageError, match=r"of task 'task5'.*ValueError: no such") as caught:
            handle.stages.outcomes(asked)
        assert "\n" not in str(caught.value)
    assert count(shared_folder, request(0, task=5, replica=3)) == [5]  # max_attempts
    assert len(handle.stats()["failed"]) == 1
    assert not handle.stages.outcome(asked[0]).executed


def test_killed_worker_stage_is_carried_out_by_another(
    handle: StagesHandle, shared_folder: Path, tmp_path: Path
) -> None:
    (shared_folder / "gate").touch()
    asked = request(0, replica=4)
    result = in_thread(handle.stages, asked)
    os.kill(busy_pid(handle), signal.SIGKILL)
    (shared_folder / "gate").unlink()
    assert result()[0].outcome == LocalStages(FakeEngine(tmp_path)).outcome(asked).outcome
    wait_until(lambda: all(w["state"] == "idle" for w in handle.stats()["workers"]))
    assert sorted(w["lost"] for w in handle.stats()["workers"]) == [0, 1]


def test_killed_tree_actor_continues(handle: StagesHandle, shared_folder: Path) -> None:
    handle.stages.outcomes([request(task=i) for i in (0, 1)])
    (shared_folder / "gate").touch()
    asked = [request(0, replica=5), request(0, task=1, replica=5)]
    result = in_thread(handle.stages, *asked)
    wait_until(lambda: count(shared_folder, *asked) == [1, 1])
    before, first_pid = handle.stats(), tree_pid(handle)
    os.kill(first_pid, signal.SIGKILL)
    wait_until(lambda: tree_pid(handle) != first_pid and len(handle.stats()["workers"]) == 2)
    (shared_folder / "gate").unlink()
    answers = result()
    assert all(a.executed and a.carried_out == (a.outcome.key,) for a in answers)
    # the counts go on
    wait_until(lambda: handle.stats()["asked"] == before["asked"])
    assert handle.stats()["executed"] == before["executed"] + 2
    assert handle.stats()["seconds_spent"] == pytest.approx(before["seconds_spent"] + 2)
    assert handle.stats()["failed"] == before["failed"] != {}
    # what the workers were running was waited for, not carried out twice
    assert count(shared_folder, *asked) == [1, 1]
    assert handle.stages.outcome(request(0, 1, replica=5)).executed
    again = pickle.loads(pickle.dumps(handle.stages)).outcome(asked[0])
    assert not again.executed and count(shared_folder, *asked) == [1, 1]


@pytest.mark.slow
def test_random_kills_of_workers_and_tree_change_nothing(start: Start, tmp_path: Path) -> None:
    handle = start()
    (tmp_path / "slow").write_text("0.2")
    draw = random.Random(0)
    levels = [
        (a, b, c)[:n] for a in range(3) for b in range(3) for c in range(3) for n in (1, 2, 3)
    ]
    asked = [request(*path, task=task) for task in range(6) for path in dict.fromkeys(levels)]
    draw.shuffle(asked)
    result = in_thread(handle.stages, *asked)
    for _ in range(20):
        time.sleep(draw.uniform(0.5, 2.0))
        pid = busy_pid(handle) if draw.random() < 0.7 else tree_pid(handle)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    answers = result()
    (tmp_path / "whole").mkdir()
    whole = LocalStages(FakeEngine(tmp_path / "whole"))
    assert [a.outcome for a in answers] == [a.outcome for a in whole.outcomes(asked)]
    runs = Counter(ran(tmp_path))
    assert len(runs) == len(asked)
    assert sum(runs.values()) - len(asked) <= 20  # at most the stage in flight per kill


def test_known_outcome_costs_little(handle: StagesHandle) -> None:
    asked = request(0, 1, 2, replica=6)
    handle.stages.outcome(asked)
    begun = time.perf_counter()
    for _ in range(200):
        handle.stages.outcome(asked)
    here_s = (time.perf_counter() - begun) / 200
    begun = time.perf_counter()
    for _ in range(200):
        handle.stages._known.clear()
        handle.stages.outcome(asked)
    actor_s = (time.perf_counter() - begun) / 200
    assert here_s < 2e-3 and actor_s < 5e-2, (here_s, actor_s)  # bounds for busy machines


def test_workers_lost_for_good_are_replaced_as_often_as_agreed(
    start: Start, tmp_path: Path
) -> None:
    progress = Lines()
    handle = start(max_replaced=1, poll_s=0.1, progress=progress)
    (tmp_path / "gate").touch()
    result = in_thread(handle.stages, request(0), request(0, task=1))
    wait_until(lambda: len(ran(tmp_path)) == 2)
    ray.kill(handle._workers[0])
    wait_until(lambda: any("1 of them will be replaced" in line for line in progress.lines))
    (tmp_path / "gate").unlink()
    assert len(result()) == 2
    wait_until(lambda: [w["state"] for w in handle.stats()["workers"]] == ["gone", "idle", "idle"])
    assert handle.stages.state_dict(request(0))
    for number in (1, 2):
        ray.kill(handle._workers[number])
    with pytest.raises(StageError, match=r"a worker must be left to run stages, got none"):
        handle.stages.outcome(request(1))
    assert "0 of them will be replaced" in progress.lines[-1]


def test_worker_crowded_out_by_trials_comes_back_without_cpus(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "CROWDED_OUT_S", 0.5)
    progress = Lines()
    handle = start(num_workers=1, cpus_per_worker=0.75, poll_s=2.0, progress=progress)
    free = ray.available_resources()["CPU"]
    trial = ray.remote(num_cpus=free + 0.75)(type("Trial", (), {"up": lambda self: True})).remote()
    ray.kill(handle._workers[0])
    assert ray.get(trial.up.remote(), timeout=30)  # it holds what the worker had
    assert handle.stages.outcome(request(0)).executed
    assert progress.said("one will reserve no CPUs")
    wait_until(lambda: len(handle._workers) == 1)
    ray.kill(trial)


def test_stage_that_loses_its_worker_each_time_is_given_up(start: Start, tmp_path: Path) -> None:
    handle = start(num_workers=1, max_attempts=1, max_weight_bytes=0, memory_bytes=0)
    (tmp_path / "gate").touch()
    result = in_thread(handle.stages, request(0))
    wait_until(lambda: ran(tmp_path) != [])  # not while its start is evaluated
    os.kill(busy_pid(handle), signal.SIGKILL)
    assert "must not die" in str(result(StageError))
    with pytest.raises(StageError, match="must not die"):  # set aside
        handle.stages.outcome(request(0))
    # the others go on, here without any weights that last
    (tmp_path / "gate").unlink()
    paths = [request(*(2, 1, 2, 0)[:n]) for n in range(1, 5)]
    answers = [handle.stages.outcome(path) for path in paths]
    assert answers[-1].recomputed and all(len(a.carried_out) == 1 for a in answers)
    local = LocalStages(FakeEngine(tmp_path))
    assert [a.outcome for a in answers] == [local.outcome(path).outcome for path in paths]
    wait_until(lambda: not list((tmp_path / "runs").rglob("*.safetensors")))


def test_replay_only_refuses_what_is_not_there(start: Start, tmp_path: Path) -> None:
    LocalStages(FakeEngine(tmp_path), TreeStore(open_storage(tmp_path / "runs"))).outcome(
        request(0)
    )
    stages = start(replay_only=True, num_workers=1).stages
    assert not stages.outcome(request(0)).executed
    assert stages.state_dict(request(0))
    with pytest.raises(StageError, match="must be in the tree when replaying"):
        stages.outcome(request(1))


def test_unshared_carries_out_every_stage_of_every_episode(start: Start, tmp_path: Path) -> None:
    stages = start(share=False).stages
    seen = []
    for _ in range(2):
        for n in range(4):
            answers = stages.outcomes([request(*(0, 1, 2)[:n], task=task) for task in range(3)])
            assert all(a.executed and len(a.carried_out) == min(n, 1) for a in answers)
            seen.append([a.outcome for a in answers])
    assert seen[:4] == seen[4:]
    assert set(Counter(ran(tmp_path)).values()) == {2}
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_no_room_for_a_worker_is_said_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "FIRST_WORD_S", 0.5)
    progress = Lines()
    with pytest.raises(InputError, match=r"room for a worker, which needs .* 8 GPUs, got none in"):
        started(tmp_path, gpus_per_worker=8, patience_s=1.5, progress=progress)
    (line,) = progress.lines
    assert "no worker is up yet: one needs 0.5 CPUs and 8 GPUs; the cluster has 4 CPUs" in line


def test_worker_that_sees_another_folder_is_refused(tmp_path: Path) -> None:
    here, there = (TreeStore(open_storage(tmp_path / name)) for name in ("here", "there"))
    mark = here.mark()
    assert here.has_mark(mark) and not there.has_mark(mark) and here.mark() == mark
    assert not (tmp_path / "there").exists()  # who only looks writes nothing


def test_what_cannot_be_pickled_is_refused(tmp_path: Path) -> None:
    lock = threading.Lock()
    with pytest.raises(InputError, match="must be picklable, to travel to workers, got TypeError"):
        start_workers(lambda: lock and FakeEngine(tmp_path), tmp_path / "runs", num_workers=1)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    make = functools.partial(FakeEngine, tmp_path)
    with pytest.raises(InputError, match="num_workers and max_attempts must be at least 1"):
        start_workers(make, tmp_path, num_workers=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="storage path must be writable"):
        start_workers(make, tmp_path / "file" / "x", num_workers=1)

    def broken() -> FakeEngine:
        raise ValueError("no engine\nand more")

    where = r"\(test_workers.py, line \d+\)$"
    with pytest.raises(StageError, match=rf"an engine must be made.*ValueError: no engine {where}"):
        start_workers(broken, tmp_path / "runs", num_workers=1, cpus_per_worker=0.5)
