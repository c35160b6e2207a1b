"""How large and how quick the results page is with 1, 16 and 500 trials.

    python experiments/report_speed.py

Made-up sweeps (96 episodes, 12 roll-outs per trial; uniformly drawn settings). Per size: the file;
seconds of processor time to write it the first time, and again when one more trial has ended (as a
sweep does); in Chromium, without GPU, seconds from opening the file until the table and the front
answer, until all charts are drawn, and how long the page keeps its thread busy. Median (least to
most) of 5. Writes report_speed.md.
"""

import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the made-up sweeps and the browser

from browser import as_device, browser
from report_sweeps import write_made_up_sweep, write_trial

from rlhf_ray.progress import NO_PROGRESS
from rlhf_ray.report.gathering import Gatherer
from rlhf_ray.report.live import LivePage, write_report
from rlhf_ray.storage import Storage, open_storage

SIZES = (1, 16, 500)
REPEATS = 5


def main() -> None:
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        storage = open_storage(f"{scratch}/runs")
        with browser(Path(scratch) / "profile") as driver:
            as_device(driver, 1440)
            rows = [measured(storage, driver, n) for n in SIZES]
        about = f"Chromium {driver.capabilities['browserVersion']}"
    names = ("trials", "file, MB", "first writing, s", "next writing, s", "usable after, s",
             "drawn after, s", "page's own time, s")  # fmt: skip
    lines = [" | ".join(names), " | ".join("---" for _ in names), *(" | ".join(r) for r in rows)]
    machine = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}"
    made = f"Made by report_speed.py ({machine}, plotly {version('plotly')}, {about})."
    text = "\n".join(f"| {line} |" for line in lines) + f"\n\n{made}\n"
    Path(__file__).with_suffix(".md").write_text(text)
    sys.stdout.write(text)


def measured(storage: Storage, driver, n_trials: int) -> tuple[str, ...]:
    """A row of the table."""
    name = f"of-{n_trials}"
    write_made_up_sweep(storage, name, n_trials=n_trials, continuous=True)
    first = [_seconds(lambda: write_report(storage, name)) for _ in range(REPEATS)]
    page = LivePage(storage, name, NO_PROGRESS)
    page.write()
    trial = Gatherer(storage, name).gather()["trials"][0]
    planned = {key: trial[key] for key in ("name", "values")}
    again = []
    for i in range(REPEATS):
        write_trial(storage, name, planned, i)
        again.append(_seconds(page.write))
    opened = [_opened(driver, f"{storage.local_path(name)}/report.html") for _ in range(REPEATS)]
    size = (storage.size_bytes(f"{name}/report.html") or 0) / 1e6
    columns = [first, again, *zip(*opened, strict=True)]
    return (str(n_trials), f"{size:.2f}", *(_summary(values) for values in columns))


def _seconds(act: Callable[[], object]) -> float:
    began = time.process_time()
    act()
    return time.process_time() - began


def _opened(driver, file: str) -> tuple[float, float, float]:
    driver.get("about:blank")
    driver.execute_cdp_cmd("Performance.enable", {})
    before = _busy(driver)
    driver.get(f"file://{file}")
    while not driver.execute_script("return document.documentElement.dataset.ready"):
        time.sleep(0.02)
    reached = driver.execute_script("return document.documentElement.dataset")
    return int(reached["usable"]) / 1000, int(reached["ready"]) / 1000, _busy(driver) - before


def _busy(driver) -> float:
    metrics = driver.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    return next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")


def _summary(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
