"""An S3 API over HTTP on loopback, which fails as asked."""

import http.client
import io
import logging
import socket
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

BUCKET = "archive"
_PAGE = b"<html><body>Welcome</body></html>"
_FAILURES = {"down": 10**9, "changed": 10**9, "repeated": 3}  # Number of requests that fail.


class Store:
    """A server of S3. `fails` lets a request fail.

    error: The store answers 500. other: The store does nothing, and answers 200 with a page, as a
    proxy does. unanswered: The store does its work, but the answer is lost, so that the client asks
    twice. cut: Half of the answer arrives. repeated: This request and its two repetitions fail.
    down: This and all later requests fail. changed: The store answers as always, but from now on
    keeps other bytes than those that it receives.
    """

    def __init__(self) -> None:
        self.requests = self._number = 0
        self._how = ""
        self._lock = threading.Lock()
        application = import_module("moto.moto_server.werkzeug_app")
        self._application = application.DomainDispatcherApplication(application.create_backend_app)
        make_server = import_module("werkzeug.serving").make_server
        self.server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        logging.getLogger("werkzeug").setLevel(logging.WARNING)

    def fails(self, number: int, how: str) -> None:
        """Let a request fail: the first one from now on has the number 1. 0 ends all failures."""
        with self._lock:
            self.requests, self._number, self._how = 0, number, how

    def url(self, prefix: str) -> str:
        return (
            f"s3://{BUCKET}/{prefix}?endpoint_override=127.0.0.1:{self.server.port}&scheme=http"
            "&region=us-east-1"
        )

    def _answer(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        with self._lock:
            self.requests += 1
            after = self.requests - self._number
            fails = self._number and 0 <= after < _FAILURES.get(self._how, 1)
            how = self._how if fails else ""
        if how in ("error", "down", "repeated"):
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return []
        if how == "other":
            start_response("200 OK", [("Content-Length", str(len(_PAGE)))])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [_PAGE]
        # The client sends content in chunks, without its length.
        if how == "changed" and "HTTP_TRANSFER_ENCODING" in environ:
            body = bytearray(environ["wsgi.input"].read())
            body[len(body) // 2] ^= 1
            environ["wsgi.input"] = io.BytesIO(body)
        run_wsgi_app = import_module("werkzeug.test").run_wsgi_app
        body, status, headers = run_wsgi_app(self._application, environ, buffered=True)
        data = b"".join(body)
        if how == "unanswered":
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        start_response(status, [*headers])
        return [data[: len(data) // 2] if how == "cut" else data]


@contextmanager
def object_store() -> Iterator[Store]:
    """Run a store with an empty bucket."""
    store = Store()
    thread = threading.Thread(target=store.server.serve_forever)
    thread.start()
    try:
        client = http.client.HTTPConnection("127.0.0.1", store.server.port)
        client.request("PUT", f"/{BUCKET}")
        assert client.getresponse().status == http.HTTPStatus.OK
        client.close()
        yield store
    finally:
        store.server.shutdown()
        thread.join()
        store.server.server_close()


@contextmanager
def silent_store() -> Iterator[str]:
    """Listen on a port, and answer no request. Yield a URL for AUDIT_ARCHIVE."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield (
            f"s3://{BUCKET}/silent?endpoint_override=127.0.0.1:{server.getsockname()[1]}"
            "&scheme=http&region=us-east-1&connect_timeout=1&request_timeout=1"
        )
