import copy

import numpy as np
import pytest
import torch
from torch import nn

from rlhf_ray.errors import InputError
from rlhf_ray.levels import model_digest, split_levels


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "stem": nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)),
            "act": nn.ReLU(),
            "mid": nn.Linear(2, 2),
            "head": nn.Linear(2, 3),
        }
    )


def test_split_resolves_parameters_buffers_and_what_is_left() -> None:
    split = split_levels(model(), {"a": ["stem.0", "stem.1"], "b": ["head"]})
    assert split.names == ("a", "b") and split.n_levels == 2
    assert split.parameters[1] == ("head.weight", "head.bias")
    assert "stem.1.running_mean" in split.state[0]
    assert "stem.1.running_mean" not in split.parameters[0]
    assert split.unassigned == ("mid.weight", "mid.bias")
    found = [split.level_of(name) for name in ("stem.1", "stem", "head", "mid")]
    assert found == [0, None, 1, None]


def test_order_is_that_of_the_mapping() -> None:
    assert split_levels(model(), {"late": ["head"], "early": ["stem"]}).names == ("late", "early")


@pytest.mark.parametrize(
    ("levels", "match"),
    [
        ({}, "levels must map level names to module names"),
        (["stem"], "levels must map level names to module names"),
        ({"a": "stem"}, r"level 'a' must list module names, got 'stem'. Write \['stem'\]"),
        ({"a": [nn.Linear(3, 3)]}, r"level 'a' must list module names as in model.*got \[Linear"),
        ({"a": None}, "level 'a' must list module names as in model.*, got None"),
        ({0: ["stem"]}, "a level's name must be a string, and not '__all__', got 0"),
        ({"__all__": ["stem"]}, "a level's name must be a string, and not '__all__', got '__all"),
        ({"a": ["steam"]}, "module of level 'a' must be one that exists.*Did you mean 'stem'"),
        ({"a": ["stem"], "b": ["stem.0"]}, "disjoint, got module 'stem.0' in 'b' and 'stem' in"),
        ({"a": ["stem", "stem"]}, "disjoint"),
        ({"a": ["act"]}, "every level must have parameters, got none in level 'a'"),
        ({"a": [""], "b": ["head"]}, "disjoint"),
    ],
)
def test_bad_levels_are_refused(levels: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        split_levels(model(), levels)  # type: ignore[arg-type]


def test_weights_tied_across_levels_are_refused_within_one_they_are_not() -> None:
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    tied[2].weight = tied[0].weight
    with pytest.raises(InputError, match=r"'0.weight' of 'a' tied to '2.weight' of 'b'"):
        split_levels(tied, {"a": ["0"], "b": ["1", "2"]})
    assert split_levels(tied, {"a": ["0", "2"], "b": ["1"]}).unassigned == ()


def test_weights_tied_to_a_module_outside_the_levels_are_refused() -> None:
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "body": nn.Linear(3, 3),
                          "head": nn.Linear(3, 5)})  # fmt: skip
    tied["head"].weight = tied["embedding"].weight
    with pytest.raises(InputError, match=r"'head.weight' of 'b' tied to 'embedding.weight'\. Put"):
        split_levels(tied, {"a": ["body"], "b": ["head"]})
    levels = {"a": ["embedding", "head"], "b": ["body"]}
    assert split_levels(tied, levels).unassigned == ()


def test_frozen_parameters_are_not_trained() -> None:
    net = model()
    net["stem"][0].requires_grad_(False)  # type: ignore[index]
    split = split_levels(net, {"a": ["stem"], "b": ["head"]})
    assert split.parameters[0] == ("stem.1.weight", "stem.1.bias")
    assert "stem.0.weight" in split.state[0]
    assert model_digest(net, split) != model_digest(model(), split)
    with pytest.raises(InputError, match=r"level 'c' whose parameters are all frozen\. Set"):
        split_levels(net, {"c": ["stem.0"], "b": ["head"]})
    whole = split_levels(model().requires_grad_(False), {"a": ["stem"], "b": ["head"]})
    assert whole.parameters == split_levels(model(), {"a": ["stem"], "b": ["head"]}).parameters


