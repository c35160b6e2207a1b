import sys
import types

import pytest

from rlhf_ray import trackers
from rlhf_ray.config import SearchConfig
from rlhf_ray.errors import InputError
from rlhf_ray.trackers import check_extras, tracker_callbacks


class FakeCallback:
    """Stands in for a callback of Tune's, where the tracker's package is not installed."""

    refuses: Exception | None = None

    def __init__(self, *values, **names):
        self.values, self.names = values, names

    def setup(self):
        if self.refuses is not None:
            raise self.refuses


@pytest.fixture
def fakes(monkeypatch):
    """Both trackers, without their packages and without a network."""
    found = {}
    for name, attribute in (("mlflow", "MLflowLoggerCallback"), ("wandb", "WandbLoggerCallback")):
        found[name] = type(attribute, (FakeCallback,), {})
        module = types.SimpleNamespace(**{attribute: found[name]})
        monkeypatch.setitem(sys.modules, f"ray.air.integrations.{name}", module)
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    return found


@pytest.mark.parametrize(
    ("setting", "value", "extra"),
    [
        ("mlflow", "./mlruns", "mlflow"),
        ("wandb", "tuning", "wandb"),
        ("dashboard", True, "cluster"),
    ],
)
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    monkeypatch, setting, value, extra
):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=rf"pip install 'rlhf_ray\[{extra}\]'"):
        check_extras(SearchConfig(**{setting: value}))
    check_extras(SearchConfig())


@pytest.mark.parametrize(
    "uri", ["https://ann:s3cret@host/mlflow", "https://host/mlflow?token=s3cret"]
)
def test_a_tracking_uri_with_a_secret_is_refused_and_not_shown(fakes, uri):
    with pytest.raises(InputError, match="MLFLOW_TRACKING_PASSWORD") as raised:
        check_extras(SearchConfig(mlflow=uri))
    assert "s3cret" not in str(raised.value)


def test_an_empty_name_is_refused(fakes):
    with pytest.raises(InputError, match="wandb must not be empty"):
        check_extras(SearchConfig(wandb=""))


def test_trackers_are_tunes_own_callbacks_under_the_sweeps_name(fakes):
    config = SearchConfig(mlflow="http://127.0.0.1:5000", wandb="tuning")
    check_extras(config)
    found = tracker_callbacks(config, "digits-1")
    mlflow, wandb = found["mlflow"], found["wandb"]
    assert type(mlflow) is fakes["mlflow"]
    assert (mlflow.values, mlflow.names) == (
        ("http://127.0.0.1:5000",),
        {"experiment_name": "digits-1"},
    )
    assert type(wandb) is fakes["wandb"]
    assert wandb.names == {"project": "tuning", "group": "digits-1"}
    assert tracker_callbacks(SearchConfig(), "digits-1") == {}


def test_a_tracker_that_does_not_answer_is_bad_input(fakes):
    fakes["wandb"].refuses = ValueError("No WandB API key found. Set WANDB_API_KEY\nmore")
    with pytest.raises(InputError, match="got wandb='tuning': No WandB API key found"):
        tracker_callbacks(SearchConfig(wandb="tuning"), "digits-1")


def test_where_results_are_shown_does_not_make_another_sweep():
    config = SearchConfig(mlflow="./mlruns", wandb="tuning", dashboard=True)
    assert config.digest() == SearchConfig().digest()
