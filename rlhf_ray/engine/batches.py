"""Which examples the steps of a stage meet, and what the trained levels see of them."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.engine.segments import Values


def _as_they_are(values: Values) -> Values:
    return values


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Of a split, on the device.

    Attributes:
        values: of all examples.
        boundary: where they are: at or below the trained levels.
        targets: of all examples, their number first.
        select: (values, index) -> those of some examples, as copies.
        rest: what is left to run on a batch, up to the trained levels.
    """

    values: Values
    boundary: int
    targets: Tensor
    select: Callable[[Values, Tensor], Values]
    rest: Callable[[Values], Values] = _as_they_are

    def take(self, index: Tensor) -> Values:
        """What the trained levels are run on, of the examples that an index (n,) names."""
        return self.rest(self.select(self.values, index))


Step = Callable[[Examples, Tensor], Tensor]
"""(examples, index of a batch) -> its loss, detached; the weights have moved."""


def one_by_one(step: Step, examples: Examples, batches: Iterable[Tensor]) -> list[Tensor]:
    """Carries out steps on batches of examples; gives their losses."""
    return [step(examples, index) for index in batches]


def batch_order(
    n_train: int,
    steps: int | None,
    batch_size: int,
    generator: torch.Generator,
    *,
    device: torch.device | None = None,
) -> Iterator[Tensor]:
    """Indices of the examples of each step: permutations of the split, one after the other.

    Args:
        n_train: size of the split.
        steps: number of batches; None: the split once, the last batch possibly smaller; a single
            example that is left over joins the batch before: batch statistics need two.
        batch_size: B.
        generator: CPU generator.
        device: where the indices shall lie; None: on the CPU.

    Returns:
        An iterator over int64 tensors (B,).
    """
    n_drawn = n_train if steps is None else steps * batch_size
    rounds = [
        torch.randperm(n_train, generator=generator) for _ in range(math.ceil(n_drawn / n_train))
    ]
    # all at once: a transfer per step would hold every step up
    order = torch.cat(rounds)[:n_drawn].to(device)
    if batch_size < n_drawn and n_drawn % batch_size == 1:
        before_last = n_drawn // batch_size - 1
        return iter(order.split([batch_size] * before_last + [batch_size + 1]))
    return iter(order.split(batch_size))
