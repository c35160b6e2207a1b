"""What Python code does during training steps that a replay of theirs would not do again."""

import contextlib
import random
import types
import warnings
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_ray.engine.batches import Examples, Step

TRIAL_STEPS = 2
"""At the beginning of a stage, before a kind of steps is captured; the first loads libraries."""


class Memory:
    """What modules hold at a time, and what other objects do; weights' and buffers' values aside.

    It is kept alive: nothing new can come to lie where it lay.
    """

    def __init__(self, modules: Sequence[nn.Module], objects: Sequence[object] = ()) -> None:
        self._modules, self._objects = modules, objects
        self._before = self._told()

    def changed(self) -> bool:
        """Whether anything is not what it was, or cannot be told."""
        return self._before != self._told()

    def _told(self) -> object:
        seen: set[int] = set()
        try:
            told = [_told_of_module(module, seen) for module in self._modules]
            return [*told, *(_told(value, seen, depth=4) for value in self._objects)]
        except Exception:  # whatever code of attributes raises
            return object()


class Trial:
    """Steps of a kind at the beginning of a stage that are carried out as they are, and watched.

    The first is where modules set themselves up.
    """

    def __init__(self, model: nn.Module, loss: object) -> None:
        parts = _parts(loss)
        modules = [m for part in parts if isinstance(part, nn.Module) for m in part.modules()]
        self._known = all(map(_keeps_nothing_unseen, parts))
        # the model's buffers are put back, or part of its state; those of a loss are made anew
        buffers = [buffer for module in modules for buffer in module.buffers()]
        self._memory = Memory([*model.modules(), *modules], [buffers, *closed_over(loss)])
        self._done = 0
        self._seen = ""

    def step(self, step: Step, examples: Examples, index: Tensor) -> Tensor:
        """Carries one out."""
        drawn = _random_state()
        with _waits() as waits:
            found = step(examples, index)
        self._done += 1
        if self._done == TRIAL_STEPS and waits:
            self._seen = "it waits for the device"
        elif drawn != _random_state():
            self._seen = "it draws random numbers on the CPU"
        return found

    def objection(self) -> str:
        """Why steps like these cannot be captured; "" if nothing speaks against it."""
        if not self._known:
            return "the loss is neither a module nor a plain function"
        if not self._seen and self._memory.changed():
            return "a module keeps account of its calls"
        return self._seen


@contextlib.contextmanager
def _waits() -> Iterator[list[object]]:
    """A list that is filled, at the end, with what waited for the device."""
    found: list[object] = []
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    for warning in caught:
        text = str(warning.message)
        if "synchronizing CUDA operation" in text:
            found.append(warning)
        elif "debug mode is a prototype" not in text:  # the model's own
            where = warning.filename, warning.lineno
            warnings.warn_explicit(warning.message, warning.category, *where)


def _random_state() -> tuple[object, ...]:
    """Of what a module could draw from on the CPU."""
    numpy: dict[str, Any] = np.random.get_state(legacy=False)["state"]  # type: ignore[assignment]
    parts = [v.tobytes() if isinstance(v, np.ndarray) else v for v in numpy.values()]
    return random.getstate(), *parts, torch.default_generator.get_state().numpy().tobytes()


def closed_over(loss: object) -> list[types.CellType]:
    """The cells in which functions that a loss consists of have what is around them."""
    functions = [part for part in _parts(loss) if isinstance(part, types.FunctionType)]
    return [cell for function in functions for cell in function.__closure__ or ()]


def _parts(loss: object) -> list[object]:
    """What a loss consists of: a `functools.partial` is taken apart."""
    if isinstance(loss, partial):
        return _parts((loss.func, *loss.args, *loss.keywords.values()))
    if isinstance(loss, list | tuple):
        return [part for value in loss for part in _parts(value)]
    return [loss]


def _keeps_nothing_unseen(part: object) -> bool:
    if isinstance(part, types.FunctionType):
        # a module that a function closes over is the same in all stages, and stays where it is
        return not any(isinstance(_contents(c), nn.Module) for c in closed_over(part))
    return isinstance(part, _WATCHED) or type(part).__module__.startswith("torch.")


def _contents(cell: types.CellType) -> object:
    with contextlib.suppress(ValueError):  # it is not filled yet
        return cell.cell_contents
    return None


class _Same:
    """Equal to the same object in the same condition alone."""

    __slots__ = ("_condition", "_value")

    def __init__(self, value: object, condition: object = None) -> None:
        self._value, self._condition = value, condition

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Same)
            and self._value is other._value
            and self._condition == other._condition
        )


def _told_of_module(module: nn.Module, seen: set[int]) -> object:
    tensors = (*module._parameters.values(), *module._buffers.values())
    places = [_Same(value, value.data_ptr()) for value in tensors if value is not None]
    inside = [_Same(child) for child in module._modules.values()]
    own = [
        (name, _told(value, seen, depth=3))
        for name, value in vars(module).items()
        if name not in _OF_MODULES or (value and name not in _LISTED)
    ]
    return places, inside, own


def _told(value: object, seen: set[int], depth: int) -> object:
    if isinstance(value, _CONSTANTS):
        return repr(value)
    if isinstance(value, types.CellType):
        return _told(_contents(value), seen, depth)
    if isinstance(value, nn.Parameter):
        return _Same(value, value.data_ptr())
    if isinstance(value, Tensor):
        return _Same(value, value._version)
    if isinstance(value, _MOVING):
        return object()  # equal to nothing: what it holds may change at every call
    if isinstance(value, np.ndarray):
        return _Same(value, value.tobytes() if value.size <= _MANY else None)
    if isinstance(value, _CONTAINERS):
        return _told_of_container(value, seen, depth)
    if isinstance(value, types.FunctionType):
        inside: object = value.__closure__
    else:
        inside = None if isinstance(value, _NO_DATA) else getattr(value, "__dict__", None)
    if not depth or not inside or id(value) in seen:
        return _Same(value)
    seen.add(id(value))
    return _Same(value, _told(inside, seen, depth))


def _told_of_container(value: Any, seen: set[int], depth: int) -> object:
    if not depth or len(value) > _MANY:
        return _Same(value, len(value))
    if isinstance(value, Mapping):
        pairs = value.items()
        return [(_told(k, seen, 0), _told(item, seen, depth - 1)) for k, item in pairs]
    return [_told(item, seen, depth - 1) for item in value]


_OF_MODULES = frozenset(vars(nn.Module()))
"""Attributes that all modules have; most are empty."""

_CONSTANTS = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    slice,
    type(None),
    np.generic,
    torch.device,
    torch.dtype,
)
_CONTAINERS = (Mapping, list, tuple, set, frozenset, deque)
_MANY = 1000
"""Items of a container, a vocabulary, say, that are not looked at one by one."""

_LISTED = frozenset({"_parameters", "_buffers", "_modules"})
_WATCHED = (nn.Module, bool, int, float, str, type(None), Tensor, type, types.BuiltinFunctionType)
"""What a loss may consist of, next to functions: modules, which are watched, and constants."""

_NO_DATA = (type, types.ModuleType, nn.Module)
_MOVING = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator, Iterator)
