"""The scrape endpoint: ``/metrics`` and the status page on an address, by a daemon thread of our own.

Without an address it takes the first free port from 9464 to 9473 on the loopback interface. An address that somebody chose
is never moved: while it is taken there is one warning and a new try every 5 s. A child of the process that serves there knows
so from a variable that it inherits: it says nothing and leaves the address alone for as long as that process lives. Nothing
here raises into the host program. Every connection has a thread, a time for each of its requests, and there are so many at
most: whoever sends slowly, or nothing, keeps nobody else waiting.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping, MutableMapping
from http.server import ThreadingHTTPServer
from typing import Any, Final

from prometheus_client import CollectorRegistry

from melodi_otel.config import SERVER_VARIABLE
from melodi_otel.forks import in_child
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.guard import Guard
from melodi_otel.telemetry.pages import Handler, Site

log = logging.getLogger("melodi_otel")

DEFAULT_HOST: Final = "127.0.0.1"
DEFAULT_PORTS: Final = range(9464, 9474)
RETRY_S: Final = 5.0
HANDSHAKE_S: Final = 5.0
CONNECTIONS: Final = 64
"""The most connections at a time; one more is closed at once."""

_PLAIN: Final = (
    b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\nthis is https, not http\n"
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
        *,
        status: Callable[[], Mapping[str, Any]] | None = None,
        ready: Callable[[], str | None] | None = None,
        answer: Callable[[str], Mapping[str, Any] | None] | None = None,
        guard: Guard | None = None,
    ) -> None:
        self._guard = guard or Guard()
        self._site = Site(registry, Complaints("scrape endpoint"), status, ready, self._guard, answer)
        self._environ: MutableMapping[str, str] = {} if environ is None else environ
        self._candidates = candidates
        self._retry_s = retry_s
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._lock = threading.Lock()
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
        return f"http{'s' if self._guard.tls else ''}://{host}:{self.port}/metrics"

    def start(self) -> None:
        """Bind now if that works, else keep trying on the thread; serve until :meth:`close`."""
        error = None
        if self._guard.passwords and not self._guard.tls and not _only_here(self.host):
            log.warning(
                "metrics on %s ask for passwords without https: they travel in the clear; MELODI_METRICS_TLS_CERT encrypts them",
                self._address,
            )
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

    def reload(self) -> bool:
        """Read certificates and users again, e.g. on SIGHUP; False: the old ones stay, and a warning says why.

        They are also read when their files change, so this is for whoever wants to know at once.
        """
        return self._guard.reload()

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
                server = _Server(host, port, self._site)
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
        self._guard.forked()
        if server is not None:
            with contextlib.suppress(OSError):
                server.socket.close()


def serve(
    address: str | None,
    registry: CollectorRegistry,
    *,
    retry_s: float = RETRY_S,
    environ: MutableMapping[str, str] | None = None,
    status: Callable[[], Mapping[str, Any]] | None = None,
    ready: Callable[[], str | None] | None = None,
    answer: Callable[[str], Mapping[str, Any] | None] | None = None,
    guard: Guard | None = None,
) -> Endpoint:
    """Serve ``registry``, and with ``status`` a page for people.

    Args:
        address: ``HOST:PORT`` (port 0: any free one), or None for the first free default port on the loopback.
        registry: what to show.
        retry_s: seconds between tries while the address is taken.
        environ: what children inherit: there they are told who serves, and there we look whether a parent does; None: neither.
        status: what ``/status.json`` holds and ``/`` shows, see :meth:`melodi_otel.status.Reporter.json`; called on the thread
            that answers. None: there is a small index only.
        ready: why the meter is not ready, in one line, or None; None: it is ready once it serves.
        answer: what is known of the energy of an answer, by its id, or None; None: there are no such pages.
        guard: who may read, see :func:`melodi_otel.telemetry.guard.guard_of`; None: everybody.

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
    endpoint = Endpoint(registry, candidates, retry_s, environ, status=status, ready=ready, answer=answer, guard=guard)
    endpoint.start()
    return endpoint


def _only_here(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    # On Linux this only skips the wait after a close; elsewhere it would let two programs share a port.
    allow_reuse_address = os.name == "posix"

    def __init__(self, host: str, port: int, site: Site) -> None:
        self.site = site
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._free = threading.BoundedSemaphore(CONNECTIONS)
        self._until: dict[Any, float] = {}
        self._until_lock = threading.Lock()
        super().__init__((host, port), Handler)

    def server_bind(self) -> None:
        # The base class looks its own name up in the DNS here, which may take seconds and serves nothing.
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def allow(self, connection: Any, seconds: float) -> None:
        """Let ``connection`` live for so many seconds from now; it is cut after them."""
        with self._until_lock:
            self._until[connection] = time.monotonic() + seconds

    def service_actions(self) -> None:
        """Cut who took too long; called twice a second."""
        now = time.monotonic()
        with self._until_lock:
            for connection in [connection for connection, end in self._until.items() if end < now]:
                # The plain method: the one of TLS would pull its state from under the thread that reads.
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(connection, socket.SHUT_RDWR)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for one more."""
        return self._free.acquire(blocking=False)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the thread of a connection."""
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """One connection, in its thread, the handshake included: nobody else waits for it."""
        connection = request
        try:
            if (tls := self.site.guard.tls) is not None:
                connection = self._shake_hands(request, tls.context())
            if connection is not None:
                self.finish_request(connection, client_address)
        except Exception:
            self.handle_error(connection, client_address)
        finally:
            for one in (request, connection):
                if one is not None:
                    self._forget(one)
                    self.shutdown_request(one)
            self._free.release()

    def _shake_hands(self, request: Any, context: ssl.SSLContext) -> ssl.SSLSocket | None:
        request.settimeout(HANDSHAKE_S)
        first = request.recv(1, socket.MSG_PEEK)
        if first != b"\x16":  # no handshake of TLS begins like this
            if first:
                request.sendall(_PLAIN)
            return None
        connection = context.wrap_socket(request, server_side=True, do_handshake_on_connect=False)
        try:
            connection.do_handshake()  # its timeout is one for the whole handshake
        except (OSError, ValueError):
            connection.close()
            return None
        return connection

    def _forget(self, connection: Any) -> None:
        with self._until_lock:
            self._until.pop(connection, None)

    def handle_error(self, request: object, client_address: object) -> None:
        """A scraper that hangs up is no event."""
