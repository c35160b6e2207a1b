"""Whether one process should train several stages of the same shape together.

    python experiments/batched_stages.py [--device cuda]

Stages that wait at the same level of the same model, on k tasks, could be carried out in one go:
their weights stacked (`torch.func.stack_module_state`), the forward mapped over them (`vmap`), one
Adam over the stacks. Timed are the 20 steps of batch 64 alone, from cached activations, for k of
them one after the other and together, on the CNN of the built-in suites; on a CUDA device also as
CUDA graphs, which is how the engine carries steps out there (`rlhf_ray.engine.graphs`): one graph
of a step, replayed. One thread; medians of alternating repeats; processor seconds on the CPU, wall
seconds on a CUDA device. Also the largest difference of any weight after the steps. Random inputs,
seed 0. Writes batched_stages.md, or batched_stages_cuda.md.
"""

import argparse
import contextlib
import copy
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from rlhf_ray.suites.pretrain import make_cnn

STEPS, BATCH, REPEATS = 20, 64, 5
COUNTS = {"cpu": (4,), "cuda": (4, 16)}

Step = Callable[[Tensor, Tensor], None]


def serial(models: list[nn.Sequential]) -> list[tuple[Step, list[Tensor]]]:
    """A step of the first level of each model on a batch, and the weights that it moves."""

    def made(model: nn.Sequential) -> tuple[Step, list[Tensor]]:
        weights = list(model[0].parameters())
        optimizer = adam(weights)

        def step(batch: Tensor, targets: Tensor) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(batch), targets).backward()
            optimizer.step()

        return step, weights

    return [made(model) for model in models]


def together(models: list[nn.Sequential]) -> tuple[Step, list[Tensor]]:
    """The same for all at once, on (k, B, ...) batches; weights (k, ...)."""
    stacked, _ = stack_module_state(models)  # type: ignore[arg-type]
    skeleton = copy.deepcopy(models[0]).to("meta")
    n_trained = len(list(models[0][0].parameters()))  # the first ones
    trained = [p.detach().requires_grad_(i < n_trained) for i, p in enumerate(stacked.values())]
    weights = dict(zip(stacked, trained, strict=True))
    optimizer = adam(trained[:n_trained])

    def loss(weights: dict[str, Tensor], batch: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(skeleton, weights, (batch,)), targets)

    mapped = vmap(loss)

    def step(batch: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        mapped(weights, batch, targets).sum().backward()
        optimizer.step()

    return step, trained[:n_trained]


def adam(weights: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.Adam(weights, lr=1e-3, fused=True, capturable=weights[0].is_cuda)


def captured(step: Step, batch: Tensor, targets: Tensor) -> Step:
    """The step, which has run before, as a graph on one place for its batch."""
    batch, targets = batch.clone(), targets.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        step(batch, targets)

    def replayed(another: Tensor, its_targets: Tensor) -> None:
        batch.copy_(another)
        targets.copy_(its_targets)
        graph.replay()

    return replayed


def compared(level: int, k: int, device: str) -> tuple[list[float], float]:
    """Median seconds of all ways, and the largest difference of the weights of the first two."""
    torch.manual_seed(0)
    base = make_cnn(0).to(device, memory_format=torch.channels_last).requires_grad_(False)
    base[level].requires_grad_(True)
    with torch.no_grad():
        x = base[:level](torch.randn(k * STEPS * BATCH, 1, 28, 28, device=device))
    x = x.unflatten(0, (k, STEPS, BATCH))
    y = torch.randint(0, 10, (k, STEPS, BATCH), device=device)
    times, differences = [], []
    for _ in range(REPEATS):
        models = [copy.deepcopy(base[level:]) for _ in range(k)]
        ones, (all_, stacks) = serial(models), together([copy.deepcopy(m) for m in models])
        steps = [step for step, _ in ones]
        times.append(
            [seconds(device, one_by_one, steps, x, y), seconds(device, at_once, all_, x, y)]
        )
        with torch.no_grad():
            moved = [torch.stack(same) for same in zip(*(w for _, w in ones), strict=True)]
            pairs = zip(moved, stacks, strict=True)
            differences += [float((a - b).abs().max()) for a, b in pairs]
        if device == "cuda":
            one = captured(steps[0], x[0, 0], y[0, 0])
            several = captured(all_, x[:, 0], y[:, 0])
            times[-1].append(seconds(device, one_by_one, [one] * k, x, y))
            times[-1].append(seconds(device, at_once, several, x, y))
    return [statistics.median(found) for found in zip(*times, strict=True)], max(differences)


def one_by_one(steps: list[Step], x: Tensor, y: Tensor) -> None:
    for step, xs, ys in zip(steps, x, y, strict=True):
        for batch, targets in zip(xs, ys, strict=True):
            step(batch, targets)


def at_once(step: Step, x: Tensor, y: Tensor) -> None:
    for i in range(STEPS):
        step(x[:, i], y[:, i])


def seconds(device: str, function: Callable[..., None], *arguments: object) -> float:
    clock = time.process_time if device == "cpu" else time.perf_counter
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    began = clock()
    function(*arguments)
    wait()
    return clock() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    torch.set_num_threads(1)
    torch.backends.cudnn.deterministic = True  # as in the engine's workers
    ways = ["one by one, ms", "together, ms"]
    if device == "cuda":
        ways += ["graphs one by one, ms", "graph together, ms"]
    heads = ["level", "stages", *ways, "ratio", "difference"]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    # all on one stream, on which graphs can be captured
    with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else contextlib.nullcontext():
        for level, name in enumerate(("conv1", "conv2", "dense", "head")):
            for k in COUNTS[device]:
                found, difference = compared(level, k, device)
                cells = [name, str(k), *(f"{one * 1e3:.1f}" for one in found),
                         f"{found[-2] / found[-1]:.2f}", f"{difference:.0e}"]  # fmt: skip
                lines.append(f"| {' | '.join(cells)} |")
    on = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    lines.append(f"\nThe ratio is that of the last two times. Made by batched_stages.py (one "
                 f"thread of {platform.machine()}, {on}, Python {platform.python_version()}, torch "
                 f"{torch.__version__}).")  # fmt: skip
    name = "batched_stages_cuda.md" if device == "cuda" else "batched_stages.md"
    Path(__file__).with_name(name).write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
