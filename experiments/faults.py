"""Fault campaigns: processes and nodes are killed at random while a small sweep runs.

    python experiments/faults.py > experiments/faults.md

First 30 kills of stage workers, env runners, trials, the tree's actor and nodes of a cluster of
three nodes on this machine; then 20 kills of the driver, workers and the tree's actor of a local
sweep, after each of the driver's the same command again. Both must end with what an undisturbed
run gives, and carry no committed stage out twice.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from torch import nn

import rlhf_ray as rr
from rlhf_ray import ray_session
from rlhf_ray.engine.stages import Engine
from rlhf_ray.operations import Skip, StageSession, Stop, Train
from rlhf_ray.sweep.results import SearchResult

STAGE_S = 1.0
KINDS = {
    "worker": "ray::StageWorker", "tree": "ray::TreeActor", "trial": "ray::ResourceTrainable",
    "runner": "ray::NumberedEpisodesRunner",
}  # fmt: skip
"""What Ray calls the processes."""


@dataclass(frozen=True, kw_only=True)
class SlowTrain(Train):
    """Training that lasts, so that a kill finds something in flight."""

    def run(self, session: StageSession) -> None:
        """Trains, after a pause."""
        time.sleep(STAGE_S)
        super().run(session)


class LoggedEngine:
    """An engine that notes when it begins a stage."""

    def __init__(self, *args: Any) -> None:
        self._engine = Engine(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_engine"], name)

    def run(self, request: Any, *args: Any) -> Any:
        """Carries out a stage, and notes it before."""
        line = f"{self._engine.identity.key(request)} {time.time()}\n".encode()
        with open(os.environ["FAULTS_LOG"], "ab", buffering=0) as log:
            log.write(line)
        return self._engine.run(request, *args)


def suite() -> rr.Suite:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    tasks = []
    for name in ("train-0", "train-1", "val-0", "test-0"):
        x = torch.randn(32, 4)
        data = (x, x[:, :3].argmax(1))
        tasks.append(rr.Task(name=name, train=data, val=data, test=data))
    return rr.Suite(name="small", model=model, levels={"low": ["0"], "head": ["2"]},
                    train_tasks=tasks[:2], val_tasks=tasks[2:3], test_tasks=tasks[3:])  # fmt: skip


def sweep(storage: str, address: str | None) -> None:
    """The driver: always the same call."""
    ray_session.Engine = LoggedEngine  # type: ignore[misc, assignment]
    config = rr.SearchConfig(
        gamma=(0.9,), epsilon=(0.1,), tuning_cost_weight=(0.0, 0.05),
        switch_cost_weight=(0.001, 0.01), episodes=40, horizon=4, judge_replicas=2, num_workers=2,
        cpus_per_worker=0.5, concurrent_trials=2, stages_in_flight=2, env_runners=1,
        storage_path=storage, name="sweep", address=address,
    )  # fmt: skip
    operations = [SlowTrain(name=n, learning_rate=r, steps=2) for n, r in (("a", 1e-3), ("b", 0.1))]
    rr.search(suite(), config, operations=(*operations, Skip(), Stop()))


def start(storage: Path, address: str = "") -> subprocess.Popen[bytes]:
    words = [sys.executable, __file__, "sweep", str(storage), address]
    with (storage.parent / "out.log").open("ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=log)


def processes(root: int) -> dict[int, str]:
    """The living descendants of a process, with their titles."""
    parents, titles = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
            titles[int(folder.name)] = (folder / "cmdline").read_bytes().decode().rstrip("\0")
            parents[int(folder.name)] = int(fields[1])
        except OSError:
            continue
    mine, size = {root}, 0
    while size != len(mine):
        size = len(mine)
        mine |= {pid for pid, parent in parents.items() if parent in mine}
    return {pid: titles[pid] for pid in mine - {root}}


def kill_one(kind: str, root: int, draw: random.Random) -> bool:
    found = [pid for pid, name in processes(root).items() if name.startswith(KINDS[kind])]
    if found:
        os.kill(draw.choice(found), signal.SIGKILL)
    return bool(found)


def await_instant(driver: subprocess.Popen[bytes], draw: random.Random) -> None:
    """Until one to three stages more have begun, or long after, and into one of them."""
    log, end = Path(os.environ["FAULTS_LOG"]), time.monotonic() + 60
    wanted = begun(log) + draw.randint(1, 3)
    while driver.poll() is None and begun(log) < wanted and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(draw.uniform(0, STAGE_S))


def begun(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def on_cluster(storage: Path, n_kills: int) -> Counter[str]:
    draw, kills = random.Random(0), Counter[str]()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    driver = start(storage, cluster.address)
    while kills.total() < n_kills and driver.poll() is None:
        await_instant(driver, draw)
        kind = draw.choice(["worker", "worker", "runner", "trial", "trial", "tree", "node"])
        if kind == "node":
            cluster.remove_node(nodes.pop(draw.randrange(2)), allow_graceful=False)
            time.sleep(draw.uniform(0, 5))
            nodes.append(cluster.add_node(num_cpus=1))
        elif not kill_one(kind, os.getpid(), draw):
            continue
        kills[kind] += 1
    assert driver.wait(900) == 0, (storage.parent / "out.log").read_text()[-3000:]
    cluster.shutdown()
    return kills


def on_one_machine(storage: Path, n_kills: int) -> Counter[str]:
    draw, kills = random.Random(1), Counter[str]()
    while kills.total() < n_kills:
        driver = start(storage)
        while kills.total() < n_kills and driver.poll() is None:
            await_instant(driver, draw)
            kind = draw.choice(["driver", "worker", "tree"])
            family = list(processes(driver.pid))
            if kind == "driver":
                driver.kill()
                driver.wait()
                while any(Path(f"/proc/{pid}").exists() for pid in family):
                    time.sleep(0.2)  # Ray's processes notice
            elif not kill_one(kind, driver.pid, draw):
                continue
            kills[kind] += 1
        if driver.wait(900) == 0:
            return kills
    assert start(storage).wait(900) == 0, (storage.parent / "out.log").read_text()[-3000:]
    return kills


def report(name: str, storage: Path, kills: Counter[str], expected: SearchResult) -> None:
    result = SearchResult.load(storage / "sweep")
    same = result.table().equals(expected.table())
    same &= result.summary["methods"] == expected.summary["methods"]
    committed = {file.stem: file.stat().st_mtime for file in (storage / "tree").rglob("*.json")}
    runs = [line.split() for line in (storage.parent / "runs.log").read_text().splitlines()]
    twice = sum(float(began) > committed.get(key, float("inf")) for key, began in runs)
    lost = len(runs) - len({key for key, _ in runs})
    what = ", ".join(f"{n} {kind}" for kind, n in sorted(kills.items())) or "none"
    print(f"| {name} | {kills.total()}: {what} | {result.sweep['state']} | "
          f"{'yes' if same else 'NO'} | {len({key for key, _ in runs})} | {lost} | {twice} |",
          flush=True)  # fmt: skip


def main() -> None:
    print("# Fault campaigns\n\n`python experiments/faults.py`; 4 trials of 40 episodes, stages of "
          f"{STAGE_S} s, seeded kills.\n{os.cpu_count()} cores, Ray {ray.__version__}, torch "
          f"{torch.__version__}.\n\n| run | kills | state | trials and methods as "
          "undisturbed | stages | begun again, lost in flight | begun again though committed |\n"
          "| --- | --- | --- | --- | --- | --- | --- |", flush=True)  # fmt: skip
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
    os.environ["RAY_TMPDIR"] = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # no other Ray is met
    expected: SearchResult | None = None
    for name, n_kills, campaign in (("undisturbed", 0, on_one_machine),
                                    ("cluster of 3 nodes", 30, on_cluster),
                                    ("one machine", 20, on_one_machine)):  # fmt: skip
        folder = Path(tempfile.mkdtemp(prefix="faults-"))
        os.environ["FAULTS_LOG"] = str(folder / "runs.log")
        kills = campaign(folder / "runs", n_kills)
        expected = expected or SearchResult.load(folder / "runs" / "sweep")
        report(name, folder / "runs", kills, expected)


if __name__ == "__main__":
    if sys.argv[1:2] == ["sweep"]:
        import faults  # under its own name, which the sweep's processes can import

        faults.sweep(sys.argv[2], sys.argv[3] or None)
    else:
        main()
