import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

from rlhf_ray.provenance import git_revision, library_versions


def test_versions_are_those_installed() -> None:
    found = library_versions()
    assert found["ray"] == version("ray") and found["rlhf_ray"] == version("rlhf_ray")
    assert set(found) == {"torch", "rlhf_ray", "ray", "torchvision", "numpy"}


def test_revision_says_when_the_tree_is_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_revision() is None
    (tmp_path / "file").write_text("a")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-qm", "one"]):
        subprocess.run(["git", *command], check=True)
    clean = git_revision()
    assert clean is not None and "dirty" not in clean
    (tmp_path / "file").write_text("b")
    assert git_revision() == f"{clean}-dirty"


def test_revision_without_git_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None
