"""Storage paths as text: what of a URI is a secret, and what messages may show.

Opens nothing, and needs no pyarrow: commands show their arguments before either is there.
"""

import re

HARMLESS = (
    "region", "scheme", "endpoint_override",  # of S3
    "location", "project_id",  # of Google's
    "enable_tls", "blob_storage_authority", "dfs_storage_authority", "credential_kind",  # of Azure
)  # fmt: skip
"""Options of a URI that messages may show: where the storage is, not how one gets in."""


def below(location: str, name: str) -> str:
    """Where a file or folder of a storage path lies, as messages name it; opens nothing.

    >>> below("/shared/runs/", "digits-1"), below("s3://KEY:SECRET@b/runs?region=eu", "digits-1")
    ('/shared/runs/digits-1', 's3://b/runs/digits-1?region=eu')
    """
    shown = without_secrets(location)
    root, mark, options = shown.partition("?") if "://" in shown else (shown, "", "")
    return f"{root.rstrip('/')}/{name}{mark}{options}"


def without_options(path: str) -> str:
    """A URI without its query, for programs that know none of pyarrow's options."""
    return path.partition("?")[0] if "://" in path else path


def without_secrets(uri: str) -> str:
    """URIs may hold keys before an @ and in the query: neither may reach a message.

    >>> without_secrets("s3://KEY:SECRET@bucket/runs?region=eu-west-1&session_token=abc")
    's3://bucket/runs?region=eu-west-1'
    >>> without_secrets("abfss://container:KEY@account.dfs.core.windows.net/runs")
    'abfss://container@account.dfs.core.windows.net/runs'
    """
    if "://" not in uri:
        return uri
    bare, _, query = uri.partition("?")
    kind, _, place = bare.partition("://")
    user = user_of(uri)
    if user:
        name = user.partition(":")[0] if kind.lower() in _AZURE else ""
        place = (f"{name}@" if name else "") + place.removeprefix(f"{user}@")
    options = [option for option in query.split("&") if option.partition("=")[0] in HARMLESS]
    return f"{kind}://{place}" + ("?" + "&".join(options) if options else "")


def shown_word(word: str) -> str:
    """A word of a command line as messages show it: without the secrets of a URI that it holds.

    >>> shown_word("--storage-path=s3://KEY:SEC/RET@bucket/runs"), shown_word("--fresh")
    ('--storage-path=s3://bucket/runs', '--fresh')
    """
    return _URI.sub(lambda found: without_secrets(found[0]), word, count=1)


def user_of(uri: str) -> str:
    """What stands before the @ of a URI: a user, or a key and its secret; "" if nothing does.

    A container or account of Azure alone is part of the place, and no user.

    >>> user_of("s3://KEY:SEC/RET@bucket/runs"), user_of("s3://bucket/me@home")
    ('KEY:SEC/RET', '')
    """
    kind, mark, place = uri.partition("?")[0].partition("://")
    found = _USERS.get(kind.lower(), _USER).match(place)
    return found[1] if mark and found else ""


_URI = re.compile(r"[a-z][a-z0-9+.-]*://.*", re.IGNORECASE | re.DOTALL)

_AZURE = ("abfs", "abfss")

_USER = re.compile(r"([^/@]*)@")
_USERS = {
    "s3": re.compile(r"([^/@:]*:[^@]*|[^/@]*)@"),
    **dict.fromkeys(_AZURE, re.compile(r"([^/@:]*:[^@]*)@")),
}
"""Keys of S3 and Azure may hold slashes, which end what other readers take for the user."""
