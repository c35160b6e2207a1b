import cloudpickle
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf_ray.tensorboard import TensorBoardLog

SWEPT = {"gamma": 0.9, "epsilon": 0.05, "tuning_cost_weight": 0.01, "switch_cost_weight": 0.001}


class Trial:
    def __init__(self, config, local_path):
        self.config, self.local_path = config, local_path

    def init_local_path(self): ...


def result(episodes: int, **judged: float) -> dict:
    return {"episodes": episodes, "train/return": episodes / 10, "train/epsilon": 0.5,
            "stages/logical": 3, "time_this_iter_s": 1.0, "config": {"gamma": 0.9},
            "done": bool(judged), **judged}  # fmt: skip


def test_few_names_of_our_own_over_episodes_and_the_swept_settings(tmp_path):
    trial = Trial({"trial": "000", **SWEPT}, str(tmp_path))
    log = TensorBoardLog()
    log.log_trial_start(trial)
    log.log_trial_result(1, trial, result(4))
    log.log_trial_result(2, trial, result(8, **{"judge/accuracy": 0.9, "judge/cost": 1.5}))
    log.log_trial_end(trial)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/return", "train/epsilon", "stages/logical", "judge/accuracy", "judge/cost"
    }  # fmt: skip
    assert [(e.step, round(e.value, 3)) for e in events.Scalars("train/return")] == [
        (4, 0.4), (8, 0.8)
    ]  # fmt: skip
    hparams = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    for name in SWEPT:
        assert name.encode() in hparams
    experiment = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    assert b"judge/accuracy" in experiment


def test_a_trial_that_fails_before_its_first_result_is_closed(tmp_path):
    trial = Trial(SWEPT, str(tmp_path))
    log = TensorBoardLog()
    log.log_trial_end(trial, failed=True)
    log.log_trial_start(trial)
    log.log_trial_end(trial, failed=True)
    assert EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"] == []
    assert cloudpickle.loads(cloudpickle.dumps(log))._writers == {}
