"""The literal form of the founding document's example, as a suite to compare against.

A fresh network, ten task numbers that only label the state, all of MNIST, one epoch per stage.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rlhf_ray.digests import derive_seed
from rlhf_ray.suites.images import read_torchvision, to_unit
from rlhf_ray.suites.pretrain import make_cnn
from rlhf_ray.tasks import Suite, Task

N_TASKS = 10

DEFAULTS: Mapping[str, Any] = {
    "algorithm": "q-learning",
    "alpha": 0.1,
    "only_operations": ("train_mid",),
    "observation": ("tabular",),
    "performance": "value",
    "start": "random",
    "horizon": 10,
    "steps": None,
    "batch_size": 32,
    "optimizer": "adam",
    "val_size": 10_000,
    "tuning_cost_weight": (0.0,),
    "switch_cost_weight": (1.0,),
    "gamma": (0.99,),
    "epsilon": (0.1,),
    "episodes": 100,
    "warm_up": 0.0,
    "decay_fraction": 0.0,
    "explore_by": "step",
    "persistence": 0.0,
    "counterfactuals": False,
    "replicas": 1,
    "judge_replicas": 1,
    "cache_gb": 1.0,
    "stages_in_flight": 10,
}
"""The founding document's settings: a table over (level, task), and one operation, an epoch on the
acting level (Adam at 1e-3, batches of 32), so that all there is to choose is the level that acts
next; `stop` is open too, but gives up reward. Reward: accuracy on the test images - |l - l'|."""


def mnist_seed_suite(*, data_root: str | Path | None = None, seed: int = 0) -> Suite:
    """The suite `mnist-seed`.

    Its reward sees the test images, as in the founding document: val and test are the same 10,000.
    So its figures say how the search runs, never how well a tuned model generalises. The one
    departure: the model starts anew in each episode.

    Args:
        data_root: where MNIST is, or is downloaded to.
        seed: of the initial weights; nothing is pretrained.

    Returns:
        Ten tasks per role which all hold the same tensors (about 220 MB in all).

    Raises:
        InputError: MNIST is not there and cannot be had.
    """
    x, y = read_torchvision("MNIST", train=True, data_root=data_root)
    x_test, y_test = read_torchvision("MNIST", train=False, data_root=data_root)
    images, held_out = (to_unit(x), y), (to_unit(x_test), y_test)
    first = Task(name="task-0", train=images, val=held_out, test=held_out)

    def tasks(suffix: str) -> tuple[Task, ...]:
        return tuple(_renamed(first, f"task-{i}", suffix) for i in range(N_TASKS))

    return Suite(
        name="mnist-seed",
        model=pooled_first(make_cnn(derive_seed("cnn", "mnist-seed", seed))),
        levels={"conv": ["conv1", "conv2"], "dense": ["dense", "head"]},
        train_tasks=tasks(""),
        val_tasks=tasks("-val"),
        test_tasks=tasks("-test"),
        defaults=DEFAULTS,
    )


def pooled_first(model: nn.Sequential) -> nn.Sequential:
    """The same function, rectified after pooling: on a quarter of the values.

    The two change places without a difference, in gradients too. `model`, as `make_cnn` makes it,
    is changed in place.
    """
    for block in (model.conv1, model.conv2):
        assert isinstance(block, nn.Sequential)
        block[1], block[2] = block[2], block[1]
    return model


def _renamed(task: Task, label: str, suffix: str) -> Task:
    # A shallow copy, not `replace`: its data are checked already, and it keeps the digest, so that
    # 190 MB are read once for all tasks and not 30 times.
    assert task.digest
    same = copy.copy(task)
    object.__setattr__(same, "name", label + suffix)
    object.__setattr__(same, "label", label)  # a table learned on task-0 judges task-0-val
    return same
