"""The training inside a stage: batches from cached activations, optimizer state, divergence."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_ray.engine.allocation import to_keep
from rlhf_ray.engine.graphs import Step
from rlhf_ray.engine.segments import Values
from rlhf_ray.operations import OptimizerName, Train


def batch_order(
    n_train: int,
    steps: int | None,
    batch_size: int,
    generator: torch.Generator,
    *,
    device: torch.device | None = None,
) -> Iterator[Tensor]:
    """Indices of the examples of each step: permutations of the split, one after the other.

    Args:
        n_train: size of the split.
        steps: number of batches; None: the split once, the last batch possibly smaller; a single
            example that is left over joins the batch before: batch statistics need two.
        batch_size: B.
        generator: CPU generator.
        device: where the indices shall lie; None: on the CPU.

    Returns:
        An iterator over int64 tensors (B,).
    """
    n_drawn = n_train if steps is None else steps * batch_size
    rounds = [
        torch.randperm(n_train, generator=generator) for _ in range(math.ceil(n_drawn / n_train))
    ]
    # all at once: a transfer per step would hold every step up
    order = torch.cat(rounds)[:n_drawn].to(device)
    if batch_size < n_drawn and n_drawn % batch_size == 1:
        before_last = n_drawn // batch_size - 1
        return iter(order.split([batch_size] * before_last + [batch_size + 1]))
    return iter(order.split(batch_size))


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
    """Gives an optimizer the state that an earlier stage left, as `optimizer_state` named it."""
    for entry, value in kept.items():
        slot, name = entry.split("/", 1)
        if name in parameters:
            parameter = parameters[name]
            if value.shape == parameter.shape:
                # in the parameter's own order in memory: fused kernels pair values by address
                own = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
            else:
                own = value.to(parameter.device, copy=True)
            optimizer.state[parameter][slot] = own.detach()


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor]:
    """The optimizer's state as "<slot>/<parameter name>" -> CPU tensor."""
    return {
        f"{slot}/{name}": to_keep(value)
        for name, parameter in parameters.items()
        for slot, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def train_steps(
    settings: Train,
    *,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Tensor],
    take: Callable[[Tensor], Values],
    output: Callable[[Values], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    targets: Tensor,
    anchors: Mapping[nn.Parameter, Tensor] | None = None,
    captured: Callable[[Step], Step] = lambda step: step,
) -> Tensor:
    """Carries out the steps.

    Args:
        settings: of the operation; the caller has set modes and `requires_grad`.
        optimizer: over the trained parameters.
        batches: example indices (B,) of each step, on the device.
        take: indices -> what the trained levels are run on.
        output: that -> outputs.
        loss: (outputs, targets) -> scalar.
        targets: of the whole split, on the device.
        anchors: where `settings.l2_sp` pulls parameters to; needed if that is not 0.
        captured: makes of a step one that does the same (`StepGraphs.steps`).

    Returns:
        The loss of every step, float32 (K,), on the device: reading it is left to the caller, so
        that steps are not held up by a transfer.
    """
    pulled = anchors if anchors and settings.l2_sp else {}

    def step(values: Values, wanted: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        value = loss(output(values), wanted)
        value.backward()
        with torch.no_grad():
            for parameter, anchor in pulled.items():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter - anchor, alpha=settings.l2_sp)
        optimizer.step()
        return value.detach().float()

    run = captured(step)
    losses = [run(take(index), targets.index_select(0, index)) for index in batches]
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses)
