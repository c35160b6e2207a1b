import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_ray.engine.descriptors import activation_shift, gradient_norms, level_moments
from rlhf_ray.engine.segments import plan_segments
from rlhf_ray.levels import split_levels


def test_gradient_norms_are_relative_per_level_and_leave_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).requires_grad_(False)
    split = split_levels(model, {"low": ["0"], "head": ["2"]})
    x, y = torch.randn(16, 4), torch.arange(16) % 3
    norms, loss = gradient_norms(model, split, lambda: F.cross_entropy(model(x), y))
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    model.requires_grad_(True)
    expected = F.cross_entropy(model(x), y)
    expected.backward()
    for norm, layer in zip(norms, (model[0], model[2]), strict=True):
        gradients = torch.cat([p.grad.flatten() for p in layer.parameters() if p.grad is not None])
        weights = torch.cat([p.detach().flatten() for p in layer.parameters()])
        assert norm == pytest.approx(float(gradients.norm() / weights.norm()), rel=1e-4)
    assert loss == pytest.approx(expected.item())


def test_gradient_norm_of_a_level_the_loss_does_not_reach_is_zero() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 2), "unused": nn.Linear(2, 2)})
    split = split_levels(model, {"a": ["unused"], "b": ["used"]})
    norms, _ = gradient_norms(model, split, lambda: model["used"](torch.ones(3, 2)).sum())
    assert norms[0] == 0.0 and norms[1] > 0.0


def test_moments_are_those_of_each_level_over_all_runs() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Flatten(), nn.Linear(12, 4))
    split = split_levels(model, {"conv": ["0"], "head": ["2"]})
    x = torch.randn(10, 1, 3, 3)
    with level_moments(model, split) as moments, torch.no_grad():
        model(x[:4])
        model(x[4:])
    (conv_mean, conv_variance), (head_mean, _) = moments()
    channels = model[0](x).movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(conv_mean, channels.mean(0))
    torch.testing.assert_close(conv_variance, channels.var(0, unbiased=False))
    torch.testing.assert_close(head_mean, model(x).mean(0))
    assert not any(module._forward_hooks for module in model.modules())


def test_shift_is_zero_against_itself_and_without_a_source() -> None:
    moments = [(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))]
    for shift in (activation_shift(moments, moments), activation_shift(moments, None)):
        assert shift == {"mean_shift": (0.0,), "variance_shift": (0.0,)}


def test_shift_is_in_deviations_and_logarithms() -> None:
    source = [(torch.zeros(2), torch.full((2,), 4.0))]
    task = [(torch.tensor([2.0, -4.0]), torch.full((2,), 8.0))]
    shift = activation_shift(task, source)
    assert shift["mean_shift"] == pytest.approx((1.5,), rel=1e-4)
    assert shift["variance_shift"] == pytest.approx((math.log(2),), rel=1e-4)


def test_level_that_was_not_seen_has_no_shift() -> None:
    empty = (torch.empty(0), torch.empty(0))
    other = (torch.zeros(3), torch.ones(3))
    found = activation_shift([empty, (torch.ones(2), torch.ones(2))], [other, other])
    assert found == {"mean_shift": (0.0, 0.0), "variance_shift": (0.0, 0.0)}


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 1e9:
            x = x * 0
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def test_zeros_that_stand_for_what_nothing_depends_on_do_not_count() -> None:
    torch.manual_seed(0)
    model, x = Untraceable().eval(), torch.randn(8, 4) + 1
    split = split_levels(model, {"a": ["a"], "b": ["b"], "c": ["c"]})
    plan = plan_segments(model, split, x)
    assert (plan.mechanism, plan.usable) == ("replay", (True, True, True))
    with torch.no_grad():
        with level_moments(model, split) as whole:
            model(x)
        with level_moments(model, split) as cut:
            values = plan.forward(plan.start(x), 0, 1)
            plan.output(plan.forward(values, 1, 2), 2)
    for found, expected in zip(cut(), whole(), strict=True):
        torch.testing.assert_close(found, expected)
