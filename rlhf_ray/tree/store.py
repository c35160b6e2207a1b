"""How the tree lies on storage: one JSON file per outcome, one safetensors file per stage.

    tree/<first 2 digits of key>/<key>.json         the outcome with its checksum
    tree/<first 2 digits of key>/<key>.safetensors  states of the levels that the stage changed

The weights are written first and the outcome last: it is the commit mark. Each file carries the
checksum of its own content, so that weights which were evicted and recomputed (on hardware that
rounds differently, say) stay valid beside the outcome that was committed first. A file that is
missing, cut or altered counts as absent.
"""

import hashlib
import json
import threading
import uuid
from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from rlhf_ray.digests import digest
from rlhf_ray.outcomes import LevelState, Outcome
from rlhf_ray.storage import Storage

_MARKS = "marks"
"""Folder of what tells one tree's folder from another's of the same path."""


class StateCache:
    """Level states in memory, least recently used out first beyond a limit.

    What a stage has just left stays whatever its size: the next one starts there. States are kept
    by (space, version, level); a space is one unshared episode's, or "".
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._states: OrderedDict[tuple[str, str, int], LevelState] = OrderedDict()

    def get(self, space: str, version: str, level: int) -> LevelState | None:
        """The state, if it is still there."""
        state = self._states.get((space, version, level))
        if state is not None:
            self._states.move_to_end((space, version, level))
        return state

    def put(self, space: str, version: str, states: Mapping[int, LevelState]) -> None:
        """Keeps the states that a stage left."""
        for level, state in states.items():
            self._drop((space, version, level))
            self._states[space, version, level] = state
            self._bytes += state.n_bytes()
        while self._bytes > self._max_bytes and len(self._states) > len(states):
            self._drop(next(iter(self._states)))

    def keep(self, space: str, versions: Container[str]) -> None:
        """Drops a space's states of all other versions."""
        for name in list(self._states):
            if name[0] == space and name[1] not in versions:
                self._drop(name)

    def _drop(self, name: tuple[str, str, int]) -> None:
        state = self._states.pop(name, None)
        self._bytes -= 0 if state is None else state.n_bytes()


