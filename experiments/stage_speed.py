"""Seconds of a stage in the engine against the plain PyTorch loop, level by level.

    python experiments/stage_speed.py [--device cuda] [PART ...]

A stage is what the product carries out: optimizer steps of batch 64 on one level of the pretrained
model, then an evaluation on val. The plain loop does the same steps (Adam; the other levels frozen
and in eval mode, so that autograd stops where it can) and the same evaluation, in torch's default
memory format; it keeps no activations and is not charged for resetting its weights. *First* is the
engine's first stage of a task, with every cache empty; *later* one from a prefix that is cached.
The row *together* has the means of the seconds, their ratios, and the geometric means of the
levels' ratios. One thread; medians of alternating repeats. CPU: processor seconds, which other
load on the machine hardly moves. A CUDA device: wall seconds, to the end of its work. Random
inputs, seed 0. Writes stage_speed.md, or stage_speed_cuda.md; of the PARTs named, if any are, only
prints.
"""

import argparse
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import rlhf_ray as rr
from rlhf_ray.engine.loaded_model import EngineSettings
from rlhf_ray.engine.stages import Engine
from rlhf_ray.operations import Train
from rlhf_ray.outcomes import StageRequest, StageStep


class Encoder(nn.Module):
    """A Transformer encoder with a padding mask (token 0), as PyTorch users write it."""

    def __init__(self, n_blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, n_blocks, enable_nested_tensor=False)
        self.head = nn.Linear(128, 10)

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, 32), int64 -> logits (B, 10)."""
        padding = tokens == 0
        x = self.blocks(self.embedding(tokens), src_key_padding_mask=padding)
        return self.head(x.masked_fill(padding.unsqueeze(-1), 0).sum(1))


def cnn(width: int = 1) -> nn.Sequential:
    """The built-in suites' network, so many times as wide."""
    convs = (nn.Conv2d(1, 32 * width, 3), nn.Conv2d(32 * width, 64 * width, 3))
    blocks = [nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(2)) for conv in convs]
    dense = nn.Sequential(nn.Flatten(), nn.Linear(1600 * width, 64 * width), nn.ReLU())
    return nn.Sequential(*blocks, dense, nn.Linear(64 * width, 10))


