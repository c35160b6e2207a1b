import pytest
import torch
from torch import nn

from rlhf_ray.engine import recurrent
from rlhf_ray.engine.recurrent import differentiable_recurrence


def layers() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({
        "frozen": nn.LSTM(4, 6, num_layers=2, dropout=0.5).eval(),
        "trained": nn.GRU(4, 6, num_layers=2, dropout=0.5),
    })  # fmt: skip


def test_frozen_layers_compute_what_they_do_in_eval_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent, "_runs_on_cudnn", lambda module: True)
    model, x = layers(), torch.randn(5, 3, 4)
    expected = model["frozen"](x)[0]
    with differentiable_recurrence(model):
        assert model["frozen"].training
        torch.testing.assert_close(model["frozen"](x)[0], expected)
        assert model["trained"].dropout == 0.5  # trained ones keep theirs
    assert not model["frozen"].training
    assert model["frozen"].dropout == 0.5


def test_layers_elsewhere_are_left_alone() -> None:
    model = layers()
    with differentiable_recurrence(model):
        assert not model["frozen"].training
