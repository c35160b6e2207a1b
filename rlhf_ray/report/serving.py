"""The page on 127.0.0.1, made anew at every request; it asks for what has changed by itself."""

import threading
from collections.abc import Callable
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from rlhf_ray.errors import InputError
from rlhf_ray.report.gathering import Gatherer
from rlhf_ray.report.page import fragment, version, whole

HOST = "127.0.0.1"


def server_of(gatherer: Gatherer, port: int) -> ThreadingHTTPServer:
    """A server of one sweep's page, not yet running.

    Args:
        gatherer: reads the sweep.
        port: of 127.0.0.1; 0: any that is free.

    Raises:
        InputError: the port is taken.
    """
    lock = threading.Lock()

    def answer(path: str) -> tuple[HTTPStatus, str]:
        url = urlsplit(path)
        if url.path not in ("/", "/content"):
            return HTTPStatus.NOT_FOUND, "There is / only."
        with lock:
            data = gatherer.gather()
        if url.path == "/":
            return HTTPStatus.OK, whole(data)
        if parse_qs(url.query).get("have") == [version(data)]:
            return HTTPStatus.NO_CONTENT, ""
        return HTTPStatus.OK, fragment(data)

    try:
        return ThreadingHTTPServer((HOST, port), _handler(answer))
    except (OSError, OverflowError) as error:
        raise InputError(
            f"port must be a free one of {HOST}, got port={port} ({error}). 0 takes any."
        ) from error


def _handler(answer: Callable[[str], tuple[HTTPStatus, str]]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def handle(self) -> None:
            # a page that is reloaded or left while it loads hangs up: nobody's error
            with suppress(ConnectionError):
                super().handle()

        def do_GET(self) -> None:
            # another site's name that resolves to this address is not meant for us
            if (self.headers.get("Host") or "").split(":")[0] not in (HOST, "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN)
                return
            try:
                status, text = answer(self.path)
            except Exception as error:  # a sweep that was deleted, a storage that is away
                status, text = HTTPStatus.SERVICE_UNAVAILABLE, str(error)
            content = text.encode()
            self.send_response(status)
            kind = "html" if status == HTTPStatus.OK else "plain"
            self.send_header("Content-Type", f"text/{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            return  # one line per request is nobody's interest

    return Handler
