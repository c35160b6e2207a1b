"""The convolutional network of the built-in suites, and its pretraining on clean images.

Pretrained weights are kept under the storage path by the digest of all they follow from.
"""

import json
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn

from rlhf_ray.digests import derive_seed, digest, tensor_digest
from rlhf_ray.storage import open_storage
from rlhf_ray.suites.images import N_CLASSES, Images

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is pretrained: Adam under a one-cycle learning rate.

    Attributes:
        epochs: passes over the pretraining images.
        batch_size: images per step.
        learning_rate: the highest of the cycle.
    """

    epochs: int
    batch_size: int = 64
    learning_rate: float = 3e-3


RECIPES = {
    "digits": Recipe(epochs=15, batch_size=32),
    "mnist": Recipe(epochs=4),
    "fashion-mnist": Recipe(epochs=6),
}
"""Per source of images."""


def make_cnn(seed: int) -> nn.Sequential:
    """Conv 32, pool, conv 64, pool, dense 64, dense 10: (N, 1, 28, 28) -> logits (N, 10).

    Initial weights are drawn in float64 and rounded: the same on every processor.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        double: dict[str, Any] = {"dtype": torch.float64}
        parts: OrderedDict[str, nn.Module] = OrderedDict(
            conv1=nn.Sequential(nn.Conv2d(1, 32, 3, **double), nn.ReLU(), nn.MaxPool2d(2)),
            conv2=nn.Sequential(nn.Conv2d(32, 64, 3, **double), nn.ReLU(), nn.MaxPool2d(2)),
            dense=nn.Sequential(nn.Flatten(), nn.Linear(64 * 5 * 5, 64, **double), nn.ReLU()),
            head=nn.Linear(64, N_CLASSES, **double),
        )
    return nn.Sequential(parts).float()


def pretrained_cnn(
    source: str,
    images: Images,
    *,
    seed: int,
    storage_path: str | Path | None = None,
    progress: Progress | None = None,
) -> nn.Sequential:
    """The network pretrained on clean images: read from the storage path, or trained and kept.

    Args:
        source: name of the images' source; chooses the recipe.
        images: the pretraining pool.
        seed: of the initial weights and the order of the images.
        storage_path: weights are kept in its folder `pretrained`; None keeps nothing.
        progress: called with about five short lines.

    Returns:
        The network, in eval mode.

    Raises:
        InputError: the storage path cannot be written (told before the training).
    """
    recipe = RECIPES[source]
    model = make_cnn(derive_seed("cnn", source, seed))
    if storage_path is None:
        _train(model, images, recipe, derive_seed("pretrain", source, seed), source, progress)
        return model.eval()
    storage = open_storage(storage_path, check=True)
    data = tensor_digest({"x": images[0], "y": images[1]})
    key = digest("pretrained 2", data, repr(model), asdict(recipe), source, seed)
    name = f"pretrained/{key}.safetensors"
    if not _restore(model, storage.read_bytes(name)):
        _train(model, images, recipe, derive_seed("pretrain", source, seed), source, progress)
        storage.write_bytes(name, _packed(model))
    return model.eval()


def _train(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    seed: int,
    source: str,
    progress: Progress | None,
) -> None:
    """Trains in float64: processors round differently, and training makes much of it.

    What float32 keeps in the end is the same on all, and so is the suite's digest.
    """
    x, y = images[0].double(), images[1]
    rng = torch.Generator().manual_seed(seed)
    model.double()
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    n_batches = -(-len(y) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=recipe.epochs * n_batches
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on the number of threads: the same weights for any
    try:
        model.train()
        for epoch in range(recipe.epochs):
            n_right = torch.tensor(0)
            for batch in torch.randperm(len(y), generator=rng).split(recipe.batch_size):
                outputs = model(x[batch])
                optimizer.zero_grad()
                F.cross_entropy(outputs, y[batch]).backward()
                optimizer.step()
                schedule.step()
                n_right += (outputs.argmax(1) == y[batch]).sum()
            if progress is not None and (epoch + 1) % -(-recipe.epochs // 5) == 0:
                share = float(n_right) / len(y)
                progress(f"pretraining {source}: epoch {epoch + 1}/{recipe.epochs}, "
                         f"accuracy {share:.3f}")  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    model.float()


def _packed(model: nn.Module) -> bytes:
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    return save(state, {"checksum": tensor_digest(state)})


def _restore(model: nn.Module, content: bytes | None) -> bool:
    """Loads kept weights; False where there are none, or they were cut or altered."""
    if content is None:
        return False
    try:
        state = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        if header["__metadata__"]["checksum"] != tensor_digest(state):
            return False
        model.load_state_dict(state)
    except (SafetensorError, ValueError, KeyError, RuntimeError):
        return False
    return True
