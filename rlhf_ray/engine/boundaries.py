"""What crosses a boundary between two levels, as named tensors with a known batch dimension.

Objects that are no tensors (an LSTM's nested states, a size, None) are taken apart and put together
again here. How the objects are computed stands in `tracing` and `replay`; which boundaries can be
relied on, in `segments`.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Values = dict[str, Tensor]
"""The values at one boundary, by name."""


class UncacheableError(Exception):
    """Why a boundary cannot be cached; ends up in `SegmentPlan.reason`."""


@dataclass(frozen=True)
class _Multiple:
    """An integer that is so many times the batch size."""

    factor: int


@dataclass(frozen=True)
class _Blank:
    """A tensor that nothing depends on: replaced by zeros instead of being kept."""

    shape: tuple[int | _Multiple, ...]
    dtype: torch.dtype
    device: torch.device


_TENSOR = object()


@dataclass(frozen=True)
class Packing:
    """How one object becomes tensors, and how it is put together again.

    Attributes:
        names: names of its tensors.
        dims: batch dimension of each; None: the tensor is the same for all examples.
        spec: the object's structure; None when it is a tensor itself.
        leaves: per leaf, what it is made from.
    """

    names: tuple[str, ...]
    dims: tuple[int | None, ...]
    spec: pytree.TreeSpec | None
    leaves: tuple[Any, ...]

    @property
    def baked(self) -> bool:
        """Whether it holds numbers that stand for sizes of the example it was made from."""
        return any(
            type(leaf) in (int, _Blank) or (type(leaf) is _Multiple and leaf.factor != 1)
            for leaf in self.leaves
        )

    def unpack(self, values: Values, batch: int) -> Any:
        """The object, from tensors of `batch` examples."""
        if self.spec is None:
            return values[self.names[0]]
        tensors = (values[name] for name in self.names)
        leaves = [next(tensors) if leaf is _TENSOR else _fill(leaf, batch) for leaf in self.leaves]
        return pytree.tree_unflatten(leaves, self.spec)

    def pack(self, thing: Any, into: Values) -> None:
        """Adds the object's tensors to `into`."""
        if self.spec is None:
            into[self.names[0]] = thing
        elif self.names:
            into.update(zip(self.names, _tensors(thing), strict=True))


def _tensors(thing: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(thing) if isinstance(leaf, Tensor)]


def _fill(leaf: Any, batch: int) -> Any:
    if isinstance(leaf, _Multiple):
        return leaf.factor * batch
    if isinstance(leaf, _Blank):
        shape = [_fill(size, batch) for size in leaf.shape]
        return torch.zeros(shape, dtype=leaf.dtype, device=leaf.device)
    return leaf


def observe(
    name: str, many: Any, few: Any, last: Any, sizes: tuple[int, int], *, blank: bool
) -> Packing:
    """Learns how to pack an object from what it was on a batch, and on two parts of it.

    Args:
        name: the object's name.
        many: the object on the whole batch.
        few: the object on the first examples of that batch.
        last: the same on its last examples: so that every example is once without some other,
            which may have decided what all of them became (a length to pad to, a maximum).
        sizes: of the batch and of a part; two parts are no less than the batch.
        blank: nothing depends on the object's tensors.

    Raises:
        UncacheableError: examples are mixed, or there is no batch dimension to pick examples by.
    """
    leaves, spec = pytree.tree_flatten(many)
    leaves_few, spec_few = pytree.tree_flatten(few)
    leaves_last, spec_last = pytree.tree_flatten(last)
    if not spec == spec_few == spec_last:
        raise UncacheableError(f"the structure of {name} depends on the data")
    kinds: list[Any] = []
    names: list[str] = []
    dims: list[int | None] = []
    zipped = zip(leaves, leaves_few, leaves_last, strict=True)
    for i, (leaf, leaf_few, leaf_last) in enumerate(zipped):
        if not isinstance(leaf, Tensor):
            kinds.append(_number(name, leaf, (leaf_few, leaf_last), sizes))
        elif blank:
            shape = zip(leaf.shape, leaf_few.shape, leaf_last.shape, strict=True)
            sizes_of = tuple(_number(name, size, parts, sizes) for size, *parts in shape)
            kinds.append(_Blank(sizes_of, leaf.dtype, leaf.device))
        else:
            kinds.append(_TENSOR)
            names.append(name if leaf is many else f"{name}.{i}")
            dims.append(_batch_dim(names[-1], leaf, leaf_few, leaf_last, sizes))
    plain = isinstance(many, Tensor) and not blank
    return Packing(tuple(names), tuple(dims), None if plain else spec, tuple(kinds))


