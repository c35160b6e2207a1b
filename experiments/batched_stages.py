"""Whether one process should train several stages of the same shape together.

    python experiments/batched_stages.py

Stages that wait at the same level of the same model, on k tasks, could be carried out in one go:
their weights stacked (`torch.func.stack_module_state`), the forward mapped over them (`vmap`), one
Adam over the stacks. Timed are the 20 steps of batch 64 alone, from cached activations, for k of
them one after the other and together, on the CNN of the built-in suites. One thread; medians of
alternating repeats; processor seconds on the CPU, wall seconds on a CUDA device. Also the largest
difference of any weight after the steps. Random inputs, seed 0. Writes batched_stages.md.
"""

import copy
import platform
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from rlhf_ray.suites.pretrain import make_cnn

STEPS, BATCH, REPEATS = 20, 64, 3
COUNTS = {"cpu": (4,), "cuda": (4, 16)}


def serial(models: list[nn.Sequential], x: Tensor, y: Tensor) -> list[Tensor]:
    """Trains the first level of each model on its own (k, steps, batch, ...) data; its weights."""
    for model, xs, ys in zip(models, x, y, strict=True):
        optimizer = torch.optim.Adam(model[0].parameters(), lr=1e-3, fused=True)
        for batch, targets in zip(xs, ys, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(model(batch), targets).backward()
            optimizer.step()
    found = zip(*(model[0].parameters() for model in models), strict=True)
    return [torch.stack([p.detach() for p in same]) for same in found]


def together(models: list[nn.Sequential], x: Tensor, y: Tensor) -> list[Tensor]:
    """The same with one vmapped step for all."""
    stacked, _ = stack_module_state(models)  # type: ignore[arg-type]
    skeleton = copy.deepcopy(models[0]).to("meta")
    n_trained = len(list(models[0][0].parameters()))  # the first ones
    trained = [p.detach().requires_grad_(i < n_trained) for i, p in enumerate(stacked.values())]
    weights = dict(zip(stacked, trained, strict=True))

    def loss(weights: dict[str, Tensor], batch: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(skeleton, weights, (batch,)), targets)

    optimizer = torch.optim.Adam(trained[:n_trained], lr=1e-3, fused=True)
    mapped = vmap(loss)
    for step in range(STEPS):
        optimizer.zero_grad()
        mapped(weights, x[:, step], y[:, step]).sum().backward()
        optimizer.step()
    return [p.detach() for p in trained[:n_trained]]


def compared(level: int, k: int, device: str) -> tuple[float, float, float]:
    """Median seconds of both ways, and the largest difference of their weights."""
    torch.manual_seed(0)
    base = make_cnn(0).to(device, memory_format=torch.channels_last).requires_grad_(False)
    base[level].requires_grad_(True)
    with torch.no_grad():
        x = base[:level](torch.randn(k * STEPS * BATCH, 1, 28, 28, device=device))
    x = x.unflatten(0, (k, STEPS, BATCH))
    y = torch.randint(0, 10, (k, STEPS, BATCH), device=device)
    times: list[list[float]] = [[], []]
    results = []
    for _ in range(REPEATS):
        results = []
        for way, function in enumerate((serial, together)):
            models = [copy.deepcopy(base[level:]) for _ in range(k)]
            began = clock(device)
            results.append(function(models, x, y))
            times[way].append(clock(device) - began)
    differences = [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]
    return statistics.median(times[0]), statistics.median(times[1]), max(differences)


def clock(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    torch.set_num_threads(1)
    lines = ["| device | level | stages | one by one, ms | together, ms | ratio | difference |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for device in ["cpu", "cuda"][: 1 + torch.cuda.is_available()]:
        for level, name in enumerate(("conv1", "conv2", "dense", "head")):
            for k in COUNTS[device]:
                one, all_, difference = compared(level, k, device)
                lines.append(f"| {device} | {name} | {k} | {one * 1e3:.1f} | {all_ * 1e3:.1f} "
                             f"| {one / all_:.2f} | {difference:.0e} |")  # fmt: skip
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    lines.append(f"\nMade by batched_stages.py (one thread of {platform.machine()}, {gpu}, Python "
                 f"{platform.python_version()}, torch {torch.__version__}).")  # fmt: skip
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
