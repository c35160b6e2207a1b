import torch

from rlhf_ray.errors import FailedStageError
from rlhf_ray.tree.stage_worker import is_full_device, is_lost_device


def wrapped(cause: Exception) -> FailedStageError:
    error = FailedStageError("the engine failed")
    error.__cause__ = cause
    return error


def test_a_failed_kernel_loses_the_device_and_too_little_memory_does_not() -> None:
    assert is_lost_device(wrapped(torch.AcceleratorError("device-side assert triggered")))
    for harmless in (torch.OutOfMemoryError("too little"), RuntimeError("shapes"), ValueError()):
        assert not is_lost_device(wrapped(harmless))
        assert not is_lost_device(harmless)


def test_a_full_device_is_told_apart_from_a_lost_one() -> None:
    full = wrapped(torch.OutOfMemoryError("out of memory"))
    assert is_full_device(full) and not is_lost_device(full)
    assert not is_full_device(wrapped(ValueError("x"))) and not is_full_device(None)