def _number(name: str, many: Any, parts: Sequence[Any], sizes: tuple[int, int]) -> Any:
    if all(type(many) is type(part) and many == part for part in parts):
        return many
    if type(many) is int and all(
        type(part) is int and many * sizes[1] == part * sizes[0] for part in parts
    ):
        factor, rest = divmod(many, sizes[0])
        if not rest:
            return _Multiple(factor)
    raise UncacheableError(f"{name} is no tensor and depends on the data")


def _batch_dim(
    name: str, many: Tensor, few: Tensor, last: Tensor, sizes: tuple[int, int]
) -> int | None:
    if many.is_nested or many.dim() != few.dim():
        raise UncacheableError(f"the shape of {name} depends on the data")
    differ = [dim for dim in range(many.dim()) if many.shape[dim] != few.shape[dim]]
    if not differ:
        if not (agree(many, few) and agree(many, last)):
            raise UncacheableError(f"{name} mixes the examples of a batch")
        return None
    dim = differ[0]
    if len(differ) > 1 or (many.shape[dim], few.shape[dim]) != sizes:
        raise UncacheableError(f"{name} has no batch dimension of its own")
    n, n_few = sizes
    first, rest = many.narrow(dim, 0, n_few), many.narrow(dim, n - n_few, n_few)
    if not (agree(first, few) and agree(rest, last)):
        raise UncacheableError(f"{name} mixes the examples of a batch")
    return dim


@dataclass(frozen=True)
class Boundary:
    """All objects that cross one boundary, in the order of the mechanism that computes them."""

    packings: tuple[Packing, ...]

    @functools.cached_property
    def dims(self) -> dict[str, int | None]:
        """Batch dimension of each tensor, by name."""
        return {n: d for p in self.packings for n, d in zip(p.names, p.dims, strict=True)}

    @functools.cached_property
    def _batched(self) -> tuple[str, int] | None:
        return next(((name, dim) for name, dim in self.dims.items() if dim is not None), None)

    @functools.cached_property
    def _plain(self) -> bool:
        return all(packing.spec is None for packing in self.packings)

    @property
    def baked(self) -> bool:
        """Whether it holds for inputs of the example's shape only."""
        return any(packing.baked for packing in self.packings)

    def unpack(self, values: Values) -> list[Any]:
        """The objects, from their tensors."""
        if self._plain:
            return [values[packing.names[0]] for packing in self.packings]
        batch = values[self._batched[0]].shape[self._batched[1]] if self._batched else 0
        return [packing.unpack(values, batch) for packing in self.packings]

    def pack(self, things: Sequence[Any]) -> Values:
        """The tensors of the objects, by name."""
        values: Values = {}
        for packing, thing in zip(self.packings, things, strict=True):
            packing.pack(thing, values)
        return values


def select(value: Tensor, dim: int, index: Tensor) -> Tensor:
    """Examples by index, in the memory format of `value`: `index_select` answers in NCHW."""
    if value.dim() == 4 and value.stride(1) == 1 and dim == 0:
        # also with one channel, where channels-last and NCHW differ in the strides only
        return value.permute(0, 2, 3, 1).index_select(0, index).permute(0, 3, 1, 2)
    return value.index_select(dim, index)


def agree(a: Tensor, b: Tensor) -> bool:
    """Equal up to what rounding in another order can do (batch sizes choose other kernels)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    if a.numel() == 0:
        return True
    tolerance = 1e-3 if a.dtype in (torch.float32, torch.float64, torch.complex64) else 3e-2
    scale = float(a.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
