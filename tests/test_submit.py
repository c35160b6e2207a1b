import base64
import contextlib
import hashlib
import io
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import types
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest
from sweep_files import write_sweep

from rlhf_ray import submit
from rlhf_ray.errors import InputError, RlhfRayError, StorageError
from rlhf_ray.storage import open_storage
from rlhf_ray.submission import archive, job, staging
from rlhf_ray.submission.staging import MB

TESTS = Path(__file__).parent
TOKEN = "a-token-of-the-tests-that-nobody-may-see"


# -- what is uploaded ------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A user's folder with a suite, and with what must stay there."""
    files = {
        "sensors.py": "", "own/__init__.py": "", "own/suites.py": "", "own/data/rates.csv": "1",
        "own/__pycache__/suites.pyc": "", "own/.secret": "", ".git/config": "", ".env": "KEY=1",
        "data/images.bin": "1", "rlhf_runs/tree/a.json": "", "notes/a.txt": "a",
    }  # fmt: skip
    for name, text in files.items():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def staged(tmp_path: Path, **given) -> set[str]:
    """Names of the files that were staged besides this package's."""
    folder = tmp_path / "staged"
    folder.mkdir()
    staging.stage(folder, **given)
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {name for name in names if not name.startswith(("rlhf_ray/", "rlhf_ray-"))}


def test_stage_holds_the_package_and_its_metadata(tmp_path) -> None:
    folder = tmp_path / "staged"
    folder.mkdir()
    done = staging.stage(folder, suite="digits")
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert {"rlhf_ray/launch.py", "rlhf_ray/report/templates/page.html"} <= set(names)
    assert not [name for name in names if "__pycache__" in name or "/." in name]
    assert done.n_files == len(names)
    # the version can be told where the package is not installed
    code = "from importlib.metadata import version; print(version('rlhf_ray'))"
    told = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == version("rlhf_ray")


@pytest.mark.usefixtures("project")
def test_stage_takes_the_suite_and_nothing_else(tmp_path) -> None:
    assert staged(tmp_path, suite="sensors:suite") == {"sensors.py"}


@pytest.mark.usefixtures("project")
def test_stage_takes_the_whole_package_of_a_suite(tmp_path) -> None:
    expected = {"own/__init__.py", "own/suites.py", "own/data/rates.csv"}
    assert staged(tmp_path, suite="own.suites:suite") == expected


def test_stage_takes_what_python_imports(tmp_path, project) -> None:
    (project / "sensors").mkdir()
    (project / "sensors/raw.csv").write_text("1")
    assert staged(tmp_path, suite="sensors:suite") == {"sensors.py"}


def test_stage_takes_what_is_named_wherever_it_lies(tmp_path, project) -> None:
    names = staged(tmp_path, include=["data/images.bin", ".env"], leave_out=[project / "data"])
    assert names == {"data/images.bin", ".env"}


@pytest.mark.parametrize("target", ["../secret", "nowhere", ".env", "data/images.bin"])
def test_stage_follows_no_link_that_leads_out_or_nowhere(tmp_path, project, target) -> None:
    (tmp_path / "secret").write_text("key")
    (project / "own/inside.txt").symlink_to(project / "notes/a.txt")
    names = staged(tmp_path, suite="own.suites:suite")
    assert "own/inside.txt" in names
    (project / "own/link.txt").symlink_to(project / target)
    (project / "linked.py").symlink_to(project / target)
    for suite in ("own.suites:suite", "linked:suite"):
        if suite == "linked:suite" and target == "nowhere":
            continue  # no module at all
        with pytest.raises(InputError, match="links must lead to files of the current folder"):
            staging.stage(tmp_path / "again", suite=suite, leave_out=[project / "data"])


def test_stage_leaves_out_git_data_and_storage_even_when_all_is_included(tmp_path, project) -> None:
    names = staged(tmp_path, include=["."], leave_out=[project / "data"])
    assert names == {
        "sensors.py", "own/__init__.py", "own/suites.py", "own/data/rates.csv", "notes/a.txt",
    }  # fmt: skip


