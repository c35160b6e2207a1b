import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhf_ray.errors import InputError, StorageError
from rlhf_ray.storage import Storage, open_storage
from rlhf_ray.sweep import driver_lock as module
from rlhf_ray.sweep.driver_lock import STALE_S, driver_lock

HERE = socket.gethostname()


def lock_of(folder: Path, **holder: object) -> None:
    (folder / "sweep").mkdir(exist_ok=True)
    (folder / "sweep" / "lock.json").write_text(json.dumps({"token": "x", **holder}))


def dead_pid() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def test_lock_is_held_by_one_and_gone_afterwards(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with driver_lock(storage, "sweep"):
        with (
            pytest.raises(InputError, match="a sweep must have one driver, got 'sweep' held by"),
            driver_lock(storage, "sweep"),
        ):
            pass
        assert storage.exists("sweep/lock.json")
        with driver_lock(storage, "another"):
            pass
    assert not storage.exists("sweep/lock.json")
    with driver_lock(storage, "sweep"):
        pass


def test_lock_is_freed_by_an_error(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with pytest.raises(KeyboardInterrupt), driver_lock(storage, "sweep"):
        raise KeyboardInterrupt
    with driver_lock(storage, "sweep"):
        pass


def test_other_process_that_lives_keeps_its_lock(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        lock_of(tmp_path, host=HERE, pid=other.pid, time=time.time())
        with (
            pytest.raises(InputError, match=f"held by process {other.pid} on {HERE}"),
            driver_lock(open_storage(tmp_path), "sweep"),
        ):
            pass
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize(
    "holder",
    [
        {"host": HERE, "pid": dead_pid(), "time": time.time() + 1000},
        {"host": HERE, "pid": 1, "time": time.time() - STALE_S - 1},  # the id is another's by now
        {"host": "elsewhere", "pid": 1, "time": time.time() - STALE_S - 1},
    ],
)
def test_lock_left_behind_is_taken_over(tmp_path: Path, holder: dict[str, object]) -> None:
    lock_of(tmp_path, **holder)
    with driver_lock(open_storage(tmp_path), "sweep"):
        pass


def test_lock_of_another_machine_counts_while_it_beats(tmp_path: Path) -> None:
    lock_of(tmp_path, host="elsewhere", pid=1, time=time.time() - STALE_S / 2)
    with (
        pytest.raises(InputError, match="on elsewhere"),
        driver_lock(open_storage(tmp_path), "sweep"),
    ):
        pass


def test_cut_lock_file_is_no_lock(tmp_path: Path) -> None:
    lock_of(tmp_path)
    (tmp_path / "sweep" / "lock.json").write_text('{"host": ')
    with driver_lock(open_storage(tmp_path), "sweep"):
        pass


def test_lock_beats_and_outlives_a_storage_that_fails_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BEAT_S", 0.02)
    write, failures = Storage.write_json, 3
    beats = threading.Semaphore(0)

    def flaky(self: Storage, name: str, value: dict[str, object]) -> None:
        nonlocal failures
        if threading.current_thread() is not threading.main_thread():
            failures -= 1
            if failures >= 0:
                raise StorageError("no network")
        write(self, name, value)
        beats.release()

    monkeypatch.setattr(Storage, "write_json", flaky)
    storage = open_storage(tmp_path)
    with driver_lock(storage, "sweep"):
        first = storage.read_json("sweep/lock.json")
        for _ in range(3):
            assert beats.acquire(timeout=10)
        later = storage.read_json("sweep/lock.json")
    assert first is not None and later is not None and later["time"] > first["time"]


def test_of_many_that_start_at_once_one_has_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Storage.read_json

    def slow(self: Storage, name: str) -> object:
        found = read(self, name)
        time.sleep(0.02)  # others read before this one writes
        return found

    monkeypatch.setattr(Storage, "read_json", slow)
    storage, holding, refused = open_storage(tmp_path), [], []
    release = threading.Event()

    def start() -> None:
        try:
            with driver_lock(storage, "sweep"):
                holding.append(1)
                release.wait(10)
        except InputError as error:
            refused.append(str(error))
            if len(refused) == 5:
                release.set()

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(holding), len(refused)) == (1, 5)
    assert not storage.exists("sweep/lock.json")


def test_a_lock_that_was_taken_over_is_left_to_its_holder(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    with driver_lock(storage, "sweep"):
        lock_of(tmp_path, host="elsewhere", pid=1, time=time.time())
    assert storage.read_json("sweep/lock.json")["host"] == "elsewhere"
