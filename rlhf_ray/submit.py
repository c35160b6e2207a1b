"""`python -m rlhf_ray.submit`: runs the launch command on a Ray cluster, from any machine.

The job runs on the cluster whether or not anybody follows it. Ray and torch are imported late.
"""

import os
import shlex
import sys
import tempfile
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray import launch
from rlhf_ray.commands import command_line
from rlhf_ray.commands.command_line import FAILED, INTERRUPTED, OK, Flag, flag_of
from rlhf_ray.commands.terminal import Terminal, printable
from rlhf_ray.errors import InputError, RlhfRayError
from rlhf_ray.submission import archive, job, staging
from rlhf_ray.submission.staging import MB
from rlhf_ray.uris import HARMLESS, below, user_of

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PROG = "python -m rlhf_ray.submit"

DESCRIPTION = (
    "Runs a sweep on a Ray cluster: uploads this package and your suite's module, runs the launch "
    "command with the flags after -- there, and shows its output. Ctrl-C or a closed lid leave the "
    "job running. The token comes from RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH or "
    "RAY_AUTH_TOKEN. Exit status: the launch command's (0; 2 bad input; 3 some trials failed; 4 "
    "the time was up before the end; 1 all else; 130 stopped, or no longer followed)."
)

FETCH_TIMEOUT_S = 600.0

_STORAGE = "rlhf_ray_storage_path"
"""Key of a job's metadata."""


@dataclass(frozen=True, kw_only=True)
class SubmitOptions:
    """What this command does.

    Attributes:
        address: of the head's job server, http:// or https://; none: RAY_API_SERVER_ADDRESS, else
            http://127.0.0.1:8265, where tunnels end.
        follow: show a job that was submitted before, from its begin; no flags after --.
        stop: stop a job; what it has done is kept, and the same flags go on with it.
        fetch: folder; the sweep's results are copied into it when the job has ended: all but the
            tree of stages and Tune's pickles.
        detach: do not follow the job that is submitted.
        include: further files and folders below the current one that your suite needs.
        pip: let the cluster install the versions of this machine's packages (not Ray) for the job.
        any_versions: run with the cluster's Python, Ray and torch, whatever versions they are.
        max_upload_mb: bound on what is uploaded, MB, > 0, at most 500 by Ray's own bound.
        max_fetch_mb: bound on what is fetched, MB, > 0.
    """

    address: str | None = None
    follow: str | None = None
    stop: str | None = None
    fetch: str | None = None
    detach: bool = False
    include: tuple[str, ...] = ()
    pip: bool = False
    any_versions: bool = False
    max_upload_mb: float = 100.0
    max_fetch_mb: float = 64.0

    def __post_init__(self) -> None:
        if self.follow is not None and self.stop is not None:
            raise InputError("one of --follow and --stop must be given, got both. Leave one out.")
        if self.follow is not None or self.stop is not None:
            idle = ["detach", "include", "pip", *(("fetch",) if self.stop is not None else ())]
            given = [flag_of(name) for name in idle if getattr(self, name)]
            if given:
                raise InputError(
                    "a job that runs must be named without flags that it has no use for, got "
                    f"{' '.join(given)}. Leave them out."
                )
        if self.detach and self.fetch is not None:
            raise InputError(
                "fetch must come without detach, for there are no results yet, got both. Fetch "
                "later: --follow JOB --fetch DIR."
            )
        for name in ("max_upload_mb", "max_fetch_mb"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name} must be > 0, got {name}={getattr(self, name)}.")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    return command_line.run(lambda: _submit(arguments))


def _submit(arguments: list[str]) -> int:
    options, flags = _read(arguments)
    address = checked_address(options.address)
    from rlhf_ray.submission import cluster

    terminal = Terminal(sys.stdout)
    if options.stop is not None:
        with cluster.answering(address):
            stopped = cluster.connect(address).stop_job(options.stop)
        terminal.say(f"{options.stop} is stopping." if stopped else f"{options.stop} had ended.")
        return OK
    client = cluster.connect(address)
    name = options.follow or _start(client, address, options, flags, terminal)
    with cluster.answering(address):
        details = client.get_job_info(name)
    _show_job(terminal, address, name)
    if options.detach:
        return OK
    submitted = _Job(
        client=client,
        address=address,
        name=name,
        location=(details.metadata or {}).get(_STORAGE, ""),
        pip=cluster.packages_of(details),
    )
    return _follow(submitted, options, terminal)


