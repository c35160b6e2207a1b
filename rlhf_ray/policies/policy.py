"""A learned policy: act greedily, save, load, check. No Ray here.

On disk a policy is a directory with `policy.json` (what the policy is for, how it was made, and a
SHA-256 of itself and of the weights) and `policy.safetensors` (the weights). No pickle. Its `kind`
is "network" (Q-values, or an actor's logits) or "tabular" (`q_table`: Q-values of states, with
what a state is answered that was never met).

Dimensions: L level, F feature, A action, M ensemble member.
"""

import errno
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from rlhf_ray.digests import digest
from rlhf_ray.engine.descriptors import SourceMoments
from rlhf_ray.errors import InputError, StorageError, unknown_name
from rlhf_ray.policies.networks import LevelQNetwork, LevelQNetworks, NetworkSettings, masked
from rlhf_ray.policies.q_table import from_weights
from rlhf_ray.process import ProcessSpec
from rlhf_ray.storage import Storage, parent_of

SCHEMA_VERSION = 1
"""Of the files; a reader refuses every other."""

JSON_NAME = "policy.json"
WEIGHTS_NAME = "policy.safetensors"

BEST_POLICY = "best_policy"
"""Folder of a sweep that holds the policy to use."""

KINDS = ("network", "tabular")

MOMENTS, OUTPUTS = "source_moments/", "source_outputs/"
"""Begin the names of the activation moments among the tensors: of levels, and of modules."""

PAIR = ("mean", "variance")


