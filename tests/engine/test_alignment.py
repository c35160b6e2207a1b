import copy

import pytest
import torch
from torch import nn
from zoo import CASES

from rlhf_ray.engine.alignment import aligning, output_moments, weighted_modules
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
    with aligning(moved, source):
        call_model(shifted, inputs)
    # in a second run, from the changed weights alone
    for module, (mean, variance) in _moments(shifted, moved, inputs).items():
        wanted, spread = source[module]
        assert torch.allclose(mean, wanted, atol=1e-3), module
        close = (variance.sqrt() - spread.sqrt()).abs() <= 0.02 + 0.02 * spread.sqrt()
        bounded = variance < 1e-4  # a feature that hardly varies is not blown up
        assert (close | bounded).all(), module


def test_what_a_run_puts_out_while_aligning_is_what_it_puts_out_afterwards() -> None:
    torch.manual_seed(0)
    case = CASES["cnn4"]
    model = case.model().eval()
    split = split_levels(model, case.levels)
    modules = weighted_modules(model, split, (0, 1))
    source = {n: (m + 0.5, 4 * v) for n, (m, v) in _moments(model, modules, case.inputs(8)).items()}
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
