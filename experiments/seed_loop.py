"""The founding document's loop, in Keras and here: seconds per step, and the whole search.

    pip install -e '.[seed-loop]' && python experiments/seed_loop.py --data-root DATA
    python experiments/seed_loop.py --keras-python OTHER_ENVIRONMENT/bin/python   # tensorflow there

A step is one epoch over MNIST's 60,000 images in batches of 32 and an evaluation on 10,000. Keras
makes the document's `fit` and `evaluate`, literally; the engine makes the stages of the suite
`mnist-seed`. Then the suite's search (100 episodes of at most 10 steps) runs from the command line
on fresh storage. Writes seed_loop.md: every step's seconds, the search, and what each part of the
way from one to the other is worth, in processor seconds, which other load on the machine hardly
moves (Linux: the search's are read from /proc). `--steps-only` leaves the search out and writes
nothing; `--storage-path` keeps the search's storage.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np  # all else is imported where it is used: tensorflow may lie elsewhere

EPISODES, HORIZON = 100, 10

Seconds = tuple[float, float]
"""Of the wall clock, and of the processor."""


def keras_seconds(data: str, n_steps: int) -> list[Seconds]:
    """Of each step after the first, which traces the graph."""
    import tensorflow as tf

    arrays = np.load(data)
    x_train, x_test = arrays["x_train"], arrays["x_test"]
    y_train = tf.keras.utils.to_categorical(arrays["y_train"], 10)
    y_test = tf.keras.utils.to_categorical(arrays["y_test"], 10)
    layers = tf.keras.layers
    model = tf.keras.models.Sequential(
        [
            layers.Conv2D(32, (3, 3), activation="relu", input_shape=(28, 28, 1)),
            layers.MaxPooling2D((2, 2)),
            layers.Conv2D(64, (3, 3), activation="relu"),
            layers.MaxPooling2D((2, 2)),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(optimizer="adam", loss="categorical_crossentropy", metrics=["accuracy"])
    seconds = []
    for _ in range(n_steps):
        began, spent = time.perf_counter(), time.process_time()
        model.fit(x_train, y_train, epochs=1, verbose=0)
        model.evaluate(x_test, y_test, verbose=0)
        seconds.append((time.perf_counter() - began, time.process_time() - spent))
    return seconds[1:]


def run_keras(python: str, data_root: str | None, n_steps: int) -> Seconds:
    from torch import Tensor

    from rlhf_ray.suites.seed import mnist_seed_suite

    task = mnist_seed_suite(data_root=data_root).train_tasks[0]
    arrays = {}
    for name, (x, y) in {"train": task.train, "test": task.test}.items():
        assert isinstance(x, Tensor)
        arrays |= {f"x_{name}": x.numpy().reshape(-1, 28, 28, 1), f"y_{name}": y.numpy()}
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/mnist.npz", **arrays)
        command = [python, __file__, "--keras-data", f"{folder}/mnist.npz", "--steps", str(n_steps)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    wall, spent = zip(*json.loads(done.stdout.splitlines()[-1]), strict=True)
    return statistics.median(wall), statistics.median(spent)


def engine_seconds(data_root: str | None, tuned: bool) -> dict[str, Seconds]:
    """Of the engine's stages in this process, on one thread.

    Args:
        data_root: where MNIST is.
        tuned: as workers have it; False: in torch's own memory format, with freed memory given
            back to the system as by default.
    """
    import torch

    from rlhf_ray.config import SearchConfig, with_defaults
    from rlhf_ray.engine.allocation import keep_freed_memory
    from rlhf_ray.engine.stages import Engine
    from rlhf_ray.outcomes import StageRequest, StageStep
    from rlhf_ray.suites.seed import mnist_seed_suite
    from rlhf_ray.tree.stage_tree import LocalStages

    torch.set_num_threads(1)
    if tuned:
        keep_freed_memory()
    suite = mnist_seed_suite(data_root=data_root)
    config = with_defaults(SearchConfig(), suite.defaults)
    settings = replace(config.engine_settings(), channels_last=tuned)
    (train,) = (operation for operation in config.operations() if operation.name != "stop")
    step = {
        name: StageStep(operation=train, levels=levels)
        for name, levels in {"conv": (0,), "dense": (1,), "all": (0, 1)}.items()
    }

    def seconds(*names: str) -> Seconds:
        path = tuple(step[name] for name in names)
        request = StageRequest(task=suite.train_tasks[0].name, path=path)
        spent = time.process_time()
        wall_s = stages.outcome(request).outcome.time_s
        return wall_s, time.process_time() - spent

    stages = LocalStages(Engine(suite, settings))
    seconds()  # the start: data, first calls
    found = {"all": seconds("all")}
    if tuned:
        found["conv"] = seconds("conv")
        found["dense"] = seconds("conv", "dense")
        found["dense, kept"] = seconds("conv", "dense", "dense")
    return found


def measure_steps(python: str, data_root: str | None, n_steps: int) -> dict[str, Seconds]:
    """Keras' step, and the engine's in two processes at once, as in the search."""
    found = {"keras": run_keras(python, data_root, n_steps)}
    spawn = multiprocessing.get_context("spawn")
    for tuned in (True, False):
        # new processes each time: what `tuned` sets cannot be taken back
        with ProcessPoolExecutor(2, mp_context=spawn) as pool:
            first, second = pool.map(engine_seconds, [data_root] * 2, [tuned] * 2)
        for name, (wall, spent) in first.items():
            mean = ((wall + second[name][0]) / 2, (spent + second[name][1]) / 2)
            found[name if tuned else f"{name}, defaults"] = mean
    return found


def processor_seconds(root: int) -> dict[int, float]:
    """Of a process and all below it, by process id (Linux)."""
    parent, spent = {}, {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        parent[int(entry.parent.name)] = int(fields[1])
        ticks = int(fields[11]) + int(fields[12])
        spent[int(entry.parent.name)] = ticks / os.sysconf("SC_CLK_TCK")

    def below(pid: int) -> bool:
        return pid == root or (pid in parent and below(parent[pid]))

    return {pid: seconds for pid, seconds in spent.items() if below(pid)}


def run_search(storage: str, data_root: str | None) -> dict[str, float]:
    """The search as a user starts it; figures of the trial, and of the command in all."""
    command = [sys.executable, "-m", "rlhf_ray.launch", "--suite", "mnist-seed"]
    command += ["--storage-path", storage, "--name", "seed-loop", "--num-workers", "2"]
    command += ["--data-root", data_root] if data_root else []
    began, spent, search_s = time.monotonic(), {}, 0.0
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        while process.poll() is None:
            spent |= processor_seconds(process.pid)
            if not any(Path(storage, "seed-loop").glob("**/trial.json")):
                search_s = sum(spent.values())
            time.sleep(1)
    if process.returncode:
        raise SystemExit(process.returncode)
    wall_s = time.monotonic() - began
    (record,) = Path(storage, "seed-loop").glob("**/trial.json")
    trial, tree = json.loads(record.read_text()), Path(storage, "tree")
    outcomes = [json.loads(file.read_text()) for file in tree.glob("*/*.json")]
    keys = set(trial["stages"].pop("keys"))
    mine = [o for o in (o.get("outcome", o) for o in outcomes) if o["key"] in keys]
    return {
        **trial["stages"],
        "distinct": len(keys),
        "dense": sum(o["versions"][0] != o["key"] for o in mine),
        "wall_s": trial["wall_s"],
        "command_s": wall_s,
        "processor_s": search_s,
        "command_processor_s": sum(spent.values()),
        "accuracy": max(o["metric"] for o in mine),
    }


def step_table(steps: dict[str, Seconds]) -> list[str]:
    names = {
        "keras": "Keras' `fit` and `evaluate`, all cores",
        "all, defaults": "all levels, torch's default memory format, freed memory given back",
        "all": "all levels",
        "conv": "conv level",
        "dense": "dense level, the prefix computed",
        "dense, kept": "dense level, the prefix kept",
    }
    lines = ["| step | wall s | processor s |", "| --- | --- | --- |"]
    for key, name in names.items():
        wall, spent = steps[key]
        lines.append(f"| {name} | {wall:.1f} | {spent:.1f} |")
    return lines


def factor_table(steps: dict[str, Seconds], r: dict[str, float]) -> list[str]:
    """From the document's steps in Keras to the search, in processor seconds."""
    s = {name: spent for name, (_, spent) in steps.items()}
    nominal, distinct, n_dense = EPISODES * HORIZON, r["distinct"], r["dense"]
    n_conv = distinct - n_dense
    stations = [
        (f"{nominal:,} steps of Keras", nominal * s["keras"]),
        (f"episodes may stop: {r['logical']:.0f} steps, with judging", r["logical"] * s["keras"]),
        (f"sharing: {distinct:.0f} distinct stages", distinct * s["keras"]),
        ("the engine with torch's defaults", distinct * s["all, defaults"]),
        ("channels-last, freed memory kept", distinct * s["all"]),
        (
            f"the acting level only: {n_conv:.0f} conv, {n_dense:.0f} dense",
            n_conv * s["conv"] + n_dense * s["dense"],
        ),
        ("prefixes kept; the driver and all else that the search does", r["processor_s"]),
    ]
    lines = ["| to here | processor s | factor |", "| --- | --- | --- |"]
    before = stations[0][1]
    for name, seconds in stations:
        lines.append(f"| {name} | {seconds:,.0f} | {before / seconds:.2f} |")
        before = seconds
    return [*lines, f"| in all | | {stations[0][1] / stations[-1][1]:.1f} |"]


