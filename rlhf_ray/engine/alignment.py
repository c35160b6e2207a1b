"""Moments of what a model's weighted modules put out, and modules given other moments (`Align`)."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.levels import LevelSplit

OutputMoments = Mapping[str, tuple[Tensor, Tensor]]
"""Module name -> mean and variance of its output per feature, float32 (F,) each."""

GAIN = (0.1, 10.0)
"""Bounds of the factor on a feature: one that says nothing, there or here, is not blown up."""

EPSILON = 1e-5

_FIRST: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm,
)  # fmt: skip
"""Kinds of modules whose features are dimension 1 of their output; else they are the last."""

_LAST: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm)


def weighted_modules(
    model: nn.Module, split: LevelSplit, levels: Sequence[int]
) -> dict[str, nn.Module]:
    """The modules of some levels that scale and move each feature of their output by parameters.

    Convolutions, linear and normalising layers with a weight and a bias.
    """
    owned = {name for level in levels for name in split.parameters[level]}

    def holds(name: str, module: nn.Module) -> bool:
        if not isinstance(module, (*_FIRST, *_LAST)):
            return False
        weight, bias = module.weight, module.bias
        if not (isinstance(weight, Tensor) and isinstance(bias, Tensor)):
            return False
        return {f"{name}.weight", f"{name}.bias"} <= owned and weight.shape[:1] == bias.shape

    return {name: module for name, module in model.named_modules() if holds(name, module)}


@contextlib.contextmanager
def output_moments(modules: Mapping[str, nn.Module]) -> Iterator[Callable[[], OutputMoments]]:
    """Watches modules while the body runs the model once.

    Yields:
        A function that gives the moments of those that ran exactly once.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen[name].append(_moments(module, output))

        return hook

    with _hooked(modules, watch):
        yield lambda: {name: found[0] for name, found in seen.items() if len(found) == 1}


@contextlib.contextmanager
def aligning(modules: Mapping[str, nn.Module], source: OutputMoments) -> Iterator[None]:
    """Aligns modules while the body runs the model once: each on the aligned ones before it.

    Args:
        modules: changed in place by weight and bias; what they put out in this run is aligned too.
        source: the moments that they shall have; modules that are not in it stay as they are.
    """

    def align(name: str) -> Callable[[nn.Module, object, object], object]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            assert isinstance(output, Tensor)
            mean, variance = _moments(module, output)
            goal, spread = (value.to(output.device) for value in source[name])
            gain = ((spread + EPSILON) / (variance + EPSILON)).sqrt().clamp(*GAIN)
            weight, bias = module.weight, module.bias
            assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
            weight.mul_(gain.view(-1, *[1] * (weight.dim() - 1)))
            bias.sub_(mean).mul_(gain).add_(goal)
            along = [-1 if d == _dimension(module, output) else 1 for d in range(output.dim())]
            move = (goal - mean * gain).view(along)
            return (output * gain.view(along) + move).to(output.dtype)

        return hook

    with torch.no_grad(), _hooked({n: m for n, m in modules.items() if n in source}, align):
        yield


@contextlib.contextmanager
def _hooked(
    modules: Mapping[str, nn.Module], hook: Callable[[str], Callable[..., object]]
) -> Iterator[None]:
    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dimension(module: nn.Module, output: Tensor) -> int:
    return 1 if isinstance(module, _FIRST) else output.dim() - 1


def _moments(module: nn.Module, output: Tensor) -> tuple[Tensor, Tensor]:
    feature = _dimension(module, output)
    others = [dimension for dimension in range(output.dim()) if dimension != feature]
    variance, mean = torch.var_mean(output.detach().float(), others, correction=0)
    return mean, variance
