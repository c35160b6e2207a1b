import itertools
import types
from collections import deque
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from rlhf_ray.engine.watching import Memory


def scaling() -> Callable[[float], float]:
    factor = 1.0

    def scaled(value: float) -> float:
        nonlocal factor
        factor += 1.0
        return factor * value

    return scaled


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.register_buffer("met", torch.zeros(2))
        self.calls, self.items, self.named = 0, [1, [2]], {"a": (3, 4)}
        self.seen = torch.zeros(2)
        self.helper = types.SimpleNamespace(calls=0, myself=self)
        self.last, self.table, self.place = deque([1], maxlen=2), np.zeros(3), torch.device("cpu")
        self.scaled = scaling()
        self.words = {str(i): i for i in range(5000)}


CHANGES: dict[str, Callable[[Holding], object]] = {
    "number": lambda m: setattr(m, "calls", 1),
    "item": lambda m: m.items[1].append(3),
    "entry": lambda m: m.named.update(a=(3, 5)),
    "in place": lambda m: m.seen.add_(1),
    "another tensor": lambda m: setattr(m, "seen", torch.zeros(2)),
    "moved weight": lambda m: setattr(m.inner.weight, "data", torch.zeros(2, 2)),
    "another buffer": lambda m: setattr(m, "met", torch.zeros(2)),
    "another module": lambda m: setattr(m, "inner", nn.Linear(2, 2)),
    "helper": lambda m: setattr(m.helper, "calls", 1),
    "new attribute": lambda m: setattr(m, "late", None),
    "hook": lambda m: m.inner.register_forward_hook(lambda *_: None),
    "mode": lambda m: m.inner.eval(),
    "closure": lambda m: m.scaled(1.0),
    "queue": lambda m: m.last.append(2),
    "array": lambda m: m.table.fill(1.0),
    "more words": lambda m: m.words.update(more=1),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_modules_hold_is_seen_to_change(change: str) -> None:
    model = Holding()
    memory = Memory([*model.modules()])
    with torch.no_grad():  # as steps do
        model.inner.weight.add_(1.0)
        model.met.add_(1.0)
    model.place, model.calls = torch.device("cpu"), int("0")  # the same anew
    assert not memory.changed()
    CHANGES[change](model)
    assert memory.changed()


@pytest.mark.parametrize(
    "make",
    [
        lambda: torchvision.models.resnet18(num_classes=3),
        lambda: nn.LSTM(4, 4, 2, dropout=0.1),
        lambda: nn.Transformer(8, 2, 1, 1, 8),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)),
    ],
    ids=["resnet18", "lstm", "transformer", "weight_norm", "spectral_norm"],
)
def test_a_pass_changes_nothing_that_torchs_modules_hold(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    inputs = {
        nn.LSTM: (torch.randn(3, 2, 4),),
        nn.Transformer: (torch.randn(3, 2, 8), torch.randn(3, 2, 8)),
        torchvision.models.ResNet: (torch.randn(2, 3, 32, 32),),
    }.get(type(model), (torch.randn(3, 2),))
    memory = Memory([*model.modules()])
    for training in (True, False):
        output = model.train(training)(*inputs)
        (output[0] if isinstance(output, tuple) else output).sum().backward()
    assert not memory.changed()


def test_what_is_held_twice_or_odd_is_told() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise TypeError

        def __bool__(self) -> bool:
            raise TypeError

        def __getattr__(self, name: str) -> object:
            raise RuntimeError(name)

    model = nn.Identity()
    model.first = model.second = Odd()
    model.items = [model.first, {1: model.second}]
    model.items.append(model.items)
    memory = Memory([model])
    assert not memory.changed()
    model.second = Odd()
    assert memory.changed()


class Unspeakable:
    __slots__ = ()

    def __getattr__(self, name: str) -> object:
        raise RuntimeError(name)


@pytest.mark.parametrize(
    "value",
    [Unspeakable(), itertools.count(), np.random.default_rng()],
    ids=["unspeakable", "iterator", "generator"],
)
def test_what_cannot_be_told_counts_as_changed(value: object) -> None:
    model = nn.Identity()
    model.value = value
    assert Memory([model]).changed()
