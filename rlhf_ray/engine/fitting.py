"""The output layer fitted on its own: a linear probe by L-BFGS (`operations.Fit`)."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_ray.levels import LevelSplit
from rlhf_ray.tasks import Inputs, call_model

Loss = Callable[[Tensor, Tensor], Tensor]


def output_layer(model: nn.Module, split: LevelSplit, example: Inputs) -> nn.Linear | None:
    """The linear layer of the last level whose output is the model's; None if there is none.

    Args:
        model: in eval mode.
        split: its levels.
        example: inputs of one or more examples, on the model's device.
    """
    outputs: list[tuple[nn.Linear, Any]] = []

    def note(layer: Any, inputs: Any, output: Any) -> None:
        outputs.append((layer, output))

    mine = set(split.parameters[-1])
    handles = [
        module.register_forward_hook(note)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in mine
    ]
    try:
        with torch.no_grad():
            whole = call_model(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return next((layer for layer, output in reversed(outputs) if output is whole), None)


def layer_inputs(layer: nn.Linear, run: Callable[[], object]) -> Tensor:
    """What flows into a layer while `run` runs the model, float32 (N, ..., n_in)."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].detach()))
    try:
        with torch.no_grad():
            run()
    finally:
        handle.remove()
    return torch.cat(seen).float()


def output_loss(
    layer: nn.Linear, features: Tensor, targets: Tensor, loss: Loss, l2: float = 0.0
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The loss as a function of the layer alone.

    Args:
        layer: its parameters take gradients.
        features: the layer's inputs (N, ..., n_in).
        targets: (N, ...).
        loss: (outputs, targets) -> scalar.
        l2: l2 / 2 times the squared parameters is added.

    Returns:
        The loss, what is minimised (both detached), and its gradient per parameter.
    """
    parameters = list(layer.parameters())
    value = plain = loss(F.linear(features, layer.weight, layer.bias), targets)
    if l2:
        value = plain + l2 / 2 * sum(parameter.square().sum() for parameter in parameters)
    return plain.detach(), value.detach(), torch.autograd.grad(value, parameters)


def fit_output(
    layer: nn.Linear,
    features: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    l2: float,
    evaluations: int,
) -> Tensor:
    """Minimises the loss over the output layer by L-BFGS (Liu and Nocedal 1989).

    Without a line search: then the number of evaluations, and so the account, is known beforehand.

    Args:
        layer: changed in place; afterwards its parameters take no gradients.
        features: the layer's inputs (N, ..., n_in), float32.
        targets: (N, ...).
        loss: (outputs, targets) -> scalar.
        l2: see `output_loss`.
        evaluations: of loss and gradient.

    Returns:
        The loss at the last evaluation, without the addition, float32 (1,).
    """
    losses: list[Tensor] = []
    optimizer = torch.optim.LBFGS(
        layer.parameters(),
        max_iter=evaluations,
        max_eval=evaluations,
        tolerance_grad=0.0,
        tolerance_change=0.0,
    )

    def closure() -> Tensor:
        plain, value, gradients = output_loss(layer, features, targets, loss, l2)
        losses.append(plain)
        for parameter, gradient in zip(layer.parameters(), gradients, strict=True):
            parameter.grad = gradient
        return value

    for parameter in layer.parameters():
        parameter.requires_grad_(True)
    try:
        optimizer.step(closure)  # pyright: ignore[reportArgumentType] declared to give a float
        return losses[-1].float().view(1)
    finally:
        for parameter in layer.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
