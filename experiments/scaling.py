"""How stages scale with workers, what the tree costs per stage, and how many askers it bears.

    python experiments/scaling.py > experiments/scaling.md

Stages sleep, so that a small machine can show it. The 1,000 askers are simulated: the tree's own
code in this process, its workers replaced by timers.
"""

import asyncio
import functools
import os
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray
import torch

from rlhf_ray.operations import Train
from rlhf_ray.outcomes import PRETRAINED, Identity, LevelState, Outcome, StageRequest, StageStep
from rlhf_ray.tree.actor import TreeActor
from rlhf_ray.tree.pool import StagesHandle
from rlhf_ray.tree.stage_tree import start_of
from rlhf_ray.tree.tally import Answer
from rlhf_ray.tree.workers import start_workers

N_TASKS, PER_WORKER, STAGE_S = 16, 60, 0.1
IDENTITY = Identity(
    model="m" * 64,
    levels=("low", "head"),
    tasks={f"task{i}": f"digest{i}" for i in range(2000)},
    precision="fp32",
    val_size=8,
)


def asked(task: int, n: int) -> StageRequest:
    """The n-th stage of a task: of depth 1, all different."""
    operation = Train(name="train", learning_rate=1e-3 * (n + 1))
    return StageRequest(task=f"task{task}", path=(StageStep(operation=operation, levels=(n % 2,)),))


def outcome(request: StageRequest) -> Outcome:
    key = IDENTITY.key(request)
    versions = (key if request.path else PRETRAINED, PRETRAINED)
    return Outcome(key=key, metric=0.5, loss=1.0, flops={"train": 1.0}, versions=versions)


class SleepingEngine:
    """Stages that last a while and change one small level."""

    identity = IDENTITY

    def __init__(self, stage_s: float) -> None:
        self._stage_s = stage_s

    def start(self, request: StageRequest) -> Outcome:
        """Made-up figures of the pretrained model."""
        return outcome(request)

    def run(self, request: StageRequest, parent: Outcome, load: Any) -> Any:
        """Made-up figures, after a pause."""
        time.sleep(self._stage_s)
        return outcome(request), {0: LevelState(weights={"w": torch.zeros(1000)})}


def stages_per_second(
    n_workers: int, n_askers: int, stage_s: float, n_stages: int
) -> tuple[float, float]:
    """As `measured`, with stages that sleep."""
    with (
        tempfile.TemporaryDirectory() as folder,
        start_workers(
            functools.partial(SleepingEngine, stage_s),
            folder,
            num_workers=n_workers,
            cpus_per_worker=0.1,
            max_weight_bytes=None,
        ) as handle,
    ):
        wait_for(handle, n_workers)
        handle.stages.outcomes([StageRequest(task=f"task{i}") for i in range(N_TASKS)])
        work = [asked(i % N_TASKS, i) for i in range(n_stages)]
        return measured(handle, work, n_askers)


def wait_for(handle: StagesHandle, n_workers: int) -> None:
    """Until so many workers are up."""
    while sum(worker["state"] == "idle" for worker in handle.stats()["workers"]) < n_workers:
        time.sleep(0.1)


