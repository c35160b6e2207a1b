"""Gradients through recurrent layers that are frozen."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def differentiable_recurrence(model: nn.Module) -> Iterator[None]:
    """Lets gradients pass through recurrent layers that are in eval mode.

    cuDNN refuses the backward pass of an LSTM, GRU or RNN in eval mode. In train mode without the
    dropout between its layers it computes the same, and passes gradients on.
    """
    frozen = {
        module: module.dropout
        for module in model.modules()
        if isinstance(module, nn.RNNBase) and not module.training and _runs_on_cudnn(module)
    }
    for module in frozen:
        module.training, module.dropout = True, 0.0
    try:
        yield
    finally:
        for module, dropout in frozen.items():
            module.training, module.dropout = False, dropout


def _runs_on_cudnn(module: nn.RNNBase) -> bool:
    return all(parameter.is_cuda for parameter in module.parameters())
