"""A model as a chain of segments, one per level, so that what lies below a level can be kept.

`plan_segments` finds out how a model can be cut (`tracing`, else `replay`) and at which boundaries
the values can be relied on: each is run and compared with the plain model before it counts as
usable. Training along a plan is `stage_session`'s business, evaluating `loaded_model`'s.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from rlhf_ray.engine.boundaries import (
    Boundary,
    Packing,
    UncacheableError,
    Values,
    agree,
    observe,
    select,
)
from rlhf_ray.engine.recurrent import differentiable_recurrence
from rlhf_ray.engine.replay import Call, Replay
from rlhf_ray.engine.tracing import Traced
from rlhf_ray.errors import InputError
from rlhf_ray.isolation import apart, restored_buffers
from rlhf_ray.levels import LevelSplit
from rlhf_ray.tasks import Inputs, input_tensors, map_inputs, model_device, n_examples

_MANY, _FEW = 4, 2
"""Batch sizes at which a plan is made: what changes with them is a batch dimension."""


class _Mechanism(Protocol):
    """How objects at one boundary become those at another."""

    name: str

    def blocked(self, boundary: int) -> str: ...

    def objects(self, boundary: int) -> list[tuple[str, bool]]: ...

    def run(self, things: Sequence[Any], start: int, stop: int) -> Any: ...


@final
class SegmentPlan:
    """A live model cut at its levels. Boundary b holds the values that flow into segment b.

    Holds no weights: modules are called with the weights and training flags they have at the time.
    Code outside the levels runs in eval mode. Values at boundary b depend on the levels below b
    alone; they can be kept while those do not change.

    Attributes:
        n_levels: L.
        mechanism: "fx", "replay", or "none" if only boundary 0 can be used.
        reason: why some boundary cannot be cached; "" if all can.
        usable: per boundary 0 ... L - 1; the first is always usable.
    """

    def __init__(
        self,
        *,
        call: Call,
        mechanism: _Mechanism | None,
        boundaries: Sequence[Boundary | None],
        clobbered: Sequence[frozenset[str]],
        shapes: dict[str, torch.Size],
        attention: bool,
        reason: str = "",
    ) -> None:
        self.n_levels = len(boundaries)
        self.usable = tuple(boundary is not None for boundary in boundaries)
        self.mechanism = mechanism.name if mechanism and any(self.usable[1:]) else "none"
        self.reason = reason
        self._call = call
        self._run = mechanism.run if mechanism else None
        self._boundaries = tuple(boundaries)
        self._clobbered = tuple(clobbered)
        self._shapes = shapes
        self._baked = any(boundary is not None and boundary.baked for boundary in boundaries)
        self._context = no_fast_path if attention else contextlib.nullcontext

    def nearest(self, boundary: int) -> int:
        """The largest usable boundary that is not above `boundary`."""
        return max(b for b in range(boundary + 1) if self.usable[b])

    def start(self, inputs: Inputs) -> Values:
        """The values at boundary 0: the inputs by name.

        Raises:
            InputError: the inputs have other shapes than the plan's example, and the plan holds
                numbers that stand for them.
        """
        values = dict(input_tensors(inputs))
        if self._baked:
            for name, value in values.items():
                if value.shape[1:] != self._shapes[name]:
                    raise InputError(
                        f"inputs must have the shape that the plan was made for, got {name} with "
                        f"{tuple(value.shape[1:])} per example. Make a plan for it "
                        f"(here: {tuple(self._shapes[name])})."
                    )
        return values

    def forward(self, values: Values, start: int, stop: int) -> Values:
        """From the values at boundary `start` to those at `stop` < L; both must be usable."""
        if start == stop:
            return values
        with self._context():
            assert self._run is not None
            things = self._run(self._things(values, start), start, stop)
        return self._boundary(stop).pack(things)

    def output(self, values: Values, start: int) -> Tensor:
        """From the values at boundary `start` to the model's output."""
        things = self._things(values, start)
        with self._context():
            if start == 0:
                return self._call(things)
            assert self._run is not None
            return self._run(things, start, self.n_levels)

    def take(self, values: Values, index: Tensor, boundary: int) -> Values:
        """The examples that an index (n, int64, on the values' device) names, as copies.

        Memory formats are kept, channels-last with one channel included.
        """
        return {
            name: values[name].clone() if dim is None else select(values[name], dim, index)
            for name, dim in self._boundary(boundary).dims.items()
        }

    def join(self, parts: Sequence[Values], boundary: int) -> Values:
        """The values of several batches as those of one."""
        if len(parts) == 1:
            return parts[0]
        return {
            name: parts[0][name] if dim is None else torch.cat([part[name] for part in parts], dim)
            for name, dim in self._boundary(boundary).dims.items()
        }

    @staticmethod
    def n_bytes(values: Values) -> int:
        """Memory that the values take."""
        return sum(value.numel() * value.element_size() for value in values.values())

    def _boundary(self, boundary: int) -> Boundary:
        found = self._boundaries[boundary]
        if found is None:
            raise InputError(f"boundary must be usable, got boundary={boundary}. {self.reason}")
        return found

    def _things(self, values: Values, start: int) -> list[Any]:
        clobbered = self._clobbered[start]
        if clobbered:  # in-place operations of the model would write into what is kept
            values = {n: v.clone() if n in clobbered else v for n, v in values.items()}
        return self._boundary(start).unpack(values)


