"""Other trackers, by Tune's own callbacks: MLflow and Weights & Biases.

A run per trial, all runs of a sweep in one experiment (MLflow) or group (W&B) of its name; what
they are told are the names that `tensorboard` documents, beside Tune's own. Credentials come from
the trackers' own settings (MLFLOW_TRACKING_USERNAME, WANDB_API_KEY, `wandb login`), never from a
configuration, which is kept in records.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING

from rlhf_ray.config import SearchConfig
from rlhf_ray.errors import InputError
from rlhf_ray.uris import without_secrets

if TYPE_CHECKING:
    from ray.tune.logger import LoggerCallback

EXTRAS = {
    "mlflow": ("mlflow", "mlflow"),
    "wandb": ("wandb", "wandb"),
    "dashboard": ("aiohttp_cors", "cluster"),
}
"""Setting -> the module that it needs, and the extra of this package that brings it."""


def check_extras(config: SearchConfig) -> None:
    """Checks that what a configuration asks for besides is installed. Imports neither.

    Raises:
        InputError: a package is missing, or a tracker's address will not do.
    """
    check_no_password(config)
    for setting, (module, extra) in EXTRAS.items():
        value = getattr(config, setting)
        if value is None or value is False:
            continue
        if value == "":
            raise InputError(f"{setting} must not be empty, got {setting}=''. Or leave it out.")
        if find_spec(module) is None:
            raise InputError(
                f"{setting} must have its package installed, got {setting}={_shown(value)} and no "
                f"module {module!r}. Install it: pip install 'rlhf_ray[{extra}]'."
            )


def check_no_password(config: SearchConfig) -> None:
    """Raises InputError if a tracker's address holds a secret; needs no tracker installed."""
    given = config.mlflow or ""
    remote = "://" in given and not given.startswith("file:")
    if without_secrets(given) != given or (remote and "@" in given):
        raise InputError(
            "mlflow must be a URI without a user, password or query, as it is kept in records, got "
            "one with them. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN."
        )


def tracker_callbacks(config: SearchConfig, sweep: str) -> "dict[str, LoggerCallback]":
    """Tune's callbacks of the trackers that are asked for, by setting; each known to answer.

    Raises:
        InputError: a tracker does not answer, or takes nothing from this user.
    """
    callbacks: dict[str, LoggerCallback] = {}
    if config.mlflow is not None:
        from ray.air.integrations.mlflow import MLflowLoggerCallback

        callbacks["mlflow"] = MLflowLoggerCallback(config.mlflow, experiment_name=sweep)
    if config.wandb is not None:
        from ray.air.integrations.wandb import WandbLoggerCallback

        callbacks["wandb"] = WandbLoggerCallback(project=config.wandb, group=sweep)
    for setting, callback in callbacks.items():
        try:
            callback.setup()  # Tune does so again; here it says in time what is wrong
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            raise InputError(
                f"{setting} must name a tracker that answers, got "
                f"{setting}={_shown(getattr(config, setting))}: {reason}"
            ) from error
    return callbacks


def _shown(value: str | bool) -> str:
    return repr(without_secrets(value)) if isinstance(value, str) else str(value)
