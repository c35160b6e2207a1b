"""Jobs on a Ray cluster, over the HTTP job server of its head.

Ray's client reads the token by itself (RAY_AUTH_MODE, RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH); it is
never passed on from here.
"""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from rlhf_ray.commands.command_line import FAILED, INTERRUPTED, OK
from rlhf_ray.errors import InputError, RlhfRayError

T = TypeVar("T")

SILENT_S = 30.0
"""After so long without a word the connection is made anew: it does not outlive a closed lid."""

RETRY_S = 2.0
"""Between two tries to reach a cluster that did not answer."""

GIVE_UP_S = 600.0
"""How long a cluster may not answer while a job is followed, or its results are fetched."""

_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Variables that would override the address that is given."""


_CHATTER = (
    "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)  # fmt: skip
"""Loggers of Ray's client that tell of every upload and connection."""


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a job ended.

    Attributes:
        status: exit status of its command; 130 if it was stopped.
        reason: in one line, where it is not the command's own.
    """

    status: int
    reason: str = ""


def connect(address: str) -> JobSubmissionClient:
    """A client of the job server at an http(s) address.

    Raises:
        InputError: none answers there, it wants another token, or a package is missing.
    """
    hidden = {name: os.environ.pop(name) for name in _ADDRESSES if name in os.environ}
    try:
        with answering(address):
            client = JobSubmissionClient(address)
    except RuntimeError as error:  # Ray without its extra "default"
        raise InputError(
            "Ray's job client must be installed, got none. pip install 'rlhf_ray[cluster]'."
        ) from error
    finally:
        os.environ.update(hidden)
    for name in _CHATTER:
        logging.getLogger(name).setLevel(logging.WARNING)
    return client


@contextmanager
def answering(address: str) -> Iterator[None]:
    """Turns what Ray's client raises into one line.

    Raises:
        InputError: the cluster does not answer, or not with this token, or knows no such job.
    """
    try:
        yield
    except AuthenticationError as error:
        raise InputError(
            f"the cluster at {address} must be given its token, got none or a wrong one. Set "
            "RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH (a file) or RAY_AUTH_TOKEN."
        ) from error
    except OSError as error:
        raise InputError(
            f"a Ray cluster's job server must answer, got no answer from {address}. Is its port "
            "8265 reachable from here (tunnel, port-forward)?"
        ) from error
    except RuntimeError as error:
        reason = (str(error).splitlines() or [""])[0][:300]
        if "Version check" in reason:
            raise InputError(
                f"a Ray cluster's job server must answer at {address}, got another server."
            ) from error
        if "status code 404" in reason:
            raise InputError(
                f"a job of the cluster at {address} must be named, got: {reason}"
            ) from error
        if "Request failed" in reason:
            raise RlhfRayError(f"the cluster at {address} refused: {reason}") from error
        raise


def submit(
    client: JobSubmissionClient,
    entrypoint: str,
    *,
    folder: Path,
    metadata: Mapping[str, str],
    pip: list[str] | None = None,
) -> str:
    """Uploads a folder and starts a job in it.

    Args:
        client: of the cluster.
        entrypoint: its shell command.
        folder: becomes the working directory of the job and of its workers.
        metadata: kept with the job, and shown to everyone who may see it.
        pip: requirements that the cluster installs first; None: it runs with what it has.

    Returns:
        The job's name.
    """
    packages = {"pip": {"packages": pip, "pip_check": False}} if pip is not None else {}
    return client.submit_job(
        entrypoint=entrypoint,
        submission_id=f"rlhf-ray-{uuid.uuid4().hex[:12]}",
        runtime_env={"working_dir": str(folder), **packages},
        metadata=dict(metadata),
    )


def packages_of(details: JobDetails) -> list[str] | None:
    """What the cluster installed for a job by pip; None: nothing."""
    pip = (details.runtime_env or {}).get("pip")
    packages = pip.get("packages") if isinstance(pip, dict) else None
    # only a list: a text is the path of a file that Ray's client would read on this machine
    return packages if isinstance(packages, list) else None


def follow(client: JobSubmissionClient, job: str, show: Callable[[str], None]) -> Ended:
    """Shows a job's log from its begin to its end, whatever happens to the connection.

    Args:
        client: of the cluster.
        job: its name.
        show: told pieces of the log, each character once.

    Raises:
        RlhfRayError: the cluster has not answered for `GIVE_UP_S`.
    """
    shown, answered = 0, time.monotonic()

    def show_more(text: str) -> None:
        nonlocal shown, answered
        shown, answered = shown + len(text), time.monotonic()
        show(text)

    while True:
        try:
            asyncio.run(_tail(client, job, shown, show_more))
            details = client.get_job_info(job)
            answered = time.monotonic()
            if details.status.is_terminal():
                show_more(client.get_job_logs(job)[shown:])
                return _ended(details)
        except _lost() as error:
            if time.monotonic() - answered > GIVE_UP_S:
                raise RlhfRayError(
                    f"the cluster must answer, got no answer for {GIVE_UP_S / 60:.0f} minutes. "
                    f"The job may run on: --follow {job} once the cluster can be reached."
                ) from error
        time.sleep(RETRY_S)


async def _tail(
    client: JobSubmissionClient, job: str, skip: int, show: Callable[[str], None]
) -> None:
    """Shows what a log holds beyond its first `skip` characters, until it ends or falls silent."""
    position = 0
    stream = client.tail_job_logs(job)
    while True:
        try:
            text = await asyncio.wait_for(anext(stream), SILENT_S)
        except (StopAsyncIteration, TimeoutError):
            return
        new = text[max(0, skip - position) :]
        position += len(text)
        if new:
            show(new)


def _lost() -> tuple[type[Exception], ...]:
    """What the client raises when the cluster does not answer, or not sensibly."""
    import aiohttp  # comes with Ray's extra "default"

    return (OSError, RuntimeError, asyncio.TimeoutError, aiohttp.ClientError)


def _ended(details: JobDetails) -> Ended:
    """The command's exit status; as shells have it where a signal ended it."""
    if details.status == JobStatus.STOPPED:
        return Ended(status=INTERRUPTED, reason="stopped")
    if details.status == JobStatus.SUCCEEDED:
        return Ended(status=OK)
    code = details.driver_exit_code
    if code is None:  # it never ran: its environment could not be made, its node was lost
        return Ended(status=FAILED, reason=" ".join((details.message or "").split())[-600:])
    return Ended(status=code if code >= 0 else 128 - code)