def tokens(n: int) -> Tensor:
    """32 of 1,000 tokens; 1 to 24 at the end are padding."""
    return torch.randint(1, 1000, (n, 32)) * (torch.arange(32) < torch.randint(8, 32, (n, 1)))


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model with its levels, and what a stage of it is."""

    name: str
    model: Callable[[], nn.Module]
    levels: dict[str, list[str]]
    inputs: Callable[[int], Tensor]
    shown: tuple[int, ...] = ()  # levels measured; none: all
    n_train: int = 256
    n_val: int = 256
    steps: int = 20
    repeats: int = 3


def encoder(n_blocks: int) -> Case:
    blocks = {f"block{i}": [f"blocks.layers.{i}"] for i in range(n_blocks)}
    return Case(name=f"Transformer encoder of {n_blocks} blocks", model=lambda: Encoder(n_blocks),
                inputs=tokens,
                levels={"embedding": ["embedding"], **blocks, "head": ["head"]})  # fmt: skip


CNN = Case(name="CNN at 28 px", repeats=7, model=cnn, inputs=lambda n: torch.randn(n, 1, 28, 28),
           levels={"conv1": ["0"], "conv2": ["1"], "dense": ["2"], "head": ["3"]})  # fmt: skip
RESNET_LEVELS = {"stem": ["conv1", "bn1"], **{f"layer{i}": [f"layer{i}"] for i in range(1, 5)}}
RESNET = Case(
    name="resnet18 at 64 px",
    model=lambda: torchvision.models.resnet18(num_classes=10),
    levels={**RESNET_LEVELS, "fc": ["fc"]},
    inputs=lambda n: torch.randn(n, 3, 64, 64),
)
PARTS = {
    "cnn": [CNN, replace(CNN, name="CNN, 10 steps, 1,000 val images", steps=10, n_val=1000)],
    "encoder": [encoder(4)],
    "resnet18": [RESNET],
    "data": [replace(CNN, name=f"CNN, {n} train, {m} val", n_train=n, n_val=m, shown=(0, 3))
             for n, m in ((64, 64), (1024, 1024), (4096, 1024))],
    "width": [replace(CNN, name=f"CNN, {w}x wide", model=lambda w=w: cnn(w), shown=(0, 3))
              for w in (2, 4)],
    "depth": [replace(encoder(n), shown=(0, n, n + 1)) for n in (2, 8)],
}  # fmt: skip


HEADER = """\
Seconds of a stage in the plain PyTorch loop over those in the engine. *First*: a task's first
stage, caches empty; *later*: from a cached prefix, as all but the first are. *Together*:
mean seconds; ratio of the means, then geometric mean of the levels' ratios. How it is measured
stands in stage_speed.py.
"""


def plain_stage(model: nn.Module, modules: Sequence[str], data: list[Tensor], steps: int) -> None:
    """A stage as a plain loop; the model goes on from where it is."""
    x, y, x_val, y_val = data
    model.eval().requires_grad_(False)
    trained = [model.get_submodule(name).train().requires_grad_(True) for name in modules]
    optimizer = torch.optim.Adam([p for module in trained for p in module.parameters()], lr=1e-3)
    order = torch.cat([torch.randperm(len(y)) for _ in range(-(-steps * 64 // len(y)))])
    for index in order[: steps * 64].to(y.device).split(64):
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        outputs = torch.cat([model(part) for part in x_val.split(256)])
        float((outputs.argmax(1) == y_val).float().mean()), float(F.cross_entropy(outputs, y_val))


def measured(case: Case, device: str) -> Iterator[tuple[str, float, float, float]]:
    """Per level: its name, seconds of the plain loop, of a first and of a later stage."""
    torch.manual_seed(0)
    sizes = {"train": case.n_train, "val": case.n_val, "test": 1}
    shown = case.shown or range(len(case.levels))
    splits = [{k: (case.inputs(n), torch.arange(n) % 10) for k, n in sizes.items()}
              for _ in range(case.repeats * len(shown))]  # fmt: skip
    tasks = [rr.Task(name=str(i), **split) for i, split in enumerate(splits)]
    model = case.model()
    suite = rr.Suite(name="speed", model=model, levels=case.levels, train_tasks=tasks,
                     val_tasks=[], test_tasks=[])  # fmt: skip
    engine = Engine(suite, EngineSettings(device=device, val_size=case.n_val))
    model.to(device)
    start = engine.start(StageRequest(task="0"))
    operation = Train(name="train", learning_rate=1e-3, steps=case.steps)
    for i, level in enumerate(shown):
        name, modules = list(case.levels.items())[level]
        path = (StageStep(operation=operation, levels=(level,)),)
        times = []
        for task in tasks[i * case.repeats :][: case.repeats]:
            data = [part.to(device) for part in (*task.train, *task.val)]
            first, later = (StageRequest(task=task.name, replica=r, path=path) for r in (0, 1))
            ways = (partial(plain_stage, model, modules, data, case.steps),
                    partial(engine.run, first, start, None),
                    partial(engine.run, later, start, None))  # fmt: skip
            found = []
            for way in ways:
                torch.backends.cudnn.deterministic = way is not ways[0]  # as in the workers
                found.append(seconds(way, device))
            times.append(found)
        yield name, *map(statistics.median, zip(*times, strict=True))


def seconds(function: Callable[[], object], device: str) -> float:
    """Processor seconds on the CPU; wall seconds on a CUDA device, to the end of its work."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    if device != "cpu":
        torch.cuda.synchronize()
    began = clock()
    function()
    if device != "cpu":
        torch.cuda.synchronize()
    return clock() - began


def table(case: Case, device: str) -> str:
    lines = [f"**{case.name}**, {device}", "",
             "| level | plain, ms | first, ms | later, ms | plain / first | plain / later |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    rows = list(measured(case, device))
    for name, plain, first, later in rows:
        lines.append(f"| {name} | {plain * 1e3:.1f} | {first * 1e3:.1f} | {later * 1e3:.1f} "
                     f"| {plain / first:.1f} | {plain / later:.1f} |")  # fmt: skip
    plain, first, later = (statistics.mean(row[i] for row in rows) for i in (1, 2, 3))
    of_ratios = [statistics.geometric_mean(row[1] / row[i] for row in rows) for i in (2, 3)]
    lines.append(f"| together | {plain * 1e3:.1f} | {first * 1e3:.1f} | {later * 1e3:.1f} | "
                 f"{plain / first:.1f}; {of_ratios[0]:.1f} | "
                 f"{plain / later:.1f}; {of_ratios[1]:.1f} |")  # fmt: skip
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("parts", metavar="PART", nargs="*", help=", ".join(PARTS))
    asked = parser.parse_args()
    torch.set_num_threads(1)
    found = [HEADER]
    for part in asked.parts or PARTS:
        for case in PARTS[part]:
            found.append(table(case, asked.device))
            sys.stdout.write(found[-1] + "\n")
            sys.stdout.flush()
    on = torch.cuda.get_device_name() if asked.device == "cuda" else "no GPU"
    found.append(f"Made by stage_speed.py (one thread of {platform.machine()}, {on}, Python "
                 f"{platform.python_version()}, torch {torch.__version__}).\n")  # fmt: skip
    if not asked.parts:
        name = "stage_speed_cuda.md" if asked.device == "cuda" else "stage_speed.md"
        Path(__file__).with_name(name).write_text("\n".join(found))


if __name__ == "__main__":
    main()
