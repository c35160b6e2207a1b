"""Everything durable on an object store: a real S3 server (moto's) on the loopback interface."""

import functools
import json
import logging
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine, ran, request
from lines import Lines
from sweep_files import small_suite

from rlhf_ray.config import SearchConfig
from rlhf_ray.errors import InputError, StorageError
from rlhf_ray.policies.policy import Policy
from rlhf_ray.storage import open_storage
from rlhf_ray.sweep.results import SearchResult
from rlhf_ray.sweep.search import search
from rlhf_ray.tree.stage_tree import LocalStages
from rlhf_ray.tree.store import TreeStore

SECRET = "wJalrXUtnFEMI-secret"


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URI of an empty bucket; keys in it, as a user who has no AWS files may give them."""
    boto3 = pytest.importorskip("boto3")
    server_module = pytest.importorskip("moto.server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=port)
    server.start()
    endpoint = f"127.0.0.1:{port}"
    keys = {"aws_access_key_id": "me", "aws_secret_access_key": SECRET}
    client = boto3.client("s3", endpoint_url=f"http://{endpoint}", region_name="us-east-1", **keys)
    client.create_bucket(Bucket="runs")
    yield f"s3://me:{SECRET}@runs/FOLDER?endpoint_override={endpoint}&scheme=http&region=us-east-1"
    server.stop()


@pytest.fixture
def uri(bucket: str, request: pytest.FixtureRequest) -> str:
    """A folder of the test's own in the bucket."""
    return bucket.replace("FOLDER", request.node.name)


def test_files_written_read_listed_deleted(uri: str) -> None:
    storage = open_storage(uri, check=True)
    assert SECRET not in repr(storage) and storage.shown.startswith(
        "s3://runs/test_files_written_read_listed_deleted?endpoint"
    )
    assert storage.read_bytes("a/x.bin") is None and storage.list("nothing") == []
    storage.write_bytes("a/x.bin", b"one")
    storage.write_json("b/y.json", {"n": [1]})
    assert storage.list() == ["a/x.bin", "b/y.json"] and storage.folders() == ["a", "b"]
    assert storage.read_json("b/y.json") == {"n": [1]} and storage.size_bytes("a/x.bin") == 3
    storage.delete("a/x.bin")
    storage.delete("a/x.bin")
    storage.delete_prefix("b")
    assert storage.list() == []


def test_bucket_that_is_not_there_is_refused_without_the_keys(bucket: str) -> None:
    with pytest.raises(
        InputError, match=r"must be writable, got 's3://none/x\?endpoint_override="
    ) as caught:
        open_storage(bucket.replace("@runs/FOLDER", "@none/x"), check=True)
    assert SECRET not in str(caught.value)


def test_tree_commits_resumes_and_takes_cut_files_for_absent(uri: str, tmp_path: Path) -> None:
    storage = open_storage(uri)
    first = LocalStages(FakeEngine(tmp_path), TreeStore(storage))
    paths = [request(*(0, 1, 2)[:n]) for n in range(4)]
    answers = first.outcomes(paths)
    assert sum(len(a.carried_out) for a in answers) == 3
    again = LocalStages(FakeEngine(tmp_path), TreeStore(open_storage(uri)))
    assert [a.outcome for a in again.outcomes(paths)] == [a.outcome for a in answers]
    assert len(ran(tmp_path)) == 3
    # no rename there: a writer that is killed may leave a part, or weights without their outcome
    key = answers[2].outcome.key
    name = f"tree/{key[:2]}/{key}"
    content = storage.read_bytes(f"{name}.json")
    assert content is not None
    storage.write_bytes(f"{name}.json", content[:-10])
    third = LocalStages(FakeEngine(tmp_path), TreeStore(open_storage(uri)))
    assert third.outcome(paths[3]).outcome == answers[3].outcome and len(ran(tmp_path)) == 3
    assert third.outcome(paths[2]).carried_out == (key,)
    storage.write_bytes(f"{name}.safetensors", b"cut")
    fourth = LocalStages(FakeEngine(tmp_path), TreeStore(open_storage(uri)))
    asked = request(0, 1, 0)
    assert fourth.outcome(asked).recomputed == (key,)


def test_weights_beyond_the_limit_are_evicted(uri: str, tmp_path: Path) -> None:
    store = TreeStore(open_storage(uri), max_weight_bytes=1)
    stages = LocalStages(FakeEngine(tmp_path), store)
    stages.outcome(request(0, 1))
    assert not [name for name in open_storage(uri).list() if name.endswith(".safetensors")]


@pytest.mark.usefixtures("ray_session")
def test_whole_sweep_with_resume_report_and_no_keys_in_what_it_writes(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SearchConfig(
        storage_path=uri, name="mine", gamma=(0.9,), epsilon=(0.1,), tuning_cost_weight=(0.05,),
        switch_cost_weight=(0.001,), episodes=4, horizon=2, steps=2, batch_size=8,
        judge_replicas=1, num_workers=1, cpus_per_worker=0.5, concurrent_trials=1,
    )  # fmt: skip
    assert search(small_suite(), config, max_minutes=0.01).sweep["state"] == "interrupted"
    progress = Lines()
    result = search(small_suite(), config, progress=progress)
    assert not [line for line in progress.lines if "cannot be written" in line]
    assert result.finished and not result.failures
    assert SearchResult.load(uri.replace("?", "/mine?")).table().equals(result.table())
    assert result.best_policy.levels == ("low", "head")
    assert Policy.load(uri.replace("?", "/mine/best_policy?")).levels == ("low", "head")
    storage = open_storage(uri)
    names = set(storage.list("mine"))
    assert {"mine/report.html", "mine/summary.json", "mine/sweep.json"} <= names
    assert "mine/lock.json" not in names
    for name in storage.list():
        assert SECRET.encode() not in (storage.read_bytes(name) or b""), name
    assert json.loads(storage.read_bytes("mine/sweep.json") or b"")["state"] == "finished"
    monkeypatch.setattr("rlhf_ray.sweep.search._run", functools.partial(pytest.fail, "was there"))
    assert search(small_suite(), config).finished


def test_server_that_goes_away_is_an_error_of_the_storage(bucket: str) -> None:
    folder = bucket.split("?")[0].replace("FOLDER", "x")
    gone = f"{folder}?endpoint_override=127.0.0.1:9&scheme=http"
    with pytest.raises(StorageError, match=r"must be read under 's3://runs/x\?endpoint_override="):
        open_storage(gone).read_bytes("a")