@dataclass(frozen=True, kw_only=True)
class Policy:
    """What decides, at a level's turn, which operation to carry out and which level acts next.

    Attributes:
        levels: the L level names, in order.
        features: the F names of the observation's features, in order.
        operations: name and settings (JSON-able) of each operation, in order. Action
            `operation * L + next_level`.
        network: shape of the levels' networks; None: there are tables instead.
        weights: the networks' state dict, or the tables' tensors.
        metadata: JSON-able: package versions, the configuration that made the policy, ...
        source_moments: of the pretrained model's activations on the source data, which the
            observation's activation shift and `Align` hold a task's against; None without.
    """

    levels: tuple[str, ...]
    features: tuple[str, ...]
    operations: tuple[Mapping[str, Any], ...]
    network: NetworkSettings | None
    weights: Mapping[str, Tensor] = field(repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    source_moments: SourceMoments | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        sizes = (len(self.levels), len(self.features), len(self.operations) * len(self.levels))
        if self.network is None:
            names = ("n_levels", "n_features", "n_actions")
            views = from_weights(self.weights, **dict(zip(names, sizes, strict=True)))
        else:
            views = _network_views(self.network, self.weights, sizes)
        object.__setattr__(self, "_views", views)

    @property
    def kind(self) -> str:
        """What the weights are: "network" or "tabular"."""
        return "tabular" if self.network is None else "network"

    @property
    def operation_names(self) -> tuple[str, ...]:
        """The operations' names, in order."""
        return tuple(str(operation["name"]) for operation in self.operations)

    def values(self, level: int, features: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Values at a level's turn: (A,) float32, minus infinity where the mask is 0.

        Q-values; of an actor-critic policy the actor's logits. A table answers a state it never
        learned from with the mean over those it did.

        Args:
            level: whose turn it is, 0 to L - 1.
            features: (F,).
            mask: (A,), non-zero where an action is valid.
        """
        view: Any = self._views[level]  # pyright: ignore[reportAttributeAccessIssue]
        with torch.no_grad():
            values_A = view.values(torch.from_numpy(np.float32(features)).unsqueeze(0))[0]
        return masked(values_A, torch.from_numpy(np.asarray(mask) != 0)).numpy()

    def act(self, level: int, features: np.ndarray, mask: np.ndarray) -> int:
        """The valid action that the policy decides on; arguments as for `values`.

        The one of highest value; with a schedule, that of the schedule unless another is surely
        better (`rlhf_ray.policies.networks.decided`).
        """
        if self.network is None or self.network.schedule is None:
            return int(self.values(level, features, mask).argmax())
        view: Any = self._views[level]  # pyright: ignore[reportAttributeAccessIssue]
        with torch.no_grad():
            values_A = view.decided(torch.from_numpy(np.float32(features)).unsqueeze(0))[0]
        return int(masked(values_A, torch.from_numpy(np.asarray(mask) != 0)).argmax())

    def faithful(self) -> "Policy":
        """The same, but it never leaves its schedule."""
        assert self.network is not None and self.network.schedule is not None
        return replace(self, network=replace(self.network, departs=False))

    def as_charged(self, spec: ProcessSpec) -> ProcessSpec:
        """The process with what the policy pays for in it: no probes if it looks at nothing.

        It looks unless it never leaves its schedule; under a budget that may not fit any more.
        """
        faithful = self.network is not None and not self.network.departs
        looks = not faithful or spec.settings.budget is not None
        return spec if looks else replace(spec, probed=False)

    def check(
        self,
        levels: Sequence[str],
        operations: Sequence[Mapping[str, Any]],
        features: Sequence[str],
    ) -> None:
        """Raises InputError unless the policy was made for just these.

        Args:
            levels: the level names, in order.
            operations: name and settings of each operation, in order.
            features: the observation's feature names, in order.
        """
        _check_equal("levels", list(self.levels), list(levels))
        names = [str(operation["name"]) for operation in operations]
        _check_equal("operations", list(self.operation_names), names)
        for own, given in zip(self.operations, operations, strict=True):
            if digest(dict(own)) != digest(dict(given)):
                raise InputError(
                    "the policy must have been made for the same operations, got other settings of "
                    f"{own['name']!r}: {_difference(own, given)}."
                )
        _check_equal("features", list(self.features), list(features))

    def save(self, directory: str | Path) -> str | Path:
        """Writes the policy.

        Args:
            directory: a local path or a URI; made if it is not there; a policy in it is replaced.

        Returns:
            The path of the `policy.json`, or its URI.

        Raises:
            StorageError: it cannot be written.
        """
        storage, name = parent_of(directory)
        self.write(storage, name)
        if "://" in str(directory):
            uri, mark, options = str(directory).partition("?")
            return f"{uri.rstrip('/')}/{JSON_NAME}{mark}{options}"
        return Path(directory).expanduser() / JSON_NAME

    def write(self, storage: Storage, folder: str) -> None:
        """Writes the policy to any storage.

        Args:
            storage: where.
            folder: on it; "": the storage's root. A policy in it is replaced.

        Raises:
            StorageError: it cannot be written.
        """
        tensors = {**self.weights, **_moments_by_name(self.source_moments)}
        weights = save_tensors(
            {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        )
        content = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "levels": list(self.levels),
            "n_levels": len(self.levels),
            "features": list(self.features),
            "operations": [dict(operation) for operation in self.operations],
            "network": None if self.network is None else self.network.to_json(),
            "metadata": dict(self.metadata),
            "weights": {WEIGHTS_NAME: hashlib.sha256(weights).hexdigest()},
        }
        # the digest in the file is of what is read back: JSON has lists for tuples
        content = json.loads(json.dumps(content, allow_nan=False))
        text = json.dumps({**content, "sha256": digest(content)}, indent=1) + "\n"
        inside = f"{folder}/" if folder else ""
        storage.write_bytes(f"{inside}{WEIGHTS_NAME}", weights)
        storage.write_bytes(f"{inside}{JSON_NAME}", text.encode())

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """Reads a policy.

        Args:
            path: the directory, or the `policy.json` in it; a local path or a URI.

        Returns:
            The policy.

        Raises:
            InputError: missing, cut or altered files, or another schema version.
        """
        storage, name = parent_of(path)
        itself = name == JSON_NAME or storage.exists(name)
        return cls.read(storage, "" if itself else name)

    @classmethod
    def read(cls, storage: Storage, folder: str) -> "Policy":
        """Reads a policy from any storage.

        Args:
            storage: holds it.
            folder: on it; "": the storage's root.

        Raises:
            InputError: as `load`.
        """
        files = _Files(storage, folder)
        content = _read_json(files)
        data = files.read(WEIGHTS_NAME)
        if content.get("weights") != {WEIGHTS_NAME: hashlib.sha256(data).hexdigest()}:
            raise files.damaged(WEIGHTS_NAME, "its checksum differs")
        try:
            weights = load_tensors(data)
            shape = content["network"]
            return cls(
                levels=tuple(content["levels"]),
                features=tuple(content["features"]),
                operations=tuple(content["operations"]),
                network=(
                    None if content["kind"] == "tabular" else NetworkSettings.from_json(shape)
                ),
                weights={n: v for n, v in weights.items() if not n.startswith((MOMENTS, OUTPUTS))},
                metadata=content["metadata"],
                source_moments=_moments_of(weights, len(content["levels"])),
            )
        except SafetensorError as error:
            raise files.damaged(WEIGHTS_NAME, _first_line(error)) from error
        except (KeyError, TypeError, ValueError) as error:
            what = f"it does not describe a policy ({type(error).__name__}: {_first_line(error)})"
            raise files.damaged(JSON_NAME, what) from error


def _network_views(
    shape: NetworkSettings, weights: Mapping[str, Tensor], sizes: tuple[int, int, int]
) -> tuple[LevelQNetwork, ...]:
    got = (shape.n_levels, shape.n_features, shape.n_actions)
    if got != sizes:
        raise InputError(
            "the network must have a head per level, an input per feature and an output per "
            f"action, got (levels, features, actions)={got}, not {sizes}."
        )
    networks = LevelQNetworks(shape)
    try:
        networks.load_state_dict(dict(weights))
    except RuntimeError as error:
        raise InputError(f"weights must fit the network, got {_first_line(error)}.") from error
    networks.requires_grad_(False)
    return tuple(networks.level(i) for i in range(shape.n_levels))


def _moments_by_name(moments: SourceMoments | None) -> dict[str, Tensor]:
    if moments is None:
        return {}
    places = {f"{MOMENTS}{level}": pair for level, pair in enumerate(moments.levels)}
    places |= {f"{OUTPUTS}{name}": pair for name, pair in moments.outputs.items()}
    return {
        f"{place}/{name}": value
        for place, pair in places.items()
        for name, value in zip(PAIR, pair, strict=True)
    }


def _moments_of(tensors: Mapping[str, Tensor], n_levels: int) -> SourceMoments | None:
    if not any(name.startswith(MOMENTS) for name in tensors):
        return None

    def pair(place: str) -> tuple[Tensor, Tensor]:
        mean, variance = (tensors[f"{place}/{name}"] for name in PAIR)
        return mean, variance

    means = [name for name in tensors if name.startswith(OUTPUTS) and name.endswith("/mean")]
    modules = [name.removeprefix(OUTPUTS).removesuffix("/mean") for name in means]
    return SourceMoments(
        levels=[pair(f"{MOMENTS}{level}") for level in range(n_levels)],
        outputs={name: pair(f"{OUTPUTS}{name}") for name in modules},
    )


@dataclass(frozen=True)
class _Files:
    """A policy's files on a storage."""

    storage: Storage
    folder: str

    def read(self, name: str) -> bytes:
        try:
            data, reason = self.storage.read_bytes(self._at(name)), os.strerror(errno.ENOENT)
        except StorageError as error:
            data, reason = None, str(error)
        if data is not None:
            return data
        of_sweep = name == JSON_NAME and self.storage.exists(self._at(f"{BEST_POLICY}/{name}"))
        hint = f" Did you mean {self.shown(BEST_POLICY)!r}?" if of_sweep else ""
        raise InputError(
            f"a policy must be a directory with {JSON_NAME} and {WEIGHTS_NAME}, or the {JSON_NAME} "
            f"in it, got {self.shown(name)!r} ({reason}).{hint}"
        )

    def shown(self, name: str) -> str:
        return self.storage.shown_path(self._at(name))

    def damaged(self, name: str, how: str) -> InputError:
        return InputError(
            f"a policy's files must be whole, got {self.shown(name)!r}: {how}. Save it again."
        )

    def _at(self, name: str) -> str:
        return f"{self.folder}/{name}" if self.folder else name


def _read_json(files: _Files) -> dict[str, Any]:
    data = files.read(JSON_NAME)
    try:
        content = json.loads(data)
    except ValueError as error:
        raise files.damaged(JSON_NAME, _first_line(error)) from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version is None:
        raise files.damaged(JSON_NAME, "it has no schema_version")
    if version != SCHEMA_VERSION:
        raise InputError(
            f"a policy's schema_version must be {SCHEMA_VERSION}, got schema_version={version!r} "
            f"in {files.shown(JSON_NAME)!r}. Use the rlhf_ray version that wrote it."
        )
    if content.pop("sha256", None) != digest(content):
        raise files.damaged(JSON_NAME, "its checksum differs")
    if content.get("kind") not in KINDS:
        raise unknown_name("kind of policy", str(content.get("kind")), KINDS)
    return content


def _check_equal(what: str, own: list[str], given: list[str]) -> None:
    if own != given:
        raise InputError(
            f"the policy must have been made for the same {what}, got {what}={given} for a policy "
            f"made for {own}. Use a policy made for them, or learn one."
        )


def _difference(own: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    names = sorted(set(own) | set(given))
    return ", ".join(
        f"{name}={given.get(name)!r} instead of {own.get(name)!r}"
        for name in names
        if own.get(name) != given.get(name)
    )


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]