class Pooled(nn.Module):
    """Does what neither its weights nor its `repr` tell."""

    def __init__(self, power: float, shift: float) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.power = power
        self.register_buffer("shift", torch.tensor(shift), persistent=False)


def test_digest_follows_attributes_and_unsaved_buffers() -> None:
    def digest(net: nn.Module) -> str:
        for parameter in net.parameters():
            nn.init.zeros_(parameter)
        return model_digest(net, split_levels(net, {"a": [""]}))

    nets = [Pooled(1.0, 0.0), Pooled(2.0, 0.0), Pooled(1.0, 1.0)]
    layer = nn.TransformerEncoderLayer
    nets += [layer(4, 1), layer(4, 2), layer(4, 1, norm_first=True), layer(4, 1, activation="gelu")]
    found = [digest(net) for net in nets]
    assert len(set(found)) == len(found)
    assert digest(Pooled(1.0, 0.0)) == found[0] == digest(Pooled(1.0, 0.0).eval())
    compiled = Pooled(1.0, 0.0)
    torch.compile(compiled, backend="eager")
    assert digest(compiled) == found[0]


@pytest.mark.parametrize(
    ("one", "other"),  # what their text leaves out
    [
        (nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)),
        (nn.AvgPool2d(3), nn.AvgPool2d(3, divisor_override=2)),
        (nn.Upsample(scale_factor=2, mode="bilinear"),
         nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True)),
        (nn.MaxPool2d(2), nn.MaxPool2d(2, return_indices=True)),
    ],
)  # fmt: skip
def test_digest_follows_arguments_that_are_not_shown(one: nn.Module, other: nn.Module) -> None:
    def digest(module: nn.Module) -> str:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 2, 3), module)
        return model_digest(net, split_levels(net, {"a": ["0"]}))

    assert repr(one) == repr(other)
    assert digest(one) == digest(copy.deepcopy(one)) != digest(other)


def test_digest_follows_private_attributes() -> None:
    def digest(factor: object) -> str:
        torch.manual_seed(0)
        net = nn.Sequential(Pooled(1.0, 0.0))
        net[0]._factor = factor
        return model_digest(net, split_levels(net, {"a": ["0"]}))

    factors = [1.0, 5.0, np.float32(5.0), torch.float32, range(3)]
    assert len({digest(factor) for factor in factors}) == len(factors)


class Node:
    """Knows all others, so that there are more ways through them than could be gone."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.others: list[Node] = []


def test_digest_tells_an_object_once_however_many_ways_lead_to_it() -> None:
    def digest(last: int) -> str:
        net = Pooled(1.0, 0.0)
        nn.init.zeros_(net.layer.weight)
        nn.init.zeros_(net.layer.bias)
        net.nodes = [Node(value) for value in (*range(11), last)]  # type: ignore[assignment]
        for node in net.nodes:  # type: ignore[union-attr]
            node.others = list(net.nodes)  # type: ignore[arg-type]
        return model_digest(net, split_levels(net, {"a": [""]}))

    assert digest(11) == digest(11) != digest(12)


def test_digest_follows_weights_structure_and_levels() -> None:
    levels = {"a": ["stem"], "b": ["head"]}

    def digest(net: nn.Module, levels: dict[str, list[str]] = levels) -> str:
        return model_digest(net, split_levels(net, levels))

    changed = model()
    with torch.no_grad():
        changed["head"].bias[0] += 1e-3  # type: ignore[index]
    other_code = model()
    other_code["act"] = nn.GELU()  # type: ignore[index]
    assert digest(model()) == digest(model())
    found = {
        digest(model()),
        digest(changed),
        digest(other_code),
        digest(model(), {"a": ["stem"], "c": ["head"]}),
        digest(model(), {"a": ["stem"], "b": ["mid", "head"]}),
    }
    assert len(found) == 5
