"""One small store for everything durable: a local folder, NFS, S3 or GCS by the same code.

Object stores have no rename: readers must not rely on a file being whole, and verify checksums or
that JSON parses. What is cut counts as absent. (On local paths files do appear whole: `_write`.)

Nothing is synced to the disk (fsync). A process that is killed loses none of what it had written,
for the kernel holds it. After a power cut the last files may be missing or cut, which readers
notice; stages are carried out again then. A sync per stage would cost more than many a stage.
"""

import json
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import pyarrow as pa
from pyarrow import fs

from rlhf_ray.errors import InputError, StorageError
from rlhf_ray.uris import below, without_secrets

_PART = ".part"
"""Ends the names of local files that are being written; a killed writer leaves them behind."""


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of a store: its name, size and when it was written (seconds since 1970)."""

    name: str
    size_bytes: int
    modified_s: float


class Storage:
    """Named byte strings under one root. Picklable; safe to use from several threads.

    Names are relative POSIX paths ("tree/ab/abc.json") and cannot leave the root.

    Args:
        filesystem: any pyarrow filesystem.
        root: its folder that holds everything.
        shown: how messages name the root, free of secrets.
        uri: it was opened from, secrets and all; "" if from none.
    """

    def __init__(self, filesystem: fs.FileSystem, root: str, shown: str, *, uri: str = "") -> None:
        self._filesystem = filesystem
        self._uri = uri
        self._root = root.rstrip("/") or "/"
        self.shown = shown

    def __repr__(self) -> str:
        return f"Storage({self.shown!r})"

    @property
    def is_local(self) -> bool:
        """Whether files lie on a path of this machine (NFS included)."""
        return isinstance(self._filesystem, fs.LocalFileSystem)

    def local_path(self, name: str = "") -> Path | None:
        """Where a file or folder ("": the root) lies on this machine; None for object stores."""
        return Path(self._path(name)) if self.is_local else None

    def shown_path(self, name: str) -> str:
        """How messages name a file or folder, free of secrets; `open_storage` takes it again."""
        return below(self.shown, name)

    def opened(self, name: str) -> tuple[fs.FileSystem, str]:
        """The pyarrow filesystem and a path on it, for other libraries that write there."""
        return self._filesystem, self._path(name)

    @contextmanager
    def keyless(self) -> Iterator[fs.FileSystem]:
        """The filesystem, for a library that pickles it to a file: without the URI's S3 keys.

        In the body they stand in this process's environment, where its S3 client finds them.
        """
        parts = urlsplit(self._uri)
        if parts.scheme != "s3" or not parts.password:
            yield self._filesystem
            return
        keys = {
            "AWS_ACCESS_KEY_ID": unquote(parts.username or ""),
            "AWS_SECRET_ACCESS_KEY": unquote(parts.password),
        }
        before = {name: os.environ.get(name) for name in keys}
        os.environ |= keys
        try:
            bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
            yield fs.FileSystem.from_uri(urlunsplit(bare))[0]
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                os.environ |= {} if value is None else {name: value}

    def read_bytes(self, name: str) -> bytes | None:
        """A file's content, or None if there is none."""
        path = self._path(_checked(name))
        try:
            with self._filesystem.open_input_stream(path) as stream:
                return stream.read()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._error("read", name, error) from error

    def write_bytes(self, name: str, data: bytes) -> None:
        """Writes a file, replacing what it held.

        Raises:
            StorageError: it cannot be written.
        """
        try:
            self._write(self._path(_checked(name)), data)
        except OSError as error:
            raise self._error("written", name, error) from error

    def read_json(self, name: str) -> Any | None:
        """What `write_json` wrote, or None if the file is missing or cut."""
        data = self.read_bytes(name)
        try:
            return None if data is None else json.loads(data)
        except ValueError:
            return None

    def write_json(self, name: str, value: dict[str, Any] | list[Any]) -> None:
        """Writes indented JSON; an object or list, for a cut one of these never parses."""
        self.write_bytes(name, (json.dumps(value, indent=1) + "\n").encode())

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self._info(name).type == fs.FileType.File

    def size_bytes(self, name: str) -> int | None:
        """A file's size, or None if there is none."""
        info = self._info(name)
        return info.size if info.type == fs.FileType.File else None

    def files(self, folder: str = "") -> list[StoredFile]:
        """All files under a folder ("": all there are), by name; none if it does not exist."""
        strip = len(self._root.rstrip("/")) + 1
        files = [
            StoredFile(
                name=info.path[strip:],
                size_bytes=info.size or 0,
                modified_s=info.mtime.timestamp() if info.mtime else 0.0,
            )
            for info in self._entries(folder, recursive=True)
            if info.type == fs.FileType.File and not info.path.endswith(_PART)
        ]
        return sorted(files, key=lambda file: file.name)

    def folders(self, folder: str = "") -> list[str]:
        """Names of the folders right in a folder ("": the root), sorted; looks no deeper."""
        found = self._entries(folder, recursive=False)
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def list(self, folder: str = "") -> list[str]:
        """Names of all files under a folder ("": all there are), sorted."""
        return [file.name for file in self.files(folder)]

    def delete(self, name: str) -> None:
        """Deletes a file; nothing happens if there is none."""
        try:
            with suppress(FileNotFoundError):
                self._filesystem.delete_file(self._path(_checked(name)))
        except OSError as error:
            raise self._error("deleted", name, error) from error

    def delete_prefix(self, folder: str) -> None:
        """Deletes a folder (never the root) with all it holds; nothing happens if there is none."""
        try:
            with suppress(FileNotFoundError):
                self._filesystem.delete_dir(self._path(_checked(folder)))
        except OSError as error:
            raise self._error("deleted", folder, error) from error

    def check(self) -> None:
        """Writes a probe file, reads it back and deletes it.

        Raises:
            InputError: the path cannot be written or read.
        """
        name = f"probe-{uuid.uuid4().hex}"
        try:
            self.write_bytes(name, name.encode())
            back = self.read_bytes(name)
            self.delete(name)
        except StorageError as error:
            raise InputError(
                f"the storage path must be writable, got {self.shown!r}: {self._reason(error)}. "
                "Give another storage path."
            ) from error
        if back != name.encode():
            raise InputError(
                f"the storage path must give back what was written, got {self.shown!r}."
            )

    def _write(self, path: str, data: bytes) -> None:
        if not self.is_local:
            with self._filesystem.open_output_stream(path) as stream:
                stream.write(data)
            return
        # A kill while a file is rewritten would lose the old content too: rename where one can.
        part = f"{path}.{uuid.uuid4().hex[:12]}{_PART}"
        try:
            stream = self._filesystem.open_output_stream(part)
        except FileNotFoundError:
            self._filesystem.create_dir(os.path.dirname(path), recursive=True)
            stream = self._filesystem.open_output_stream(part)
        try:
            with stream:
                stream.write(data)
            self._filesystem.move(part, path)
        except OSError:
            with suppress(OSError):
                self._filesystem.delete_file(part)
            raise

    def _entries(self, folder: str, *, recursive: bool) -> Sequence[fs.FileInfo]:
        selector = fs.FileSelector(self._path(folder), recursive=recursive, allow_not_found=True)
        try:
            return self._filesystem.get_file_info(selector)
        except OSError as error:
            raise self._error("listed", folder, error) from error

    def _info(self, name: str) -> fs.FileInfo:
        try:
            return self._filesystem.get_file_info([self._path(_checked(name))])[0]
        except OSError as error:
            raise self._error("read", name, error) from error

    def _path(self, name: str) -> str:
        if not name:
            return self._root
        return f"{self._root.rstrip('/')}/{_checked(name)}"

    def _reason(self, error: StorageError) -> str:
        """Why a file cannot be had, without its name where the system's own words will do."""
        cause = error.__cause__
        if self.is_local and isinstance(cause, OSError) and cause.errno:
            return os.strerror(cause.errno)
        return _first_line(cause if isinstance(cause, Exception) else error)

    def _error(self, what: str, name: str, error: OSError) -> StorageError:
        reason = _first_line(error)
        return StorageError(f"{name!r} must be {what} under {self.shown!r}, got: {reason}.")