@pytest.mark.usefixtures("project")
def test_stage_refuses_what_is_missing_outside_or_too_large(tmp_path) -> None:
    with pytest.raises(InputError, match="no module 'nowhere'"):
        staging.stage(tmp_path / "a", suite="nowhere.at:all")
    with pytest.raises(InputError, match="in the current folder"):
        staging.stage(tmp_path / "b", include=["../other"])
    with pytest.raises(InputError, match="must be a file or folder that exists"):
        staging.stage(tmp_path / "c", include=["absent"])
    Path("notes/big.bin").write_bytes(bytes(3 * MB))
    with pytest.raises(InputError, match=r"at most 2 MB .* got .* most of it notes/big.bin \(3"):
        staging.stage(tmp_path / "d", include=["notes"], limit_bytes=2 * MB)


@pytest.mark.usefixtures("project")
def test_stage_says_which_suite_the_cluster_must_have(tmp_path) -> None:
    (tmp_path / "staged").mkdir()
    assert staging.stage(tmp_path / "staged", suite="json:loads").elsewhere == "json"


def test_pinned_are_the_versions_of_this_machine_but_for_ray() -> None:
    pins = staging.pinned()
    assert f"torch=={version('torch').partition('+')[0]}" in pins
    assert not [pin for pin in pins if pin.startswith(("ray", "pytest", "ruff"))]


# -- what runs there -------------------------------------------------------------------------------


