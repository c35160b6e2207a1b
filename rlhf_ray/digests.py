"""Content digests: what identifies weights, data, code and settings across runs and machines.

Seeds are derived here too, so that every random draw follows from what it stands for.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch


def digest(*parts: object) -> str:
    """Hex SHA-256 over JSON-able parts; mappings count by content, not by order.

    >>> digest("a", {"x": 1, "y": 2}) == digest("a", {"y": 2, "x": 1})
    True
    """
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def derive_seed(*parts: object) -> int:
    """A 63-bit seed for the random draws that `parts` name.

    >>> derive_seed(0, "episode", 3) == derive_seed(0, "episode", 3)
    True
    """
    return int(digest(*parts)[:16], 16) >> 1


def tensor_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Hex SHA-256 over names, dtypes, shapes and bytes of tensors (any device)."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        sha.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        # uint8 view: covers dtypes that NumPy lacks (bfloat16)
        sha.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def source_digest(thing: Callable[..., Any] | type) -> str:
    """Identity of code: the qualified name, and for code that users write its source as well.

    Library code (torch, torchvision, this package) is identified by its name alone: a digest that
    changed with every release would void everything a storage path holds.
    """
    module = getattr(thing, "__module__", "") or ""
    name = f"{module}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
    if module.split(".")[0] in {"torch", "torchvision", "rlhf_ray"}:
        return name
    try:
        source = inspect.getsource(thing)
    except (OSError, TypeError):
        source = ""
    return digest(name.replace("__main__", ""), source)
