"""What a job takes along: the package's sources, the user's suite, and the versions used here.

Never data, storage or version control: only what is named here goes into the folder that Ray
uploads.
"""

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path

import rlhf_ray
from rlhf_ray.errors import InputError

MB = 10**6

_LEFT_OUT = re.compile(r"\..*|__pycache__|.*\.py[cod]|.*\.egg-info|rlhf_runs")
"""Names of files and folders that are never uploaded."""


@dataclass(frozen=True, kw_only=True)
class Staged:
    """What a folder to be uploaded holds.

    Attributes:
        n_files: in it.
        size_bytes: of them all, before they are packed.
        elsewhere: the suite's module, if the cluster must have it installed; else None.
    """

    n_files: int
    size_bytes: int
    elsewhere: str | None = None


def stage(
    folder: Path,
    *,
    suite: str | None = None,
    include: Sequence[str] = (),
    leave_out: Sequence[Path] = (),
    limit_bytes: int = 100 * MB,
) -> Staged:
    """Copies what a job needs into a folder.

    Args:
        folder: empty; becomes the job's working directory.
        suite: of the launch flags; the module of "package.module:function" is taken along (its
            whole top-level package) where it lies in the current folder.
        include: further files and folders below the current one.
        leave_out: folders that are not taken along wherever they lie (data, storage).
        limit_bytes: bound on the sum of the file sizes.

    Raises:
        InputError: something is missing, lies outside the current folder, or all is too large.
    """
    here = Path.cwd().resolve()
    package = Path(rlhf_ray.__file__).parent.resolve()
    files = {Path("rlhf_ray") / name: package / name for name in _files(package, ())}
    own, elsewhere = _suite_path(suite, here)
    for path in ([own] if own else []) + [_included(name, here) for name in include]:
        found = _files(path, leave_out) if path.is_dir() else [Path()]
        own_files = {path.relative_to(here) / name: path / name for name in found}
        for file in own_files.values():
            _check_link(file, here, leave_out)
        files |= own_files
    _check_size(files, limit_bytes)
    for name, source in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    _write_metadata(folder)
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return Staged(n_files=len(sizes), size_bytes=sum(sizes), elsewhere=elsewhere)


def versions_here() -> dict[str, str]:
    """What must agree between this machine and the cluster: Python (major.minor), Ray, torch."""
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "ray": public(version("ray")),
        "torch": public(version("torch")),
    }


def pinned() -> list[str]:
    """The package's requirements as they are installed here; Ray must be the cluster's own."""
    names = [
        match[0]
        for requirement in distribution("rlhf_ray").requires or []
        if "extra ==" not in requirement and (match := re.match(r"[\w.-]+", requirement))
    ]
    return [f"{name}=={public(version(name))}" for name in names if name != "ray"]


def public(number: str) -> str:
    """A version without its local part: "2.15.0+cu130" -> "2.15.0"."""
    return number.partition("+")[0]


def _files(folder: Path, leave_out: Sequence[Path]) -> Iterator[Path]:
    """Files below a folder, relative to it; links to folders are not followed."""
    for at, folders, names in os.walk(folder):
        kept = [name for name in folders if not _LEFT_OUT.fullmatch(name)]
        folders[:] = sorted(name for name in kept if (Path(at) / name).resolve() not in leave_out)
        for name in sorted(names):
            if not _LEFT_OUT.fullmatch(name):
                yield (Path(at) / name).relative_to(folder)


def _check_link(file: Path, here: Path, leave_out: Sequence[Path]) -> None:
    """Raises InputError unless a file, if it is a link, leads to one that may be uploaded."""
    target = file.resolve()
    if target == file:
        return
    inside = target.is_file() and target.is_relative_to(here)
    hidden = inside and any(map(_LEFT_OUT.fullmatch, target.relative_to(here).parts))
    if not inside or hidden or any(target.is_relative_to(folder) for folder in leave_out):
        raise InputError(
            "links must lead to files of the current folder that may be uploaded, got "
            f"{str(file)!r}, which leads to {str(target)!r}. Copy the file."
        )


def _suite_path(suite: str | None, here: Path) -> tuple[Path | None, str | None]:
    """Where the suite's top-level module lies, or its name if it is installed elsewhere."""
    if suite is None or ":" not in suite:
        return None, None
    top = suite.partition(":")[0].partition(".")[0]
    # as Python looks: a package, a module, what is installed, a folder without an __init__.py
    places = {here / top / "__init__.py": here / top, here / f"{top}.py": here / f"{top}.py"}
    for file, path in places.items():
        if top.isidentifier() and file.exists():
            return path, None
    spec = importlib.util.find_spec(top) if top.isidentifier() else None
    if top.isidentifier() and (here / top).is_dir() and (spec is None or spec.origin is None):
        return here / top, None
    if spec is None:
        raise InputError(
            f"the suite's module must exist, got {suite!r} and no module {top!r}. Start in the "
            "folder that holds it, or install it here and on the cluster."
        )
    return None, top


def _included(name: str, here: Path) -> Path:
    path = (here / name).resolve()
    if not path.is_relative_to(here):
        raise InputError(f"include must lie in the current folder, got include={name!r}.")
    if not path.exists():
        raise InputError(f"include must be a file or folder that exists, got include={name!r}.")
    return path


def _check_size(files: dict[Path, Path], limit_bytes: int) -> None:
    sizes = {name: source.stat().st_size for name, source in files.items()}
    total = sum(sizes.values())
    if total > limit_bytes:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        shown = ", ".join(f"{name} ({sizes[name] / MB:.1f} MB)" for name in largest)
        raise InputError(
            f"what is uploaded must be at most {limit_bytes / MB:g} MB (--max-upload-mb), got "
            f"{total / MB:.1f} MB, most of it {shown}. Put data where all nodes see it."
        )


def _write_metadata(folder: Path) -> None:
    """Lets the cluster tell this package's version and requirements, installed there or not."""
    number = version("rlhf_ray")
    target = folder / f"rlhf_ray-{number}.dist-info"
    target.mkdir()
    requires = [f"Requires-Dist: {each}" for each in distribution("rlhf_ray").requires or []]
    lines = ["Metadata-Version: 2.1", "Name: rlhf_ray", f"Version: {number}", *requires, ""]
    (target / "METADATA").write_text("\n".join(lines), encoding="utf-8")
