"""Cutting a model that cannot be traced: its own code runs, level modules answer from a record.

From boundary b the whole model runs with the modules of the levels below b replaced by what they
gave. Code between them runs again each time; it is cheap beside the levels or should be in one.
"""

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from rlhf_ray.engine.boundaries import UncacheableError
from rlhf_ray.engine.tracing import weights_require_grad
from rlhf_ray.errors import StageError
from rlhf_ray.levels import LevelSplit

Call = Callable[[Sequence[Any]], Any]
"""Calls the model with its input tensors, in order."""


class _StopRun(BaseException):
    """Leaves a model's forward early; no Exception, so that the model cannot catch it."""


class Replay:
    """A model run from boundary to boundary by replacing level modules' forwards for one call.

    Not for several threads on one model. The order of calls, and what depends on what, are taken
    from one run on an example.

    Raises:
        UncacheableError: the model cannot be run with its modules replaced.
    """

    name = "replay"

    def __init__(self, model: nn.Module, split: LevelSplit, call: Call, inputs: list[Any]) -> None:
        self.n_levels = split.n_levels
        self._call = call
        self._n_inputs = len(inputs)
        called = [
            (level, key)
            for level, names in enumerate(split.modules)
            for name in names
            for key in _called(model, name)
        ]
        self._keys = [key for _, key in called]
        self._levels = [level for level, _ in called]
        self._modules = [model.get_submodule(name) for name in self._keys]
        self._changed: set[int] = set()
        self._calls: list[int] = []
        self._unused: dict[int, set[int]] = {}
        self._blocked = [""] * split.n_levels
        with weights_require_grad(model):
            self._study(model, split, inputs)

    def blocked(self, boundary: int) -> str:
        """Why a boundary cannot be used; empty if nothing speaks against it."""
        return self._blocked[boundary]

    def objects(self, boundary: int) -> list[tuple[str, bool]]:
        """Name of each object that crosses a boundary, and whether it may be left out."""
        unused = self._unused.get(boundary, set())
        recorded = [(self._keys[i], i in unused) for i in self._below(boundary)]
        return [(f"input{i}", False) for i in range(self._n_inputs)] + recorded

    def run(self, things: Sequence[Any], start: int, stop: int) -> Any:
        """From the objects of one boundary to those of another, or (stop = L) to the output."""
        inputs = list(things[: self._n_inputs])
        record = dict(zip(self._below(start), things[self._n_inputs :], strict=True))
        blank = self._unused.get(start, set())
        if stop == self.n_levels:
            return self._replay(inputs, record, [], None, blank)
        wanted = [i for i in self._below(stop) if i not in record]
        last = max(self._below(stop), key=self._calls.index)
        self._replay(inputs, record, wanted, last, blank)
        return inputs + [record[i] for i in self._below(stop)]

    def _below(self, boundary: int) -> list[int]:
        return [i for i in sorted(set(self._calls)) if self._levels[i] < boundary]

    def _replay(
        self,
        inputs: list[Any],
        record: dict[int, Any],
        wanted: Sequence[int],
        last: int | None,
        blank: Container[int] = (),
    ) -> Any:
        """Runs the model; modules in `record` answer from it, those `wanted` are added to it."""
        before = {i: vars(self._modules[i]).get("forward") for i in (*record, *wanted)}
        try:
            for i in tuple(record):
                vars(self._modules[i])["forward"] = self._answer(i, record[i], i in blank)
            for i in wanted:
                vars(self._modules[i])["forward"] = self._recorder(i, record, i == last)
            return self._call(inputs)
        except _StopRun:
            return None
        finally:
            for i, own in before.items():
                if own is None:
                    del vars(self._modules[i])["forward"]
                else:
                    vars(self._modules[i])["forward"] = own

    def _answer(self, i: int, thing: Any, blank: bool) -> Callable[..., Any]:
        left = [thing]

        def forward(*_: Any, **__: Any) -> Any:
            if not left:
                raise StageError(f"module {self._keys[i]!r} must be called once per forward to be "
                                 "cached, got a second call.")  # fmt: skip
            return left.pop()

        vars(forward)["blank"] = blank
        return forward

    def _recorder(self, i: int, record: dict[int, Any], stops: bool) -> Callable[..., Any]:
        original = self._modules[i].forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            thing = original(*args, **kwargs)
            record[i] = pytree.tree_map_only(Tensor, torch.clone, thing) if (
                i in self._changed
            ) else thing  # fmt: skip
            if stops:
                raise _StopRun
            return thing

        return forward

    def _study(self, model: nn.Module, split: LevelSplit, inputs: list[Any]) -> None:
        record: dict[int, Any] = {}
        versions: dict[int, list[int]] = {}
        handles = []
        for i, module in enumerate(self._modules):

            def note(_m: nn.Module, _x: Any, out: Any, i: int = i) -> None:
                self._calls.append(i)
                record[i] = out
                versions[i] = [t._version for t in _tensors(out)]

            handles.append(module.register_forward_hook(note))
        try:
            self._call(inputs)
        except Exception as error:
            raise UncacheableError(f"it cannot be run by itself ({error})") from error
        finally:
            for handle in handles:
                handle.remove()
        self._changed = {i for i, v in versions.items() if v != [t._version for t in
                         _tensors(record[i])]}  # fmt: skip
        for boundary in range(1, self.n_levels):
            self._blocked[boundary] = self._obstacle(model, split, boundary, record)
            if not self._blocked[boundary]:
                self._unused[boundary] = self._find_unused(inputs, boundary)

    def _obstacle(
        self, model: nn.Module, split: LevelSplit, boundary: int, record: dict[int, Any]
    ) -> str:
        below = self._below(boundary)
        for i in below:
            if self._calls.count(i) > 1:
                return f"module {self._keys[i]!r} is called {self._calls.count(i)} times"
        if not below:
            return "no module of a level below it is called"
        above = [self._calls.index(i) for i in self._calls if self._levels[i] >= boundary]
        if above and max(map(self._calls.index, below)) > min(above):
            return (
                f"module {self._keys[self._calls[min(above)]]!r} is called before levels below it"
            )
        weights = dict(model.named_parameters(remove_duplicate=False))
        later = [weights[name] for names in split.parameters[boundary:] for name in names]
        roots = [t for i in below for t in _tensors(record[i]) if t.requires_grad]
        if _depend(roots, [w for w in later if w.requires_grad]):
            return "levels below it use weights of levels above it"
        return ""

    def _find_unused(self, inputs: list[Any], boundary: int) -> set[int]:
        """Recorded modules whose outputs the rest does not look at (a later one's replaces them).

        What has no path in the autograd graph is unused; integers count as used.
        """
        record: dict[int, Any] = {}
        with torch.no_grad():
            below = self._below(boundary)
            self._replay(inputs, record, below, max(below, key=self._calls.index))
        leaves: dict[int, list[Tensor]] = {}
        for i in below:
            record[i] = pytree.tree_map_only(Tensor, _as_leaf, record[i])
            leaves[i] = _tensors(record[i])
        handed = pytree.tree_map_only(Tensor, lambda t: t.view_as(t), record)  # may be written to
        roots = [t for t in _tensors(self._replay(inputs, handed, [], None)) if t.requires_grad]
        return {
            i for i in below
            if all(t.requires_grad for t in leaves[i]) and not _depend(roots, leaves[i])
        }  # fmt: skip


def gives_zeros(module: nn.Module) -> bool:
    """Whether a module, at the moment, gives zeros instead of what nothing depends on."""
    return getattr(vars(module).get("forward"), "blank", False)


def _called(model: nn.Module, name: str) -> list[str]:
    """The modules to record for a level's module: lists are not called, what they hold is."""
    module = model.get_submodule(name)
    if not isinstance(module, nn.ModuleList | nn.ModuleDict):
        return [name]
    return [
        key for child, _ in module.named_children() for key in _called(model, f"{name}.{child}")
    ]


def _tensors(thing: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(thing) if isinstance(leaf, Tensor)]


def _as_leaf(value: Tensor) -> Tensor:
    value = value.detach()
    return value.requires_grad_(True) if value.is_floating_point() else value


def _depend(roots: Sequence[Tensor], leaves: Sequence[Tensor]) -> bool:
    """Whether the autograd graph of any root reaches any leaf."""
    if not roots or not leaves:
        return False
    gradients = torch.autograd.grad(
        [root.sum() for root in roots], leaves, allow_unused=True, retain_graph=True
    )
    return any(gradient is not None for gradient in gradients)