def test_entrypoint_survives_the_shell() -> None:
    flags = ["--suite", "own:suite", "--name", "it's; $(touch x)", "--gamma", "0.9", "0.99"]
    command = job.entrypoint({"python": "3.11"}, flags)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "rlhf_ray.submission.job"]
    assert words[3:] == ["python=3.11", "--", *flags]
    shown = subprocess.run(
        ["sh", "-c", command.replace("python", "printf '%s\\n'", 1)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert shown.stdout.splitlines()[-len(flags) :] == flags


def test_job_refuses_other_versions(capsys) -> None:
    expected = {**staging.versions_here(), "torch": "1.0"}
    assert job.main([f"{name}={number}" for name, number in expected.items()] + ["--"]) == 2
    assert re.search(r"torch \S+ there and 1.0 here", capsys.readouterr().err)
    job.check_versions(staging.versions_here())


def test_job_names_its_sweep(monkeypatch, capsys) -> None:
    def launched(flags, *, on_sweep):
        on_sweep("digits-1")
        return 3

    monkeypatch.setattr("rlhf_ray.launch.main", launched)
    assert job.main(["--", "--suite", "digits"]) == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert job.sweep_in(line) == "digits-1"
    for bad in ("..", ".", ".ssh", "a/b", "", "x\x1b]0;gone", "x\0y", "x\x9b2J", "x\u202ey", "x\r"):
        assert job.sweep_in(f"rlhf_ray sweep: {bad}") is None
    assert job.sweep_in(f" {line}") is None


# -- what comes back -------------------------------------------------------------------------------


def test_sweep_comes_back_whole_without_pickles_and_tree(tmp_path) -> None:
    summary = write_sweep(tmp_path / "there")
    for name in ("small-1/tune/tuner.pkl", "small-1/lock.json", "tree/a/b.json"):
        path = tmp_path / "there" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    files = archive.read_sweep(open_storage(tmp_path / "there"), "small-1", MB)
    log = "\n".join(["Running entrypoint", *archive.as_text(files), "bye"])
    assert max(map(len, log.splitlines())) <= 20_000
    archive.write_sweep(tmp_path / "here", archive.from_text(log, MB))
    assert json.loads((tmp_path / "here/summary.json").read_text()) == summary
    found = {p.relative_to(tmp_path / "here").as_posix() for p in (tmp_path / "here").rglob("*.*")}
    assert "trials/000-abcdef/trial.json" in found
    assert not {name for name in found if "pkl" in name or "lock" in name or "tree" in name}


@pytest.mark.parametrize(
    "name",
    [
        "../out",
        "/etc/out",
        "a/../../out",
        "a/../out",
        "..\\out",
        "a/./../../out",
        "a//b",
        "",
        "tune/a.pkl",
        "model.PT",
        "a\nb.pkl",
        ".git/hooks/post-checkout",
        "a/.b/c.json",
    ],
)
def test_fetched_file_cannot_leave_its_folder(tmp_path, name) -> None:
    with pytest.raises(InputError, match="must lie in its folder and be no pickle"):
        archive.write_sweep(tmp_path / "here", {"good.json": b"{}", name: b"x"})
    assert list(tmp_path.rglob("*")) == []


def test_fetched_file_does_not_follow_a_link_out(tmp_path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/trials").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="must lie in its folder"):
        archive.write_sweep(tmp_path / "here", {"trials/a.json": b"{}"})


def as_log(data: bytes) -> str:
    """Data as an archive's lines, with the right digest."""
    begin, *_, end = archive.as_text({})
    digest = hashlib.sha256(data).hexdigest()
    return "\n".join([begin[:-64] + digest, base64.b64encode(data).decode(), end])


def test_cut_or_altered_archive_is_refused() -> None:
    lines = list(archive.as_text({"a.json": b"{}" * 9000}))
    for bad in (lines[:-1], lines[1:], [lines[0], lines[1][:-4], lines[-1]], ["no archive"]):
        with pytest.raises(StorageError, match="arrive whole"):
            archive.from_text("\n".join(bad), MB)
    with pytest.raises(StorageError, match="must be an archive, got none"):
        archive.from_text(as_log(b"no zip"), MB)


def test_fetch_is_bounded(tmp_path) -> None:
    write_sweep(tmp_path)
    with pytest.raises(InputError, match=r"at most 0.0001 MB \(--max-fetch-mb\)"):
        archive.read_sweep(open_storage(tmp_path), "small-1", 100)
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.json", bytes(5 * MB))
    with pytest.raises(InputError, match="at most 1 MB"):
        archive.from_text(as_log(bomb.getvalue()), MB)


def test_fetch_of_no_sweep_says_so(tmp_path, capsys) -> None:
    assert archive.main([str(tmp_path), "absent", str(MB)]) == 2
    assert "a sweep must be there" in capsys.readouterr().err


# -- flags -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "flags must follow --"),
        (["--adress", "http://a"], "Did you mean '--address'"),
        (["--", "--storage-path", "/s", "--gama", "1"], "Did you mean '--gamma'"),
        (["--", "--suite", "digits"], "absolute path that all nodes share"),
        (["--", "--storage-path", "runs"], "absolute path that all nodes share"),
        (["--", "--storage-path", "s3://KEY:SECRET@bucket/x"], "must hold no key"),
        (["--", "--storage-path", "s3://KEY:SEC/SECRET@bucket/x"], "must hold no key"),
        (["--", "--storage-path", "abfs://box:SECRET@acc.dfs.host/x"], "must hold no key"),
        (["--", "--storage-path", "abfs://box@acc.dfs.host/x?client_secret=SECRET"], "no key"),
        (
            ["--", "--storage-path", "/shared/x", "--mlflow", "postgresql://me:PASS@db/x"],
            "mlflow must be a URI without a user, password",
        ),
        (
            ["--", "--storage-path", "/shared/x", "--mlflow", "http://me:A/SECRET@host:5000"],
            "mlflow must be a URI without a user, password",
        ),
        (["--stop", "job", "--fetch", "here"], "has no use for, got --fetch"),
        (["--follow", "job", "--detach", "--pip"], "has no use for, got --detach --pip"),
        (["--", "--storage-path", "/s", "--address", "auto"], "must stand before --"),
        (["--follow", "a", "--", "--suite", "digits"], "without flags after --"),
        (["--follow", "a", "--stop", "a"], "one of --follow and --stop"),
        (["--detach", "--fetch", "d", "--", "--storage-path", "/s"], "without detach"),
        (["--max-upload-mb", "0", "--", "--storage-path", "/s"], "max_upload_mb must be > 0"),
        (["--address", "head:8265", "--follow", "a"], "Write http://HEAD:8265"),
        (["--address", "http://u:SECRET@head:8265", "--follow", "a"], "without user, password"),
        (["--address", "http://u:A/SECRET@head:8265", "--follow", "a"], "without user, password"),
        (["--address", "http://head:8265?token=SECRET", "--follow", "a"], "password or query"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_sent(arguments, message, capsys) -> None:
    assert submit.main(arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "SECRET" not in said


@pytest.mark.parametrize(
    "location",
    [
        "/shared/runs",
        "s3://bucket/runs?region=us-west-2",
        "s3://anonymous@bucket/runs",
        "abfss://box@acc.dfs.core.windows.net/runs",
        "abfss://box@acc.dfs.core.windows.net/runs?credential_kind=workload_identity",
    ],
)
def test_storage_without_a_key_is_taken(location) -> None:
    submit.check_launch_flags(["--storage-path", location])


def test_address_comes_from_the_flag_then_the_environment() -> None:
    there = {"RAY_API_SERVER_ADDRESS": "https://ray.example.com/"}
    assert submit.checked_address("http://head:8265", there) == "http://head:8265"
    assert submit.checked_address(None, there) == "https://ray.example.com"
    assert submit.checked_address(None, {}) == "http://127.0.0.1:8265"


def test_cluster_that_does_not_answer_is_named(capsys) -> None:
    pytest.importorskip("aiohttp", reason="needs the extra 'cluster'")
    with socket.socket() as taken:  # bound, not listening: nobody else can answer there
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert submit.main(["--address", address, "--follow", "a"]) == 2
    assert f"got no answer from {address}" in capsys.readouterr().err


# -- following -------------------------------------------------------------------------------------


class FlakyClient:
    """A job's log, through connections that break; a head that is away for a while."""

    def __init__(self, log: str, *, status: str, code: int | None, breaks: list[int]) -> None:
        self.log, self.status, self.code, self.breaks = log, status, code, breaks
        self.away = 1

    async def tail_job_logs(self, job):
        end = self.breaks.pop(0) if self.breaks else len(self.log)
        for start in range(0, end, 7):
            yield self.log[start : min(start + 7, end)]
        if self.breaks:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def get_job_info(self, job):
        from ray.job_submission import JobStatus

        if self.breaks or self.away:
            self.away = 0
            raise ConnectionError("Failed to connect")
        return types.SimpleNamespace(
            status=JobStatus(self.status), driver_exit_code=self.code, message="no\nnode"
        )

    def get_job_logs(self, job):
        return self.log


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", 3, 3), ("FAILED", 130, 130),
        ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", None, 130),
    ],
)  # fmt: skip
def test_follow_shows_each_character_once_and_passes_the_status_on(
    monkeypatch, status, code, expected
) -> None:
    pytest.importorskip("aiohttp", reason="needs the extra 'cluster'")
    from rlhf_ray.submission import cluster

    monkeypatch.setattr(cluster, "RETRY_S", 0.0)
    log = "".join(f"line {i} of the log\n" for i in range(20))
    client = FlakyClient(log, status=status, code=code, breaks=[30, 100, 50])
    shown: list[str] = []
    ended = cluster.follow(client, "a", shown.append)
    assert "".join(shown) == log
    assert ended.status == expected
    assert ended.reason == ("no node" if expected == 1 else "stopped" * (status == "STOPPED"))


def test_follow_gives_up_when_the_cluster_is_gone(monkeypatch) -> None:
    pytest.importorskip("aiohttp", reason="needs the extra 'cluster'")
    from rlhf_ray.submission import cluster

    monkeypatch.setattr(cluster, "RETRY_S", 0.0)
    monkeypatch.setattr(cluster, "GIVE_UP_S", 0.0)
    client = FlakyClient("a", status="FAILED", code=1, breaks=[0] * 9)
    with pytest.raises(RlhfRayError, match="--follow a once the cluster can be reached"):
        cluster.follow(client, "a", lambda text: None)


# -- fetching --------------------------------------------------------------------------------------


class EndedJob:
    """A client of a cluster whose job has ended; the job that reads its results runs here."""

    def __init__(self, storage: Path | str, *, code: int = 0, runtime_env: dict | None = None):
        self.storage, self.code, self.runtime_env = storage, code, runtime_env
        self.log = "rlhf_ray sweep: small-1\n"
        self.reader: dict | None = None  # what it was submitted with
        self.raises: dict[str, list[Exception]] = {}  # call about the reader -> its next errors

    async def tail_job_logs(self, job):
        yield self.log

    def get_job_info(self, job):
        from ray.job_submission import JobStatus

        self.answer("info", job)
        code = 0 if job == "reader" else self.code
        return types.SimpleNamespace(
            status=JobStatus("FAILED" if code else "SUCCEEDED"), driver_exit_code=code, message="",
            metadata={submit._STORAGE: str(self.storage)}, runtime_env=self.runtime_env,
        )  # fmt: skip

    def get_job_logs(self, job):
        self.answer("logs", job)
        if job != "reader":
            return self.log
        assert self.reader is not None
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            archive.main(shlex.split(self.reader["entrypoint"])[3:])
        return said.getvalue()

    def submit_job(self, **given):
        self.answer("submit")
        self.reader = given
        return "reader"

    def delete_job(self, job):
        self.answer("delete", job)
        return True

    def answer(self, call: str, job: str = "reader") -> None:
        if job == "reader" and self.raises.get(call):
            raise self.raises[call].pop(0)


@pytest.fixture
def ended(tmp_path, monkeypatch) -> EndedJob:
    """The cluster that `submit` finds; its sweep can be fetched."""
    pytest.importorskip("aiohttp", reason="needs the extra 'cluster'")
    from rlhf_ray.submission import cluster

    client = EndedJob(tmp_path / "there")
    write_sweep(tmp_path / "there")
    monkeypatch.setattr(cluster, "connect", lambda address: client)
    monkeypatch.setattr(cluster, "RETRY_S", 0.0)
    return client


@pytest.mark.parametrize(
    ("runtime_env", "expected"),
    [
        ({"pip": {"packages": ["tyro==1.0"], "pip_check": False}}, ["tyro==1.0"]),
        ({"pip": {"packages": "/etc/passwd", "pip_check": False}}, None),  # Ray's client reads it
        ({"pip": "/etc/passwd"}, None),
        ({"working_dir": "gcs://a.zip"}, None),
        (None, None),
    ],
)
def test_fetch_reads_with_the_packages_that_the_job_had(
    ended, tmp_path, runtime_env, expected
) -> None:
    ended.runtime_env = runtime_env
    assert submit.main(["--follow", "a", "--fetch", str(tmp_path / "here")]) == 0
    assert (tmp_path / "here/small-1/summary.json").is_file()
    given = ended.reader["runtime_env"].get("pip")
    assert (given and given["packages"]) == expected


@pytest.mark.parametrize(
    ("location", "shown"),
    [
        ("/shared/runs", "/shared/runs/small-1"),
        ("s3://bucket/runs?region=us-west-2", "s3://bucket/runs/small-1?region=us-west-2"),
        ("s3://KEY:SECRET@bucket/runs", "s3://bucket/runs/small-1"),
        ("/shared/\x1b]0;gone\x07", "/shared/?]0;gone?/small-1"),
    ],
)
def test_place_of_the_results_is_one_that_can_be_opened(ended, capsys, location, shown) -> None:
    ended.storage = location
    assert submit.main(["--follow", "a"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"The results are on the cluster's storage: {shown}"


def test_line_of_the_log_that_names_no_folder_is_shown_and_fetches_nothing(
    ended, tmp_path, capsys
) -> None:
    ended.log = "rlhf_ray sweep: small-1\0\n"
    assert submit.main(["--follow", "a", "--fetch", str(tmp_path / "here")]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "rlhf_ray sweep: small-1?"
    assert not (tmp_path / "here").exists()


LOST = ConnectionError("Failed to connect")
REFUSED = RuntimeError("Request failed with status code 500: pip failed.\n  at length")


def test_fetch_outlives_lost_connections(ended, tmp_path) -> None:
    ended.raises = {"info": [LOST, REFUSED], "logs": [LOST, REFUSED], "delete": [LOST]}
    assert submit.main(["--follow", "a", "--fetch", str(tmp_path / "here")]) == 0
    assert not any(ended.raises.values())
    assert (tmp_path / "here/small-1/summary.json").is_file()


@pytest.mark.parametrize(("code", "status"), [(0, 1), (3, 3)])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        ("submit", LOST, "got no answer from http://head:8265"),
        ("submit", REFUSED, "refused: Request failed with status code 500: pip failed."),
        ("info", LOST, "the cluster must answer, got no answer for 0 minutes."),
        ("logs", REFUSED, "the cluster must answer, got no answer for 0 minutes."),
    ],
)
def test_fetch_that_fails_says_how_to_fetch_and_keeps_the_status(
    ended, tmp_path, monkeypatch, capsys, call, error, message, code, status
) -> None:
    monkeypatch.setattr("rlhf_ray.submission.cluster.GIVE_UP_S", 0.0)
    ended.raises, ended.code = {call: [error] * 9}, code
    here = str(tmp_path / "my results")
    own = ["--address", "http://head:8265", "--follow", "a", "--fetch", here]
    assert submit.main(own) == status
    out = capsys.readouterr().out
    assert message in " ".join(out.split())
    *_, why, command = out.splitlines()
    assert why == "The results still lie on the cluster's storage. This fetches them:"
    assert shlex.split(command) == ["python", "-m", "rlhf_ray.submit", *own]


def test_token_that_is_no_longer_good_is_one_line(ended, monkeypatch, capsys) -> None:
    from ray.exceptions import AuthenticationError

    def refused(job):
        raise AuthenticationError("expired")

    monkeypatch.setattr(ended, "tail_job_logs", refused)
    assert submit.main(["--follow", "a"]) == 2
    assert "must be given its token, got none or a wrong one" in capsys.readouterr().err


def test_name_of_a_job_is_not_taken_for_a_missing_one() -> None:
    pytest.importorskip("aiohttp", reason="needs the extra 'cluster'")
    from rlhf_ray.submission import cluster

    refused = RuntimeError("Request failed with status code 500: rlhf-ray-404 is pending.")
    with (
        pytest.raises(RlhfRayError, match=r"refused: .* rlhf-ray-404 is pending"),
        cluster.answering("http://head:8265"),
    ):
        raise refused


# -- on a cluster ----------------------------------------------------------------------------------


@dataclass
class Cluster:
    """Two nodes of this machine, token authentication on."""

    address: str
    gcs: str
    environment: dict[str, str]

    def joins(self, token: str) -> bool:
        """Whether a node that knows another token is let in; it is ended either way."""
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--address", self.gcs],
            env={**self.environment, "RAY_AUTH_TOKEN": token},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(120) == 0
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def submit(self, *arguments: str, cwd: Path, timeout_s: float = 420, **changed: str):
        return subprocess.run(
            [sys.executable, "-m", "rlhf_ray.submit", "--address", self.address, *arguments],
            cwd=cwd,
            env={**self.environment, **changed},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def node(*arguments: str, environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen]:
    """A Ray node while the body runs; ends the processes of its own session, and no others."""
    import ray  # noqa: F401, I001  # carries psutil with it
    import psutil

    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", *arguments],
            env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        started = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
            top = psutil.Process(process.pid)
            started = [*top.children(recursive=True), top]
            top.terminate()  # --block: ends what it started
        for left in psutil.wait_procs(started, timeout=20)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait()


@pytest.fixture
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    pytest.importorskip("aiohttp", reason="needs the extra 'cluster'")
    home = tmp_path_factory.mktemp("ray")  # its own ~/.ray; sockets need a short path
    bin_ = str(Path(sys.executable).parent)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    token = home / "token"
    token.write_text(TOKEN)
    environment = kept | {
        "HOME": str(home), "PATH": f"{bin_}:{kept['PATH']}", "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token),
    }  # fmt: skip
    gcs, dashboard = free_port(), free_port()
    shared = ["--num-cpus", "2", "--object-store-memory", str(100 * 2**20)]
    head = [
        "--head", "--port", str(gcs), "--include-dashboard", "true", "--dashboard-host",
        "127.0.0.1", "--dashboard-port", str(dashboard), "--node-ip-address", "127.0.0.1",
        "--temp-dir", str(home / "h"), "--ray-client-server-port", str(free_port()),
        "--dashboard-agent-listen-port", str(free_port()), *shared,
    ]  # fmt: skip
    second = [
        "--address", f"127.0.0.1:{gcs}", "--node-ip-address", "127.0.0.1",
        # in one session folder two nodes of one machine delete each other's working directories
        "--temp-dir", str(home / "w"),
        "--dashboard-agent-listen-port", str(free_port()), *shared,
    ]  # fmt: skip
    with node(*head, environment=environment, log=home / "head.log") as process:
        wait_for(dashboard, process, home / "head.log")
        with node(*second, environment=environment, log=home / "second.log"):
            yield Cluster(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{gcs}", environment)


def wait_for(port: int, process: subprocess.Popen, log: Path) -> None:
    end = time.monotonic() + 240  # seconds on a quiet machine
    while time.monotonic() < end:
        assert process.poll() is None, (
            f"ray start ended with {process.returncode}: {log.read_text()}"
        )
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.5)
    raise AssertionError(f"no answer on port {port}: {log.read_text()}")


FLAGS = (
    "--suite", "own:suite", "--gamma", "0.9", "--epsilon", "0.2", "--tuning-cost-weight", "0.05",
    "--switch-cost-weight", "0.01", "--episodes", "2", "--horizon", "2", "--judge-replicas", "1",
    "--num-workers", "2", "--steps", "2", "--concurrent-trials", "1",
)  # fmt: skip


OWN = """
import rlhf_ray
from sweep_files import small_suite as suite

assert "working_dir_files" in rlhf_ray.__file__, rlhf_ray.__file__  # what was uploaded
"""


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_sweep_on_a_cluster_from_submit_to_fetched_results(cluster: Cluster, tmp_path) -> None:
    project, storage = tmp_path / "project", tmp_path / "shared"
    project.mkdir()
    (project / "own.py").write_text(OWN)
    (project / "sweep_files.py").write_text((TESTS / "sweep_files.py").read_text())
    launch_flags = ("--", *FLAGS, "--storage-path", str(storage))

    def submitted(*arguments: str, **changed: str):
        return cluster.submit(*arguments, cwd=project, **changed)

    stranger = submitted("--follow", "a", RAY_AUTH_MODE="disabled")
    assert stranger.returncode == 2, stranger.stderr
    assert "must be given its token" in stranger.stderr
    assert not cluster.joins("another-token")
    unknown = submitted("--follow", "absent")
    assert unknown.returncode == 2
    assert "a job of the cluster" in unknown.stderr

    name = begin_and_leave(cluster, project, ("--include", "sweep_files.py", *launch_flags))
    done = submitted("--follow", name, "--fetch", "results")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Methods on the test tasks" in done.stdout

    (fetched,) = (project / "results").iterdir()
    summary = json.loads((fetched / "summary.json").read_text())
    assert summary == json.loads((storage / fetched.name / "summary.json").read_text())
    assert {"policy", "full_best"} <= set(summary["methods"])
    assert (fetched / "best_policy/policy.safetensors").is_file()
    assert not list((project / "results").rglob("*.pkl"))
    assert f"{storage}/{fetched.name}" in done.stdout

    refused = submitted(*launch_flags)  # the suite needs a file that was not included
    assert (refused.returncode, "No module named 'sweep_files'" in refused.stdout) == (2, True)

    more = ("--episodes", "4000", "--name", "endless")
    began = submitted("--detach", "--include", "sweep_files.py", *launch_flags, *more)
    (endless,) = re.findall(r"^job +(\S+)", began.stdout, re.MULTILINE)
    assert submitted("--stop", endless).returncode == 0
    stopped = submitted("--follow", endless)
    assert stopped.returncode == 130

    said = [run.stdout + run.stderr for run in (stranger, unknown, done, refused, began, stopped)]
    assert not [text for text in said if TOKEN in text]


def begin_and_leave(cluster: Cluster, project: Path, arguments: tuple[str, ...]) -> str:
    """Submits, leaves by Ctrl-C when the job has begun; returns the job's name."""
    process = subprocess.Popen(
        [sys.executable, "-m", "rlhf_ray.submit", "--address", cluster.address, *arguments],
        cwd=project, env=cluster.environment, stdout=subprocess.PIPE, text=True,
        # not ignored, as it is by what a shell runs in the background
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None
    said = ""
    while "loading torch" not in said:
        line = process.stdout.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    (name,) = re.findall(r"^job +(\S+)", said, re.MULTILINE)
    assert process.returncode == 130
    assert f"{name} runs on" in rest
    return name