def plan_segments(model: nn.Module, split: LevelSplit, example: Inputs) -> SegmentPlan:
    """Cuts a model at its levels and checks every boundary on an example.

    A boundary is usable if, in eval mode, running on from its values gives the plain model's
    output, twice the same, and every example's values do not depend on its neighbours.

    Args:
        model: any module; weights, buffers, training flags, hooks are left as they were.
        split: its levels.
        example: inputs of one or more examples, better 4 different ones; on the model's device.

    Returns:
        The plan. Boundary 0, the plain run, can always be used.
    """
    index = torch.arange(_MANY) % n_examples(example)
    many = map_inputs(lambda value: value[index.to(value.device)], example)
    call = _caller(model, example)
    with _undisturbed(model), differentiable_recurrence(model), torch.no_grad():
        best = plain = _plain_plan(model, split, many, call)
        reasons: dict[str, None] = {}
        builders: tuple[Callable[[], _Mechanism], ...] = (
            lambda: Traced(model, split, many),
            lambda: Replay(model, split, call, list(input_tensors(many).values())),
        )
        for build in builders:
            if all(best.usable):
                break
            try:
                with plain._context():
                    mechanism = build()
            except Exception as error:  # whatever the model's code raises
                _pass_on_a_full_device(error)
                reasons[_reason(error)] = None
                continue
            plan = _checked_plan(plain, mechanism, split, many)
            if sum(plan.usable) > sum(best.usable):
                best = plan
            reasons[plan.reason] = None
        if not any(best.usable[1:]) and split.n_levels > 1:
            best.reason = "; ".join(reasons)
        return best


