"""Descriptors of a model on a task, taken once at the start: the dear part of the observation.

Relative gradient norm per level (Auto-RGN: Lee et al., "Surgical Fine-Tuning", 2023) and the shift
of each level's activation moments against the source data.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_ray.engine.alignment import OutputMoments
from rlhf_ray.engine.recurrent import differentiable_recurrence
from rlhf_ray.engine.replay import gives_zeros
from rlhf_ray.levels import LevelSplit

Moments = list[tuple[Tensor, Tensor]]
"""Per level: mean and variance of its output per feature, float32 (F,) each."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SourceMoments:
    """How a pretrained model's activations are distributed on its source data.

    Attributes:
        levels: of each level's output, for the probe of the observation.
        outputs: of its weighted modules' outputs, for `operations.Align`.
    """

    levels: Moments
    outputs: OutputMoments


EPSILON = 1e-6


def gradient_norms(
    model: nn.Module, split: LevelSplit, loss: Callable[[], Tensor]
) -> tuple[tuple[float, ...], float]:
    """||g|| / ||theta|| per level, and the loss, in eval mode; the model is left as it was."""
    found = dict(model.named_parameters())
    levels = [[found[name] for name in names if name in found] for names in split.parameters]
    every = [parameter for level in levels for parameter in level]
    for parameter in every:
        parameter.requires_grad_(True)
    try:
        with differentiable_recurrence(model):
            value = loss()
            gradients = iter(torch.autograd.grad(value, every, allow_unused=True))
    finally:
        for parameter in every:
            parameter.requires_grad_(False)
    norms = []
    for level in levels:
        pairs = [(p.detach(), g) for p, g in zip(level, gradients, strict=False)]
        size = sum(float(p.float().square().sum()) for p, _ in pairs) ** 0.5
        slope = sum(float(g.float().square().sum()) for _, g in pairs if g is not None) ** 0.5
        norms.append(slope / (size + EPSILON))
    return tuple(norms), float(value.detach())


@contextlib.contextmanager
def level_moments(model: nn.Module, split: LevelSplit) -> Iterator[Callable[[], Moments]]:
    """Watches the output of each level's last module while the body runs the model.

    Yields:
        A function that gives the moments (on the CPU), to be called after the runs. Features are
        channels (dimension 1) of 4-D outputs and the last dimension of others. A level whose last
        module was not called, or gave no float tensor, has empty tensors.
    """
    seen: list[list[tuple[Tensor, Tensor, int]]] = [[] for _ in split.names]

    def watch(level: int) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: object, outputs: object) -> None:
            if gives_zeros(module):
                return
            value = outputs[0] if isinstance(outputs, tuple) else outputs
            if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 1:
                flat = (value.movedim(1, -1) if value.dim() == 4 else value).detach().float()
                flat = flat.reshape(-1, flat.shape[-1])
                seen[level].append((flat.sum(0), flat.square().sum(0), flat.shape[0]))

        return hook

    handles = [
        model.get_submodule(modules[-1]).register_forward_hook(watch(level))
        for level, modules in enumerate(split.modules)
    ]
    try:
        yield lambda: [_moments(parts) for parts in seen]
    finally:
        for handle in handles:
            handle.remove()


def _moments(parts: list[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor]:
    if not parts:
        return torch.empty(0), torch.empty(0)
    n = sum(count for _, _, count in parts)
    mean = torch.stack([total for total, _, _ in parts]).sum(0) / n
    square = torch.stack([total for _, total, _ in parts]).sum(0) / n
    return mean.cpu(), (square - mean.square()).clamp_min(0).cpu()


def activation_shift(task: Moments, source: Moments | None) -> dict[str, tuple[float, ...]]:
    """Shift of activation moments against the source, per level.

    Returns:
        "mean_shift": mean over features of |mean - mean_source| / deviation_source;
        "variance_shift": mean over features of log(variance / variance_source). Zeros where there
        is no source.
    """
    if source is None:
        zeros = (0.0,) * len(task)
        return {"mean_shift": zeros, "variance_shift": zeros}
    mean_shift, variance_shift = [], []
    for (mean, variance), (mean_s, variance_s) in zip(task, source, strict=True):
        if mean.numel() == 0 or mean.shape != mean_s.shape:
            mean_shift.append(0.0)
            variance_shift.append(0.0)
            continue
        scale = (variance_s + EPSILON).sqrt()
        mean_shift.append(float(((mean - mean_s).abs() / scale).clamp_max(100).mean()))
        ratio = (variance + EPSILON) / (variance_s + EPSILON)
        variance_shift.append(float(ratio.log().mean()))
    return {"mean_shift": tuple(mean_shift), "variance_shift": tuple(variance_shift)}
