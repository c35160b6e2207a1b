import copy
import functools
import os
import pickle
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from fake_engine import IDENTITY, FakeEngine, ran, request

from rlhf_ray.errors import InputError, StageError
from rlhf_ray.stage_tree import LocalStages
from rlhf_ray.tally import Answer
from rlhf_ray.workers import RayStages, StagesHandle, start_workers

pytestmark = pytest.mark.usefixtures("ray_session")

Start = Callable[..., StagesHandle]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    handles: list[StagesHandle] = []

    def start(**options: Any) -> StagesHandle:
        options = {"num_workers": 2, "cpus_per_worker": 0.5, **options}
        make = functools.partial(FakeEngine, tmp_path)
        handles.append(start_workers(make, tmp_path / "runs", **options))
        return handles[-1]

    yield start
    for handle in handles:
        handle.stop()


def slow(folder: Path, seconds: float) -> None:
    (folder / "slow").write_text(str(seconds))


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


def in_thread(stages: RayStages, *asked: Any) -> Callable[[], list[Answer]]:
    """Starts asking; the result waits for the answers."""
    answers: list[Answer] = []
    thread = threading.Thread(target=lambda: answers.extend(stages.outcomes(asked)))
    thread.start()

    def result() -> list[Answer]:
        thread.join(60)
        assert not thread.is_alive()
        return answers

    return result


def test_outcomes_equal_those_of_one_process(start: Start, tmp_path: Path) -> None:
    handle = start()
    asked = [request(0), request(0, 1), request(2, task=1), request(0, -1, 2), request(1, task=2)]
    asked.append(request(0, 1).as_kind("test"))
    answers = handle.stages.outcomes(asked)
    local = LocalStages(FakeEngine(tmp_path / "."))
    assert [a.outcome for a in answers] == [a.outcome for a in local.outcomes(asked)]
    assert Counter(key for a in answers for key in a.carried_out).most_common(1)[0][1] == 1
    assert sum(len(a.carried_out) for a in answers) == 6
    expected = local.state_dict(request(0, 1))
    for name, value in handle.stages.state_dict(request(0, 1)).items():
        assert torch.equal(value, expected[name])
    stats = handle.stats()
    assert stats["executed"] == 6 and stats["in_flight"] == 0 and stats["failed"] == {}
    handle.stop()
    again = start().stages.outcomes(asked)  # another sweep on the same storage
    assert [a.outcome for a in again] == [a.outcome for a in answers]
    assert not any(a.carried_out or a.spent_s for a in again)


def test_two_askers_wait_for_one_run(start: Start, tmp_path: Path) -> None:
    slow(tmp_path, 0.5)
    stages = start().stages
    other: RayStages = pickle.loads(pickle.dumps(copy.deepcopy(stages)))
    results = [in_thread(s, request(0, 1)) for s in (stages, other, stages)]
    answers = [result()[0] for result in results]
    assert Counter(ran(tmp_path)) == {IDENTITY.key(request(0)): 1, IDENTITY.key(request(0, 1)): 1}
    assert sum(a.executed for a in answers) == 1
    assert sum(len(a.carried_out) for a in answers) == 2


def test_several_requests_are_in_flight_at_once(start: Start, tmp_path: Path) -> None:
    handle = start()
    handle.stages.outcomes([request(task=i) for i in range(8)])
    slow(tmp_path, 0.5)
    begun = time.monotonic()
    handle.stages.outcomes([request(0, task=i) for i in range(4)])
    assert time.monotonic() - begun < 1.8  # 4 stages of 0.5 s on two workers
    assert {worker["executed"] for worker in handle.stats()["workers"]} == {2}


def test_tasks_stay_with_the_workers_that_know_them(start: Start, tmp_path: Path) -> None:
    stages = start().stages
    stages.outcomes([request(task=i) for i in (0, 1)])
    slow(tmp_path, 0.05)
    for n in range(1, 5):
        stages.outcomes([request(*([0] * n), task=i) for i in (0, 1)])
    lines = (tmp_path / "log").read_text().splitlines()
    pid_of = {line.split()[1]: line.split()[2] for line in lines}
    for i in (0, 1):
        pids = [pid_of[IDENTITY.key(request(*([0] * n), task=i))] for n in range(1, 5)]
        assert len(set(pids)) <= 2


def test_killed_worker_stage_is_carried_out_by_another(start: Start, tmp_path: Path) -> None:
    handle = start()
    handle.stages.outcome(request())
    slow(tmp_path, 1.0)
    result = in_thread(handle.stages, request(0))
    os.kill(busy_pid(handle), signal.SIGKILL)
    slow(tmp_path, 0.0)
    (answer,) = result()
    assert answer.outcome == LocalStages(FakeEngine(tmp_path)).outcome(request(0)).outcome
    assert handle.stats()["retried"] == 1
    wait_until(lambda: all(w["state"] == "idle" for w in handle.stats()["workers"]))
    assert sorted(w["lost"] for w in handle.stats()["workers"]) == [0, 1]


def test_worker_killed_for_good_leaves_the_rest(start: Start, tmp_path: Path) -> None:
    handle = start()
    handle.stages.outcomes([request(task=i) for i in (0, 1)])
    slow(tmp_path, 0.5)
    result = in_thread(handle.stages, request(0), request(0, task=1))
    busy_pid(handle)
    ray.kill(handle.stages._workers[0])
    assert len(result()) == 2
    assert handle.stages.state_dict(request(0))
    ray.kill(handle.stages._workers[1])
    with pytest.raises(StageError, match="a worker must be left|must not die"):
        handle.stages.outcome(request(1))


