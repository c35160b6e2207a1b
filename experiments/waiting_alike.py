"""How many stages of the same shape wait for a worker at once, in a sweep.

    python experiments/waiting_alike.py --suite digits

What one worker could carry out together (`batched_stages.py`) are stages of one operation on one
set of levels, on whatever task, that wait at the same time. Counted is, whenever the worker takes a
stage of training steps, how many waiting ones could have been taken with it, itself included: over
the whole default sweep of a suite, with its schedule, its baselines and four trials at once. There
is one worker, on a CPU: it is slow, and more wait for it than for several, or for a GPU. Writes
waiting_alike.md.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

import ray

import rlhf_ray as rr

FILE = "WAITING_ALIKE_FILE"


def watch() -> None:
    """Has a process write down what waits whenever its tree hands a stage to a worker."""
    from rlhf_ray.operations import Train
    from rlhf_ray.tree.dispatch import Dispatcher, Job, Worker

    def shape(job: Job) -> str:
        last = job.request.path[-1:] if job.request.kind == "stage" else ()
        if not last or type(last[0].operation) is not Train:
            return ""
        return json.dumps([last[0].operation.settings(), last[0].levels], sort_keys=True)

    plain = Dispatcher._run

    async def run(self: Dispatcher, worker: Worker, job: Job) -> None:
        if mine := shape(job):
            alike = 1 + sum(shape(other) == mine for other in self.waiting)
            with open(os.environ[FILE], "a") as file:
                file.write(f"{alike} {1 + len(self.waiting)}\n")
        await plain(self, worker, job)

    Dispatcher._run = run  # type: ignore[method-assign]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", default="digits")
    suite = parser.parse_args().suite
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "waiting")
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={"worker_process_setup_hook": watch, "env_vars": {FILE: str(file)}},
        )
        made = rr.load_suite(suite)
        config = rr.SearchConfig(storage_path=folder, num_workers=1, concurrent_trials=4)
        rr.search(made, config, progress=rr.Terminal())
        ray.shutdown()
        pairs = [tuple(map(int, line.split())) for line in file.read_text().splitlines()]
    alike, waiting = zip(*pairs, strict=True)
    counts = Counter(alike)
    lines = ["| alike, itself included | share of stages |", "| --- | --- |"]
    lines += [f"| {n} | {counts[n] / len(alike):.1%} |" for n in sorted(counts)]
    lines += ["", f"`{suite}`: {len(alike)} stages of training steps; {statistics.mean(alike):.2f} "
              f"alike and {statistics.mean(waiting):.1f} of any kind waiting on average, itself "
              "included. Made by waiting_alike.py."]  # fmt: skip
    Path(__file__).with_suffix(".md").write_text("\n".join(lines) + "\n")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
