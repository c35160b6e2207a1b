"""Content digests: what identifies weights, data, code and settings across runs and machines.

Seeds are derived here too, so that every random draw follows from what it stands for.
"""

import hashlib
import inspect
import json
import threading
from collections.abc import Callable, Mapping
from functools import cache, partial
from types import BuiltinFunctionType, FunctionType, MethodType
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
    changed with every release would void everything a storage path holds. What a callable carries
    counts too: arguments of a `functools.partial`, attributes of an object (`nn.CrossEntropyLoss`),
    values that a function closes over.
    """
    return _source(thing, ())


def _source(thing: Any, inside: tuple[int, ...]) -> str:
    if isinstance(thing, type):
        return _code(thing)
    carried = [_plain(value, (*inside, id(thing))) for value in _carried(thing)]
    if isinstance(thing, FunctionType | BuiltinFunctionType):
        return digest(_code(thing), carried) if carried else _code(thing)
    return digest(_code(type(thing)), carried)


_one_reader = threading.Lock()
"""Python 3.11 parses in one thread at a time only: others get a SystemError."""


@cache  # reading source takes milliseconds, and follows later edits
def _code(thing: Callable[..., Any] | type) -> str:
    module = getattr(thing, "__module__", "") or ""
    name = f"{module}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
    if module.split(".")[0] in {"torch", "torchvision", "rlhf_ray"}:
        return name
    try:
        with _one_reader:
            source = inspect.getsource(thing)
    except (OSError, TypeError):
        source = ""
    return digest(name.replace("__main__", ""), source)


def _carried(thing: Any) -> list[Any]:
    """What an object's behaviour depends on besides its code."""
    if isinstance(thing, partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, MethodType):
        return [thing.__func__, thing.__self__]
    if isinstance(thing, FunctionType):
        closure = [cell.cell_contents for cell in thing.__closure__ or ()]
        return [*closure, *(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
    return sorted(getattr(thing, "__dict__", {}).items())


def _plain(value: Any, inside: tuple[int, ...]) -> Any:
    """Any value as JSON-able data, equal in every process where that can be had."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)  # NaN and infinities too
    if isinstance(value, torch.Tensor):
        return tensor_digest({"": value})
    if id(value) in inside:
        return "itself"  # a cycle
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        return sorted([str(key), _plain(item, inside)] for key, item in value.items())
    if isinstance(value, list | tuple):
        return [_plain(item, inside) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item, inside) for item in value), key=repr)
    if callable(value) or hasattr(value, "__dict__"):
        return _source(value, inside)
    return repr(value)
