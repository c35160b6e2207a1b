"""A CUDA device for machines without one: its tensors lie on the CPU, but may not meet the CPU's.

All memory is marked with the device that Python code put it on. Operations run on the CPU, backward
passes included. What a GPU refuses is refused: operations on tensors of two devices, NumPy on a
tensor that is not on the CPU, recurrent layers in eval mode that gradients shall pass, and waits
where `torch.cuda.set_sync_debug_mode` forbids them, or while a graph is captured. A graph carries
out the operations that were met, on the memory that they were met with. Not simulated: kernels,
their rounding, streams, random states of the device, more than one thread. Autocast is that of
CPUs.

    pytest --simulated-cuda tests/engine
"""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
_INTO_THE_FIRST = {"aten::copy_", "aten::index", "aten::index_put_", "aten::_index_put_impl_"}
"""They take values or indices of another device, and answer where the first tensor is."""
_RECURRENT = {getattr(torch, name) for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}


class Device:
    """What lies on the device, and whether it may be waited for."""

    def __init__(self) -> None:
        self.sync_mode = 0
        self.n_transfers = 0
        self.capturing: Graph | None = None
        self._marks: dict[int, tuple[StorageWeakRef, torch.device, int]] = {}

    def of(self, value: Tensor) -> torch.device | None:
        """Where a tensor lies; None: C++ code made it, for whatever it was needed."""
        found = self._marks.get(value.untyped_storage()._cdata) if _has_memory(value) else None
        return found[1] if found and not found[0].expired() else None

    def mark(self, value: Any, device: torch.device) -> None:
        """Says where the tensors among some values lie."""
        for tensor in _tensors(value):
            if _has_memory(tensor):
                storage = tensor.untyped_storage()
                # the reference keeps the address from being given to another storage
                self._marks[storage._cdata] = StorageWeakRef(storage), device, storage.nbytes()
        if len(self._marks) > 10_000:
            self._marks = {at: mark for at, mark in self._marks.items() if not mark[0].expired()}

    def allocated(self, device: object = None) -> int:
        """Bytes on the device."""
        marks = self._marks.values()
        return sum(n for storage, where, n in marks if where == CUDA and not storage.expired())

    def wait(self, why: str) -> None:
        """Something waits for the device."""
        if self.capturing is not None or self.sync_mode == 2:
            raise RuntimeError(f"called a synchronizing CUDA operation: {why}")
        if self.sync_mode == 1:
            warnings.warn(f"called a synchronizing CUDA operation: {why}", stacklevel=2)

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.sync_mode = {"default": 0, "warn": 1, "error": 2}.get(mode, mode)


