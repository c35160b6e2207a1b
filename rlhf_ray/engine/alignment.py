"""Weighted modules whose outputs are given the moments that they have on the source (`Align`)."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from rlhf_ray.errors import InputError
from rlhf_ray.levels import LevelSplit

OutputMoments = Mapping[str, tuple[Tensor, Tensor]]
"""Module name -> mean of its output per feature, (F,), and covariance of the features, (F, F); or
their variance, (F,), where the module's weights cannot mix its features. float32."""

GAIN = (0.1, 10.0)
"""Bounds of the factor along any direction of features: one that says nothing is not blown up."""

SHRINKAGE = 0.1
"""Weight of its diagonal in a covariance (Ledoit and Wolf 2004): it is taken over few examples."""

EPSILON = 1e-5

MIXED = 512
"""Modules with more features than these are aligned feature by feature."""

READ = 1024
"""The most outputs that a linear read-out is made of."""

RIDGE = 0.1
"""Weight of the squared coefficients of a read-out of standardised outputs, per example."""

_FIRST: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm,
)  # fmt: skip
"""Kinds of modules whose features are dimension 1 of their output; else they are the last."""

_LAST: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm)


def runs_as_torch_has_it(module: nn.Module, kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether a module is of one of these kinds and computes what torch's own does.

    One whose class has another `forward`, whose weights are made from others, or whose calls are
    hooked (weight norm and pruning as torch had them first) may do anything with them.
    """
    changed = module._forward_pre_hooks or module._forward_hooks or is_parametrized(module)
    return not changed and any(
        isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds
    )


def weighted_modules(
    model: nn.Module, split: LevelSplit, levels: Sequence[int]
) -> dict[str, nn.Module]:
    """The modules of some levels that scale and move each feature of their output by parameters.

    Convolutions, linear and normalising layers with a weight and a bias, as torch has them.
    """
    owned = {name for level in levels for name in split.parameters[level]}

    def holds(name: str, module: nn.Module) -> bool:
        if not runs_as_torch_has_it(module, (*_FIRST, *_LAST)):
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
        A function that gives the moments (on the CPU) of those that ran exactly once.
    """
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in modules}

    def watch(name: str) -> Callable[[nn.Module, object, object], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                seen[name].append(_moments(output, _dimension(module, output), _mixes(module)))

        return hook

    with _hooked(modules, watch):
        yield lambda: {
            name: (found[0][0].cpu(), found[0][1].cpu())
            for name, found in seen.items()
            if len(found) == 1
        }


def align_where_it_helps(
    levels: Sequence[Mapping[str, nn.Module]],
    source: OutputMoments,
    run: Callable[[], Tensor],
    targets: Tensor,
    *,
    margin: float,
) -> tuple[bool, ...]:
    """Aligns levels in turn; takes each back unless outputs then explain more of the targets.

    Args:
        levels: modules of each, changed in place.
        source: the moments that they shall have.
        run: runs the model on some examples: their outputs, see `unexplained`.
        targets: of these examples.
        margin: how much less must be left unexplained; -1: any amount will do.

    Returns:
        Which of them are aligned.
    """
    aligned = []
    with torch.no_grad():
        before = unexplained(run(), targets)
        for modules in levels:
            parameters = [p for module in modules.values() for p in module.parameters()]
            kept = [parameter.clone() for parameter in parameters]
            with aligning(modules, source):
                after = unexplained(run(), targets)
            aligned.append(margin <= -1 or before - after > margin)  # False for NaN
            if aligned[-1]:
                before = after
                continue
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.copy_(value)
    return tuple(aligned)


@contextlib.contextmanager
def aligning(
    modules: Mapping[str, nn.Module], source: OutputMoments, *, shrinkage: float = SHRINKAGE
) -> Iterator[None]:
    """Aligns modules while the body runs the model once: each on the aligned ones before it.

    A module's features are moved and mixed by the map of least distance between two normal
    distributions, that of its outputs here and that on the source (optimal transport; Dowson and
    Landau 1982); what is already there stays.

    Args:
        modules: changed in place by weight and bias; what they put out in this run is aligned too.
        source: the moments that they shall have; modules that are not in it stay as they are.
        shrinkage: weight of the diagonal in both covariances, in [0, 1].
    """

    def align(name: str) -> Callable[[nn.Module, object, object], object]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> Tensor:
            assert isinstance(output, Tensor)
            goal, wanted = (value.to(output.device) for value in source[name])
            feature = _dimension(module, output)
            mean, spread = _moments(output, feature, mixed=wanted.dim() == 2)
            if not torch.isfinite(spread).all():
                return output  # nothing to go by
            weight, bias = module.weight, module.bias
            assert isinstance(weight, Tensor) and isinstance(bias, Tensor)
            shape = weight.shape
            if wanted.dim() == 2:
                transport = transport_map(_shrunk(spread, shrinkage), _shrunk(wanted, shrinkage))
                weight.copy_((transport @ weight.flatten(1).float()).view(shape))
                bias.copy_(transport @ (bias.float() - mean) + goal)
                moved = F.linear(output.movedim(feature, -1).float() - mean, transport, goal)
            else:
                gain = ((wanted + EPSILON) / (spread + EPSILON)).sqrt().clamp(*GAIN)
                weight.mul_(gain.view(-1, *[1] * (len(shape) - 1)))
                bias.sub_(mean).mul_(gain).add_(goal)
                moved = (output.movedim(feature, -1).float() - mean) * gain + goal
            return moved.movedim(-1, feature).to(output.dtype)

        return hook

    with torch.no_grad(), _hooked({n: m for n, m in modules.items() if n in source}, align):
        yield


def transport_map(here: Tensor, there: Tensor) -> Tensor:
    """The symmetric map A with A here A = there, (F, F), its eigenvalues kept within `GAIN`.

    Args:
        here: covariance, symmetric (F, F).
        there: the same of what it shall become.
    """
    ridge = EPSILON * torch.eye(here.shape[0], dtype=torch.float64, device=here.device)
    root, inverse = _roots(here.double() + ridge)
    middle, _ = _roots(root @ (there.double() + ridge) @ root)
    values, vectors = torch.linalg.eigh(inverse @ middle @ inverse)
    return (vectors * values.clamp(*GAIN) @ vectors.T).float()


def readable(outputs: Tensor, targets: Tensor) -> bool:
    """Whether a linear read-out of outputs can be held against targets (`unexplained`)."""
    found = _as_regression(outputs, targets)
    return found is not None and found[0].shape[1] <= READ


def unexplained(outputs: Tensor, targets: Tensor) -> float:
    """What the best linear read-out of a model's outputs leaves unexplained of the targets.

    Ridge regression; every example is predicted from the others (leave-one-out), so that no
    examples need to be kept apart. It asks how well outputs tell targets apart, not whether they
    are right: outputs whose labels were permuted explain as much as before.

    Args:
        outputs: of classes (N, C, ...) or (N, ..., C), or of real values (N, ...).
        targets: class indices (N, ...), those outside 0 ... C - 1 are passed over; or real values.

    Returns:
        Share of the targets' variance, about [0, 1]; above 1 for worse than their mean; NaN for
        outputs that are not finite, or of a single example.

    Raises:
        InputError: their shapes do not go together.
    """
    found = _as_regression(outputs, targets)
    if found is None:
        raise InputError(
            "outputs must be of classes (N, C, ...) with targets (N, ...), or as many real values, "
            f"got outputs of shape {tuple(outputs.shape)} and {targets.dtype} targets of shape "
            f"{tuple(targets.shape)}."
        )
    x, y = (value.double() - value.double().mean(0) for value in found)
    x = x / (x.square().mean().sqrt() + EPSILON)
    if not (torch.isfinite(x).all() and len(x) > 1):
        return math.nan
    n, n_features = x.shape
    ridge = RIDGE * n * torch.eye(n_features, dtype=x.dtype, device=x.device)
    inverse_t = torch.linalg.solve(x.T @ x + ridge, x.T).T
    leverage = (inverse_t * x).sum(1, keepdim=True) + 1 / n  # of the mean, too
    errors = (y - inverse_t @ (x.T @ y)) / (1 - leverage).clamp_min(EPSILON)
    return float(errors.square().sum() / y.square().sum().clamp_min(EPSILON))


def _as_regression(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor] | None:
    """Features (n, C) and goals (n, D) of a read-out; None where shapes do not go together."""
    if targets.is_floating_point():
        if len(outputs) != len(targets):
            return None
        return outputs.reshape(len(outputs), -1), targets.reshape(len(targets), -1)
    if outputs.dim() < 2:
        return None
    last = outputs.movedim(1, -1)
    if last.shape[:-1] != targets.shape:
        last = outputs
    if last.shape[:-1] != targets.shape:
        return None
    x, labels = last.reshape(-1, last.shape[-1]), targets.reshape(-1)
    known = (labels >= 0) & (labels < x.shape[1])
    return x[known], F.one_hot(labels[known].long(), x.shape[1])


@contextlib.contextmanager
def _hooked(
    modules: Mapping[str, nn.Module], hook: Callable[[str], Callable[..., object]]
) -> Iterator[None]:
    def exact(name: str) -> Callable[..., object]:
        inner = hook(name)

        def run(module: nn.Module, inputs: Any, output: Any) -> object:
            # the run may be one of half precision; moments, and weights made from them, are not
            device = output.device.type if isinstance(output, Tensor) else "cpu"
            with torch.autocast(device, enabled=False):
                return inner(module, inputs, output)

        return run

    handles = [module.register_forward_hook(exact(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _dimension(module: nn.Module, output: Tensor) -> int:
    return 1 if isinstance(module, _FIRST) else output.dim() - 1


def _mixes(module: nn.Module) -> bool:
    """Whether a module's weight can mix the features of its output."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    groups = getattr(module, "groups", 1)
    return weight.dim() > 1 and groups == 1 and weight.shape[0] <= MIXED


def _moments(output: Tensor, feature: int, mixed: bool) -> tuple[Tensor, Tensor]:
    flat = output.detach().float().movedim(feature, -1).flatten(0, -2)
    if not mixed:
        variance, mean = torch.var_mean(flat, 0, correction=0)
        return mean, variance
    mean = flat.mean(0)
    flat = flat - mean
    return mean, flat.T @ flat / flat.shape[0]


def _shrunk(covariance: Tensor, shrinkage: float) -> Tensor:
    return torch.lerp(covariance, torch.diag(covariance.diagonal()), shrinkage)


def _roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Square root of a positive definite matrix, and its inverse."""
    values, vectors = torch.linalg.eigh(matrix)
    roots = values.clamp_min(EPSILON * EPSILON).sqrt()
    return vectors * roots @ vectors.T, vectors / roots @ vectors.T
