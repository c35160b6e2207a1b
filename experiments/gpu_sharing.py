"""Stages per second of one GPU: with and without CUDA graphs, by the workers that share it.

    python experiments/gpu_sharing.py [--device cpu]

Distinct stages of the product, of 20 steps each, on all four levels of the built-in suites' CNN in
turn, carried out by workers on a local Ray, committed to a tree on disk; two askers per worker. The
first stages, in which libraries are loaded and graphs captured, are not timed. Random inputs, seed
0. Also what the tree's actor, which hands them out, takes of its processor. Writes gpu_sharing.md.
"""

import argparse
import functools
import os
import platform
import sys
import tempfile
from pathlib import Path

import ray
import torch
from scaling import measured, wait_for
from stage_speed import CNN

import rlhf_ray as rr
from rlhf_ray.engine.loaded_model import EngineSettings
from rlhf_ray.engine.stages import Engine
from rlhf_ray.operations import Train
from rlhf_ray.outcomes import StageRequest, StageStep
from rlhf_ray.tree.workers import start_workers

N_TASKS = 8


def suite() -> rr.Suite:
    torch.manual_seed(0)
    splits = [
        {name: (CNN.inputs(n), torch.arange(n) % 10)
         for name, n in (("train", 256), ("val", 256), ("test", 1))}
        for _ in range(N_TASKS)
    ]  # fmt: skip
    tasks = [rr.Task(name=f"task{i}", **split) for i, split in enumerate(splits)]
    return rr.Suite(name="sharing", model=CNN.model(), levels=CNN.levels, train_tasks=tasks,
                    val_tasks=[], test_tasks=[])  # fmt: skip


def requests(replicas: range) -> list[StageRequest]:
    """Stages of depth 1, all different: every level of every task, by replica."""
    operation = Train(name="train", learning_rate=1e-3)
    paths = [(StageStep(operation=operation, levels=(level,)),) for level in range(len(CNN.levels))]
    return [StageRequest(task=f"task{i}", replica=replica, path=path)
            for replica in replicas for i in range(N_TASKS) for path in paths]  # fmt: skip


def stages_per_second(
    tasks: rr.Suite, settings: EngineSettings, n_workers: int
) -> tuple[float, float]:
    """Stages per second, and ms of the tree's processor per stage."""
    with (
        tempfile.TemporaryDirectory() as folder,
        start_workers(
            functools.partial(Engine, tasks, settings),
            folder,
            num_workers=n_workers,
            gpus_per_worker=1 / n_workers if settings.device == "cuda" else 0,
        ) as handle,
    ):
        wait_for(handle, n_workers)
        n_askers = n_first = 2 * n_workers
        measured(handle, requests(range(n_first)), n_askers)
        return measured(handle, requests(range(n_first, n_first + 3 * n_workers)), n_askers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    asked = parser.parse_args()
    tasks = suite()
    gpus = 1 if asked.device == "cuda" else 0
    ray.init(address="local", num_cpus=max(asked.workers) + 1, num_gpus=gpus,
             include_dashboard=False, log_to_driver=False)  # fmt: skip
    rates: dict[tuple[bool, int], tuple[float, float]] = {}
    for n_workers in asked.workers:
        for graphs in (False, True):
            settings = EngineSettings(device=asked.device, cuda_graphs=graphs)
            rate, tree_ms = rates[graphs, n_workers] = stages_per_second(tasks, settings, n_workers)
            ways = f"{n_workers} workers, {'with' if graphs else 'without'} graphs"
            sys.stderr.write(f"{ways}: {rate:.0f} stages/s, tree {tree_ms:.1f} ms per stage\n")
    ray.shutdown()
    lines = ["| workers | without graphs, stages/s | with graphs, stages/s | ratio "
             "| tree's processor, ms per stage |",
             "| --- | --- | --- | --- | --- |"]  # fmt: skip
    for n_workers in asked.workers:
        (without, _), (with_, tree_ms) = rates[False, n_workers], rates[True, n_workers]
        lines.append(f"| {n_workers} | {without:.0f} | {with_:.0f} | {with_ / without:.1f} "
                     f"| {tree_ms:.1f} |")  # fmt: skip
    on = torch.cuda.get_device_name() if gpus else "no GPU"
    lines.append(f"\nMade by gpu_sharing.py ({on}, {os.cpu_count()} cores of {platform.machine()}, "
                 f"Python {platform.python_version()}, Ray {ray.__version__}, torch "
                 f"{torch.__version__}).")  # fmt: skip
    sys.stdout.write("\n".join(lines) + "\n")
    if asked.device == "cuda":
        Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