class Graph:
    """What was met during a capture: operations, and the memory that they write into.

    Memory that was asked for during the capture is the graph's own; what else it reads or writes on
    the device must be held by somebody else.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._met: list[tuple[Any, Any, Any, dict[int, Tensor], bool]] = []
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: dict[int, Tensor] = {}

    def note_writes(self, func: Any, args: Any, kwargs: Any) -> None:
        """Keeps what an operation is about to write into: a capture carries nothing out."""
        for i, argument in enumerate(func._schema.arguments):
            says_so = argument.alias_info is not None and argument.alias_info.is_write
            if says_so or argument.name.startswith("running_"):  # batch norm's schema does not
                named = (kwargs or {}).get(argument.name)
                for tensor in _tensors(args[i] if i < len(args) else named):
                    at = tensor.untyped_storage()._cdata
                    whole = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())
                    self._before.setdefault(at, (whole, whole.clone()))

    def note(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        """Keeps an operation, and those of its results whose memory is new."""
        known = {value.untyped_storage()._cdata for value in _tensors(args, kwargs)}
        results = enumerate(_tensors(result))
        new = {i: v for i, v in results if v.untyped_storage()._cdata not in known}
        self._own.update({value.untyped_storage()._cdata: value for value in new.values()})
        args, kwargs = pytree.tree_map_only(Tensor, self._lent, (args, kwargs or {}))
        self._met.append((func, args, kwargs, new, torch.is_grad_enabled()))

    def _lent(self, value: Tensor) -> "Tensor | Lent":
        inside = not _has_memory(value) or value.untyped_storage()._cdata in self._own
        return value if inside or self._device.of(value) != CUDA else Lent(value)

    def end(self) -> None:
        """Puts back what was written."""
        for whole, before in self._before.values():
            whole.copy_(before)
        self._before.clear()

    def replay(self) -> None:
        """Carries the operations out again."""
        with torch._C._AutoDispatchBelowAutograd():
            for func, lent_args, lent_kwargs, new, with_gradients in self._met:
                args, kwargs = pytree.tree_map_only(Lent, Lent.tensor, (lent_args, lent_kwargs))
                with torch.set_grad_enabled(with_gradients):  # some give more with them
                    found = _tensors(func(*args, **kwargs))
                for i, place in new.items():
                    place.copy_(found[i])


class Lent:
    """A tensor whose memory is not held."""

    def __init__(self, value: Tensor) -> None:
        self._storage = StorageWeakRef(value.untyped_storage())
        self._like = value.dtype, value.storage_offset(), value.size(), value.stride()

    def tensor(self) -> Tensor:
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        if storage is None:
            raise AssertionError("a graph must read memory that is held, got some that was freed.")
        dtype, *where = self._like
        return torch.empty(0, dtype=dtype).set_(storage, *where)


class Stream:
    """Does everything at once."""

    def wait_stream(self, other: Any) -> None:
        """There is nothing to wait for."""


def _has_memory(value: Tensor) -> bool:
    return value.layout is torch.strided and not value.is_meta


def _tensors(*values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


class _Operations(TorchDispatchMode):
    """Holds every operation to one device, where its results then lie."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        tensors, name = _tensors(args, kwargs), func._schema.name
        places = [self._device.of(value) for value in tensors]
        # a number on the CPU goes with everything
        found = {place for value, place in zip(tensors, places, strict=True) if value.dim()}
        found = found - {None} or set(places) - {None}
        if name in _INTO_THE_FIRST:
            if any(value.dtype in (torch.bool, torch.uint8) for value in tensors[1:]):
                self._device.wait(name)
            if len(found) > 1:
                self._device.wait(name)
            found = {places[0]} if places[0] else found
        if len(found) > 1:
            shapes = [(tuple(v.shape), str(p)) for v, p in zip(tensors, places, strict=True)]
            raise RuntimeError(f"Expected all tensors to be on the same device: {name} of {shapes}")
        if CUDA in found and name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal"):
            self._device.wait(name)
        graph = self._device.capturing if CUDA in found else None
        if graph is not None:
            graph.note_writes(func, args, kwargs)
        result = func(*args, **(kwargs or {}))
        if graph is not None:
            graph.note(func, args, kwargs, result)
        new = [value for value in _tensors(result) if self._device.of(value) is None]
        for place in found:
            self._device.mark(new, place)
        return result


