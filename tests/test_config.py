import json
import math
import os
from dataclasses import fields, replace
from pathlib import Path

import pytest

from rlhf_ray.config import SWEPT, SearchConfig, check_observation, with_defaults
from rlhf_ray.errors import InputError
from rlhf_ray.process import RewardWeights


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got gamma=1.5"),
        ({"gamma": (0.9, math.nan)}, r"gamma must be in \[0, 1\], got gamma=nan"),
        ({"epsilon": -0.1}, r"epsilon must be in \[0, 1\]"),
        ({"epsilon": ()}, "epsilon must have at least one value"),
        ({"gamma": (0.9, 0.9)}, "gamma must name each value once"),
        ({"gamma": "high"}, "gamma must be in"),
        ({"tuning_cost_weight": math.inf}, "tuning_cost_weight must be finite and >= 0"),
        ({"switch_cost_weight": (-1.0,)}, "switch_cost_weight must be finite and >= 0"),
        ({"episodes": 0}, "episodes must be at least 1, got episodes=0"),
        ({"episodes": 2.5}, "episodes must be a whole number, got episodes=2.5"),
        ({"episodes": None}, "episodes must be a whole number, got episodes=None"),
        ({"horizon": True}, "horizon must be a whole number"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"num_workers": "many"}, "num_workers must be a whole number, got num_workers='many'"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"budget": 0.0}, "budget must be > 0"),
        ({"budget": "big"}, "budget must be a number, got budget='big'"),
        ({"weights_gb": math.inf}, "weights_gb must be > 0"),
        ({"utility_cost": math.nan}, "utility_cost must be at least 0"),
        ({"prefill": 4}, r"prefill must lie in \[0, 3\]"),
        ({"optimizer": "adamw"}, "optimizer must be one that exists.*Did you mean 'adam'"),
        ({"start": "last"}, "start must be one that exists"),
        ({"algorithm": "dqm"}, "algorithm must be one that exists.*Did you mean 'dqn'"),
        ({"observation": ("figures", "colour")}, "observation group must be one that exists"),
        ({"observation": ("tabular", "level")}, "'tabular' stands alone"),
        ({"observation": None}, r"observation must be strings, got observation=\(None,\)"),
        ({"algorithm": None}, "algorithm must be a string, got algorithm=None"),
        ({"baselines": None}, r"baselines must be strings, got baselines=\(None,\)"),
        ({"schedule": "no"}, "schedule must be True or False, got schedule='no'"),
        ({"storage_path": None}, "storage_path must be a string, got storage_path=None"),
        ({"address": 6379}, "address must be a string, or None, got address=6379"),
        ({"rllib": ["lr=1"]}, r"rllib must be a mapping of names to values, got rllib=\['lr=1'\]"),
        ({"alpha": "x"}, "alpha must be a number, got alpha='x'"),
        ({"learning_rates": 0.1}, "learning_rates must be three numbers .*got learning_rates=0.1"),
        ({"learning_rates": ("a", 1, 2)}, "learning_rates must be three numbers"),
        ({"name": 3}, "name must be a string, or None, got name=3"),
        ({"alpha": 0.0}, r"alpha must lie in \(0, 1\], got alpha=0.0"),
        ({"only_operations": ("train_mod",)}, "operation must be .*Did you mean 'train_mid'"),
        ({"algorithm": "ppo", "epsilon": 0.1}, "epsilon must be left out for ppo.*entropy_coeff"),
        ({"algorithm": "ppo", "share_experience": True}, "share_experience must go.*Take dqn or"),
        ({"share": False, "share_experience": True}, "share_experience must go.*got.*share=False"),
        ({"learning_rates": (1e-3, 1e-2)}, "learning_rates must be three"),
        ({"learning_rates": (1e-2, 1e-3, 1e-1)}, r"learning_rates must ascend \(low, middle"),
        ({"share": False, "prefill": 1}, "share must be on.*got share=False, prefill=1"),
        ({"share": False, "replay_only": True}, "share must be on.*replay_only=True"),
        ({"learning_rates": (0.0, 1e-3, 1e-2)}, "learning_rate must be > 0"),
        ({"name": "../up"}, "name must be that of one folder"),
        ({"name": "tree"}, "name must be that of one folder"),
        ({"name": ".hidden"}, "name must be that of one folder"),
        ({"name": "a\nb"}, "name must be that of one folder"),
        ({"name": "x" * 101}, "name must be that of one folder"),
    ],
)
def test_bad_setting_is_refused_in_one_line(setting: dict[str, object], match: str) -> None:
    with pytest.raises(InputError, match=match) as caught:
        SearchConfig(**setting)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def test_one_value_counts_as_a_sweep_of_one() -> None:
    config = SearchConfig(gamma=0.5, epsilon=[0.1, 0.2], observation="figures")  # type: ignore[arg-type]
    assert config.gamma == (0.5,) and config.epsilon == (0.1, 0.2)
    assert config.observation == ("figures",)


