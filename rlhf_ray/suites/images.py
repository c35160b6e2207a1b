"""Where the images of the built-in suites come from, and the pools that tasks draw from.

N images, 28 x 28, one channel, float32 in [0, 1]; labels int64 in [0, 9].
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_ray.digests import derive_seed
from rlhf_ray.errors import InputError

Images = tuple[Tensor, Tensor]
"""x of shape (N, 1, 28, 28), y of shape (N,)."""

N_CLASSES = 10
SIZE = 28


@dataclass(frozen=True, kw_only=True, eq=False)
class Pools:
    """Four sets of images that share none.

    Attributes:
        pretrain: what the model is pretrained on.
        train: where the train splits of all tasks are drawn from.
        val: the same for their val splits.
        test: the same for their test splits; nothing else ever sees these.
    """

    pretrain: Images
    train: Images
    val: Images
    test: Images


def digits_pools(*, data_root: str | Path | None = None, seed: int = 0) -> Pools:
    """scikit-learn's 1,797 digits (8 x 8), enlarged; 700 / 500 / 267 / 330 images."""
    del data_root  # embedded in scikit-learn
    from sklearn.datasets import load_digits  # slow to import, and for this source only

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).reshape(-1, 1, 8, 8) / 16  # float64, as the enlargement
    x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", align_corners=False).float()
    y = torch.from_numpy(labels).long()
    parts = split_indices(len(y), (700, 500, 267, 330), derive_seed("pools", "digits", seed))
    pretrain, train, val, test = ((x[part], y[part]) for part in parts)
    return Pools(pretrain=pretrain, train=train, val=val, test=test)


def mnist_pools(*, data_root: str | Path | None = None, seed: int = 0) -> Pools:
    """MNIST: 10,000 / 10,000 / 5,000 images of its train split, 10,000 of its test split."""
    return _torchvision_pools("MNIST", data_root, seed)


def fashion_mnist_pools(*, data_root: str | Path | None = None, seed: int = 0) -> Pools:
    """Fashion-MNIST, divided like MNIST."""
    return _torchvision_pools("FashionMNIST", data_root, seed)


SOURCES: dict[str, Callable[..., Pools]] = {
    "digits": digits_pools,
    "mnist": mnist_pools,
    "fashion-mnist": fashion_mnist_pools,
}
"""Name of a source -> its pools, called with `data_root` and `seed`."""


def split_indices(n: int, sizes: Sequence[int], seed: int) -> tuple[Tensor, ...]:
    """Disjoint random index sets of the given sizes; together they hold at most n indices."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    return order[: sum(sizes)].split(list(sizes))


def read_torchvision(dataset: str, *, train: bool, data_root: str | Path | None) -> Images:
    """Reads one split of MNIST or FashionMNIST; downloads it where it is absent.

    Args:
        dataset: class name in `torchvision.datasets`.
        train: the 60,000 training images, or the 10,000 test images.
        data_root: folder in torchvision's layout; else `RLHF_RAY_DATA`, else `./data`.

    Returns:
        x uint8 of shape (N, 28, 28), y int64 of shape (N,).

    Raises:
        InputError: not there and not to be had, or unreadable.
    """
    from torchvision import datasets  # slow to import, and for these sources only

    root = resolve_data_root(data_root)
    try:
        data: Any = getattr(datasets, dataset)(root, train=train, download=True)
    # torchvision lets through whatever urllib, the file system or its own parser raises
    except Exception as error:
        _remove_empty(root / dataset / "raw", root / dataset, root)
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"{dataset} must be found or downloaded, got data_root={str(root)!r} "
            f"({type(error).__name__}: {reason}). Give --data-root or set RLHF_RAY_DATA to a "
            f"folder that holds {dataset}/raw, or run once with a network."
        ) from error
    return data.data, data.targets.long()


def _remove_empty(*folders: Path) -> None:
    """Removes folders that a download made and left empty."""
    for folder in folders:
        with contextlib.suppress(OSError):  # not there, or not empty
            folder.rmdir()


def resolve_data_root(data_root: str | Path | None) -> Path:
    """The folder that holds the data: the argument, `RLHF_RAY_DATA`, or `./data`."""
    return Path(data_root or os.environ.get("RLHF_RAY_DATA") or "data").expanduser()


def to_unit(x: Tensor) -> Tensor:
    """uint8 (N, 28, 28) -> float32 (N, 1, 28, 28) in [0, 1]."""
    return x.unsqueeze(1).float() / 255


def _torchvision_pools(dataset: str, data_root: str | Path | None, seed: int) -> Pools:
    x, y = read_torchvision(dataset, train=True, data_root=data_root)
    x_test, y_test = read_torchvision(dataset, train=False, data_root=data_root)
    parts = split_indices(len(y), (10_000, 10_000, 5_000), derive_seed("pools", dataset, seed))
    pretrain, train, val = ((to_unit(x[part]), y[part]) for part in parts)
    return Pools(pretrain=pretrain, train=train, val=val, test=(to_unit(x_test), y_test))
