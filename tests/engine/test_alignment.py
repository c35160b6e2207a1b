import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from zoo import CASES

from rlhf_ray.engine.alignment import (
    RIDGE,
    align_where_it_helps,
    aligning,
    output_moments,
    readable,
    transport_map,
    unexplained,
    weighted_modules,
)
from rlhf_ray.levels import split_levels
from rlhf_ray.tasks import call_model

NAMES = ["cnn4", "norm_cnn", "transformer"]


def _moments(model: nn.Module, modules, inputs):  # type: ignore[no-untyped-def]
    with torch.no_grad(), output_moments(modules) as found:
        call_model(model, inputs)
    return found()


@pytest.mark.parametrize("name", NAMES)
def test_aligned_modules_put_out_the_sources_moments(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]
    model = case.model().eval()
    split = split_levels(model, case.levels)
    modules = weighted_modules(model, split, range(split.n_levels))
    assert modules
    source = _moments(model, modules, case.inputs(32))
    shifted = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in shifted.parameters():
            parameter.mul_(1.3).add_(0.02)
    moved = weighted_modules(shifted, split, range(split.n_levels))
    inputs = case.inputs(32)
    with aligning(moved, source, shrinkage=0.0):
        call_model(shifted, inputs)
    # in a second run, from the changed weights alone
    mixed = 0
    for module, (mean, spread) in _moments(shifted, moved, inputs).items():
        wanted, goal = source[module]
        assert torch.allclose(mean, wanted, atol=2e-3), module
        mixed += goal.dim() == 2
        if goal.dim() == 2:
            spread, goal = spread.diagonal(), goal.diagonal()
        close = (spread.sqrt() - goal.sqrt()).abs() <= 0.02 + 0.03 * goal.sqrt()
        bounded = spread < 1e-4  # a feature that hardly varies is not blown up
        assert (close | bounded).all(), module
    assert mixed  # convolutions and linear layers, whose features go together


def test_transport_map_takes_one_covariance_to_the_other() -> None:
    torch.manual_seed(0)
    here, there = (torch.cov(torch.randn(6, 60)) for _ in range(2))
    found = transport_map(here, there)
    assert torch.allclose(found, found.T, atol=1e-5)
    assert torch.allclose(found @ here @ found, there, atol=1e-3)
    assert torch.allclose(transport_map(here, here), torch.eye(6), atol=1e-4)


def test_depthwise_convolutions_are_aligned_feature_by_feature() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(16, 2)).eval()
    split = split_levels(model, {"conv": ["0"], "head": ["2"]})
    modules = weighted_modules(model, split, (0, 1))
    source = _moments(model, modules, torch.randn(32, 4, 4, 4))
    assert {name: spread.dim() for name, (_, spread) in source.items()} == {"0": 1, "2": 2}
    inputs = 3 + 2 * torch.randn(64, 4, 4, 4)
    with aligning({"0": modules["0"]}, source):
        model(inputs)
    mean, variance = _moments(model, {"0": modules["0"]}, inputs)["0"]
    assert torch.allclose(mean, source["0"][0], atol=1e-3)
    assert torch.allclose(variance, source["0"][1], rtol=1e-2)


def test_modules_with_a_forward_of_their_own_are_passed_over() -> None:
    torch.manual_seed(0)
    case = CASES["convnext"]  # its LayerNorm2d is a LayerNorm whose features are dimension 1
    model = case.model().eval()
    split = split_levels(model, case.levels)
    modules = weighted_modules(model, split, range(split.n_levels))
    assert {type(module) for module in modules.values()} == {nn.Conv2d, nn.Linear, nn.LayerNorm}
    source = _moments(model, modules, case.inputs(6))
    with aligning(modules, source):
        call_model(model, case.inputs(6))


def test_unexplained_is_the_error_of_a_ridge_regression_left_one_out() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(30, 4), torch.randint(0, 4, (30,))
    x = (outputs - outputs.mean(0)).double()
    x = x / x.square().mean().sqrt()
    y = F.one_hot(targets, 4).double()
    errors = []
    for i in range(30):
        others = torch.arange(30) != i
        # the intercept is not pulled: a column of ones whose coefficient costs nothing
        ones = torch.ones(29, 1, dtype=torch.float64)
        columns = torch.cat([x[others], ones], 1)
        pull = torch.diag(torch.tensor([RIDGE * 30] * 4 + [0.0], dtype=torch.float64))
        fitted = torch.linalg.solve(columns.T @ columns + pull, columns.T @ y[others])
        errors.append((y[i] - torch.cat([x[i], ones[0]]) @ fitted).square().sum())
    share = float(torch.stack(errors).sum() / (y - y.mean(0)).square().sum())
    assert unexplained(outputs, targets) == pytest.approx(share, rel=1e-4)


