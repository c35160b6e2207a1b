"""Memory on the CPU: what is freed stays in the process, what is kept for long lies apart.

A third of a stage's time goes to page faults where it does not stay.

Every training step frees its activations and asks for the same again. glibc gives blocks of more
than 128 kB back to the system at once, and the next step pays for each page anew: on the built-in
suites' CNN 2,700 page faults per step of 32 images, and 1.5 times the processor time without them
(1.8 times in forward passes).

A block that is kept for long among those that come and go splits the heap: what lies free around it
serves smaller requests only. Caches of 3 GiB had grown a worker to 7.3 GiB.
"""

import ctypes
import mmap
from collections.abc import Hashable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

Name = TypeVar("Name", bound=Hashable)

# From glibc's malloc.h, with values in bytes.
_SETTINGS = {
    -1: 256 << 20,  # M_TRIM_THRESHOLD: so much may lie free before any is given back
    -2: 64 << 20,  # M_TOP_PAD: how much to ask for at a time
    -3: 32 << 20,  # M_MMAP_THRESHOLD: larger blocks still go back at once; more is not allowed
}


def keep_freed_memory() -> bool:
    """Has the C library keep up to 256 MB of freed memory, for the whole process and for good.

    For processes of our own; a user's process is left alone. Settings in the environment
    (`MALLOC_TRIM_THRESHOLD_` and its like) are overridden.

    Returns:
        Whether the C library took the settings: glibc does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; another system
        return False
    return all([bool(mallopt(name, value)) for name, value in _SETTINGS.items()])


OWN_BLOCK_BYTES = 1 << 20
"""Smaller tensors stay where they are: a block of its own is a number of whole pages."""


def in_own_block(tensor: Tensor) -> Tensor:
    """A tensor to keep: no part of a larger one, and on the CPU outside the C library's heap.

    Its memory goes back to the system when it is dropped.

    Args:
        tensor: any; one that is small, or not on the CPU, is copied only where it is a view of a
            larger one, which would live as long.

    Returns:
        The same values, shape and (if the tensor is dense) strides, without gradient.
    """
    n_bytes = tensor.numel() * tensor.element_size()
    if tensor.device.type != "cpu" or n_bytes < OWN_BLOCK_BYTES:
        part = tensor.untyped_storage().nbytes() > n_bytes
        return tensor.detach().clone() if part else tensor
    strides = torch.empty_like(tensor, device="meta").stride()
    block = torch.frombuffer(mmap.mmap(-1, n_bytes), dtype=tensor.dtype)
    return block.as_strided(tensor.shape, strides).copy_(tensor.detach())


TOGETHER_BYTES = 1 << 16
"""Tensors up to here leave a GPU together: a transfer takes longer than what it carries."""


def to_keep(values: Mapping[Name, Tensor]) -> dict[Name, Tensor]:
    """Copies on the CPU, each with memory of its own.

    A GPU puts them in the order of a file first, which takes a CPU long.
    """
    kept: dict[Name, Tensor] = {}
    small: dict[torch.dtype, dict[Name, Tensor]] = {}
    for name, value in values.items():
        if not value.is_cuda:
            kept[name] = value.detach().to("cpu", copy=True)
        elif value.numel() * value.element_size() > TOGETHER_BYTES:
            kept[name] = value.detach().contiguous().cpu()
        else:
            small.setdefault(value.dtype, {})[name] = value.detach()
    for alike in small.values():
        together = torch.cat([value.flatten() for value in alike.values()]).cpu()
        parts = together.split([value.numel() for value in alike.values()])
        for (name, value), part in zip(alike.items(), parts, strict=True):
            kept[name] = part.view(value.shape).clone()
    return {name: kept[name] for name in values}
