"""Results on their way back: a sweep's folder as text in a job's log, and into a folder here.

On the cluster: `python -m rlhf_ray.submission.archive STORAGE_PATH SWEEP MAX_BYTES`. The tree of
stages lies beside the sweeps and stays where it is; so do Tune's pickles and the driver's lock.
"""

import base64
import binascii
import hashlib
import io
import re
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlhf_ray.commands import command_line
from rlhf_ray.errors import InputError, StorageError
from rlhf_ray.storage import Storage, is_plain, open_storage

_STAYS = re.compile(
    r".*\.(pkl|pickle|pt|pth|ckpt|npy)|(.*/)?(lock\.json|\..*)", re.IGNORECASE | re.DOTALL
)
"""Names of files that are not fetched, and never accepted: pickles, and what is of no use here."""

_LINE = 12_000
"""Bytes per line of text: Ray hands logs on in pieces of at most 20,000 characters."""

_BEGIN, _END = "rlhf_ray archive begins: ", "rlhf_ray archive ends"


def read_sweep(storage: Storage, sweep: str, limit_bytes: int) -> dict[str, bytes]:
    """The files of a sweep that can be fetched, by their names under the sweep's folder.

    Raises:
        InputError: there are none, or they are larger than the bound.
    """
    files = [file for file in storage.files(sweep) if not _STAYS.fullmatch(file.name)]
    if not files:
        raise InputError(f"a sweep must be there, got {sweep!r} under {storage.shown!r}.")
    _check_size(sum(file.size_bytes for file in files), limit_bytes)
    contents = {file.name: storage.read_bytes(file.name) for file in files}
    return {
        name.removeprefix(f"{sweep}/"): data
        for name, data in contents.items()
        if data is not None  # gone since it was listed
    }


def write_sweep(folder: Path, files: dict[str, bytes]) -> None:
    """Writes fetched files below a folder, and nowhere else.

    Args:
        folder: made if it is not there; files of the same names are replaced.
        files: relative POSIX path -> content.

    Raises:
        InputError: a name leads out of the folder, or is that of a pickle; nothing was written.
    """
    root = folder.resolve()
    for name in files:
        target = (root / name).resolve()
        out = not is_plain(name) or not target.is_relative_to(root)  # links may lead out
        if out or _STAYS.fullmatch(name):
            raise InputError(
                "a fetched file must lie in its folder and be no pickle, got "
                f"{name!r}. Nothing was written."
            )
    storage = open_storage(folder)
    for name, data in files.items():
        storage.write_bytes(name, data)


def as_text(files: dict[str, bytes]) -> Iterator[str]:
    """Lines that `from_text` reads back."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    data = packed.getvalue()
    yield f"{_BEGIN}{hashlib.sha256(data).hexdigest()}"
    for start in range(0, len(data), _LINE):
        yield base64.b64encode(data[start : start + _LINE]).decode()
    yield _END


def from_text(text: str, limit_bytes: int) -> dict[str, bytes]:
    """The files in a job's log.

    Args:
        text: the log; what stands before and after the archive is left aside.
        limit_bytes: bound on the sum of the unpacked sizes.

    Raises:
        StorageError: there is no whole archive in it.
        InputError: it is larger than the bound.
    """
    _, begins, rest = text.partition(_BEGIN)
    body, ends, _ = rest.partition(f"\n{_END}")
    digest, _, lines = body.partition("\n")
    try:
        data = b"".join(base64.b64decode(line, validate=True) for line in lines.split("\n"))
    except binascii.Error:
        data = b""
    if not (begins and ends) or hashlib.sha256(data).hexdigest() != digest.strip():
        raise StorageError("what is fetched must arrive whole, got a cut archive. Fetch again.")
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            _check_size(sum(info.file_size for info in archive.infolist()), limit_bytes)
            return {info.filename: _unpacked(archive, info) for info in archive.infolist()}
    except zipfile.BadZipFile as error:
        raise StorageError(f"what is fetched must be an archive, got none ({error}).") from error


def _unpacked(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """A member's content; a member that is longer than it says is not read to its end."""
    with archive.open(info) as stream:
        return stream.read(info.file_size)


def _check_size(total_bytes: int, limit_bytes: int) -> None:
    if total_bytes > limit_bytes:
        raise InputError(
            f"what is fetched must be at most {limit_bytes / 10**6:g} MB (--max-fetch-mb), got "
            f"{total_bytes / 10**6:.1f} MB. Raise the bound, or copy it from the storage."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a sweep's files as text; returns the exit status."""
    location, sweep, limit = sys.argv[1:] if argv is None else argv
    return command_line.run(lambda: _print_sweep(location, sweep, int(limit)))


def _print_sweep(location: str, sweep: str, limit_bytes: int) -> int:
    for line in as_text(read_sweep(open_storage(location), sweep, limit_bytes)):
        print(line)
    return command_line.OK


if __name__ == "__main__":
    sys.exit(main())
