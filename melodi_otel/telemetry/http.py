"""The scrape endpoint: ``/metrics`` on an address, by a daemon thread of our own.

Without an address it takes the first free port from 9464 to 9473 on the loopback interface. An address that somebody chose
is never moved: while it is taken there is one warning and a new try every 5 s. A child of the process that serves there knows
so from a variable that it inherits: it says nothing and leaves the address alone for as long as that process lives. Nothing
here raises into the host program.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import os
import socket
import threading
from collections.abc import Callable, MutableMapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from melodi_otel.config import SERVER_VARIABLE
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.forks import in_child

log = logging.getLogger("melodi_otel")

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORTS: Final = range(9464, 9474)
RETRY_S: Final = 5.0

_INDEX: Final = (
    b"<!doctype html><title>melodi_otel</title><h1>melodi_otel</h1>"
    b"<p>Energy of LLM requests: <a href=/metrics>metrics</a></p>\n"
)


class Endpoint:
    """A scrape endpoint; made by :func:`serve`.

    Attributes:
        port: the port it is bound to; None while its address is taken by somebody else.
        bound: set once it is bound.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        candidates: list[tuple[str, int]],
        retry_s: float,
        environ: MutableMapping[str, str] | None = None,
    ) -> None:
        self._registry = registry
        self._environ: MutableMapping[str, str] = {} if environ is None else environ
        self._candidates = candidates
        self._retry_s = retry_s
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._complain = Complaints("scrape endpoint")
        self.port: int | None = None
        self.host: Final = candidates[0][0]
        self.bound: Final = threading.Event()
        in_child(self._forked)

    @property
    def url(self) -> str | None:
        """Where ``/metrics`` is, or None while it is not bound."""
        if self.port is None:
            return None
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}/metrics"

    def start(self) -> None:
        """Bind now if that works, else keep trying on the thread; serve until :meth:`close`."""
        error = None
        if self._parent_serves():
            log.info("metrics of this process are not on the page at %s: its parent serves there", self._address)
        else:
            error = self._bind()
        if error is not None:
            log.warning(
                "metrics cannot be served on %s: %s; trying again every %g s",
                " or ".join(
                    f"{host}:{port}"
                    for host, port in (self._candidates[0], self._candidates[-1])[: len(self._candidates)]
                ),
                error.strerror or error,
                self._retry_s,
            )
        self._thread = threading.Thread(target=self._run, name="melodi-otel-http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the port; a second call does nothing."""
        with self._lock:
            self._closing.set()
            server = self._server
        thread, self._thread = self._thread, None
        if thread is None:
            return
        if server is not None:
            server.shutdown()
        thread.join(timeout=5.0)
        self.port = None
        if self._environ.get(SERVER_VARIABLE, "").partition("@")[0] == str(os.getpid()):
            del self._environ[SERVER_VARIABLE]

    @property
    def _address(self) -> str:
        host, port = self._candidates[0]
        return f"{host}:{port}"

    def _parent_serves(self) -> bool:
        """Whether a process that we descend from serves on our address, and lives."""
        pid, _, address = self._environ.get(SERVER_VARIABLE, "").partition("@")
        if len(self._candidates) > 1 or address != self._address or not pid.isdigit() or int(pid) == os.getpid():
            return False
        if os.name != "posix":
            return False
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            return False
        except OSError:
            pass  # it lives, and belongs to somebody else
        return True

    def _bind(self) -> OSError | None:
        error: OSError | None = None
        for host, port in self._candidates:
            try:
                server = _Server(host, port, self._registry, self._complain)
            except OSError as refused:
                error = error or refused
                continue
            self.port = int(server.server_address[1])
            self._server = server
            self._environ[SERVER_VARIABLE] = f"{os.getpid()}@{host}:{self.port}"
            self.bound.set()
            if port not in (0, self._candidates[0][1]):
                log.info("port %d is taken; metrics are served on %s", self._candidates[0][1], self.url)
            return None
        return error

    def _run(self) -> None:
        while self._server is None:
            if self._closing.wait(self._retry_s):
                return
            with self._lock:
                if self._closing.is_set():
                    return
                if not self._parent_serves():
                    self._bind()
        server = self._server
        try:
            server.serve_forever()
        finally:
            server.server_close()

    def _forked(self) -> None:
        # The child has the socket but no thread: left open, it would keep the port from a parent that restarts.
        server, self._server, self._thread, self.port = self._server, None, None, None
        if server is not None:
            with contextlib.suppress(OSError):
                server.socket.close()


def serve(
    address: str | None,
    registry: CollectorRegistry,
    *,
    retry_s: float = RETRY_S,
    environ: MutableMapping[str, str] | None = None,
) -> Endpoint:
    """Serve ``registry``.

    Args:
        address: ``HOST:PORT`` (port 0: any free one), or None for the first free default port on the loopback.
        registry: what to show.
        retry_s: seconds between tries while the address is taken.
        environ: what children inherit: there they are told who serves, and there we look whether a parent does; None: neither.

    Raises:
        ValueError: ``address`` is no HOST:PORT.
    """
    if address is None:
        candidates = [(DEFAULT_HOST, port) for port in DEFAULT_PORTS]
    else:
        host, colon, port = address.rpartition(":")
        if not colon or not host or not port.isdigit() or int(port) > 65535:
            raise ValueError(f"{address!r} is no HOST:PORT")
        candidates = [(host.strip("[]"), int(port))]
    endpoint = Endpoint(registry, candidates, retry_s, environ)
    endpoint.start()
    return endpoint


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    # On Linux this only skips the wait after a close; elsewhere it would let two programs share a port.
    allow_reuse_address = os.name == "posix"

    def __init__(
        self, host: str, port: int, registry: CollectorRegistry, complain: Callable[[str, BaseException], None]
    ) -> None:
        self.registry = registry
        self.complain = complain
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    def server_bind(self) -> None:
        # The base class looks its own name up in the DNS here, which may take seconds and serves nothing.
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: object, client_address: object) -> None:
        """A scraper that hangs up is no event."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "melodi_otel"
    sys_version = ""
    timeout = 60
    server: _Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            self._metrics()
        elif path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", _INDEX)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain; charset=utf-8", b"only /metrics is here\n")

    do_HEAD = do_GET  # noqa: N815 - the names that http.server calls

    def _refuse(self) -> None:
        # A body may follow that nobody reads: the connection cannot be used again.
        self.close_connection = True
        self._answer(
            HTTPStatus.METHOD_NOT_ALLOWED, "text/plain; charset=utf-8", b"only GET and HEAD\n", ("Allow", "GET, HEAD")
        )

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = _refuse  # noqa: N815

    def _metrics(self) -> None:
        try:
            encode, kind = choose_encoder(self.headers.get("Accept", ""))
            body = encode(self.server.registry)
        except Exception as error:
            self.server.complain("collecting", error)
            self._answer(HTTPStatus.INTERNAL_SERVER_ERROR, "text/plain; charset=utf-8", b"collecting failed\n")
            return
        headers: list[tuple[str, str]] = [("Vary", "Accept, Accept-Encoding")]
        if "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, compresslevel=1)
            headers.append(("Content-Encoding", "gzip"))
        self._answer(HTTPStatus.OK, kind, body, *headers)

    def _answer(self, status: HTTPStatus, kind: str, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's own name
        """Access logs are the host program's business."""
