"""Levels: a model's modules in ordered, disjoint groups, input side first."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from rlhf_ray.digests import digest, source_digest, tensor_digest
from rlhf_ray.errors import InputError, unknown_name


@dataclass(frozen=True, kw_only=True)
class LevelSplit:
    """Which tensors of a model belong to which level.

    Attributes:
        names: the L level names, input side first.
        modules: per level, the names of its modules.
        parameters: per level, the full names of its parameters.
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
        InputError: no levels, a module that does not exist, a level without parameters, a module or
            a parameter (tied weights) in two levels.
    """
    if not isinstance(levels, Mapping) or not levels:
        raise InputError(f"levels must map level names to module names, got levels={levels!r}.")
    modules = dict(model.named_modules())
    owner: dict[str, str] = {}
    for level, names in levels.items():
        if isinstance(names, str):
            raise InputError(f"level {level!r} must list module names, got {names!r}. "
                             f"Write [{names!r}].")  # fmt: skip
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
    holder: dict[int, tuple[str, str]] = {}
    per_level: list[tuple[str, ...]] = []
    for level, names in levels.items():
        mine = tuple(p for p in parameters if any(_contains(name, p) for name in names))
        if not mine:
            raise InputError(f"every level must have parameters, got none in level {level!r}.")
        for name in mine:
            first_level, first_name = holder.setdefault(id(parameters[name]), (level, name))
            if first_level != level:
                raise InputError(f"weights must not be shared across levels, got {first_name!r} of "
                                 f"{first_level!r} tied to {name!r} of {level!r}.")  # fmt: skip
        per_level.append(mine)
    unassigned = tuple(name for name, value in parameters.items() if id(value) not in holder)
    keys = tuple(model.state_dict(keep_vars=True))
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
    return digest(tensor_digest(tensors), repr(model), kinds, levels)