class TreeStore:
    """Outcomes and weights on storage, with the outcomes met kept in memory. Thread-safe.

    Args:
        storage: where.
        max_weight_bytes: weights used longest ago are deleted beyond this; None: this process
            deletes none (another one may).
        max_outcomes: how many outcomes to keep in memory (about 3 kB each).
        folder: the tree's folder on the storage.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        max_weight_bytes: int | None = None,
        max_outcomes: int = 50_000,
        folder: str = "tree",
    ) -> None:
        self._storage = storage
        self._folder = folder
        self._max_weight_bytes = max_weight_bytes
        self._max_outcomes = max_outcomes
        self._outcomes: OrderedDict[str, Outcome] = OrderedDict()
        self._weights: OrderedDict[str, int] | None = None  # version -> bytes, by last use
        self._lock = threading.Lock()  # of the outcomes: never held while storage is asked
        self._weights_lock = threading.Lock()

    def mark(self) -> str:
        """The name of a file that marks this tree, for `has_mark`; made if there is none."""
        folder = f"{self._folder}/{_MARKS}"
        found = self._storage.list(folder)
        if not found:
            found = [f"{folder}/{uuid.uuid4().hex}"]
            self._storage.write_bytes(found[0], b"of one tree\n")
        return found[0]

    def has_mark(self, mark: str) -> bool:
        """Whether this process sees the folder that the mark was made in."""
        return self._storage.exists(mark)

    def peek(self, key: str) -> Outcome | None:
        """The outcome if it is in memory; never touches the storage."""
        with self._lock:
            outcome = self._outcomes.get(key)
            if outcome is not None:
                self._outcomes.move_to_end(key)
            return outcome

    def get(self, key: str) -> Outcome | None:
        """The committed outcome of a key, or None."""
        outcome = self.peek(key)
        if outcome is None:
            outcome = _parse_outcome(self._storage.read_bytes(self._name(key, "json")), key)
            if outcome is not None:
                self.remember(outcome)
        return outcome

    def remember(self, outcome: Outcome) -> None:
        """Keeps a committed outcome in memory."""
        with self._lock:
            self._outcomes[outcome.key] = outcome
            while len(self._outcomes) > self._max_outcomes:
                self._outcomes.popitem(last=False)

    def put(self, outcome: Outcome, states: Mapping[int, LevelState]) -> Outcome:
        """Commits an outcome; returns the one that stands (the first committed).

        Args:
            outcome: of a stage that was carried out.
            states: of the levels it changed; empty if none.
        """
        first = self.get(outcome.key)
        if first is not None:
            return first
        if states:
            self.put_states(outcome.key, states)
        self._storage.write_bytes(self._name(outcome.key, "json"), _format_outcome(outcome))
        self.remember(outcome)
        return outcome

    def put_states(self, version: str, states: Mapping[int, LevelState]) -> None:
        """Writes the states that a stage left, over what may be there."""
        data = _format_states(version, states)
        self._storage.write_bytes(self._name(version, "safetensors"), data)
        self.use([version])

    def states(self, version: str) -> dict[int, LevelState] | None:
        """The states that a stage left, or None: evicted, cut or altered."""
        data = self._storage.read_bytes(self._name(version, "safetensors"))
        states = None if data is None else _parse_states(data, version)
        if states is not None:
            self.use([version])
        return states

    def use(self, versions: Iterable[str]) -> None:
        """Notes that weights were just used or written; evicts beyond the limit."""
        if self._max_weight_bytes is None:
            return
        with self._weights_lock:
            if self._weights is None:
                self._weights = self._list_weights()
            for version in versions:
                size = self._weights.pop(version, None)
                if size is None:
                    size = self._storage.size_bytes(self._name(version, "safetensors"))
                if size is not None:
                    self._weights[version] = size
            self._evict(self._weights)

    def _evict(self, weights: OrderedDict[str, int]) -> None:
        excess = sum(weights.values()) - (self._max_weight_bytes or 0)
        while excess > 0 and weights:
            version, size = weights.popitem(last=False)
            self._storage.delete(self._name(version, "safetensors"))
            excess -= size

    def _list_weights(self) -> OrderedDict[str, int]:
        ending = ".safetensors"
        files = [f for f in self._storage.files(self._folder) if f.name.endswith(ending)]
        files.sort(key=lambda file: file.modified_s)
        return OrderedDict(
            (f.name.rsplit("/", 1)[1].removesuffix(ending), f.size_bytes) for f in files
        )

    def _name(self, key: str, ending: str) -> str:
        return f"{self._folder}/{key[:2]}/{key}.{ending}"


def _format_outcome(outcome: Outcome) -> bytes:
    data = outcome.as_json()
    return json.dumps({"sha256": _json_sha256(data), "outcome": data}).encode()


def _parse_outcome(data: bytes | None, key: str) -> Outcome | None:
    if data is None:
        return None
    try:
        entry = json.loads(data)
        if entry["sha256"] != _json_sha256(entry["outcome"]) or entry["outcome"]["key"] != key:
            return None
        return Outcome.from_json(entry["outcome"])
    except (ValueError, KeyError, TypeError):
        return None


def _json_sha256(data: object) -> str:
    # not `digest`: figures may be NaN or infinite here
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _format_states(version: str, states: Mapping[int, LevelState]) -> bytes:
    tensors: dict[str, Tensor] = {}
    for level, state in states.items():
        for name, value in state.weights.items():
            tensors[f"{level}/w/{name}"] = value
        for name, value in state.optimizer.items():
            tensors[f"{level}/o/{name}"] = value
    # copies where safetensors wants them: channels-last strides, two names of one tensor
    seen: set[int] = set()
    for name, value in tensors.items():
        plain = value.detach().cpu().contiguous()
        tensors[name] = plain.clone() if plain.data_ptr() in seen else plain
        seen.add(tensors[name].data_ptr())
    optimizers = {str(level): state.optimizer_name for level, state in states.items()}
    metadata = {"version": version, "optimizers": json.dumps(optimizers, sort_keys=True)}
    return save(tensors, {**metadata, "sha256": _states_sha256(tensors, metadata)})


def _parse_states(data: bytes, version: str) -> dict[int, LevelState] | None:
    try:
        n_header = int.from_bytes(data[:8], "little")
        metadata: dict[str, str] = json.loads(data[8 : 8 + n_header])["__metadata__"]
        tensors = load(data)
        sha256 = metadata.pop("sha256")
        if metadata["version"] != version or sha256 != _states_sha256(tensors, metadata):
            return None
    except Exception:  # a cut file fails in many ways; SafetensorError is a plain Exception
        return None
    optimizers: dict[str, str] = json.loads(metadata["optimizers"])
    return {
        int(level): LevelState(
            weights=_under(f"{level}/w/", tensors),
            optimizer=_under(f"{level}/o/", tensors),
            optimizer_name=name,
        )
        for level, name in optimizers.items()
    }


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)}


def _states_sha256(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(digest(metadata).encode())
    for name in sorted(tensors):
        value = tensors[name]
        sha.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        sha.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
