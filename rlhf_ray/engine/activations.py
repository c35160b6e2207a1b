"""Activations at level boundaries, kept while the levels below them do not change.

Bounded memory, least recently used first out. A worker that serves many stages of one task finds
the frozen prefix of most of them here.
"""

from collections import OrderedDict

from rlhf_ray.engine.allocation import in_own_block
from rlhf_ray.engine.segments import SegmentPlan, Values

Key = tuple[str, str, int, tuple[str, ...]]


class ActivationCache:
    """Boundary values by (task digest, split, boundary, versions of the levels below it).

    Args:
        max_bytes: bound on the tensors kept; 0 keeps nothing.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._kept: OrderedDict[Key, Values] = OrderedDict()
        self._n_bytes = 0

    @property
    def n_bytes(self) -> int:
        """Memory of what is kept."""
        return self._n_bytes

    def get(self, key: Key) -> Values | None:
        """What is kept under a key, now the most recently used; None if nothing is."""
        values = self._kept.get(key)
        if values is not None:
            self._kept.move_to_end(key)
        return values

    def put(self, key: Key, values: Values) -> None:
        """Keeps values, and drops the least recently used ones over the bound."""
        size = SegmentPlan.n_bytes(values)
        if size > self._max_bytes or key in self._kept:
            return
        self._kept[key] = {name: in_own_block(value) for name, value in values.items()}
        self._n_bytes += size
        while self._n_bytes > self._max_bytes:
            self._n_bytes -= SegmentPlan.n_bytes(self._kept.popitem(last=False)[1])

    def forget(self, version: str, above: int) -> None:
        """Drops the values of boundaries higher than `above` that depend on a version."""
        for key in [k for k in self._kept if k[2] > above and version in k[3]]:
            self._n_bytes -= SegmentPlan.n_bytes(self._kept.pop(key))
