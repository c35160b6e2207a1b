import torch

from rlhf_ray.errors import FailedStageError
from rlhf_ray.tree.stage_worker import is_lost_device


def test_a_failed_kernel_loses_the_device_and_too_little_memory_does_not() -> None:
    def wrapped(cause: Exception) -> FailedStageError:
        error = FailedStageError("the engine failed")
        error.__cause__ = cause
        return error

    assert is_lost_device(wrapped(torch.AcceleratorError("device-side assert triggered")))
    for harmless in (torch.OutOfMemoryError("too little"), RuntimeError("shapes"), ValueError()):
        assert not is_lost_device(wrapped(harmless))
        assert not is_lost_device(harmless)
