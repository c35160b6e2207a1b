"""What a submitted job runs on the cluster: looks at the versions there, then launches the sweep.

`python -m rlhf_ray.submission.job python=3.11 ray=2.60.0 torch=2.15.0 -- <launch flags>`
"""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version

from rlhf_ray.commands import command_line
from rlhf_ray.errors import InputError
from rlhf_ray.submission.staging import public, versions_here

_MARK = "rlhf_ray sweep: "
"""Begins the line of a job's log that names the sweep's folder."""


def entrypoint(expected: Mapping[str, str], flags: Sequence[str]) -> str:
    """The shell command of a job.

    Args:
        expected: versions that the cluster must have; none: whatever it has will do.
        flags: of the launch command.
    """
    versions = [f"{name}={number}" for name, number in expected.items()]
    return shlex.join(["python", "-m", "rlhf_ray.submission.job", *versions, "--", *flags])


def sweep_in(line: str) -> str | None:
    """The sweep that a line of a job's log names, or None.

    The cluster's word: it is shown, and a folder here is named after it.
    """
    match = re.fullmatch(rf"{_MARK}([^/\\\s.][^/\\]*)", line)  # no dot at its begin, as by launch
    return match[1] if match and match[1].isprintable() else None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the job; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    at = arguments.index("--")
    expected = dict(word.split("=", 1) for word in arguments[:at])
    return command_line.run(lambda: _run(expected, arguments[at + 1 :]))


def _run(expected: Mapping[str, str], flags: list[str]) -> int:
    check_versions(expected)
    from rlhf_ray import launch

    return launch.main(flags, on_sweep=_tell)


def check_versions(expected: Mapping[str, str]) -> None:
    """Holds the versions of this machine against those of the one that submitted.

    Raises:
        InputError: they differ.
    """
    wrong = []
    for name, number in expected.items():
        there = versions_here()["python"] if name == "python" else _installed(name)
        if there != number:
            wrong.append(f"{name} {there} there and {number} here")
    if wrong:
        raise InputError(
            f"the cluster must have the versions of the machine that submits, got "
            f"{', '.join(wrong)}. Install the same on both, let --pip install the packages, or "
            "take the cluster's with --any-versions."
        )


def _installed(name: str) -> str:
    try:
        return public(version(name))
    except PackageNotFoundError:
        return "none"


def _tell(sweep: str) -> None:
    print(_MARK + sweep, flush=True)


if __name__ == "__main__":
    sys.exit(main())
