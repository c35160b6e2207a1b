import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rlhf_ray.engine.batches import Examples, batch_order
from rlhf_ray.engine.training import (
    load_optimizer_state,
    make_optimizer,
    optimizer_state,
    train_steps,
)
from rlhf_ray.operations import OptimizerName, Train


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def setting() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(3, 2), torch.randn(24, 3), torch.arange(24) % 2


def examples_of(x: torch.Tensor, y: torch.Tensor) -> Examples:
    return Examples(
        values={"": x}, boundary=0, targets=y, select=lambda values, i: {"": values[""][i]}
    )


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: torch.Tensor,
    y: torch.Tensor,
    batches: list[torch.Tensor],
) -> torch.Tensor:
    return train_steps(
        Train(name="t", learning_rate=0.1),
        optimizer=optimizer,
        batches=iter(batches),
        examples=examples_of(x, y),
        output=lambda values: model(values[""]),
        loss=F.cross_entropy,
    )


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_steps_are_those_of_the_plain_loop(name: OptimizerName) -> None:
    (model, x, y), (plain, _, _) = setting(), setting()
    batches = list(batch_order(24, 6, 8, generator()))
    losses = run(model, make_optimizer(name, dict(model.named_parameters()), 0.05), x, y, batches)
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    extra = {"momentum": 0.9} if name == "sgd" else {}
    optimizer = kind(plain.parameters(), lr=0.05, **extra)  # type: ignore[arg-type]
    for batch, loss in zip(batches, losses, strict=True):
        optimizer.zero_grad()
        expected = F.cross_entropy(plain(x[batch]), y[batch])
        expected.backward()
        optimizer.step()
        torch.testing.assert_close(loss, expected.detach())
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
        assert ours.grad is None


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_kept_state_goes_on_as_if_nothing_had_come_between(name: OptimizerName) -> None:
    (whole, x, y), (halves, _, _) = setting(), setting()
    batches = list(batch_order(24, 8, 8, generator()))
    run(whole, make_optimizer(name, dict(whole.named_parameters()), 0.05), x, y, batches)
    parameters = dict(halves.named_parameters())
    first = make_optimizer(name, parameters, 0.05)
    run(halves, first, x, y, batches[:3])
    kept = optimizer_state(first, parameters)
    assert all(entry.split("/")[1] in parameters for entry in kept)
    second = make_optimizer(name, parameters, 0.05)
    load_optimizer_state(second, parameters, {**kept, "exp_avg/of another level": torch.ones(1)})
    run(halves, second, x, y, batches[3:])
    for a, b in zip(whole.parameters(), halves.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_kept_state_is_a_copy() -> None:
    model, x, y = setting()
    parameters = dict(model.named_parameters())
    optimizer = make_optimizer("adam", parameters, 0.05)
    batches = list(batch_order(24, 2, 8, generator()))
    run(model, optimizer, x, y, batches[:1])
    kept = optimizer_state(optimizer, parameters)
    before = {entry: value.clone() for entry, value in kept.items()}
    again = make_optimizer("adam", parameters, 0.05)
    load_optimizer_state(again, parameters, kept)
    run(model, again, x, y, batches[1:])
    assert all(torch.equal(kept[entry], before[entry]) for entry in kept)


def test_scales_multiply_the_step_size() -> None:
    parameters = {name: nn.Parameter(torch.ones(1)) for name in "ab"}
    optimizer = make_optimizer("sgd", parameters, 0.1, {"a": 1.0, "b": 0.5})
    for parameter in parameters.values():
        parameter.grad = torch.ones(1)
    optimizer.step()
    assert parameters["a"].item() == pytest.approx(0.9)
    assert parameters["b"].item() == pytest.approx(0.95)


def test_l2_sp_is_the_gradient_of_the_squared_distance() -> None:
    (model, x, y), (plain, _, _) = setting(), setting()
    anchors = {p: torch.zeros_like(p) for p in model.parameters()}
    batch = next(batch_order(24, 1, 8, generator()))
    train_steps(
        Train(name="t", learning_rate=0.1, optimizer="sgd", l2_sp=0.3),
        optimizer=make_optimizer("sgd", dict(model.named_parameters()), 0.1),
        batches=iter([batch]),
        examples=examples_of(x, y),
        output=lambda values: model(values[""]),
        loss=F.cross_entropy,
        anchors=anchors,
    )
    distance = torch.stack([p.square().sum() for p in plain.parameters()]).sum()
    (F.cross_entropy(plain(x[batch]), y[batch]) + 0.3 / 2 * distance).backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours, theirs - 0.1 * theirs.grad)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_kept_state_from_storage_goes_on_as_from_memory(name: OptimizerName) -> None:
    """Storage gives tensors back contiguous, the model lies in channels-last order."""
    last = torch.channels_last
    weights = torch.randn(8, 4, 3, 3, generator=generator())
    gradient = torch.randn(8, 4, 3, 3, generator=generator())
    state = torch.arange(8 * 4 * 9.0).view(8, 4, 3, 3)
    slots = ("exp_avg", "exp_avg_sq") if name == "adam" else ("momentum_buffer",)
    found = []
    for kept in (state.contiguous(), state.to(memory_format=last)):
        parameters = {"w": nn.Parameter(weights.to(memory_format=last))}
        parameters["w"].grad = gradient.to(memory_format=last)
        optimizer = make_optimizer(name, parameters, 0.05)
        step = {"step/w": torch.tensor(1.0)} if name == "adam" else {}
        load_optimizer_state(optimizer, parameters, {f"{s}/w": kept for s in slots} | step)
        optimizer.step()
        found.append(parameters["w"].detach())
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
