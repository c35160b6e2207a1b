import os
import pickle
from pathlib import Path

import pytest
from pyarrow import fs

from rlhf_ray.errors import InputError, StorageError
from rlhf_ray.storage import Storage, open_storage, parent_of
from rlhf_ray.uris import without_secrets


@pytest.fixture(params=["local", "object store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return open_storage(tmp_path / "runs")
    # anything but a LocalFileSystem takes the path without renames
    (tmp_path / "bucket" / "a").mkdir(parents=True)
    inner = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    return Storage(inner, "bucket", "test://bucket")


@pytest.mark.skipif(not hasattr(fs, "AzureFileSystem"), reason="pyarrow is built without Azure")
def test_shown_place_on_azure_is_the_same_place() -> None:
    uri = "abfss://box:a2V5@acc.dfs.core.windows.net/runs?enable_tls=true"
    storage = open_storage(uri)
    assert "a2V5" not in storage.shown
    assert open_storage(storage.shown).opened("a")[1] == storage.opened("a")[1] == "box/runs/a"


def test_files_written_read_listed_deleted(storage: Storage) -> None:
    assert storage.read_bytes("a/x.bin") is None
    assert not storage.exists("a/x.bin")
    assert storage.size_bytes("a/x.bin") is None
    storage.write_bytes("a/x.bin", b"one")
    storage.write_bytes("a/x.bin", b"three")
    storage.write_bytes("y.bin", b"")
    assert storage.read_bytes("a/x.bin") == b"three"
    assert storage.read_bytes("y.bin") == b""
    assert storage.exists("a/x.bin") and storage.size_bytes("a/x.bin") == 5
    assert not storage.exists("a")
    assert storage.list() == ["a/x.bin", "y.bin"]
    assert storage.list("a") == ["a/x.bin"]
    assert storage.list("nothing") == []
    storage.delete("y.bin")
    storage.delete("y.bin")
    storage.delete_prefix("a")
    storage.delete_prefix("a")
    assert storage.list() == []


def test_folders_are_those_right_below(storage: Storage) -> None:
    for name in ("a/x.bin", "top.bin"):
        storage.write_bytes(name, b"")
    assert storage.folders() == ["a"]
    assert storage.folders("a") == storage.folders("nothing") == []


def test_others_can_write_there(storage: Storage) -> None:
    storage.write_bytes("a/x.bin", b"one")
    filesystem, path = storage.opened("a/x.bin")
    assert filesystem.get_file_info(path).size == 3
    with pytest.raises(InputError, match="stays in its folder"):
        storage.opened("../x")


def test_json_cut_counts_as_absent(storage: Storage) -> None:
    storage.write_json("a/s.json", {"n": [1, 2.5, None]})
    assert storage.read_json("a/s.json") == {"n": [1, 2.5, None]}
    assert storage.read_json("a/none.json") is None
    whole = storage.read_bytes("a/s.json")
    assert whole is not None
    for n in range(len(whole) - 1):  # the last byte is a newline
        storage.write_bytes("a/s.json", whole[:n])
        assert storage.read_json("a/s.json") is None


@pytest.mark.parametrize("name", ["", "/etc/x", "../x", "a/../../x", "a\\b", "a\0b", "a//b", "./x"])
def test_names_cannot_escape(storage: Storage, name: str) -> None:
    for act in (storage.read_bytes, storage.exists, storage.delete, storage.delete_prefix):
        with pytest.raises(InputError, match="must be a relative path"):
            act(name)
    with pytest.raises(InputError, match="must be a relative path"):
        storage.write_bytes(name, b"")


def test_local_leaves_no_parts_and_ignores_those_of_killed_writers(tmp_path: Path) -> None:
    storage = open_storage(tmp_path)
    storage.write_bytes("d/x", b"1")
    assert [path.name for path in (tmp_path / "d").iterdir()] == ["x"]
    (tmp_path / "d" / "y.0123.part").write_bytes(b"cut")
    assert storage.list() == ["d/x"]
    assert storage.local_path("d/x") == tmp_path / "d" / "x"


def test_check_makes_the_folder_and_leaves_nothing(tmp_path: Path) -> None:
    storage = open_storage(tmp_path / "new" / "runs", check=True)
    assert storage.list() == []


def test_check_unwritable_path_says_so_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(
        InputError, match=r"must be writable, got .*file/runs': Not a dir.*\. Give"
    ) as caught:
        open_storage(tmp_path / "file" / "runs", check=True)
    assert "\n" not in str(caught.value) and "probe" not in str(caught.value)
    with pytest.raises(StorageError, match="must be written"):
        open_storage(tmp_path / "file").write_bytes("x", b"")


@pytest.mark.parametrize("location", ["", "nope://x/y", "a\0b", "s3://", "gs://", "s3://?x=1"])
def test_open_bad_location(location: str) -> None:
    with pytest.raises(InputError, match="storage path must be a folder or a URI"):
        open_storage(location)


def test_messages_hold_no_secrets() -> None:
    uri = "s3://KEY:SECRET@bucket/folder?endpoint_override=127.0.0.1%3A1"
    storage = open_storage(uri + "&region=x&scheme=http")
    options = "endpoint_override=127.0.0.1%3A1&region=x&scheme=http"
    assert storage.shown == f"s3://bucket/folder?{options}"
    assert storage.shown_path("a/b") == f"s3://bucket/folder/a/b?{options}"
    assert without_secrets("s3://bucket/x?session_token=SECRET") == "s3://bucket/x"
    assert not storage.is_local and storage.local_path() is None
    with pytest.raises(InputError, match="must be a folder or a URI") as caught:
        open_storage("bad://KEY:SECRET@bucket?token=SECRET")
    assert "SECRET" not in str(caught.value) and "KEY" not in str(caught.value)


def test_storage_pickles(tmp_path: Path) -> None:
    open_storage(tmp_path).write_bytes("x", b"1")
    assert pickle.loads(pickle.dumps(open_storage(tmp_path))).read_bytes("x") == b"1"


def test_file_uri_is_local(tmp_path: Path) -> None:
    storage = open_storage(tmp_path.as_uri(), check=True)
    assert storage.local_path("x") == tmp_path / "x"


def test_keys_of_a_uri_are_in_no_pickle_of_a_keyless_filesystem(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "other")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY", raising=False)
    options = "endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    storage = open_storage(f"s3://me:my%2Fown@bucket/runs?{options}")
    assert b"my/own" in pickle.dumps(storage.opened("x")[0])
    with storage.keyless() as filesystem:
        assert b"my/own" not in pickle.dumps(filesystem)
        assert os.environ["AWS_SECRET_ACCESS_KEY"] == "my/own"
        assert os.environ["AWS_ACCESS_KEY_ID"] == "me"
    assert os.environ["AWS_ACCESS_KEY_ID"] == "other"
    assert "AWS_SECRET_ACCESS_KEY" not in os.environ


def test_filesystem_without_keys_is_keyless_as_it_is(storage: Storage) -> None:
    with storage.keyless() as filesystem:
        assert filesystem is storage.opened("x")[0]


def test_parent_of_a_path_and_of_a_uri(tmp_path: Path) -> None:
    open_storage(tmp_path).write_bytes("runs/one/x", b"1")
    for path in (
        tmp_path / "runs" / "one",
        str(tmp_path / "runs/one/"),
        f"file://{tmp_path}/runs/one",
    ):
        storage, name = parent_of(path)
        assert name == "one" and storage.read_bytes("one/x") == b"1"
    storage, name = parent_of("s3://bucket/runs/one?region=eu-west-1")
    assert (storage.shown, name) == ("s3://bucket/runs?region=eu-west-1", "one")
    with pytest.raises(InputError, match="must lie in a bucket or folder, got 's3://bucket'"):
        parent_of("s3://bucket?region=x")
