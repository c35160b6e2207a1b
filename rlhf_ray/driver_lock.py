"""One driver per sweep: a lock file that says who holds it, and goes stale when its holder dies."""

import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_ray.errors import InputError
from rlhf_ray.storage import Storage

BEAT_S = 20.0
"""How often a driver says that it lives."""

STALE_S = 90.0
"""After so long without a beat, a lock of another machine counts as left behind."""


@contextmanager
def driver_lock(storage: Storage, sweep: str) -> Iterator[None]:
    """Holds a sweep for this process while the body runs.

    Raises:
        InputError: another driver that lives holds it.
    """
    name = f"{sweep}/lock.json"
    holder = storage.read_json(name)
    if isinstance(holder, dict) and _alive(holder):
        raise InputError(
            f"a sweep must have one driver, got {sweep!r} held by process {holder['pid']} on "
            f"{holder['host']}. Wait for it, end it, or give another --name."
        )
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "token": uuid.uuid4().hex}
    storage.write_json(name, {**mine, "time": time.time()})
    written = storage.read_json(name)
    if not isinstance(written, dict) or written.get("token") != mine["token"]:
        raise InputError(f"a sweep must have one driver, got two starting {sweep!r} at once.")
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(BEAT_S):
            storage.write_json(name, {**mine, "time": time.time()})

    thread = threading.Thread(target=beat, daemon=True, name="rlhf_ray_lock")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        storage.delete(name)


def _alive(holder: dict[str, Any]) -> bool:
    if holder.get("host") == socket.gethostname():
        pid = int(holder["pid"])
        return pid != os.getpid() and _runs(pid)
    return time.time() - float(holder["time"]) < STALE_S


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
