"""How hard the built-in suites' tasks are, and which levels they want tuned.

Per task, accuracy on the test split: of the pretrained model, and after 5 stages of 20 Adam steps
at 1e-3 (batches of 64) over all levels, the convolutions alone, the dense levels alone. Plain
torch loops, nothing of the engine.

    python experiments/suite_difficulty.py --suites digits mnist-4 --data-root data
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_ray.digests import derive_seed
from rlhf_ray.suites import load_suite
from rlhf_ray.tasks import Suite, Task

N_STEPS, BATCH_SIZE, LEARNING_RATE = 100, 64, 1e-3
COLUMNS = ("pretrained", "all", "conv", "dense")


def image_tensors(task: Task, split: str) -> tuple[Tensor, Tensor]:
    x, y = task.split(split)
    assert isinstance(x, Tensor)
    # strides of channels-last, which torch does not set by itself for one channel
    return x.as_strided(x.shape, (784, 1, 28, 1)), y


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


def tune(model: nn.Module, x: Tensor, y: Tensor, trained: nn.Module, seed: int) -> None:
    model.requires_grad_(False)
    trained.requires_grad_(True)
    optimizer = torch.optim.Adam(trained.parameters(), lr=LEARNING_RATE)
    rng = torch.Generator().manual_seed(seed)
    n_epochs = -(-N_STEPS * BATCH_SIZE // len(y))
    order = torch.cat([torch.randperm(len(y), generator=rng) for _ in range(n_epochs)])
    for batch in order.split(BATCH_SIZE)[:N_STEPS]:
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()


def row(suite: Suite, task: Task, seed: int) -> list[float]:
    """Accuracies in the order of COLUMNS."""
    draw = derive_seed("difficulty", seed, task.name)
    (x, y), (x_test, y_test) = image_tensors(task, "train"), image_tensors(task, "test")
    model = copy.deepcopy(suite.model).to(memory_format=torch.channels_last)
    accuracies = [accuracy(model, x_test, y_test)]
    for column in COLUMNS[1:]:
        tuned = copy.deepcopy(model)
        body, tail = (
            nn.Sequential(*list(tuned.children())[:2]),
            nn.Sequential(*list(tuned.children())[2:]),
        )
        if column == "dense":  # what the convolutions give stays the same: once is enough
            with torch.no_grad():
                features = body(x)
            tune(tail, features, y, tail, draw)
        else:
            tune(tuned, x, y, body if column == "conv" else tuned, draw)
        accuracies.append(accuracy(tuned, x_test, y_test))
    return accuracies


def line(name: str, values: list[float]) -> str:
    return f"{name:32}" + "".join(f"{value:12.3f}" for value in values)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--suites", nargs="+", default=["digits", "mnist-4"])
    parser.add_argument("--data-root", help="torchvision's layout; else RLHF_RAY_DATA, else ./data")
    parser.add_argument("--storage-path", help="where pretrained weights are kept")
    parser.add_argument("--tasks", type=int, default=8, help="of each role")
    parser.add_argument("--seeds", type=int, default=1, help="of the tuning; the mean is shown")
    args = parser.parse_args()
    torch.set_num_threads(1)
    n_tasks = {f"n_{role}_tasks": args.tasks for role in ("train", "val", "test")}
    where = {"data_root": args.data_root, "storage_path": args.storage_path}
    for name in args.suites:
        suite = load_suite(name, **where, **n_tasks)
        print(f"\n{name:32}" + "".join(f"{column:>12}" for column in COLUMNS))
        means = []
        for task in suite.tasks():
            rows = torch.tensor([row(suite, task, seed) for seed in range(args.seeds)])
            means.append(rows.mean(0))
            print(line(task.name, means[-1].tolist()), flush=True)
        print(line("mean", torch.stack(means).mean(0).tolist()))


if __name__ == "__main__":
    main()