def _pass_on_a_full_device(error: Exception) -> None:
    """A device that is full, or lost, says nothing about the model."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError):
        raise error


def _reason(error: Exception) -> str:
    text = (str(error).splitlines() or [""])[0]
    return text if isinstance(error, UncacheableError) else f"{type(error).__name__}: {text}"


def _plain_plan(model: nn.Module, split: LevelSplit, many: Inputs, call: Call) -> SegmentPlan:
    values = input_tensors(many)
    kinds = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
    inputs = Boundary(tuple(_input_packing(name) for name in values))

    def made(written: frozenset[str]) -> SegmentPlan:
        return SegmentPlan(
            call=call,
            mechanism=None,
            boundaries=[inputs] + [None] * (split.n_levels - 1),
            clobbered=[written] + [frozenset[str]()] * (split.n_levels - 1),
            shapes={name: value.shape[1:] for name, value in values.items()},
            attention=any(isinstance(module, kinds) for module in model.modules()),
        )

    return made(_written(made(frozenset()), values, 0))


def _input_packing(name: str) -> Packing:
    # any tensors whose first dimension is the batch teach it what an input is
    many = torch.arange(_MANY)
    return observe(name, many, many[:_FEW], many[-_FEW:], (_MANY, _FEW), blank=False)


def _checked_plan(
    plain: SegmentPlan, mechanism: _Mechanism, split: LevelSplit, many: Inputs
) -> SegmentPlan:
    """The plan of a mechanism, with the boundaries that stand the test."""
    plan = plain
    reasons: dict[str, list[str]] = {}
    for boundary in range(1, split.n_levels):
        try:
            if why := mechanism.blocked(boundary):
                raise UncacheableError(why)
            plan = _with_boundary(plan, mechanism, boundary, many)
        except Exception as error:  # whatever the model's code raises when cut here
            _pass_on_a_full_device(error)
            reasons.setdefault(_reason(error), []).append(split.names[boundary])
    plan.reason = "; ".join(
        f"below {', '.join(names)} nothing can be cached: {why}" for why, names in reasons.items()
    )
    return plan


def _with_boundary(
    plan: SegmentPlan, mechanism: _Mechanism, boundary: int, many: Inputs
) -> SegmentPlan:
    """The plan with one boundary more.

    Raises:
        UncacheableError: the boundary does not stand the test.
    """

    def run(inputs: Inputs) -> list[Any]:
        # copies: the model may write into its inputs
        values = [value.clone() for value in input_tensors(inputs).values()]
        with plan._context():
            return mechanism.run(values, 0, boundary)

    things = run(many)
    few, last = (
        run(map_inputs(lambda value: value[part], many))  # noqa: B023 called at once
        for part in (slice(0, _FEW), slice(_MANY - _FEW, _MANY))
    )
    objects = zip(mechanism.objects(boundary), things, few, last, strict=True)
    packings = tuple(
        observe(name, one, one_few, one_last, (_MANY, _FEW), blank=blank)
        for (name, blank), one, one_few, one_last in objects
    )
    names = [name for packing in packings for name in packing.names]
    if len(set(names)) != len(names):
        raise UncacheableError("two values have one name")
    longer = _extended(plan, mechanism, boundary, Boundary(packings), frozenset())
    values = longer.forward(longer.start(many), 0, boundary)
    written = _written(longer, values, boundary)
    longer = _extended(plan, mechanism, boundary, Boundary(packings), written)
    _check(longer, boundary, many)
    return longer


def _extended(
    plan: SegmentPlan,
    mechanism: _Mechanism,
    boundary: int,
    found: Boundary,
    written: frozenset[str],
) -> SegmentPlan:
    boundaries, clobbered = list(plan._boundaries), list(plan._clobbered)
    boundaries[boundary], clobbered[boundary] = found, written
    return SegmentPlan(
        call=plan._call,
        mechanism=mechanism,
        boundaries=boundaries,
        clobbered=clobbered,
        shapes=plan._shapes,
        attention=plan._context is no_fast_path,
    )


def _written(plan: SegmentPlan, values: Values, boundary: int) -> frozenset[str]:
    """Names of the values that running on from a boundary writes into."""
    copies = {name: value.clone() for name, value in values.items()}
    versions = {name: value._version for name, value in copies.items()}
    plan.output(copies, boundary)
    return frozenset(name for name, value in copies.items() if value._version != versions[name])


def _check(plan: SegmentPlan, boundary: int, many: Inputs) -> None:
    """Compares runs through a boundary with the plain model, and with runs in smaller steps."""
    plain = plan.output(plan.start(many), 0)
    values = plan.forward(plan.start(many), 0, boundary)
    for _ in range(2):
        if not _agree(plan.output(values, boundary), plain):
            raise UncacheableError("running on from there differs from the plain model")
    again = plan.forward(plan.start(many), 0, boundary)
    before = plan.nearest(boundary - 1)
    steps = plan.forward(plan.forward(plan.start(many), 0, before), before, boundary)
    for name, value in values.items():
        if not (agree(value, again[name]) and agree(value, steps[name])):
            raise UncacheableError(f"{name} differs from run to run")


def _agree(a: Any, b: Any) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
        raise UncacheableError("the model's output is no tensor")
    return agree(a, b)


def _caller(model: nn.Module, example: Inputs) -> Call:
    """Calls the model with input tensors in order, in the example's form."""
    if isinstance(example, Tensor):
        return lambda values: model(values[0])
    if isinstance(example, tuple):
        return lambda values: model(*values)
    names = tuple(example)
    return lambda values: model(**dict(zip(names, values, strict=True)))


@contextlib.contextmanager
def no_fast_path() -> Iterator[None]:
    """Switches the fused inference path of `nn.TransformerEncoder` off.

    It gives zeros at padded places where the training path gives something else, so that values
    kept in eval mode would not be those that a training step meets; and its FLOPs go uncounted.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode and full precision inside; what runs there changes, and TF32, is put back.

    A GPU may answer a batch in TF32 and a smaller one exactly: as far apart as a model that mixes
    the examples of a batch.
    """
    training = [module for module in model.modules() if module.training]
    cudnn, cublas = torch._C._get_cudnn_allow_tf32(), torch._C._get_cublas_allow_tf32()
    with apart(model_device(model)), restored_buffers(model):
        for module in training:
            module.training = False
        torch._C._set_cudnn_allow_tf32(False)
        torch._C._set_cublas_allow_tf32(False)
        try:
            yield
        finally:
            torch._C._set_cudnn_allow_tf32(cudnn)
            torch._C._set_cublas_allow_tf32(cublas)
            for module in training:
                module.training = True
