"""The package's exception family, and how bad names are answered.

Every message has the form `<what must hold>, got <name=value>. <fix, or the nearest valid name>.`
"""

import difflib
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path


class RlhfRayError(Exception):
    """Base of every error this package raises on purpose."""


class InputError(RlhfRayError, ValueError):
    """Something the user gave cannot be worked with; raised before any work starts."""


class StageError(RlhfRayError, RuntimeError):
    """A stage could not be carried out (a worker lost too often, an operation that raised)."""


class FailedStageError(StageError):
    """A stage fails by itself, whoever carries it out: its operation raises, or kills its worker.

    A search counts it as a diverged stage; other kinds of `StageError` end it.
    """


class FullDeviceError(FailedStageError):
    """A stage found no memory on a GPU; tried again later it may, if others use that GPU, too."""


class LostProcessError(RlhfRayError, RuntimeError):
    """A process that a trial needs was lost with its node, or killed: the trial starts again."""


class StorageError(RlhfRayError, RuntimeError):
    """What lies under the storage path cannot be read or written as it should."""


def unknown_name(what: str, name: str, valid: Iterable[str]) -> InputError:
    """Error for a name that is not among the valid ones, with the nearest valid name.

    Args:
        what: what is being named, in the user's words ("suite", "task", "algorithm").
        name: the name that was given.
        valid: the names that exist.

    Returns:
        The error, for the caller to raise.
    """
    names = sorted(valid)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    shown = ", ".join(names[:12]) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")
    hint = f"Did you mean {near[0]!r}?" if near else f"Valid: {shown}."
    return InputError(f"{what} must be one that exists, got {what}={name!r}. {hint}")


def in_one_line(error: BaseException) -> str:
    """An error of a user's code in one line: its kind, what it says, and where it was raised."""
    line = (str(error).splitlines() or [""])[0]
    installed = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    others = (str(Path(__file__).parent), *installed, "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__)
              if not frame.filename.startswith(others)]  # fmt: skip
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {line}{where}"


def check_whole(name: str, value: object, *, at_least: int) -> None:
    """Raises InputError unless a setting's value is a whole number of some size."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{name} must be a whole number, got {name}={value!r}.")
    if value < at_least:
        raise InputError(f"{name} must be at least {at_least}, got {name}={value}.")
