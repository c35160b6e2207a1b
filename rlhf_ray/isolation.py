"""Runs a user's code apart: random state, torch's modes and buffers are put back afterwards."""

import contextlib
import random
from collections.abc import Container, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from rlhf_ray.errors import InputError


@contextlib.contextmanager
def apart(device: torch.device) -> Iterator[None]:
    """Gradients on, autocast off, whatever the caller's modes; their random state stays as it was.

    Args:
        device: whose random state is put back, next to torch's on the CPU, NumPy's and Python's.
    """
    python, with_numpy = random.getstate(), np.random.get_state(legacy=False)
    with (
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
    ):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(with_numpy)


@contextlib.contextmanager
def beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Work on a stream of its own: after all that was asked for before, before what follows.

    Args:
        stream: None: where there are no streams.
    """
    if stream is None:
        yield
        return
    around = torch.cuda.current_stream()
    stream.wait_stream(around)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        around.wait_stream(stream)


def seed_all(seed: int, device: torch.device) -> None:
    """Seeds what modules may draw from: torch on the CPU and on a device, NumPy and Python."""
    # not torch.manual_seed: it notes a traceback for every kind of device that is not there
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextlib.contextmanager
def restored_buffers(model: nn.Module, kept: Container[str] = ()) -> Iterator[None]:
    """Undoes what forward passes do to a model's buffers, in place or by putting others there.

    Args:
        model: whose buffers are the same tensors afterwards.
        kept: full names of buffers that keep their new values.

    Raises:
        InputError: one that is to keep its new value has another shape.
    """
    held = [
        (module, leaf, f"{name}.{leaf}".lstrip("."), value, value.clone())
        for name, module in model.named_modules()
        for leaf, value in module._buffers.items()
        if value is not None
    ]
    reshaped: list[str] = []
    try:
        yield
    finally:
        for module, leaf, name, value, copy in held:
            found = module._buffers.get(leaf)
            if name not in kept:  # batch norm moves its buffers without a new version of theirs
                value.detach().copy_(copy)
            elif found is not value and not _take_over(value, found):
                reshaped.append(name)
            module._buffers[leaf] = value
    if reshaped:
        raise InputError(f"a buffer must keep its shape, got another one for {reshaped[0]!r}. "
                         "Register it with persistent=False.")  # fmt: skip


def _take_over(value: Tensor, found: Tensor | None) -> bool:
    if found is None or found.shape != value.shape:
        return False
    value.detach().copy_(found.detach())
    return True