def open_storage(location: str | Path, *, check: bool = False) -> Storage:
    """Opens a storage path.

    Args:
        location: a local folder (made on first write), or a URI: s3://…, gs://…, file://….
        check: write, read and delete a probe file now.

    Raises:
        InputError: no such kind of location, or (with `check`) one that cannot be written.
    """
    text = str(location)
    shown = without_secrets(text)
    if not text or "\0" in text:
        raise InputError(f"the storage path must be a folder or a URI, got {shown!r}.")
    try:
        if "://" in text:
            filesystem, root = fs.FileSystem.from_uri(text)
            if not root:
                raise ValueError("it names no bucket")
        else:
            filesystem, root = fs.LocalFileSystem(), Path(text).expanduser().absolute().as_posix()
    except (pa.ArrowException, OSError, ValueError) as error:
        # pyarrow's reason may quote keys: given only where the URI holds nothing to hide
        reason = f" ({_first_line(error)})" if shown == text else ""
        raise InputError(
            "the storage path must be a folder or a URI that pyarrow.fs takes (s3://bucket/folder, "
            f"gs://bucket/folder), got {shown!r}{reason}."
        ) from (error if shown == text else None)
    uri = text if "://" in text else ""
    storage = Storage(filesystem, root, shown if uri else root, uri=uri)
    if check:
        storage.check()
    return storage


def parent_of(path: str | Path) -> tuple[Storage, str]:
    """The storage around a folder or file, and its name there.

    Args:
        path: a local path or a URI.

    Raises:
        InputError: no such kind of location.
    """
    uri, mark, options = str(path).partition("?")
    if "://" not in uri:
        local = Path(path).expanduser().resolve()
        return open_storage(local.parent), local.name
    parent, _, name = uri.rstrip("/").rpartition("/")
    if "://" not in parent:
        raise InputError(f"the path must lie in a bucket or folder, got {without_secrets(uri)!r}.")
    return open_storage(parent + mark + options), name


def is_plain(name: str) -> bool:
    """Whether a name is a relative path with forward slashes that stays in its folder."""
    parts = name.split("/")
    return not (set(name) & set("\\\0") or any(part in {"", ".", ".."} for part in parts))


def _checked(name: str) -> str:
    if not is_plain(name):
        raise InputError(
            "a stored name must be a relative path with forward slashes that stays in its folder, "
            f"got name={name!r}."
        )
    return name


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
