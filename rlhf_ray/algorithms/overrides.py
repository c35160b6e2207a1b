"""Which of RLlib's settings the algorithms read, and what they may be. No Ray here.

All of RLlib's other settings are this package's own (gamma, lr, batch sizes), or have no effect on
learners that are.
"""

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any

from rlhf_ray.errors import InputError, unknown_name


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    return isinstance(value, Integral) or math.isfinite(value)


Range = tuple[str, Callable[[Any], bool]]
"""What a value must be, and whether one is."""

WHOLE: Range = (
    "a whole number >= 1",
    lambda x: is_number(x) and isinstance(x, Integral) and int(x) >= 1,
)
SHARE: Range = "a number in [0, 1]", lambda x: is_number(x) and 0 <= x <= 1
POSITIVE: Range = "a number > 0", lambda x: is_number(x) and x > 0
NOT_NEGATIVE: Range = "a number >= 0", lambda x: is_number(x) and x >= 0
BOUND: Range = "a number > 0 or None", lambda x: x is None or (is_number(x) and x > 0)

READ: Mapping[str, Mapping[str, Range]] = {
    "dqn": {
        "grad_clip": BOUND,
        "td_error_loss_fn": ("'huber' or 'mse'", lambda x: x in ("huber", "mse")),
    },
    "ppo": {
        "clip_param": POSITIVE,
        "entropy_coeff": NOT_NEGATIVE,
        "grad_clip": BOUND,
        "lambda_": SHARE,
        "minibatch_size": WHOLE,
        "num_epochs": WHOLE,
        "vf_loss_coeff": NOT_NEGATIVE,
    },
    "q-learning": {},
}
"""Algorithm -> the settings that it reads."""


def check_overrides(algorithm: str, overrides: Mapping[str, Any]) -> None:
    """Raises InputError unless RLlib settings are ones that an algorithm reads, in their range."""
    if algorithm not in READ:
        raise unknown_name("algorithm", algorithm, READ)
    read = READ[algorithm]
    for name, value in overrides.items():
        if name not in read:
            valid = f"Valid: {', '.join(read)}." if read else "It reads none."
            raise InputError(
                f"RLlib settings must be ones that {algorithm} reads, got {name!r}. {valid}"
            )
        requirement, holds = read[name]
        if not holds(value):
            raise InputError(f"{name} must be {requirement}, got {name}={value!r}.")
