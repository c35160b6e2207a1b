"""How many workers and trials a cluster has room for. Arithmetic on its nodes' resources; no Ray.

Ray grants whole reservations or none, and does not keep workers from taking what a trial needs:
who asks for more than there is would wait for ever. So no more workers are started than leave room
for a trial, and where not even one of each fits, both reserve less.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf_ray.errors import InputError

Nodes = Sequence[Mapping[str, float]]
"""Resources of each node that lives: "CPU", "GPU", ..."""


GPU_SHARE = 0.25
"""What a worker reserves where nothing is said: small stages leave most of a GPU idle."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What workers and trials reserve.

    Attributes:
        worker_cpus: of each worker, > 0.
        worker_gpus: of each worker, >= 0: a fraction of one GPU, or whole ones.
        trial_cpus: of each trial with its env runners, > 0.
        trials: how many shall run at once, >= 1.
    """

    worker_cpus: float
    worker_gpus: float
    trial_cpus: float
    trials: int

    def __post_init__(self) -> None:
        if self.worker_gpus > 1 and self.worker_gpus != int(self.worker_gpus):
            raise InputError(
                "gpus_per_worker must be a fraction of one GPU or a whole number, got "
                f"gpus_per_worker={self.worker_gpus:g}."
            )

    @property
    def of_a_worker(self) -> str:
        """In words.

        >>> Needs(worker_cpus=1, worker_gpus=0.5, trial_cpus=0.5, trials=2).of_a_worker
        '1 CPUs and 0.5 GPUs'
        """
        gpus = f" and {self.worker_gpus:g} GPUs" if self.worker_gpus else ""
        return f"{self.worker_cpus:g} CPUs{gpus}"


def total(nodes: Nodes, resource: str) -> float:
    """What all nodes have of a resource.

    >>> total([{"CPU": 2.0}, {"CPU": 1.0, "GPU": 1.0}], "CPU")
    3.0
    """
    return sum(node.get(resource, 0.0) for node in nodes)


def worker_room(nodes: Nodes, needs: Needs, *, trials: int) -> int:
    """The most workers that fit beside so many trials.

    >>> needs = Needs(worker_cpus=1, worker_gpus=0, trial_cpus=0.5, trials=1)
    >>> worker_room([{"CPU": 4.0}, {"CPU": 1.5}], needs, trials=2)
    4
    """
    left = total(nodes, "CPU") - trials * needs.trial_cpus
    return max(0, min(_slots(nodes, needs), _floor(left / needs.worker_cpus)))


def wanted_workers(nodes: Nodes, needs: Needs, asked: int | None) -> int:
    """How many workers to have on these nodes, >= 1.

    One at least: a worker that waits for room is what makes an autoscaler add a node. More than
    there is room for only where GPUs are short: those cannot take the CPUs that trials need.

    Args:
        nodes: those that live.
        needs: what is reserved.
        asked: the user's number; None: what fits beside all trials.
    """
    one_trial = worker_room(nodes, needs, trials=1)
    if asked is None:
        return max(1, worker_room(nodes, needs, trials=needs.trials) or min(1, one_trial))
    if asked <= one_trial or (needs.worker_gpus > 0 and _slots(nodes, needs) == one_trial):
        return asked
    return max(1, one_trial)


def trial_room(nodes: Nodes, needs: Needs, workers: int) -> int:
    """How many trials fit beside so many workers."""
    left = total(nodes, "CPU") - workers * needs.worker_cpus
    return max(0, _floor(left / needs.trial_cpus))


def sharing_gpus(nodes: Nodes, needs: Needs) -> Needs:
    """Needs with a share of a GPU for each worker, where such a worker fits.

    >>> needs = Needs(worker_cpus=1, worker_gpus=0, trial_cpus=0.5, trials=4)
    >>> sharing_gpus([{"CPU": 8.0, "GPU": 1.0}], needs).worker_gpus
    0.25
    >>> sharing_gpus([{"CPU": 8.0}, {"GPU": 1.0}], needs).worker_gpus
    0
    """
    shared = replace(needs, worker_gpus=GPU_SHARE)
    return shared if _slots(nodes, shared) else needs


def fitting(nodes: Nodes, needs: Needs) -> Needs:
    """Needs of which a worker and a trial fit: as they are, or less CPUs where those are too few.

    >>> needs = Needs(worker_cpus=2, worker_gpus=0, trial_cpus=0.5, trials=4)
    >>> less = fitting([{"CPU": 1.0}], needs)
    >>> less.worker_cpus, less.trial_cpus
    (0.66, 0.33)
    """
    cpus = total(nodes, "CPU")
    if cpus <= 0 or worker_room(nodes, needs, trials=1):
        return needs
    largest = max(node.get("CPU", 0.0) for node in nodes)
    worker = min(needs.worker_cpus, largest)
    part = min(1.0, cpus / (worker + needs.trial_cpus))
    return replace(
        needs,
        worker_cpus=max(0.01, _floor(100 * worker * part) / 100),
        trial_cpus=max(0.01, _floor(100 * needs.trial_cpus * part) / 100),
    )


def _slots(nodes: Nodes, needs: Needs) -> int:
    """Workers that fit on the nodes, each on one of them, if nothing else ran there."""
    return sum(_slots_on(node, needs) for node in nodes)


def _slots_on(node: Mapping[str, float], needs: Needs) -> int:
    by_cpus, each = _floor(node.get("CPU", 0.0) / needs.worker_cpus), needs.worker_gpus
    if each <= 0:
        return by_cpus
    gpus = node.get("GPU", 0.0)
    # a fraction lies on one GPU
    by_gpus = _floor(gpus / each) if each >= 1 else _floor(gpus) * _floor(1 / each)
    return min(by_cpus, by_gpus)


def _floor(value: float) -> int:
    return math.floor(value + 1e-9)
