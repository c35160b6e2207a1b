"""Which operations a suite has what they need for (`operations.NEEDS`)."""

import functools
import itertools
from collections.abc import Sequence

from torch import nn

from rlhf_ray.engine.alignment import readable, weighted_modules
from rlhf_ray.engine.fitting import output_layer
from rlhf_ray.errors import InputError
from rlhf_ray.levels import split_levels
from rlhf_ray.operations import NEEDS, Operation
from rlhf_ray.tasks import Suite, call_model, first_two, looking, model_device


def what_there_is(suite: Suite) -> frozenset[str]:
    """Those of `NEEDS` that a suite has. Its model is left as it was."""
    split = split_levels(suite.model, suite.levels)
    found = set()
    if suite.source is not None and weighted_modules(suite.model, split, range(split.n_levels)):
        found.add("source")
    device = model_device(suite.model)
    x, y = suite.train_tasks[0].train
    with looking(suite.model):
        outputs = call_model(suite.model, first_two(x, device))
        if readable(outputs, first_two(y, device)):
            found.add("readable targets")
        if output_layer(suite.model, split, first_two(x, device)) is not None:
            found.add("output layer")
    return frozenset(found)


def against_the_flow(suite: Suite) -> str:
    """A line about a level that runs after the next one; "" where they run in their order."""
    model, split = suite.model, split_levels(suite.model, suite.levels)
    called: list[int] = []

    def note(module: nn.Module, inputs: object, level: int) -> None:
        called.append(level)

    handles = [
        module.register_forward_pre_hook(functools.partial(note, level=level))
        for name, module in model.named_modules()
        if (level := split.level_of(name)) is not None
    ]
    x = suite.train_tasks[0].train[0]
    try:
        with looking(model):
            call_model(model, first_two(x, model_device(model)))
    finally:
        for handle in handles:
            handle.remove()
    order = list(dict.fromkeys(called))
    for early, late in itertools.pairwise(order):
        if early > late:
            return (
                f"levels should be listed from the input on: {split.names[early]!r} runs before "
                f"{split.names[late]!r}, so that less can be kept between stages"
            )
    return ""


def in_no_level(suite: Suite) -> str:
    """A line about parameters in no level, which stay as they are; "" if there are none."""
    names = split_levels(suite.model, suite.levels).unassigned
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"parameters in no level are never trained: {len(names)} ({shown})"


def supported(
    suite: Suite, operations: Sequence[Operation], *, asked: Sequence[str] = ()
) -> tuple[tuple[Operation, ...], list[str]]:
    """The operations that a suite has what they need for, and lines about the others.

    Of an operation that consists of several those stand in that are possible.

    Args:
        suite: whose model is to be tuned.
        operations: all that there might be.
        asked: names of those that the user wants: they must be possible.

    Raises:
        InputError: one that is wanted is not.
    """
    there = what_there_is(suite)
    kept, left_out = [], []
    for operation in operations:
        missing = [need for need in dict.fromkeys(operation.needs) if need not in there]
        if not missing:
            kept.append(operation)
            continue
        parts = [part for part in operation.parts if set(part.needs) <= there]
        reason = f"{operation.name} needs {' and '.join(NEEDS[need] for need in missing)}"
        if operation.name in asked:
            raise InputError(
                f"operations must be possible on the suite, got {operation.name!r} for "
                f"{suite.name!r}: {reason}. Leave it out."
            )
        kept += parts
        kinds = " and ".join(type(part).__name__.lower() for part in parts)
        instead = f"only the {kinds} of {operation.name}" if parts else f"without {operation.name}"
        left_out.append(f"{instead}: {reason}")
    return tuple(kept), left_out
