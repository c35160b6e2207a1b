"""Clusters of several nodes on this machine. Each test runs this file in a process of its own.

The run's own Ray must not be touched, and a process has one Ray.
"""

import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from lines import Lines

HERE = Path(__file__).parent


def apart(scenario: str, folder: Path, timeout_s: float = 240.0) -> None:
    """Runs a function of this file in another process."""
    # In a folder of its own Ray finds no other Ray, and no other finds this one; a short name, for
    # sockets lie there.
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as ray_folder:
        done = subprocess.run(
            [sys.executable, __file__, scenario, str(folder)],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={
                **os.environ,
                "PYTHONPATH": f"{HERE}:{os.environ.get('PYTHONPATH', '')}",
                "RAY_TMPDIR": ray_folder,
            },
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_workers_follow_nodes_and_unshared_storage_is_refused(tmp_path: Path) -> None:
    apart("growth_and_loss", tmp_path)


@pytest.mark.slow
def test_sweep_goes_on_when_a_node_with_trial_and_workers_is_lost(tmp_path: Path) -> None:
    apart("node_lost_in_sweep", tmp_path, 500)


@pytest.mark.slow
def test_lost_head_ends_the_driver_and_the_same_call_goes_on(tmp_path: Path) -> None:
    apart("head_lost", tmp_path, 550)


# -- the scenarios; what they import must not slow the collection of tests down


def wait_until(condition: Callable[[], bool], timeout_s: float = 150.0, about: Any = "") -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"waited too long {about}"
        time.sleep(0.1)


def started_cluster(**head: Any) -> Any:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=head)
    ray.init(address=cluster.address, log_to_driver=False)
    return cluster


def unshared_storage_refused(folder: Path) -> None:
    """Where a process works is a folder of its own kind: the nodes' is another than this one's."""
    from rlhf_ray.errors import InputError
    from rlhf_ray.shared_storage import check_shared

    with pytest.raises(InputError, match=r"shared by all nodes, got .* on node .*does not see"):
        check_shared("/proc/self/cwd/runs")
    assert list(folder.iterdir()) in ([], [folder / "runs"])
    assert check_shared(folder / "shared") == 2
    assert list((folder / "shared").iterdir()) == []


def growth_and_loss(folder: Path) -> None:
    from fake_engine import FakeEngine, ran, request
    from ray.exceptions import GetTimeoutError

    from rlhf_ray.placement import Needs, wanted_workers
    from rlhf_ray.tree.workers import start_workers

    os.chdir(HERE)
    cluster = started_cluster(num_cpus=1)
    first = cluster.add_node(num_cpus=1, num_gpus=1)

    os.chdir(folder)
    unshared_storage_refused(folder)
    needs = Needs(worker_cpus=0.2, worker_gpus=0.5, trial_cpus=0.5, trials=1)
    progress = Lines()
    with start_workers(
        functools.partial(FakeEngine, folder),
        folder / "shared",
        num_workers=functools.partial(wanted_workers, needs=needs, asked=None),
        cpus_per_worker=0.2,
        gpus_per_worker=0.5,
        poll_s=0.2,
        progress=progress,
    ) as handle:

        def at_work() -> list[str]:
            try:
                workers = handle.stats()["workers"]
            except GetTimeoutError:  # where the machine is busy, the tree's actor is not up yet
                return []
            return [w["node"] for w in workers if w["state"] in ("idle", "busy")]

        wait_until(lambda: len(at_work()) == 2, about=progress.lines)
        assert set(at_work()) == {first.node_id}
        second = cluster.add_node(num_cpus=1, num_gpus=1)
        wait_until(lambda: len(at_work()) == 4, about=progress.lines)
        assert at_work().count(second.node_id) == 2
        assert progress.said("the cluster has grown: 2 workers more, now 4")

        (folder / "gate").touch()
        with ThreadPoolExecutor(1) as pool:
            answers = pool.submit(handle.stages.outcomes, [request(0, task=i) for i in range(6)])
            wait_until(lambda: len(ran(folder)) == 4)
            cluster.remove_node(first, allow_graceful=False)
            (folder / "gate").unlink()
            assert len(answers.result(90)) == 6
        wait_until(lambda: progress.said("the cluster has shrunk: 2 workers fewer, now 2"))
        assert set(at_work()) == {second.node_id}
        assert handle.stages.state_dict(request(0))
        assert len(set(ran(folder))) == 6

        # the younger workers are lost, while all are idle: it is not the living that go
        third = cluster.add_node(num_cpus=1, num_gpus=1)
        wait_until(lambda: at_work().count(third.node_id) == 2, about=progress.lines)
        cluster.remove_node(third, allow_graceful=False)
        wait_until(lambda: len(at_work()) == 2, about=progress.lines)
        assert set(at_work()) == {second.node_id}


def sweep_config(folder: Path, **changes: Any) -> Any:
    from rlhf_ray.config import SearchConfig

    settings = {
        "gamma": (0.9,), "epsilon": (0.1,), "tuning_cost_weight": (0.0, 0.05),
        "switch_cost_weight": (0.001,), "episodes": 24, "horizon": 3, "steps": 2, "batch_size": 8,
        "judge_replicas": 2, "stages_in_flight": 2, "storage_path": str(folder),
    }  # fmt: skip
    return SearchConfig(**{**settings, **changes})


def node_lost_in_sweep(folder: Path) -> None:
    from sweep_files import small_suite

    from rlhf_ray.sweep.search import search

    cluster = started_cluster(num_cpus=0)
    node = cluster.add_node(num_cpus=3)
    progress = Lines()
    with ThreadPoolExecutor(1) as pool:
        # more of everything than there is room for
        asked = sweep_config(folder / "a", num_workers=8, concurrent_trials=8, env_runners=1)
        found = pool.submit(search, small_suite(), asked, progress=progress)
        wait_until(lambda: len(list((folder / "a" / "tree").rglob("*.json"))) > 10, 200)
        cluster.remove_node(node, allow_graceful=False)
        time.sleep(3)
        cluster.add_node(num_cpus=2)
        result = found.result(300)
    assert result.finished, result.failures
    assert progress.said("2 workers instead of 8") and progress.said("trials at once instead of 8")
    undisturbed = search(small_suite(), sweep_config(folder / "b", env_runners=1))
    assert result.table().equals(undisturbed.table())


def head_lost(folder: Path) -> None:
    from ray.cluster_utils import Cluster

    from rlhf_ray.sweep.results import SearchResult

    words = [sys.executable, __file__, "a_sweep", str(folder)]
    for attempt in range(2):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 3})
        cluster.add_node(num_cpus=1)
        driver = subprocess.Popen(words, env={**os.environ, "RAY_ADDRESS": cluster.address})
        if attempt == 0:
            wait_until(lambda: len(list((folder / "tree").rglob("*.json"))) > 10, 200)
            for node in list(cluster.worker_nodes):
                cluster.remove_node(node, allow_graceful=False)
            cluster.remove_node(cluster.head_node, allow_graceful=False)
            assert driver.wait(150) != 0
        else:
            assert driver.wait(250) == 0
            cluster.shutdown()
    assert SearchResult.load(folder / "mine").finished


def a_sweep(folder: Path) -> None:
    from sweep_files import small_suite

    from rlhf_ray.sweep.search import search

    assert search(small_suite(), sweep_config(folder, name="mine")).finished


if __name__ == "__main__":
    globals()[sys.argv[1]](Path(sys.argv[2]))
    import ray

    ray.shutdown()  # before the cluster ends: its loss would end this process with an error
