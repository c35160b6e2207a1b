"""Levels: a model's modules in ordered, disjoint groups, input side first."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_ray.digests import (
    attributes_digest,
    digest,
    is_installed,
    source_digest,
    tensor_digest,
)
from rlhf_ray.errors import InputError, unknown_name

RESERVED = "__all__"
"""No level's name: it stands for all agents where an environment says who is done."""


@dataclass(frozen=True, kw_only=True)
class LevelSplit:
    """Which tensors of a model belong to which level.

    Attributes:
        names: the L level names, input side first.
        modules: per level, the names of its modules.
        parameters: per level, the full names of its parameters that can be trained: of floating
            point, and requiring gradients in the model that was split. Where none of the model's
            does, it was frozen as a whole, for inference, and all can be.
        state: per level, the full names of its parameters and persistent buffers, in the order of
            `state_dict`.
        unassigned: parameters in no level; they stay frozen.
    """

    names: tuple[str, ...]
    modules: tuple[tuple[str, ...], ...]
    parameters: tuple[tuple[str, ...], ...]
    state: tuple[tuple[str, ...], ...]
    unassigned: tuple[str, ...]

    @property
    def n_levels(self) -> int:
        """L, the number of levels."""
        return len(self.names)

    def level_of(self, module_name: str) -> int | None:
        """The level that holds a module (itself or one that contains it), or None."""
        for level, modules in enumerate(self.modules):
            if any(_contains(owner, module_name) for owner in modules):
                return level
        return None


def split_levels(model: nn.Module, levels: Mapping[str, Sequence[str]]) -> LevelSplit:
    """Checks a level mapping against a model and resolves it to tensor names.

    Args:
        model: the model to split.
        levels: level name -> module names as in `model.named_modules()`; ordered.

    Returns:
        The split.

    Raises:
        InputError: no levels, a level's name that cannot be one, a module that does not exist, a
            level without parameters that can be trained, a module or a parameter (tied weights) in
            two levels, a parameter of a level tied to one that is in none, complex parameters
            that can be trained, extra state, TorchScript.
    """
    if not isinstance(levels, Mapping) or not levels:
        raise InputError(f"levels must map level names to module names, got levels={levels!r}.")
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"modules must be Python's, got a TorchScript{f' at {name!r}' * bool(name)}, whose "
                "parameters cannot be frozen. Give the module that it was made from."
            )
    owner: dict[str, str] = {}
    for level, names in levels.items():
        if not isinstance(level, str) or level == RESERVED:
            raise InputError(
                f"a level's name must be a string, and not {RESERVED!r}, got {level!r}. "
                "Give it another name."
            )
        if isinstance(names, str):
            raise InputError(f"level {level!r} must list module names, got {names!r}. "
                             f"Write [{names!r}].")  # fmt: skip
        if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
            raise InputError(f"level {level!r} must list module names as in model.named_modules(), "
                             f"got {' '.join(repr(names).split())}.")  # fmt: skip
        for name in names:
            if name not in modules:
                raise unknown_name(f"module of level {level!r}", name, filter(None, modules))
            for other, other_level in owner.items():
                if _contains(other, name) or _contains(name, other):
                    raise InputError(f"levels must be disjoint, got module {name!r} in "
                                     f"{level!r} and {other!r} in {other_level!r}.")  # fmt: skip
            owner[name] = level
    return _resolve(model, {level: tuple(names) for level, names in levels.items()})


