"""One driver per sweep: a lock file that says who holds it, and goes stale when its holder dies."""

import fcntl
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from rlhf_ray.errors import InputError, StorageError
from rlhf_ray.storage import Storage

LOCK_FILE = "lock.json"

BEAT_S = 20.0
"""How often a driver says that it lives."""

STALE_S = 90.0
"""After so long without a beat, a lock counts as left behind, whatever now has its process id."""

SETTLE_S = 1.0
"""On an object store: from writing the lock to reading back whose it is."""

_held: set[str] = set()
"""Tokens of the locks that this process holds: its threads exclude each other too."""


@contextmanager
def driver_lock(storage: Storage, sweep: str) -> Iterator[None]:
    """Holds a sweep for this process while the body runs.

    Raises:
        InputError: another driver that lives holds it.
    """
    name = f"{sweep}/{LOCK_FILE}"
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    with _one_at_a_time(storage, sweep):
        holder = storage.read_json(name)
        if isinstance(holder, dict) and _alive(holder):
            raise InputError(
                f"a sweep must have one driver, got {sweep!r} held by process {holder['pid']} on "
                f"{holder['host']}. Wait for it, end it, or give another --name."
            )
        storage.write_json(name, {**mine, "time": time.time()})
        _held.add(mine["token"])

    def is_mine() -> bool:
        written = storage.read_json(name)
        return isinstance(written, dict) and written.get("token") == mine["token"]

    if not storage.is_local:  # nothing is exclusive there: another may have read before this wrote
        time.sleep(SETTLE_S)
        if not is_mine():
            _held.discard(mine["token"])
            raise InputError(f"a sweep must have one driver, got two starting {sweep!r} at once.")
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            with suppress(StorageError):  # the next one may get through
                if is_mine():
                    storage.write_json(name, {**mine, "time": time.time()})

    thread = threading.Thread(target=beat, daemon=True, name="rlhf_ray_lock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _held.discard(mine["token"])
        if is_mine():
            storage.delete(name)


@contextmanager
def _one_at_a_time(storage: Storage, sweep: str) -> Iterator[None]:
    """Excludes others who take a lock on this folder, where the file system can."""
    folder = storage.local_path(sweep)
    if folder is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # NFS of old: no worse than without
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def driver_died(storage: Storage, sweep: str) -> bool:
    """Whether a sweep's lock was left behind: its driver could not say that it ended."""
    holder = storage.read_json(f"{sweep}/{LOCK_FILE}")
    return isinstance(holder, dict) and not _alive(holder)


def _alive(holder: dict[str, Any]) -> bool:
    if time.time() - float(holder["time"]) >= STALE_S:
        return False
    if holder.get("host") != socket.gethostname():
        return True
    pid = int(holder["pid"])
    if pid == os.getpid():  # in containers, a process that is gone had the same one
        return holder.get("token") in _held
    return _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
