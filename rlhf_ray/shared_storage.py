"""Before a sweep on several nodes: that all of them see the one storage path.

A path that only some nodes share would not fail by itself: weights would be missing elsewhere, and
be computed again and again.
"""

import uuid
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_ray.errors import InputError, RlhfRayError
from rlhf_ray.storage import open_storage

TIMEOUT_S = 120.0
"""How long a node may take: Ray starts a process on it, which imports this package."""


def check_shared(storage_path: str | Path) -> int:
    """Lets every node of the running Ray read what this process wrote, and the other way round.

    Args:
        storage_path: a folder or URI.

    Returns:
        How many nodes were asked: 0 where there is no other than this one.

    Raises:
        InputError: a node sees another folder, cannot read or write, or cannot run this package.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    if set(nodes) <= {here}:
        return 0
    storage = open_storage(storage_path, check=True)
    location = str(storage.local_path() or storage_path)
    asked = f"probe-{uuid.uuid4().hex}"
    answers = {node: f"{asked}-{i}" for i, node in enumerate(nodes)}
    remote: Any = ray.remote
    probe = remote(num_cpus=0, max_retries=1)(_probe)
    storage.write_bytes(asked, asked.encode())
    try:
        pending = {
            node: probe.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
            ).remote(location, asked, answer)
            for node, answer in answers.items()
        }
        for node, answer in answers.items():
            reason = _reason(pending[node])
            if not reason and storage.read_bytes(answer) != answer.encode():
                reason = "what it wrote is not seen here"
            if reason and _alive(node):  # one that has just been lost is nobody's mistake
                raise InputError(
                    f"the storage path must be shared by all nodes, got {storage.shown!r} on "
                    f"{_name(nodes[node])}: {reason}. Give a path that all nodes see (NFS, "
                    "s3://...)."
                )
    finally:
        for name in (asked, *answers.values()):
            storage.delete(name)
    return len(nodes)


def _probe(location: str, asked: str, answer: str) -> str:
    """Runs on the node; returns what is wrong, "" if nothing is."""
    try:
        storage = open_storage(location)
        if storage.read_bytes(asked) != asked.encode():
            return "it does not see what was written elsewhere"
        storage.write_bytes(answer, answer.encode())
    except RlhfRayError as error:
        return str(error).rstrip(".")
    return ""


def _reason(pending: Any) -> str:
    try:
        return ray.get(pending, timeout=TIMEOUT_S)
    except GetTimeoutError:
        return f"no answer in {TIMEOUT_S:.0f} s"
    except RayError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"it cannot run this package ({lines[-1] if lines else type(error).__name__})"


def _alive(node_id: str) -> bool:
    return any(node["NodeID"] == node_id and node["Alive"] for node in ray.nodes())


def _name(node: dict[str, Any]) -> str:
    host, address = node.get("NodeManagerHostname", ""), node["NodeManagerAddress"]
    return f"node {host} ({address})" if host and host != address else f"node {address}"
