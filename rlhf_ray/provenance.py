"""What records hold about the software that made them."""

import subprocess
from importlib.metadata import PackageNotFoundError, version

import torch


def library_versions() -> dict[str, str]:
    """Versions of this package and of those its figures depend on."""
    found = {"torch": str(torch.__version__)}
    for package in ("rlhf_ray", "ray", "torchvision", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_revision() -> str | None:
    """The revision of the working directory, "-dirty" if it is changed; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
