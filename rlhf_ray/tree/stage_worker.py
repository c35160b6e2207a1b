"""The Ray actor that carries out stages: an engine over the shared store.

It also keeps the tree's counts for it: see `Ledger`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import ray
import torch
from ray import cloudpickle
from torch import Tensor

from rlhf_ray.engine.allocation import keep_freed_memory
from rlhf_ray.errors import (
    FullDeviceError,
    InputError,
    RlhfRayError,
    StageError,
    in_one_line,
)
from rlhf_ray.outcomes import Identity, StageRequest
from rlhf_ray.storage import open_storage
from rlhf_ray.tree.dispatch import Ledger
from rlhf_ray.tree.stage_tree import LocalStages, StageEngine
from rlhf_ray.tree.store import TreeStore
from rlhf_ray.tree.tally import Answer

MakeEngine = Callable[[], StageEngine]
"""Makes a worker's engine; picklable, sent once."""


@dataclass(frozen=True, kw_only=True)
class WorkerInfo:
    """What a worker says when it is up: the identity of its suite, process and node."""

    identity: Identity
    pid: int
    node: str


class StageWorker:
    """Carries out stages, one at a time. Made an actor by `workers.start_workers`.

    Errors are returned, not raised: they pass Ray as plain values, without its tracebacks.

    Args:
        make_engine: reference to a `MakeEngine`, pickled.
        storage_path: where the tree lies.
        mark: what `TreeStore.mark` gave the driver: this node must see the same folder; "": any.
        threads: torch's.
        share: whether outcomes may serve twice.
        memory_bytes: limit of the weights kept in memory.
    """

    def __init__(
        self,
        make_engine: bytes,
        storage_path: str,
        mark: str,
        *,
        threads: int,
        share: bool,
        memory_bytes: int,
    ) -> None:
        self._threads = threads
        self._running = ""
        self._broken = False
        self._ledger: Ledger | None = None
        self._stages: LocalStages | RlhfRayError
        try:
            torch.set_num_threads(threads)
            keep_freed_memory()
            _prepare_gpu()
            make: MakeEngine = ray.get(cloudpickle.loads(make_engine))
            store = TreeStore(open_storage(storage_path))
            if mark and not store.has_mark(mark):
                host = ray.util.get_node_ip_address()
                raise InputError("the storage path must be shared by all nodes, got another folder "
                                 f"on {host}. Give a path that all see.")  # fmt: skip
            self._stages = LocalStages(make(), store, share=share, memory_bytes=memory_bytes)
        except Exception as error:
            self._stages = as_ours("an engine must be made in every worker", error)

    @ray.method(concurrency_group="control")
    def report(self) -> tuple[str, Ledger | None]:
        """The key of what is run, "" if nothing, and the tree's counts as it last sent them.

        Answers while a stage runs.
        """
        return self._running, self._ledger

    def ready(self) -> WorkerInfo | RlhfRayError:
        """Answers when the worker is up and nothing runs on it."""
        if isinstance(self._stages, RlhfRayError):
            return self._stages
        node = ray.get_runtime_context().get_node_id()
        return WorkerInfo(identity=self._stages.identity, pid=os.getpid(), node=node)

    def run(
        self, key: str, request: StageRequest, episode: str, ledger: Ledger
    ) -> Answer | RlhfRayError:
        """Answers a request from the store, or carries it out and commits it."""
        if self._broken:
            os._exit(1)  # a fresh process takes its place; the driver has this request tried again
        self._ledger = ledger
        if isinstance(self._stages, RlhfRayError):
            return self._stages
        torch.set_num_threads(self._threads)  # counts per calling thread, and Ray may use several
        self._running = key
        try:
            return self._stages.outcome(request, episode)
        except Exception as error:
            self._broken = is_lost_device(error)
            found = as_ours("a stage must run", error)
            if is_full_device(error):
                found = FullDeviceError(str(found))
        finally:
            self._running = ""
        if isinstance(found, FullDeviceError):
            self._stages.release()  # not before: the error held the frames of what was under way
        return found

    def state_dict(self, request: StageRequest) -> dict[str, Tensor] | RlhfRayError:
        """The whole model in a state."""
        if isinstance(self._stages, RlhfRayError):
            return self._stages
        try:
            return self._stages.state_dict(request, namespace="state_dict")
        except Exception as error:
            return as_ours("a state must be had", error)


def _prepare_gpu() -> None:
    """Before CUDA starts in this process: the same stage gives the same, and on the right GPU."""
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray shows all GPUs to who reserved none
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic = True


def is_full_device(error: BaseException | None) -> bool:
    """Whether the GPU's memory did not suffice, which others use, too: later it may."""
    if error is None:
        return False
    return isinstance(error, torch.OutOfMemoryError) or is_full_device(error.__cause__)


def is_lost_device(error: BaseException | None) -> bool:
    """Whether this process can do no more on its GPU: the error of a failed kernel stays."""
    if isinstance(error, torch.OutOfMemoryError) or error is None:
        return False
    return isinstance(error, torch.AcceleratorError) or is_lost_device(error.__cause__)


def as_ours(what: str, error: Exception) -> RlhfRayError:
    """The error itself if it is this package's, else one of this package that names it."""
    if isinstance(error, RlhfRayError):
        return error
    return StageError(f"{what}, got {in_one_line(error)}")