class _Calls(TorchFunctionMode):
    """Tells Python code where tensors lie, and moves them."""

    def __init__(self, device: Device) -> None:
        super().__init__()
        self._device = device

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        attribute = getattr(func, "__self__", None)  # of a getter
        if attribute in (Tensor.device, Tensor.is_cuda, Tensor.is_cpu):
            return self._asked(attribute, args[0], func(*args))
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, *args, **kwargs)
        if func in (Tensor.numpy, Tensor.__array__) and self._device.of(args[0]) == CUDA:
            raise TypeError("can't convert a cuda:0 tensor to numpy. Use Tensor.cpu() first.")
        if func in _RECURRENT:
            self._check_recurrent(args)
        device = torch.device(kwargs.get("device") or CPU)
        if device.type == "cuda":
            kwargs["device"] = CPU
        result = func(*args, **kwargs)
        if device.type == "cuda" or not _tensors(args, kwargs):
            self._device.mark(result, CUDA if device.type == "cuda" else CPU)
        if device.type == "cuda" and self._device.capturing is not None:
            self._device.capturing.note(func, args, kwargs, result)
        return result

    def _asked(self, attribute: Any, value: Tensor, plain: Any) -> Any:
        if value.is_meta:
            return plain
        device = self._device.of(value) or CPU
        return device if attribute is Tensor.device else (device == CUDA) == (
            attribute is Tensor.is_cuda
        )  # fmt: skip

    def _moved(self, func: Any, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Moves a tensor in a step of its own; what else `to` does follows."""
        places = {"cpu": CPU, "cuda": CUDA}
        target: Any = {Tensor.cpu: CPU, Tensor.cuda: CUDA}.get(func, kwargs.pop("device", None))
        rest = []
        for argument in args:
            if isinstance(argument, Tensor):
                target = self._device.of(argument) or CPU
                kwargs["dtype"] = argument.dtype
            elif isinstance(argument, str | torch.device):
                target = argument
            elif isinstance(argument, torch.dtype):
                rest.append(argument)  # others are flags, in the order of `to(device, dtype, ...)`
        if target is not None and torch.device(target).type == "meta":
            return Tensor.to(value, "meta", *rest, **kwargs)
        here = self._device.of(value) or CPU
        there = here if target is None else places[torch.device(target).type]
        if here != there:
            self._device.wait("a transfer")
            self._device.n_transfers += 1
            moved = torch.empty_like(value.detach())
            self._device.mark(moved, there)
            value = moved.copy_(value)
            kwargs.pop("copy", None)
        kwargs.pop("non_blocking", None)
        return Tensor.to(value, *rest, **kwargs) if rest or kwargs else value

    def _check_recurrent(self, args: Any) -> None:
        trains = args[6] if isinstance(args[3], bool) else args[7]  # packed sequences: one more
        on_cudnn = self._device.of(args[0]) == CUDA and torch._C._get_cudnn_enabled()
        passes = torch.is_grad_enabled() and any(value.requires_grad for value in _tensors(args))
        if on_cudnn and passes and not trains:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")


def _autocast(plain: Callable[..., Any]) -> type:
    class Autocast(plain):  # type: ignore[misc,valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu", *args, **kwargs)

    return Autocast


def _from_numpy(device: Device, plain: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    def from_numpy(array: Any) -> Tensor:
        result = plain(array)
        device.mark(result, CPU)
        return result

    return from_numpy


@contextlib.contextmanager
def _capture(device: Device, graph: Graph) -> Iterator[None]:
    device.capturing, drawn = graph, torch.random.get_rng_state()
    try:
        yield
    finally:
        device.capturing = None
        graph.end()
        torch.random.set_rng_state(drawn)


@contextlib.contextmanager
def simulated_cuda() -> Iterator[Device]:
    """Inside, this thread has a CUDA device."""
    device = Device()
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "simulated",
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "manual_seed": lambda seed: None,
        "get_rng_state": lambda device=None: torch.zeros(1, dtype=torch.uint8),
        "set_rng_state": lambda state, device=None: None,
        "memory_allocated": device.allocated,
        "set_sync_debug_mode": device.set_sync_debug_mode,
        "get_sync_debug_mode": lambda: device.sync_mode,
        "is_current_stream_capturing": lambda: device.capturing is not None,
        "graph_pool_handle": lambda: (0, 1),
        "current_stream": lambda device=None: Stream(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": Stream,
        "CUDAGraph": functools.partial(Graph, device),
        "graph": lambda graph, *args, **kwargs: _capture(device, graph),
    }
    with contextlib.ExitStack() as stack:

        def replace(owner: Any, name: str, value: Any) -> None:
            stack.enter_context(mock.patch.object(owner, name, value))

        for name, answer in answers.items():
            replace(torch.cuda, name, answer)
        replace(torch.backends.cudnn, "is_acceptable", lambda value: False)
        replace(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda self: None)
        replace(torch, "autocast", _autocast(torch.autocast))
        replace(torch, "from_numpy", _from_numpy(device, torch.from_numpy))
        stack.enter_context(_Operations(device))
        stack.enter_context(_Calls(device))
        yield device


@contextlib.contextmanager
def cuda_device() -> Iterator[None]:
    """A CUDA device: the one that is there, exact and deterministic; else a simulated one."""
    if not torch.cuda.is_available():
        with simulated_cuda():
            yield
        return
    cudnn: Any = torch.backends.cudnn
    before = cudnn.allow_tf32, cudnn.deterministic
    cudnn.allow_tf32, cudnn.deterministic = False, True
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.deterministic = before
