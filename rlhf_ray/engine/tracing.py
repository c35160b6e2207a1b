"""Cutting a model by `torch.fx`: one graph, and a generated function per pair of boundaries.

The functions call the live modules: weights, training flags and hooks of level modules and of all
modules outside levels are the model's own. Plain code between them is traced in eval mode.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx, nn

from rlhf_ray.engine.boundaries import UncacheableError
from rlhf_ray.levels import LevelSplit
from rlhf_ray.tasks import Inputs


class _Tracer(fx.Tracer):
    """Goes into a module only if a level module lies inside it."""

    proxy_buffer_attributes = True  # else `self.position[: x.shape[1]]` cannot be traced

    def __init__(self, opened: set[nn.Module]) -> None:
        super().__init__()
        self._opened = opened

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return m not in self._opened


class _Fetch(nn.Module):
    """Reads an attribute at every call: `model.to()` replaces buffers."""

    def __init__(self, owner: Any, name: str) -> None:
        super().__init__()
        self.read: Callable[[], Any] = lambda: getattr(owner, name)

    def forward(self) -> Any:
        return self.read()


class Traced:
    """A model as one graph, run from boundary to boundary.

    Every node belongs to the highest level it depends on (to level 0 if it depends on none), so
    that what crosses boundary b depends on the levels below b only.

    Raises:
        UncacheableError: the model's code cannot be traced.
    """

    name = "fx"

    def __init__(self, model: nn.Module, split: LevelSplit, example: Inputs) -> None:
        self.n_levels = split.n_levels
        arguments = _bind(model, example)
        before = set(vars(model))
        try:
            with weights_require_grad(model):
                graph = _trace(model, split, arguments)
        finally:
            constants = _take_constants(model, before)
        self._objects = {
            node: _fetch(model, str(node.target), constants)
            if node.op == "get_attr"
            else model.get_submodule(str(node.target))
            for node in graph.nodes
            if node.op in ("get_attr", "call_module")
        }
        placeholders = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
        stages = self._stages(model, split, graph)
        self._body = [(n, s) for n, s in stages.items() if n.op not in ("placeholder", "output")]
        self._result = next(n for n in graph.nodes if n.op == "output")
        self._crossing = [[placeholders[name] for name in arguments]] + [
            [n for n, s in stages.items() if _crosses(n, s, boundary, stages)]
            for boundary in range(1, split.n_levels)
        ]
        self._functions: dict[tuple[int, int], Callable[..., Any]] = {}

    def blocked(self, boundary: int) -> str:
        """Why a boundary cannot be used; empty if nothing speaks against it."""
        return ""

    def objects(self, boundary: int) -> list[tuple[str, bool]]:
        """Name of each object that crosses a boundary, and whether it may be left out."""
        return [(node.name, False) for node in self._crossing[boundary]]

    def run(self, things: Sequence[Any], start: int, stop: int) -> Any:
        """From the objects of one boundary to those of another, or (stop = L) to the output."""
        function = self._functions.get((start, stop))
        if function is None:
            function = self._functions[start, stop] = self._compile(start, stop)
        return function(*things)

    def _stages(self, model: nn.Module, split: LevelSplit, graph: fx.Graph) -> dict[fx.Node, int]:
        level_of = _members(model, split)
        stages: dict[fx.Node, int] = {}
        for node in graph.nodes:
            own = 0
            if node.op == "call_module":
                own = level_of.get(id(self._objects[node]), 0)
            elif node.op == "get_attr":
                own = level_of.get(id(self._objects[node]()), 0)
            elif node.op == "output":
                own = split.n_levels
            stages[node] = max([own, *(stages[n] for n in node.all_input_nodes)])
        return stages

    def _compile(self, start: int, stop: int) -> Callable[..., Any]:
        graph = fx.Graph()
        modules: dict[str, nn.Module] = {}
        new: dict[fx.Node, fx.Node] = {}
        for i, node in enumerate(self._crossing[start]):
            new[node] = graph.placeholder(f"v{i}")
        inside = {node for node, stage in self._body if start <= stage < stop}
        for node, _ in self._body:
            # attributes never cross a boundary: each function reads those it uses
            if node not in inside and (node.op != "get_attr" or inside.isdisjoint(node.users)):
                continue
            args = fx.map_arg(node.args, new.__getitem__)
            kwargs = fx.map_arg(node.kwargs, new.__getitem__)
            if node in self._objects:
                key = f"m{len(modules)}"
                modules[key] = self._objects[node]
                new[node] = graph.call_module(key, args, kwargs)
            else:
                new[node] = graph.create_node(node.op, node.target, args, kwargs)
        if stop == self.n_levels:
            graph.output(fx.map_arg(self._result.args[0], new.__getitem__))
        else:
            graph.output([new[node] for node in self._crossing[stop]])
        # the generated function itself: GraphModule's own call costs as much as a small layer
        return fx.GraphModule(modules, graph).forward


def _bind(model: nn.Module, example: Inputs) -> dict[str, Tensor]:
    """Parameter name -> input tensor, in the inputs' order."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        raise UncacheableError("forward takes arguments without names")
    if isinstance(example, dict):
        return dict(example)
    values = (example,) if isinstance(example, Tensor) else example
    return dict(zip((p.name for p in parameters), values, strict=False))


