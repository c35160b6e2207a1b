"""The tasks' splits on the device, bounded: those of the least recently used tasks leave first."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.digests import derive_seed
from rlhf_ray.engine.segments import SegmentPlan, Values
from rlhf_ray.tasks import Inputs, Task, map_inputs


@dataclass(frozen=True, kw_only=True, eq=False)
class SplitData:
    """One split of one task on the device: boundary-0 values and targets."""

    name: str
    values: Values
    targets: Tensor

    @functools.cached_property
    def targets_on_cpu(self) -> Tensor:
        """For metrics."""
        return self.targets.cpu()

    @property
    def n(self) -> int:
        """Number of examples."""
        return self.targets.shape[0]

    @property
    def n_bytes(self) -> int:
        """Memory that it takes; on a CPU some of it may be the task's own."""
        return SegmentPlan.n_bytes({"targets": self.targets, **self.values})


class Splits:
    """Splits by task and name. They are the same whenever they are placed anew.

    Args:
        place: brings inputs to the device, as the values at boundary 0.
        val_size: val examples that decisions use.
        max_bytes: bound on what is kept; the splits of the task at work always are.
    """

    def __init__(self, place: Callable[[Inputs], Values], *, val_size: int, max_bytes: int) -> None:
        self._place = place
        self._val_size = val_size
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[str, str], SplitData] = OrderedDict()

    @property
    def kept(self) -> tuple[SplitData, ...]:
        """What is on the device, the least recently used first."""
        return tuple(self._kept.values())

    def get(self, task: Task, split: str) -> SplitData:
        """One split of a task, which is now the one at work."""
        key = task.digest, split
        if key not in self._kept:
            self._kept[key] = self._placed(task, split)
            self._drop(at_work=task)
        self._kept.move_to_end(key)
        return self._kept[key]

    def clear(self) -> None:
        """Keeps nothing."""
        self._kept.clear()

    def _placed(self, task: Task, split: str) -> SplitData:
        x, y = task.split(split)
        if split == "val" and y.shape[0] > self._val_size:
            generator = torch.Generator().manual_seed(derive_seed("val", task.digest))
            chosen = torch.randperm(y.shape[0], generator=generator)[: self._val_size]
            x, y = map_inputs(lambda value: value[chosen], x), y[chosen]
        values = self._place(x)
        y = y.to(next(iter(values.values())).device)
        targets = y.long() if y.dtype == torch.uint8 else y
        return SplitData(name=split, values=values, targets=targets)

    def _drop(self, at_work: Task) -> None:
        n_bytes = sum(data.n_bytes for data in self._kept.values())
        for key in [key for key in self._kept if key[0] != at_work.digest]:
            if n_bytes <= self._max_bytes:
                return
            n_bytes -= self._kept.pop(key).n_bytes