def write(steps: dict[str, Seconds], r: dict[str, float]) -> str:
    import torch

    cores = os.cpu_count() or 1
    text = [
        f"`python experiments/seed_loop.py`: {cores} cores of {platform.machine()}, torch "
        f"{torch.__version__}, seed 0; load average {os.getloadavg()[2]:.1f} (15 minutes).",
        "",
        "A step: an epoch over 60,000 images in batches of 32, an evaluation on 10,000. The "
        "engine's steps on one thread, in two processes at once.",
        "",
        *step_table(steps),
        "",
        f"The search, two workers: {r['wall_s'] / 60:.1f} minutes, {r['processor_s']:,.0f} "
        f"processor seconds ({r['processor_s'] / 60 / cores:.1f} minutes of {cores} cores); with "
        f"five baselines, from start to end, {r['command_s'] / 60:.1f} minutes, "
        f"{r['command_processor_s']:,.0f} ({r['command_processor_s'] / 60 / cores:.1f}). Keras "
        f"would take {EPISODES * HORIZON * steps['keras'][1] / cores / 3600:.1f} hours of {cores} "
        f"cores. Best accuracy on the test images {r['accuracy']:.4f}.",
        "",
        *factor_table(steps, r),
    ]
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="where MNIST is; else RLHF_RAY_DATA, else ./data")
    parser.add_argument("--keras-python", default=sys.executable, help="an interpreter that has it")
    parser.add_argument("--steps", type=int, default=3, help="of Keras, the first not counted")
    parser.add_argument("--steps-only", action="store_true", help="no search")
    parser.add_argument("--storage-path", help="of the search; else a temporary folder")
    parser.add_argument("--keras-data", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.keras_data:
        print(json.dumps(keras_seconds(args.keras_data, args.steps)))
        return
    steps = measure_steps(args.keras_python, args.data_root, args.steps)
    print("\n".join(step_table(steps)), flush=True)
    if args.steps_only:
        return
    with tempfile.TemporaryDirectory() as folder:
        found = run_search(args.storage_path or folder, args.data_root)
    text = write(steps, found)
    Path(__file__).with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