# -- what the command can do -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Job:
    """A job of the cluster.

    Attributes:
        client: of the cluster.
        address: of its job server.
        name: the job's.
        location: its storage path; "" if it is not known.
        pip: what the cluster installed for it; None: nothing.
    """

    client: "JobSubmissionClient"
    address: str
    name: str
    location: str
    pip: list[str] | None


def _start(
    client: "JobSubmissionClient",
    address: str,
    options: SubmitOptions,
    flags: list[str],
    terminal: Terminal,
) -> str:
    """Uploads what the flags need and starts the job; returns its name."""
    from rlhf_ray.submission import cluster

    _, suite, config = launch.read_flags(flags)
    expected = {} if options.any_versions else staging.versions_here()
    if options.pip:  # it will have this machine's torch
        expected.pop("torch", None)
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_") as scratch:
        staged = staging.stage(
            Path(scratch),
            suite=suite.suite,
            include=options.include,
            leave_out=_data_folders(suite.data_root),
            limit_bytes=int(options.max_upload_mb * MB),
        )
        terminal.message(f"upload   {staged.n_files} files, {staged.size_bytes / MB:.1f} MB")
        if staged.elsewhere:
            terminal.message(
                f"The suite's module {staged.elsewhere} is not in this folder: the cluster must "
                "have it installed."
            )
        with cluster.answering(address):
            return cluster.submit(
                client,
                job.entrypoint(expected, flags),
                folder=Path(scratch),
                metadata={_STORAGE: config.storage_path},
                pip=staging.pinned() if options.pip else None,
            )


def _follow(submitted: _Job, options: SubmitOptions, terminal: Terminal) -> int:
    from rlhf_ray.submission import cluster

    name, location, log = submitted.name, submitted.location, _Log(terminal)
    try:
        with cluster.answering(submitted.address):
            ended = cluster.follow(submitted.client, name, log.write)
    except KeyboardInterrupt:
        terminal.say(f"No longer followed; {name} runs on.")
        return INTERRUPTED
    log.end()
    if ended.reason:
        terminal.say(f"{name}: {ended.reason}")
    if log.sweep is None or not location:
        return ended.status
    where = printable(below(location, log.sweep))
    terminal.show_lines("", f"The results are on the cluster's storage: {where}")
    if options.fetch is None:
        return ended.status
    try:
        _fetch(submitted, log.sweep, Path(options.fetch), options.max_fetch_mb, terminal)
    except RlhfRayError as error:
        terminal.say(f"error: {error}")
        again = [*_own_command(submitted.address), "--follow", name, "--fetch", options.fetch]
        terminal.show_lines(
            "The results still lie on the cluster's storage. This fetches them:",
            f"  {shlex.join(again)}",
        )
        return ended.status or FAILED
    return ended.status


def _fetch(submitted: _Job, sweep: str, folder: Path, limit_mb: float, terminal: Terminal) -> None:
    """Copies a sweep's folder here: from object stores directly, else through a job's log."""
    from rlhf_ray.storage import open_storage

    limit, location = int(limit_mb * MB), submitted.location
    if "://" in location and not open_storage(location).is_local:
        files = archive.read_sweep(open_storage(location), sweep, limit)
    else:
        files = archive.from_text(_read_there(submitted, sweep, limit), limit)
    target = folder.expanduser() / sweep
    archive.write_sweep(target, files)
    size_mb = sum(map(len, files.values())) / MB
    terminal.show_lines(f"Fetched {len(files)} files, {size_mb:.1f} MB: {target}")


def _read_there(submitted: _Job, sweep: str, limit_bytes: int) -> str:
    """The log of a job that reads a sweep on the cluster."""
    from rlhf_ray.submission import cluster

    location = submitted.location
    words = ["python", "-m", "rlhf_ray.submission.archive", location, sweep, str(limit_bytes)]
    with tempfile.TemporaryDirectory(prefix="rlhf_ray_") as scratch:
        staging.stage(Path(scratch))
        with cluster.answering(submitted.address):
            reader = cluster.submit(
                submitted.client,
                shlex.join(words),
                folder=Path(scratch),
                metadata={_STORAGE: location},
                pip=submitted.pip,  # what reads needs packages, too; the cluster has kept them
            )
    with cluster.answering(submitted.address):
        return cluster.output(submitted.client, reader, timeout_s=FETCH_TIMEOUT_S)


