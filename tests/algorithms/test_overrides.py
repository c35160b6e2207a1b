import math

import numpy as np
import pytest

from rlhf_ray.algorithms import ALGORITHMS
from rlhf_ray.algorithms.overrides import READ, check_overrides
from rlhf_ray.config import SearchConfig
from rlhf_ray.errors import InputError


def test_every_algorithm_says_what_it_reads() -> None:
    assert set(READ) == set(ALGORITHMS)


def test_the_help_names_all_that_is_read() -> None:
    text = SearchConfig.__doc__ or ""
    told = text[text.index("        rllib:") :]
    assert not {name for read in READ.values() for name in read if name not in told}


def test_settings_in_their_range_are_taken() -> None:
    check_overrides("ppo", {"lambda_": 1, "num_epochs": 3, "grad_clip": None, "clip_param": 0.1})
    check_overrides("dqn", {"grad_clip": 5, "td_error_loss_fn": "mse"})
    check_overrides("dqn", {"grad_clip": np.float32(0.5)})
    check_overrides("ppo", {"num_epochs": np.int64(2)})
    check_overrides("q-learning", {})


@pytest.mark.parametrize(
    ("algorithm", "name", "value", "match"),
    [
        ("ppo", "minibatch_size", 0, r"minibatch_size must be a whole number >= 1, got .*=0"),
        ("ppo", "num_epochs", 2.5, r"num_epochs must be a whole number >= 1, got num_epochs=2\.5"),
        ("ppo", "num_epochs", True, "num_epochs must be a whole number"),
        ("ppo", "lambda_", 5, r"lambda_ must be a number in \[0, 1\], got lambda_=5"),
        ("ppo", "clip_param", -1, "clip_param must be a number > 0"),
        ("ppo", "entropy_coeff", [[0, 0.1]], "entropy_coeff must be a number >= 0"),
        ("ppo", "lambda_", 10**400, "lambda_ must be a number"),
        ("dqm", "grad_clip", 1.0, "algorithm must be one that exists.*'dqn'"),
        ("ppo", "vf_loss_coeff", math.nan, "vf_loss_coeff must be a number >= 0"),
        ("ppo", "grad_clip", "x", "grad_clip must be a number > 0 or None, got grad_clip='x'"),
        ("dqn", "grad_clip", -1, "grad_clip must be a number > 0 or None"),
        ("dqn", "td_error_loss_fn", "hubr", "td_error_loss_fn must be 'huber' or 'mse'"),
        # RLlib's, but not read here: without effect, or at odds with what is set
        ("dqn", "explore", False, "RLlib settings must be ones that dqn reads, got 'explore'"),
        ("dqn", "gamma", 0.9, "Valid: grad_clip, td_error_loss_fn"),
        ("ppo", "evaluation_interval", 1, "must be ones that ppo reads"),
        (
            "q-learning",
            "grad_clip",
            1.0,
            "that q-learning reads, got 'grad_clip'. It reads none",
        ),
    ],
)
def test_others_are_refused(algorithm: str, name: str, value: object, match: str) -> None:
    with pytest.raises(InputError, match=match):
        check_overrides(algorithm, {name: value})
