"""What TensorBoard shows of a sweep: few metrics under names of our own, and the swept settings.

Per trial, over the episodes played:

    train/return       mean undiscounted return of the last 32 episodes (under the trial's weights)
    train/epsilon      share of random actions
    stages/logical     stages asked for so far
    stages/distinct    distinct stages among them
    stages/executed    stages carried out for this trial, not for another before
    judge/<metric>     at the end, on the val tasks: judge/accuracy, say
    judge/cost         tuning cost, full stages
    judge/switches     levels of distance handed over
    judge/stages       stages carried out per task
    judge/utility      what the sweep is judged by

HParams hold gamma, epsilon and both weights against the judge/ metrics.
"""

from typing import Any

from ray.tune.logger import LoggerCallback
from tensorboardX import SummaryWriter
from tensorboardX.summary import hparams

from rlhf_ray.config import SWEPT

SHOWN = ("train/", "stages/", "judge/")
"""Begins the names of the metrics that are written."""


class TensorBoardLog(LoggerCallback):
    """Writes each trial's events into its folder under the sweep's `tune/`.

    In place of Tune's own logger, which prefixes every name and adds ten of its own. Ray brings
    tensorboardX.
    """

    _SAVED_FILE_TEMPLATES = ("events.out.tfevents.*",)

    def __init__(self) -> None:
        self._writers: dict[Any, SummaryWriter] = {}
        self._judged: dict[Any, dict[str, float]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_writers": {}, "_judged": {}}  # open files stay with this process

    def log_trial_start(self, trial: Any) -> None:
        """Opens the trial's file; a trial that starts again gets another."""
        if trial in self._writers:
            self._writers.pop(trial).close()
        trial.init_local_path()
        self._writers[trial] = SummaryWriter(trial.local_path, flush_secs=30)

    def log_trial_result(self, iteration: int, trial: Any, result: dict[str, Any]) -> None:
        """Writes what the trial reports."""
        if trial not in self._writers:
            self.log_trial_start(trial)
        shown = {name: float(v) for name, v in result.items() if name.startswith(SHOWN)}
        for name, value in shown.items():
            self._writers[trial].add_scalar(name, value, global_step=result["episodes"])
        self._judged[trial] = {n: v for n, v in shown.items() if n.startswith("judge/")}
        self._writers[trial].flush()

    def log_trial_end(self, trial: Any, failed: bool = False) -> None:
        """Writes the swept settings beside the judged figures, and closes the file."""
        writer = self._writers.pop(trial, None)
        judged = self._judged.pop(trial, {})
        if writer is None:
            return
        if judged:
            swept = {name: trial.config[name] for name in SWEPT}
            for summary in hparams(hparam_dict=swept, metric_dict=judged):
                assert writer.file_writer
                writer.file_writer.add_summary(summary)
        writer.close()