def test_stage_that_kills_its_workers_is_given_up(start: Start, tmp_path: Path) -> None:
    handle = start(max_attempts=2)
    handle.stages.outcome(request())
    slow(tmp_path, 30)
    caught: list[StageError] = []

    def ask() -> None:
        try:
            handle.stages.outcome(request(0))
        except StageError as error:
            caught.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    for _ in range(2):
        os.kill(busy_pid(handle), signal.SIGKILL)
        wait_until(lambda n=_: sum(w["lost"] for w in handle.stats()["workers"]) == n + 1)
    thread.join(30)
    assert "must not die" in str(caught[0])
    slow(tmp_path, 0)
    assert handle.stages.outcome(request(1)).executed  # the others go on
    with pytest.raises(StageError, match="must not die"):  # set aside
        handle.stages.outcome(request(0))


def test_killed_tree_actor_continues(start: Start, tmp_path: Path) -> None:
    handle = start()
    handle.stages.outcomes([request(task=i) for i in (0, 1)])
    slow(tmp_path, 3.0)
    result = in_thread(handle.stages, request(0), request(0, task=1))
    wait_until(lambda: len(ran(tmp_path)) == 2)
    os.kill(tree_pid(handle), signal.SIGKILL)
    answers = result()
    assert all(a.executed for a in answers)
    # what the workers were running was waited for, not carried out twice
    assert len(ran(tmp_path)) == 2
    slow(tmp_path, 0.0)
    assert handle.stages.outcome(request(0, 1)).executed
    pickle.loads(pickle.dumps(handle.stages)).outcome(request(0))
    assert len(ran(tmp_path)) == 3


def test_failing_stage_is_set_aside_in_one_line(start: Start, tmp_path: Path) -> None:
    handle = start()
    (tmp_path / "fail").write_text("task1")
    for _ in range(2):
        with pytest.raises(StageError, match="of task 'task1'.*ValueError: no such") as caught:
            handle.stages.outcomes([request(0), request(0, 1, task=1)])
        assert "\n" not in str(caught.value)
    assert ran(tmp_path).count(IDENTITY.key(request(0, task=1))) == 3  # max_attempts
    assert len(handle.stats()["failed"]) == 2
    assert not handle.stages.outcome(request(0)).executed


def test_evicted_weights_are_recomputed(start: Start, tmp_path: Path) -> None:
    handle = start(max_weight_bytes=0, memory_bytes=0)
    answers = [handle.stages.outcome(request(*(0, 1, 2, 0)[:n])) for n in range(1, 5)]
    wait_until(lambda: not list((tmp_path / "runs").rglob("*.safetensors")))
    answers.append(handle.stages.outcome(request(0, 1, 2, 0, 1)))
    assert answers[-1].recomputed > 0
    assert handle.stats()["executed"] == 5
    local = LocalStages(FakeEngine(tmp_path))
    assert answers[-1].outcome == local.outcome(request(0, 1, 2, 0, 1)).outcome


def test_replay_only_refuses_what_is_not_there(start: Start, tmp_path: Path) -> None:
    start().stages.outcome(request(0))
    stages = start(replay_only=True, num_workers=1).stages
    assert not stages.outcome(request(0)).executed
    with pytest.raises(StageError, match="must be in the tree when replaying"):
        stages.outcome(request(1))


def test_unshared_carries_out_every_stage_of_every_episode(start: Start, tmp_path: Path) -> None:
    handle = start(share=False)
    seen = []
    for _ in range(2):
        for n in range(4):
            answers = handle.stages.outcomes(
                [request(*(0, 1, 2)[:n], task=task) for task in range(3)]
            )
            assert all(a.executed and len(a.carried_out) == min(n, 1) for a in answers)
            seen.append([a.outcome for a in answers])
    assert seen[:4] == seen[4:]
    assert set(Counter(ran(tmp_path)).values()) == {2}
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_bad_input_is_one_line(start: Start, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="num_workers and max_attempts must be at least 1"):
        start(num_workers=0)
    (tmp_path / "file").write_text("")
    make = functools.partial(FakeEngine, tmp_path)
    with pytest.raises(InputError, match="must be written"):
        start_workers(make, tmp_path / "file" / "x", num_workers=1)

    def broken() -> FakeEngine:
        raise ValueError("no engine\nand more")

    with pytest.raises(StageError, match="an engine must be made.*ValueError: no engine$"):
        start_workers(broken, tmp_path / "runs", num_workers=1)


def test_known_outcome_costs_little(start: Start, tmp_path: Path) -> None:
    stages = start(num_workers=1).stages
    asked = [request(0, 1, 2)] * 200
    stages.outcome(asked[0])
    begun = time.perf_counter()
    for one in asked:
        stages.outcome(one)
    local_s = (time.perf_counter() - begun) / len(asked)
    begun = time.perf_counter()
    for one in asked:
        stages._known.clear()
        stages.outcome(one)
    actor_s = (time.perf_counter() - begun) / len(asked)
    print(f"known here: {local_s * 1e6:.0f} us, by the actor: {actor_s * 1e3:.2f} ms")
    assert local_s < 1e-3 and actor_s < 2e-2  # bounds for busy machines
