"""Content digests: what identifies weights, data, code and settings across runs and machines.

Seeds are derived here too, so that every random draw follows from what it stands for.
"""

import dis
import hashlib
import inspect
import json
import sys
import sysconfig
import threading
from collections.abc import Callable, Container, Iterator, Mapping
from functools import cache, partial
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


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


def tensor_digest(tensors: Mapping[str, Tensor]) -> str:
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
    values that a function closes over, base classes, and the functions, classes and data of their
    modules that users' functions name.
    """
    return _source(thing, ())


def attributes_digest(thing: object, *, besides: Container[str] = ()) -> str:
    """Identity of an object's public attributes, as far as they are data or code; "" of none."""
    names = [name for name in vars(thing) if not name.startswith("_") and name not in besides]
    told = _told({name: vars(thing)[name] for name in names}, (), {id(thing)})
    return digest(told) if told else ""


def is_installed(module: str) -> bool:
    """Whether a module (by name) belongs to Python, to this package or to an installed one."""
    top = module.split(".")[0]
    if top in _LIBRARY or top in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(top), "__file__", None) or ""
    return file.startswith(tuple(sysconfig.get_path(name) for name in ("purelib", "platlib")))


_LIBRARY = frozenset({"torch", "torchvision", "rlhf_ray"})


def _source(thing: Any, inside: tuple[int, ...]) -> str:
    around = _surroundings(thing)
    if isinstance(thing, type):
        return digest(_code(thing), around) if around else _code(thing)
    carried = [_plain(value, (*inside, id(thing))) for value in _carried(thing)] + around
    if isinstance(thing, FunctionType | BuiltinFunctionType):
        return digest(_code(thing), carried) if carried else _code(thing)
    return digest(_code(type(thing)), carried)


_one_reader = threading.Lock()
"""Python 3.11 parses in one thread at a time only: others get a SystemError."""


@cache  # reading source takes milliseconds, and follows later edits
def _code(thing: Callable[..., Any] | type) -> str:
    module = getattr(thing, "__module__", "") or ""
    name = f"{module}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
    if module.split(".")[0] in _LIBRARY:
        return name
    kinds = thing.__mro__[1:] if isinstance(thing, type) else ()
    bases = [_text(kind) for kind in kinds if not is_installed(kind.__module__)]
    return digest(name.replace("__main__", ""), _text(thing), *bases)


def _text(thing: Callable[..., Any] | type) -> str:
    try:
        with _one_reader:
            return inspect.getsource(thing)
    except (OSError, TypeError):
        return ""


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


def _surroundings(thing: Any) -> list[Any]:
    """What users' code names of its module, and what that names in turn: [name, value] each."""
    found: list[Any] = []
    reached, met = [thing], {id(thing)}
    objects: set[int] = set()
    for code in reached:  # grows
        for function in _functions(code):
            around = function.__globals__
            for name in sorted(_names(function.__code__) & around.keys()):
                value = around[name]
                if (told := _told(value, (), objects)) is not None:
                    found.append([name, told])
                if isinstance(value, type | FunctionType) and id(value) not in met:
                    met.add(id(value))
                    reached.append(value)
    return found


def _functions(thing: Any) -> Iterator[FunctionType]:
    """A user's function itself; the functions that a user's class and its bases define."""
    if isinstance(thing, FunctionType):
        yield from () if is_installed(thing.__module__ or "") else (thing,)
    elif isinstance(thing, type):
        for kind in thing.__mro__:
            if not is_installed(kind.__module__):
                for value in vars(kind).values():
                    inner = getattr(value, "__func__", getattr(value, "fget", value))
                    if isinstance(inner, FunctionType):
                        yield inner


def _names(code: CodeType) -> set[str]:
    """Global names that code reads and does not write, functions inside it included."""
    written = {i.argval for i in dis.get_instructions(code) if i.opname == "STORE_GLOBAL"}
    inner = [_names(const) for const in code.co_consts if isinstance(const, CodeType)]
    return set(code.co_names).union(*inner) - written


def _told(value: Any, inside: tuple[int, ...], met: set[int]) -> Any:
    """A value that code finds around it, as JSON-able data; None: nothing that can be relied on.

    Data and code count; so do users' objects by what they hold. A logger or a file does not: what
    it holds differs from process to process.

    Args:
        value: to tell.
        inside: ids of the containers around it.
        met: ids of objects that were told before, which need not be told again.
    """
    if isinstance(value, bool | int | float | str | bytes | Tensor | np.ndarray):
        return _plain(value, inside)
    if id(value) in inside:
        return None  # a cycle
    inside = (*inside, id(value))
    if isinstance(value, Mapping):
        pairs = [[str(key), _told(item, inside, met)] for key, item in value.items()]
        return sorted((pair for pair in pairs if pair[1] is not None), key=lambda pair: pair[0])
    if isinstance(value, list | tuple):
        return [_told(item, inside, met) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_told(item, inside, met) for item in value), key=repr)
    if isinstance(value, type | BuiltinFunctionType):
        return _code(value)
    if isinstance(value, partial | MethodType | FunctionType):
        own = _code(value) if isinstance(value, FunctionType) else ""
        return [own, *(_told(item, inside, met) for item in _carried(value))]
    if hasattr(value, "__dict__") and not isinstance(value, ModuleType):
        kind = type(value)
        if isinstance(value, nn.Module | SimpleNamespace) or not is_installed(kind.__module__):
            known = id(value) in met
            met.add(id(value))
            return [_code(kind), None if known else _told(vars(value), inside, met)]
    return None


def _plain(value: Any, inside: tuple[int, ...]) -> Any:
    """Any value as JSON-able data, equal in every process where that can be had."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return repr(value)  # NaN and infinities too
    if isinstance(value, Tensor):
        return tensor_digest({"": value})
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return [value.dtype.str, list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
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
