"""Content digests: what identifies weights, data, code and settings across runs and machines.

Seeds are derived here too, so that every random draw follows from what it stands for.
"""

import contextlib
import dis
import hashlib
import inspect
import json
import sys
import sysconfig
import threading
from collections.abc import Callable, Iterator, Mapping
from enum import Enum
from functools import partial
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any
from weakref import WeakKeyDictionary

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
    values that functions and methods close over, base classes, and the functions, classes and data
    of their modules, and of modules of users', that users' functions name. A lambda, of which
    several may share a line, and code without a text count by their bytecode.
    """
    return _source(thing, ())


def attributes_digest(attributes: Mapping[str, object], owner: object) -> str:
    """Identity of an object's attributes, as far as they are data or code; "" of none."""
    told = _told(attributes, (), {id(owner)})
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


_codes: WeakKeyDictionary[Any, str] = WeakKeyDictionary()
"""Reading source takes milliseconds, and follows later edits."""


def _code(thing: Callable[..., Any] | type) -> str:
    if thing not in _codes:
        _codes[thing] = _read_code(thing)
    return _codes[thing]


def _read_code(thing: Callable[..., Any] | type) -> str:
    module = getattr(thing, "__module__", "") or ""
    name = f"{module}.{getattr(thing, '__qualname__', type(thing).__qualname__)}"
    if module.split(".")[0] in _LIBRARY:
        return name
    kinds = thing.__mro__[1:] if isinstance(thing, type) else ()
    bases = [_text(kind) for kind in kinds if not is_installed(kind.__module__)]
    return digest(name.replace("__main__", ""), _text(thing), *bases)


def _text(thing: Callable[..., Any] | type) -> Any:
    # a function's own code: of one that `functools.wraps` dressed up, `inspect` reads the wrapped
    code = getattr(thing, "__code__", None)
    text = ""
    with contextlib.suppress(OSError, TypeError), _one_reader:
        text = inspect.getsource(code or thing)
    if isinstance(code, CodeType) and (not text or code.co_name == "<lambda>"):
        return [text, _bytecode(code)]
    if isinstance(thing, type) and not text:
        return [_bytecode(function.__code__) for function in _methods(thing)]
    return text


def _bytecode(code: CodeType) -> list[Any]:
    constants = [_bytecode(const) if isinstance(const, CodeType) else repr(const)
                 for const in code.co_consts if not isinstance(const, frozenset)]  # fmt: skip
    sets = [sorted(map(repr, const)) for const in code.co_consts if isinstance(const, frozenset)]
    names = [code.co_names, code.co_varnames, code.co_freevars]
    return [code.co_code.hex(), code.co_argcount, names, constants, sets]


def _carried(thing: Any) -> list[Any]:
    """What an object's behaviour depends on besides its code."""
    if isinstance(thing, partial):
        return [thing.func, thing.args, thing.keywords]
    if isinstance(thing, MethodType):
        return [thing.__func__, thing.__self__]
    if isinstance(thing, FunctionType):
        defaults = [*(thing.__defaults__ or ()), *(thing.__kwdefaults__ or {}).values()]
        return [*_closed_over(thing), *defaults]
    slots = {slot for kind in type(thing).__mro__ for slot in _slots(kind) if hasattr(thing, slot)}
    held = {**getattr(thing, "__dict__", {}), **{slot: getattr(thing, slot) for slot in slots}}
    items = list(thing) if isinstance(thing, tuple) else []
    return [*sorted(held.items()), *items]


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    named = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(slot for slot in named if slot not in ("__dict__", "__weakref__"))


def _closed_over(function: FunctionType) -> list[Any]:
    cells = function.__closure__ or ()
    return [cell.cell_contents for cell in cells if cell != CellType()]


def _surroundings(thing: Any) -> list[Any]:
    """What users' code names of its module, and what that names in turn: [name, value] each."""
    found: list[Any] = []
    start = thing if isinstance(thing, type | FunctionType | MethodType) else type(thing)
    reached, met = [start], {id(start)}
    objects: set[int] = set()
    for code in reached:  # grows
        for function in _functions(code):
            named = list(_named(function.__globals__, _names(function.__code__), ()))
            if isinstance(code, type):
                named += [("", value) for value in _closed_over(function)]
            for name, value in named:
                if (told := _told(value, (), objects)) is not None:
                    found.append([name, told])
                if isinstance(value, type | FunctionType) and id(value) not in met:
                    met.add(id(value))
                    reached.append(value)
    return found


def _named(
    around: Mapping[str, Any], names: set[str], inside: tuple[int, ...]
) -> Iterator[tuple[str, Any]]:
    """What names stand for in a namespace, and in the users' modules that they stand for."""
    for name in sorted(names & around.keys()):
        value = around[name]
        if not isinstance(value, ModuleType):
            yield name, value
        elif not is_installed(value.__name__) and id(value) not in inside:
            yield from _named(vars(value), names, (*inside, id(value)))


def _functions(thing: Any) -> Iterator[FunctionType]:
    """A user's function itself; the functions that a user's class and its bases define."""
    if isinstance(thing, FunctionType):
        yield from () if is_installed(thing.__module__ or "") else (thing,)
    elif isinstance(thing, type):
        for kind in thing.__mro__:
            if not is_installed(kind.__module__):
                yield from _methods(kind)


def _methods(kind: type) -> Iterator[FunctionType]:
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
    if isinstance(value, np.generic | complex | range | torch.dtype | torch.device | Enum):
        return [type(value).__qualname__, str(value)]
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
    if isinstance(value, list | tuple) and not callable(value):
        return [_plain(item, inside) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((_plain(item, inside) for item in value), key=repr)
    if callable(value) or hasattr(value, "__dict__"):
        return _source(value, inside)
    return repr(value)