def _show_job(terminal: Terminal, address: str, name: str) -> None:
    own = _own_command(address)
    terminal.show_lines(
        f"job      {name}",
        f"follow   {shlex.join([*own, '--follow', name, '--fetch', 'DIR'])}",
        f"stop     {shlex.join([*own, '--stop', name])}",
    )


def _own_command(address: str) -> list[str]:
    return [*PROG.split(), "--address", address]


class _Log:
    """A job's log on its way to the terminal, in whole lines; notes which sweep it names."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._rest = ""
        self.sweep: str | None = None

    def write(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            sweep = job.sweep_in(line)
            if sweep is None:
                self._terminal.show_lines(printable(line))
            self.sweep = sweep or self.sweep

    def end(self) -> None:
        if self._rest:
            self.write("\n")


# -- input -----------------------------------------------------------------------------------------


def _read(arguments: list[str]) -> tuple[SubmitOptions, list[str]]:
    """The options, and the launch command's flags after the first `--`."""
    at = arguments.index("--") if "--" in arguments else len(arguments)
    own, flags = arguments[:at], arguments[at + 1 :]
    values = command_line.parse(own, prog=PROG, description=DESCRIPTION, groups=_flag_groups())
    options = command_line.pick(SubmitOptions, values)
    named = options.follow or options.stop
    if named and flags:
        raise InputError("a job that runs must be named without flags after --, got both.")
    if not named:
        if not flags:
            raise InputError(
                "the launch command's flags must follow --, got none. For example: -- --suite "
                "digits --storage-path /shared/rlhf_runs."
            )
        check_launch_flags(flags)
    return options, flags


def check_launch_flags(flags: Sequence[str]) -> None:
    """Looks before the upload at what would not work on the cluster.

    Raises:
        InputError: the launch command would refuse the flags; the storage path is none that all
            nodes share; or it, or a tracker's address, holds a key, which Ray would record.
    """
    from rlhf_ray.trackers import check_no_password

    _, _, config = launch.read_flags(flags)
    if config.address is not None:
        raise InputError("--address must stand before --, got it after. The job finds its cluster.")
    location = str(config.storage_path)
    if "://" not in location and not location.startswith("/"):
        raise InputError(
            "--storage-path must be a URI or an absolute path that all nodes share, got "
            f"storage_path={location!r}, which would lie in the job's throw-away folder."
        )
    check_no_password(config)
    if holds_secret(location):
        raise InputError(
            "--storage-path must hold no key, for Ray shows a job's flags, got one. Give the nodes "
            "their credentials: a role, environment variables, a Kubernetes secret."
        )


def holds_secret(uri: str) -> bool:
    """Whether a storage URI carries credentials.

    >>> [holds_secret(u) for u in ("s3://KEY:SECRET@b/x", "s3://b/x?region=eu", "gs://b?token=1")]
    [True, False, True]
    """
    words = ("key", "secret", "token", "password", "credential", "signature")
    query = urllib.parse.parse_qsl(uri.partition("?")[2], True)
    names = [name.lower() for name, _ in query if name not in HARMLESS]
    return user_of(uri) not in ("", "anonymous") or any(w in name for name in names for w in words)


def checked_address(address: str | None, environment: Mapping[str, str] = os.environ) -> str:
    """The address of the job server.

    Raises:
        InputError: it is none of http or https, or holds more than host, port and path.
    """
    found = address or environment.get("RAY_API_SERVER_ADDRESS") or "http://127.0.0.1:8265"
    parts = urllib.parse.urlsplit(found)
    usual = parts.scheme in ("http", "https") and parts.hostname
    if not usual or "@" in found or parts.query or parts.fragment:
        shown = found.rpartition("@")[2].partition("?")[0].partition("#")[0]
        raise InputError(
            "address must be that of a cluster's job server, without user, password or query, got "
            f"address={shown!r}. Write http://HEAD:8265."
        )
    return found.rstrip("/")


def _flag_groups() -> dict[str, list[Flag]]:
    flags = command_line.flags_of(SubmitOptions)
    jobs = ("address", "follow", "stop", "fetch", "max_fetch_mb", "detach")
    return {
        "job": [flags[name] for name in jobs],
        "upload": [flag for name, flag in flags.items() if name not in jobs],
    }


def _data_folders(data_root: str | None) -> list[Path]:
    """Where built-in suites keep their data on this machine."""
    given = [data_root, os.environ.get("RLHF_RAY_DATA"), "data"]
    return [Path(path).expanduser().resolve() for path in given if path]


if __name__ == "__main__":
    sys.exit(main())