def _resolve(model: nn.Module, levels: Mapping[str, tuple[str, ...]]) -> LevelSplit:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    frozen = _frozen(model)
    holder: dict[int, tuple[str, str]] = {}
    owned: set[str] = set()
    per_level: list[tuple[str, ...]] = []
    for level, names in levels.items():
        mine = tuple(p for p in parameters if any(_contains(name, p) for name in names))
        if not mine:
            raise InputError(f"every level must have parameters, got none in level {level!r}.")
        for name in mine:
            if parameters[name].is_complex() and name not in frozen:
                raise InputError(
                    f"parameters to train must be real, got {name!r} of {parameters[name].dtype}. "
                    "Hold it as real numbers, and use torch.view_as_complex in forward."
                )
            first_level, first_name = holder.setdefault(id(parameters[name]), (level, name))
            if first_level != level:
                raise InputError(f"weights must not be shared across levels, got {first_name!r} of "
                                 f"{first_level!r} tied to {name!r} of {level!r}.")  # fmt: skip
        trainable = tuple(name for name in mine if name not in frozen)
        if not trainable:
            raise InputError(
                f"every level must have parameters to train, got level {level!r} whose parameters "
                "are all frozen. Set requires_grad on those that may change."
            )
        per_level.append(trainable)
        owned.update(mine)
    for name, value in parameters.items():
        if name not in owned and id(value) in holder:
            level, twin = holder[id(value)]
            raise InputError(
                f"weights must not be shared with modules outside the levels, got {twin!r} of "
                f"{level!r} tied to {name!r}. Put both in one level."
            )
    unassigned = tuple(name for name in parameters if name not in owned)
    keys = tuple(model.state_dict(keep_vars=True))
    for key in keys:
        if key.rpartition(".")[2] == "_extra_state":
            raise InputError(f"a model's state must be parameters and buffers, got {key!r} "
                             "(get_extra_state). Register a buffer instead.")  # fmt: skip
    state = tuple(
        tuple(key for key in keys if any(_contains(name, key) for name in names))
        for names in levels.values()
    )
    return LevelSplit(
        names=tuple(levels),
        modules=tuple(levels.values()),
        parameters=tuple(per_level),
        state=state,
        unassigned=unassigned,
    )


def _contains(owner: str, name: str) -> bool:
    return owner == "" or name == owner or name.startswith(owner + ".")


def model_digest(model: nn.Module, split: LevelSplit) -> str:
    """Identity of a pretrained model and its split: weights, structure, code, levels."""
    tensors: dict[str, Tensor] = dict(model.state_dict())
    kinds = sorted({source_digest(type(module)) for module in model.modules()})
    levels = [
        [name, list(modules)] for name, modules in zip(split.names, split.modules, strict=True)
    ]
    attributes = {name: _attributes(module) for name, module in model.named_modules()}
    unsaved = {name: value for name, value in model.named_buffers() if name not in tensors}
    more = {
        "attributes": {name: found for name, found in attributes.items() if found},
        "buffers": tensor_digest(unsaved) if unsaved else "",
        "frozen": sorted(_frozen(model) & {name for names in split.state for name in names}),
    }
    more = {name: value for name, value in more.items() if value}
    return digest(tensor_digest(tensors), repr(model), kinds, levels, *([more] if more else []))


def _attributes(module: nn.Module) -> str:
    """Of what a module holds besides parameters and modules, as far as its `repr` leaves it out."""
    kind, bare = type(module), {*vars(nn.Module()), *_MARKS}
    found = {name: value for name, value in vars(module).items() if name not in bare}
    if kind.extra_repr is not nn.Module.extra_repr and is_installed(kind.__module__):
        shown, arguments = module.extra_repr(), inspect.signature(kind).parameters
        found = {
            name: value
            for name, value in found.items()
            if name in arguments
            and f"{name}=" not in shown
            and not _is_default(value, arguments[name].default)
        }
    return attributes_digest(found, module)


_MARKS = ("__overloads__", "_is_torch_compile")
"""What torch leaves on a module that was scripted or compiled."""


def _is_default(value: object, default: object) -> bool:
    """Whether an argument was left out; one without a default is shown without its name."""
    alike = [default, *((default,) * n for n in (1, 2, 3))]  # convolutions hold a pair of it
    return default is inspect.Parameter.empty or repr(value) in map(repr, alike)


def _frozen(model: nn.Module) -> set[str]:
    """Parameters that cannot be trained."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    whole = not any(value.requires_grad for value in parameters.values())
    return {
        name
        for name, value in parameters.items()
        if not (
            (value.is_floating_point() or value.is_complex()) and (value.requires_grad or whole)
        )
    }
