import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune
from zoo import CASES

from rlhf_ray.engine.fitting import fit_output, layer_inputs, output_layer
from rlhf_ray.levels import split_levels


def _probe() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    features = torch.randn(80, 6)
    targets = (features @ torch.randn(6, 3)).argmax(1)
    return nn.Linear(6, 3), features, targets


def test_fit_reaches_the_optimum_of_a_convex_loss() -> None:
    layer, features, targets = _probe()
    anchors = [p.detach().double().clone() for p in layer.parameters()]
    reference = copy.deepcopy(layer).double()
    optimizer = torch.optim.LBFGS(
        reference.parameters(), max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        pairs = zip(reference.parameters(), anchors, strict=True)
        pull = sum((p - anchor).square().sum() for p, anchor in pairs)
        loss = F.cross_entropy(reference(features.double()), targets) + 0.05 / 2 * pull
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    loss = fit_output(layer, features, targets, F.cross_entropy, proximal=0.05, evaluations=80)
    assert torch.allclose(layer.weight.double(), reference.weight, atol=1e-3)
    assert torch.allclose(layer.bias.double(), reference.bias, atol=1e-3)
    assert float(loss) == pytest.approx(float(F.cross_entropy(layer(features), targets)), abs=1e-4)
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())


def test_fit_evaluates_as_often_as_it_says() -> None:
    layer, features, targets = _probe()
    calls = []

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return F.cross_entropy(outputs, targets)

    fit_output(layer, features, targets, loss, proximal=0.01, evaluations=30)
    assert len(calls) == 30


@pytest.mark.parametrize(
    ("name", "found"),
    [("cnn4", True), ("cnn2", True), ("resnet18", True), ("lstm", True), ("unet", False)],
)
def test_output_layer_is_the_linear_one_whose_output_is_the_models(name: str, found: bool) -> None:
    case = CASES[name]
    model = case.model().eval()
    layer = output_layer(model, split_levels(model, case.levels), case.inputs(2))
    assert (layer is not None) == found
    if layer is not None:
        features = layer_inputs(layer, lambda: model(case.inputs(2)))
        assert features.shape[-1] == layer.in_features


class Cosine(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return F.linear(F.normalize(input, dim=-1), F.normalize(self.weight, dim=-1))


@pytest.mark.parametrize(
    "head",
    [
        Cosine(4, 3),
        nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
        prune.l1_unstructured(nn.Linear(4, 3), "weight", 0.3),
    ],
    ids=["cosine", "parametrised", "hooked"],
)
def test_output_layer_that_is_not_plainly_linear_is_none(head: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(6, 4), head).eval()
    split = split_levels(model, {"a": ["0"], "b": ["1"]})
    assert output_layer(model, split, torch.randn(2, 6)) is None


def test_a_layer_that_is_not_the_levels_own_to_change_is_not_fitted() -> None:
    frozen = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    frozen[1].bias.requires_grad_(False)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    tied[2].weight = tied[1].weight  # its inputs change with it
    for model, head in ((frozen, ["1"]), (tied, ["1", "2"])):
        split = split_levels(model, {"body": ["0"], "head": head})
        assert output_layer(model, split, torch.randn(2, 4)) is None


def test_a_strong_pull_keeps_the_layer_where_it_was() -> None:
    layer, features, targets = _probe()
    before = layer.weight.detach().clone()
    fit_output(layer, features, targets, F.cross_entropy, proximal=1e4, evaluations=80)
    assert torch.allclose(layer.weight, before, atol=1e-3)


def test_fit_does_not_run_away_from_labels_that_the_layer_has_all_wrong() -> None:
    layer, features, targets = _probe()
    with torch.no_grad():
        layer.weight.mul_(60)  # sure of itself, and mistaken
        before = float(F.cross_entropy(layer(9 * features), targets))
    fit_output(layer, 9 * features, targets, F.cross_entropy, proximal=1e-3, evaluations=80)
    assert before > 50 and float(F.cross_entropy(layer(9 * features), targets)) < 1