def test_unexplained_asks_what_outputs_tell_apart_not_whether_they_are_right() -> None:
    torch.manual_seed(0)
    targets = torch.randint(0, 5, (200,))
    outputs = 4 * F.one_hot(targets, 5) + torch.randn(200, 5)
    right = unexplained(outputs, targets)
    assert right < 0.4 < 0.9 < unexplained(torch.randn(200, 5), targets)
    assert unexplained(outputs, torch.randperm(5)[targets]) == pytest.approx(right)


def test_unexplained_knows_dense_targets_and_real_ones_and_passes_over_the_ignored() -> None:
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (4, 8, 8))
    outputs = F.one_hot(labels, 3).movedim(-1, 1) + 0.1 * torch.randn(4, 3, 8, 8)
    dense = unexplained(outputs, labels)
    assert dense < 0.2
    assert unexplained(outputs.movedim(1, -1), labels) == pytest.approx(dense)
    ignored = labels.clone()
    ignored[:, :2] = -100
    assert unexplained(outputs, ignored) < 0.2
    values = torch.randn(50)
    assert unexplained(values + 0.1 * torch.randn(50), values) < 0.2
    assert not readable(torch.randn(4, 3), torch.zeros(7, dtype=torch.long))


def test_what_is_not_finite_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    modules = weighted_modules(model, split_levels(model, {"a": ["0"], "b": ["2"]}), (0,))
    source = _moments(model, modules, torch.randn(16, 4))
    before = model[0].weight.detach().clone()
    inputs = torch.full((16, 4), torch.inf)
    aligned = align_where_it_helps(
        [modules], source, lambda: model(inputs), torch.arange(16) % 2, margin=0.02
    )
    assert aligned == (False,) and torch.equal(model[0].weight, before)


def test_an_alignment_is_taken_back_where_it_does_not_help() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    split = split_levels(model, {"body": ["0"], "head": ["2"]})
    inputs = torch.randn(200, 6)
    with torch.no_grad():
        targets = model(inputs).argmax(1)
    modules = weighted_modules(model, split, (0,))
    before = copy.deepcopy(model.state_dict())
    source = _moments(model, modules, inputs)
    for shift, helps in ((0.0, False), (-8.0, True)):
        model.load_state_dict(before)
        shifted = inputs + shift

        def run(x: torch.Tensor = shifted) -> torch.Tensor:
            return model(x)

        aligned = align_where_it_helps([modules], source, run, targets, margin=0.02)
        assert aligned == (helps,)
        same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert same == (not helps)
    model.load_state_dict(before)
    always = align_where_it_helps([modules], source, lambda: model(inputs), targets, margin=-1.0)
    assert always == (True,)


def test_moments_and_weights_are_exact_where_the_run_is_of_half_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3)).eval().requires_grad_(False)
    modules = weighted_modules(model, split_levels(model, {"a": ["0"], "b": ["2"]}), (0,))
    source = _moments(model, modules, torch.randn(64, 6))
    before, inputs = copy.deepcopy(model.state_dict()), torch.randn(64, 6) * 2 - 1
    found = []
    for half in (False, True):
        model.load_state_dict(before)
        with torch.autocast("cpu", torch.bfloat16, enabled=half), aligning(modules, source):
            model(inputs)
        found.append(model[0].weight.detach().clone())
    exact, from_half = found
    # the features were rounded, by up to 0.4%; what is made of them was not
    torch.testing.assert_close(from_half, exact, rtol=0.02, atol=0.02)
    assert not torch.equal(from_half, from_half.bfloat16().float())


def test_what_a_run_puts_out_while_aligning_is_what_it_puts_out_afterwards() -> None:
    torch.manual_seed(0)
    case = CASES["cnn4"]
    model = case.model().eval()
    split = split_levels(model, case.levels)
    modules = weighted_modules(model, split, (0, 1))
    source = {n: (m + 0.5, 2 * v) for n, (m, v) in _moments(model, modules, case.inputs(8)).items()}
    inputs = case.inputs(8)
    with aligning(modules, source):
        during = model(inputs)
    with torch.no_grad():
        assert torch.allclose(during, model(inputs), atol=1e-4)


def test_modules_that_the_source_does_not_know_stay() -> None:
    case = CASES["cnn4"]
    model = case.model().eval()
    before = copy.deepcopy(model.state_dict())
    modules = weighted_modules(model, split_levels(model, case.levels), (0,))
    with aligning(modules, {}):
        model(case.inputs(4))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_modules_without_a_bias_are_left_to_the_norm_behind_them() -> None:
    case = CASES["resnet18"]
    model = case.model()
    split = split_levels(model, case.levels)
    found = weighted_modules(model, split, range(split.n_levels))
    kinds = {type(module) for module in found.values()}
    assert kinds == {nn.BatchNorm2d, nn.Linear}
