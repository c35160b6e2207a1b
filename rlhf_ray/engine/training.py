"""The training inside a stage: optimizer steps, and the optimizer's state between stages."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.engine.batches import Examples, Step, one_by_one
from rlhf_ray.engine.segments import Values
from rlhf_ray.operations import OptimizerName, Train


def make_optimizer(
    name: OptimizerName,
    parameters: Mapping[str, nn.Parameter],
    learning_rate: float,
    scales: Mapping[str, float] | None = None,
) -> torch.optim.Optimizer:
    """Adam, or SGD with momentum 0.9, over named parameters.

    Args:
        name: "adam" or "sgd".
        parameters: what is trained.
        learning_rate: step size.
        scales: parameter name -> factor on its step size; None: 1 for all.
    """
    values: list[Any] = list(parameters.values())
    if scales is not None:
        values = [
            {"params": [parameter], "lr": learning_rate * scales[name]}
            for name, parameter in parameters.items()
        ]
    if name == "adam":
        return torch.optim.Adam(values, lr=learning_rate, fused=True)
    # not fused: that kernel fails where some levels bring a momentum and others start without
    return torch.optim.SGD(values, lr=learning_rate, momentum=0.9)


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    kept: Mapping[str, Tensor],
) -> None:
    """Gives an optimizer the state that an earlier stage left, as `optimizer_state` named it.

    Where the optimizer has its state already (`StepGraphs.settle`), it is copied there.
    """
    for entry, value in kept.items():
        slot, name = entry.split("/", 1)
        if name in parameters:
            parameter = parameters[name]
            state = optimizer.state[parameter]
            if slot not in state:
                # in the parameter's own order in memory: fused kernels pair values by address
                like = parameter.detach() if value.shape == parameter.shape else value
                state[slot] = torch.empty_like(like, dtype=value.dtype, device=parameter.device)
            state[slot].copy_(value)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's state as "<slot>/<parameter name>" -> tensor, the live one, where it lies."""
    return {
        f"{slot}/{name}": value
        for name, parameter in parameters.items()
        for slot, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def train_steps(
    settings: Train,
    *,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    examples: Examples,
    output: Callable[[Values], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    anchors: Mapping[nn.Parameter, Tensor] | None = None,
    carried_out: Callable[[Step, Examples, Iterable[Tensor]], list[Tensor]] = one_by_one,
) -> Tensor:
    """Carries out the steps.

    Args:
        settings: of the operation; the caller has set modes and `requires_grad`.
        optimizer: over the trained parameters.
        batches: example indices (B,) of each step, on the device.
        examples: what they are indices of.
        output: what the trained levels are run on -> outputs.
        loss: (outputs, targets) -> scalar.
        anchors: where `settings.l2_sp` pulls parameters to; needed if that is not 0.
        carried_out: does steps in order and gives their losses (`StepGraphs.carry_out`).

    Returns:
        The loss of every step, float32 (K,), on the device: reading it is left to the caller, so
        that steps are not held up by a transfer.
    """
    pulled = anchors if anchors and settings.l2_sp else {}

    def step(examples: Examples, index: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss(output(examples.take(index)), examples.targets.index_select(0, index))
        value.backward()
        with torch.no_grad():
            for parameter, anchor in pulled.items():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - anchor, alpha=settings.l2_sp)
        optimizer.step()
        return value.detach().float()

    try:
        losses = carried_out(step, examples, batches)
    finally:
        optimizer.zero_grad(set_to_none=True)
    return torch.cat([value.reshape(-1) for value in losses])