def output(client: JobSubmissionClient, job: str, *, timeout_s: float) -> str:
    """Waits for a job that says little, forgets it, and returns its log.

    Raises:
        RlhfRayError: it failed, or did not end in time; or the cluster has not answered for
            `GIVE_UP_S`.
    """
    end = time.monotonic() + timeout_s
    while not (details := _answer(client.get_job_info, job)).status.is_terminal():
        if time.monotonic() > end:
            with suppress(*_lost()):
                client.stop_job(job)
            raise RlhfRayError(f"the job {job} must end in {timeout_s:.0f} s, got no end.")
        time.sleep(0.5)
    log = _answer(client.get_job_logs, job)
    with suppress(*_lost()):  # all that is wanted is here
        client.delete_job(job)
    if details.status != JobStatus.SUCCEEDED:
        reason = (log.strip().splitlines() or [details.message or ""])[-1]
        raise RlhfRayError(f"the results must be readable on the cluster, got: {reason}")
    return log


def _answer(ask: Callable[[str], T], job: str) -> T:
    """What the cluster answers about a job, however often the connection is lost before."""
    began = time.monotonic()
    while True:
        try:
            return ask(job)
        except _lost() as error:
            if time.monotonic() - began > GIVE_UP_S:
                raise RlhfRayError(
                    f"the cluster must answer, got no answer for {GIVE_UP_S / 60:.0f} minutes."
                ) from error
        time.sleep(RETRY_S)