def measured(
    handle: StagesHandle, requests: Sequence[StageRequest], n_askers: int
) -> tuple[float, float]:
    """Askers in threads, each asking for one stage after the other.

    Returns:
        Stages per second, and ms of the tree's actor's processor time per stage.
    """
    work, lock = iter(requests), threading.Lock()

    def ask() -> None:
        while True:
            with lock:
                request = next(work, None)
            if request is None:
                return
            handle.stages.outcome(request)

    threads = [threading.Thread(target=ask) for _ in range(n_askers)]
    began, spent_s = time.perf_counter(), handle.stats()["processor_s"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(requests) / (time.perf_counter() - began)
    return rate, 1000 * (handle.stats()["processor_s"] - spent_s) / len(requests)


class Remote:
    """Stands for a method of an actor."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function


class TimedWorker:
    """Stands for a worker: its stages are timers."""

    def __init__(self, stage_s: float) -> None:
        async def run(key: str, request: StageRequest, *_: Any) -> Answer:
            await asyncio.sleep(stage_s if request.path else 0)
            return Answer(outcome=outcome(request), executed=True, carried_out=(key,))

        async def ready() -> Any:
            return type("Info", (), {"pid": 0, "node": ""})

        self.run, self.ready = Remote(run), Remote(ready)


async def simulated(n_askers: int, n_workers: int, stage_s: float, each: int) -> tuple[float, ...]:
    """Stages per second, and ms of the tree's own processor time per stage."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"share": True, "replay_only": False, "max_weight_bytes": None}
        tree = TreeActor(folder, **options, max_attempts=5)
        tree.let_in([(i, TimedWorker(stage_s)) for i in range(n_workers)])

        async def trial(number: int) -> None:
            for n in range(each):
                request = asked(number, n)
                start = start_of(request)
                assert start is not None
                keys = (IDENTITY.key(start), IDENTITY.key(request))
                await tree.ask([(keys, request)])

        began, cpu = time.perf_counter(), time.process_time()
        await asyncio.gather(*(trial(number) for number in range(n_askers)))
        n = n_askers * each
        spent = time.perf_counter() - began, time.process_time() - cpu
        return n / spent[0], 1000 * spent[1] / n


READING = """
Where it would saturate. Weights never pass the tree's actor: per stage it takes a request and gives
an outcome, about 1 kB each, so its one thread is the bound. Most of what a stage costs it are the
two Ray calls (an asker's, and one to a worker); its own code is the last table's last column. With
3 ms per stage it bears some 300 stages per second. So

- 1,000 GPUs with stages of 10 s (100 stages/s) leave it two thirds idle; stages of 3 s are its
  limit; below that, workers wait for the tree. One actor per share of the tasks would lift it:
  stages of different tasks never meet. Not built: nobody has needed it.
- askers are cheap: 1,000 trials waiting cost no more per stage than 100, and what a trial has met
  before is answered from its own memory;
- the storage takes two objects per stage, in 256 folders: 600 writes/s at that limit. S3 takes
  3,500/s per folder; one NFS server may be the first to give in.
"""


def main() -> None:
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    cores = len(os.sched_getaffinity(0))
    print(
        f"# Scaling\n\n`python experiments/scaling.py`; {cores} cores, Ray {ray.__version__}, "
        f"torch {torch.__version__}, stages of {1000 * STAGE_S:.0f} ms, two askers per worker.\n"
    )
    print("| workers | stages/s | against one |\n| --- | --- | --- |")
    first = 0.0
    for n in (1, 2, 4, 8):
        rate, _ = stages_per_second(n, 2 * n, STAGE_S, PER_WORKER * n)
        first = first or rate
        print(f"| {n} | {rate:.1f} | {rate / first:.2f}x |", flush=True)
    print(
        "\nWhat the tree adds to a stage: the time of a worker per stage, less the stage's own\n"
        "(4 workers; one asker: what it waits, less the stage).\n"
    )
    print(
        "| waiting askers | ms per stage | ms of the actor's processor per stage |\n"
        "| --- | --- | --- |"
    )
    for askers in (1, 10, 100):
        n = 60 if askers == 1 else 400
        rate, cpu_ms = stages_per_second(4, askers, STAGE_S, n)
        added_ms = 1000 * (min(4, askers) / rate - STAGE_S)
        print(f"| {askers} | {added_ms:.1f} | {cpu_ms:.2f} |", flush=True)
    ray.shutdown()
    print("\nSimulated: the tree's own code, its workers timers of 1 s.\n")
    print(
        "| askers | workers | stages/s | at most | ms of the tree's processor per stage |\n"
        "| --- | --- | --- | --- | --- |"
    )
    for askers, workers in ((100, 100), (1000, 100), (1000, 1000)):
        rate, cpu_ms = asyncio.run(simulated(askers, workers, 1.0, 6 if workers == 1000 else 2))
        print(f"| {askers} | {workers} | {rate:.0f} | {workers} | {cpu_ms:.2f} |", flush=True)
    print(READING)


if __name__ == "__main__":
    main()