def _trace(model: nn.Module, split: LevelSplit, arguments: dict[str, Tensor]) -> fx.Graph:
    owners = [name for names in split.modules for name in names]
    opened = {
        module
        for name, module in model.named_modules()
        if any(owner != name and (not name or owner.startswith(name + ".")) for owner in owners)
    }
    parameters = inspect.signature(model.forward).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name not in arguments}
    try:
        graph = _Tracer(opened).trace(model, concrete_args=defaults)
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise UncacheableError(f"its code cannot be traced ({reason})") from error
    for node in [n for n in graph.nodes if n.op == "placeholder"]:
        if str(node.target) not in arguments:
            _erase(graph, node)
    return graph


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    """Removes an argument that keeps its default, with the checks that fx makes of it."""
    for user in list(node.users):
        _erase(graph, user)
    graph.erase_node(node)


def _take_constants(model: nn.Module, before: set[str]) -> dict[str, Any]:
    """Takes the tensors that fx hung on the model off again; gives them by name.

    Tracing with all weights requiring gradients shows which of them were computed from weights:
    they would not follow the weights, nor pass gradients on to them.
    """
    constants = {name: vars(model).pop(name) for name in set(vars(model)) - before}
    if any(isinstance(value, Tensor) and value.requires_grad for value in constants.values()):
        raise UncacheableError("its code computes with weights outside their modules")
    return constants


def _fetch(model: nn.Module, target: str, constants: dict[str, Any]) -> _Fetch:
    if target in constants:
        return _Fetch(SimpleNamespace(value=constants[target]), "value")
    path, _, name = target.rpartition(".")
    return _Fetch(model.get_submodule(path), name)


def _members(model: nn.Module, split: LevelSplit) -> dict[int, int]:
    """Level by id, of all modules, parameters and buffers in levels."""
    level_of: dict[int, int] = {}
    for level, names in enumerate(split.modules):
        for owner in map(model.get_submodule, names):
            for member in (*owner.modules(), *owner.parameters(), *owner.buffers()):
                level_of[id(member)] = level
    return level_of


def _crosses(node: fx.Node, stage: int, boundary: int, stages: dict[fx.Node, int]) -> bool:
    if node.op == "get_attr" or stage >= boundary:
        return False
    return any(stages[user] >= boundary for user in node.users)


@contextlib.contextmanager
def weights_require_grad(model: nn.Module) -> Iterator[None]:
    """All floating-point parameters require gradients inside, and grad mode is on."""
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