def test_paths_count_as_strings() -> None:
    config = SearchConfig(storage_path=Path("a") / "b", mlflow=Path("c"))  # type: ignore[arg-type]
    assert (config.storage_path, config.mlflow) == (os.path.join("a", "b"), "c")


def test_words_stand_for_numbers_where_they_may() -> None:
    config = SearchConfig(num_workers="auto", concurrent_trials="auto", steps=None, budget=2)
    assert config.process_settings().budget == 2
    assert config.operations()[0].settings()["steps"] is None


def test_digest_is_of_what_is_computed_not_of_where() -> None:
    base = SearchConfig()
    for change in (
        {"storage_path": "elsewhere"}, {"name": "n"}, {"num_workers": 3}, {"address": "auto"},
        {"concurrent_trials": 1}, {"baselines": ("all",)}, {"cache_gb": 0.0},
        {"cuda_graphs": False},
    ):  # fmt: skip
        assert replace(base, **change).digest() == base.digest()
    for change in ({"seed": 1}, {"gamma": (0.9,)}, {"episodes": 5}, {"rllib": {"lr": 1e-4}},
                   {"share_experience": True}):  # fmt: skip
        assert replace(base, **change).digest() != base.digest()


def test_records_hold_no_secrets_of_the_storage() -> None:
    config = SearchConfig(storage_path="s3://key:secret@bucket/runs?secret_key=hidden")
    text = json.dumps(config.as_json())
    assert "secret" not in text and "hidden" not in text and "s3://bucket/runs" in text
    assert config.digest() == SearchConfig().digest()


def test_suite_defaults_fill_what_is_left_at_the_default() -> None:
    config = with_defaults(
        SearchConfig(horizon=7), {"horizon": 3, "steps": None, "epsilon": (0.3,)}
    )
    assert (config.horizon, config.steps, config.epsilon) == (7, None, (0.3,))
    with pytest.raises(InputError, match=r"suite default must be one.*Did you mean 'episodes'"):
        with_defaults(SearchConfig(), {"episode": 3})
    with pytest.raises(InputError, match="horizon must be at least 1"):
        with_defaults(SearchConfig(), {"horizon": 0})


def test_every_field_is_documented() -> None:
    documented = SearchConfig.__doc__ or ""
    assert [f.name for f in fields(SearchConfig) if f"        {f.name}: " not in documented] == []
    assert set(SWEPT) <= {f.name for f in fields(SearchConfig)}


def test_derived_settings_carry_the_weights() -> None:
    weights = RewardWeights(tuning_cost=0.5)
    settings = SearchConfig(horizon=2, cost="seconds").process_settings(weights)
    assert (settings.weights, settings.horizon, settings.cost) == (weights, 2, "seconds")
    assert SearchConfig(cache_gb=0.5, val_size=9).engine_settings().cache_bytes == 2**29


def test_q_learning_wants_an_observation_of_finitely_many_states() -> None:
    with pytest.raises(InputError, match=r"got observation=all\. Add --observation tabular"):
        check_observation(SearchConfig(algorithm="q-learning"))
    for observation in (("tabular",), ("prefix",), ("tabular", "prefix")):
        check_observation(SearchConfig(algorithm="q-learning", observation=observation))
    check_observation(SearchConfig())


def test_epsilon_of_an_algorithm_without_one_is_not_swept() -> None:
    config = SearchConfig(algorithm="ppo")
    assert config.swept["epsilon"] == (0.0,)
    assert config.swept["gamma"] == config.gamma
    assert with_defaults(config, {"epsilon": (0.1,)}).swept["epsilon"] == (0.0,)


def test_only_operations_leaves_those_and_stop() -> None:
    config = SearchConfig(only_operations=("train_mid",))
    assert [operation.name for operation in config.operations()] == ["train_mid", "stop"]
    assert len(SearchConfig().operations()) == 8
