"""The output layer fitted on its own, to the end, by L-BFGS (`operations.Fit`)."""

import contextlib
import copy
import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_ray.engine.alignment import runs_as_torch_has_it
from rlhf_ray.levels import LevelSplit
from rlhf_ray.tasks import Inputs, call_model

Loss = Callable[[Tensor, Tensor], Tensor]

CPU_PRODUCTS = 1 << 22
"""The most multiplications of a forward pass through the layer for which a fit is done on the CPU,
wherever the model lies: L-BFGS takes hundreds of tiny steps that wait for one another. With 256
examples and 64 features a GPU took five times as long."""


def output_layer(model: nn.Module, split: LevelSplit, example: Inputs) -> nn.Linear | None:
    """The linear layer of the last level whose output is the model's; None if there is none.

    One that does not run as torch has it, with frozen parameters, or with parameters that serve
    elsewhere too, does not count.

    Args:
        model: in eval mode.
        split: its levels.
        example: inputs of one or more examples, on the model's device.
    """
    outputs: list[tuple[nn.Linear, Any]] = []

    def note(layer: Any, inputs: Any, output: Any) -> None:
        outputs.append((layer, output))

    mine = set(split.parameters[-1])
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))

    def own(name: str, layer: nn.Module) -> bool:
        parameters = layer.named_parameters(prefix=name)
        return all(full in mine and uses[id(p)] == 1 for full, p in parameters)

    handles = [
        module.register_forward_hook(note)
        for name, module in model.named_modules()
        if runs_as_torch_has_it(module, (nn.Linear,)) and own(name, module)
    ]
    try:
        with torch.no_grad():
            whole = call_model(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return next((layer for layer, output in reversed(outputs) if output is whole), None)


def layer_inputs(layer: nn.Linear, run: Callable[[], object]) -> Tensor:
    """What flows into a layer while `run` runs the model, (N, ..., n_in) of its weight's dtype."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach()))
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return torch.cat(seen).to(layer.weight.dtype)


def output_loss(
    layer: nn.Linear,
    features: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    proximal: float = 0.0,
    anchors: Sequence[Tensor] = (),
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The loss as a function of the layer alone.

    Args:
        layer: its parameters take gradients.
        features: the layer's inputs (N, ..., n_in).
        targets: (N, ...).
        loss: (outputs, targets) -> scalar.
        proximal: half of it times the squared distance of the parameters from `anchors` is added.
        anchors: shaped like the parameters, in their order.

    Returns:
        The loss, what is minimised (both detached), and its gradient per parameter.
    """
    parameters = list(layer.parameters())
    value = plain = loss(F.linear(features, layer.weight, layer.bias), targets)
    if proximal:
        pairs = zip(parameters, anchors, strict=True)
        value = plain + proximal / 2 * sum((p - anchor).square().sum() for p, anchor in pairs)
    return plain.detach(), value.detach(), torch.autograd.grad(value, parameters)


def fit_where_quickest(
    layer: nn.Linear,
    features: Tensor,
    targets: Tensor,
    loss: Callable[[torch.device], Loss],
    *,
    proximal: float,
    evaluations: int,
) -> Tensor:
    """`fit_output` on the layer's device, or on the CPU if it is small: sizes alone settle it.

    Args:
        layer: changed in place.
        features: the layer's inputs (N, ..., n_in), of its weight's dtype.
        targets: (N, ...).
        loss: device -> the loss of outputs there.
        proximal: pull towards the weights that the layer has.
        evaluations: of loss and gradient, >= 1.
    """
    device, cpu = layer.weight.device, torch.device("cpu")
    fit = partial(fit_output, proximal=proximal, evaluations=evaluations)
    if device == cpu or features.numel() * layer.out_features > CPU_PRODUCTS:
        return fit(layer, features, targets, loss(device))
    fitted = copy.deepcopy(layer).to(cpu)
    value = fit(fitted, features.to(cpu), targets.to(cpu), loss(cpu))
    with torch.no_grad():
        layer.load_state_dict(fitted.state_dict())
    return value.to(device)


def fit_output(
    layer: nn.Linear,
    features: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    proximal: float,
    evaluations: int,
) -> Tensor:
    """Minimises the loss over the output layer by L-BFGS (Liu and Nocedal 1989), where it lies.

    It evaluates exactly as often as it says, so that the account is known beforehand: a line search
    is cut off where they are spent, and the best point that was met is kept.

    Args:
        layer: changed in place; afterwards its parameters take no gradients.
        features: the layer's inputs (N, ..., n_in), of its weight's dtype.
        targets: (N, ...).
        loss: (outputs, targets) -> scalar.
        proximal: pull towards the weights that the layer has, see `output_loss`.
        evaluations: of loss and gradient, >= 1.

    Returns:
        The loss at the point that is kept, without the pull, float32 (1,).
    """
    parameters = list(layer.parameters())
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=evaluations,
        max_eval=evaluations,
        tolerance_grad=0.0,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )
    anchors = [parameter.detach().clone() for parameter in parameters]

    def evaluate() -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return output_loss(layer, features, targets, loss, proximal=proximal, anchors=anchors)

    closure = _Closure(parameters, evaluate, left=evaluations)
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        with contextlib.suppress(_SpentError):
            while True:  # it may end early, where it cannot get any lower
                optimizer.step(closure)  # pyright: ignore[reportArgumentType] declared to give a float
    finally:
        for parameter, value in zip(parameters, closure.kept, strict=True):
            parameter.requires_grad_(False)
            parameter.grad = None
            parameter.copy_(value)
    return closure.loss.float().view(1)


class _SpentError(Exception):
    """All evaluations are spent."""


class _Closure:
    """What L-BFGS calls: sets gradients, counts, and keeps the best point.

    Attributes:
        kept: parameters at the best point so far; at the first where none is finite.
        loss: there, without the pull.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        evaluate: Callable[[], tuple[Tensor, Tensor, tuple[Tensor, ...]]],
        *,
        left: int,
    ) -> None:
        self._parameters, self._evaluate, self._left = parameters, evaluate, left
        self._best = math.inf
        self.kept = [parameter.detach().clone() for parameter in parameters]
        self.loss = parameters[0].new_full((), math.nan)

    def __call__(self) -> Tensor:
        if not self._left:
            raise _SpentError
        self._left -= 1
        plain, value, gradients = self._evaluate()
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        if float(value) < self._best:  # False for NaN
            self._best, self.loss = float(value), plain
            self.kept = [parameter.detach().clone() for parameter in self._parameters]
        return value
