import pytest

from rlhf_ray.uris import user_of, without_secrets


@pytest.mark.parametrize(
    ("uri", "shown", "user"),
    [
        ("s3://KEY:SEC/RET+x@bucket/runs", "s3://bucket/runs", "KEY:SEC/RET+x"),
        ("S3://KEY:SEC/RET+x@bucket/runs", "S3://bucket/runs", "KEY:SEC/RET+x"),
        ("s3://anonymous@bucket/runs", "s3://bucket/runs", "anonymous"),
        ("s3://bucket/exp:1/me@home", "s3://bucket/exp:1/me@home", ""),
        ("hdfs://host:8020/user/me@corp", "hdfs://host:8020/user/me@corp", ""),
        ("file:///data/run:1/a@b", "file:///data/run:1/a@b", ""),
        ("/data/me@home:1/a@b", "/data/me@home:1/a@b", ""),
        ("file:///data//me@home/x", "file:///data//me@home/x", ""),
        ("gs://bucket/x?access_token=S", "gs://bucket/x", ""),
        ("abfss://box@acc.dfs.core.windows.net/x", "abfss://box@acc.dfs.core.windows.net/x", ""),
        (
            "abfss://box:K/Y=@acc.dfs.core.windows.net/x?client_secret=S&credential_kind=default",
            "abfss://box@acc.dfs.core.windows.net/x?credential_kind=default",
            "box:K/Y=",
        ),
        ("abfs://:KEY@acc.blob.core.windows.net/x", "abfs://acc.blob.core.windows.net/x", ":KEY"),
        ("abfs://acc@127.0.0.1:10000/box/me@x", "abfs://acc@127.0.0.1:10000/box/me@x", ""),
    ],
)
def test_keys_of_a_uri_are_told_from_its_path(uri: str, shown: str, user: str) -> None:
    assert (without_secrets(uri), user_of(uri)) == (shown, user)
