"""The scrape endpoint: where it is, what it answers, and what it does when its address is taken."""

from __future__ import annotations

import gzip
import http.client
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
from prometheus_client import CollectorRegistry, Counter

from melodi_otel.config import SERVER_VARIABLE
from melodi_otel.telemetry import http as endpoint_room
from melodi_otel.telemetry.http import Endpoint, serve


@pytest.fixture
def registry() -> CollectorRegistry:
    made = CollectorRegistry()
    Counter("n", "N.", registry=made).inc(3)
    return made


@pytest.fixture
def endpoint(registry: CollectorRegistry) -> Iterator[Endpoint]:
    made = serve("127.0.0.1:0", registry)
    yield made
    made.close()


def ask(
    port: int | None, path: str = "/metrics", method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port or 0, timeout=10)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def taken() -> socket.socket:
    holder = socket.socket()
    holder.bind(("127.0.0.1", 0))
    holder.listen()
    return holder


def test_text(endpoint: Endpoint) -> None:
    """Without a wish the answer is Prometheus' text format."""
    status, headers, body = ask(endpoint.port)
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert b"n_total 3.0" in body


def test_openmetrics(endpoint: Endpoint) -> None:
    """Who accepts OpenMetrics gets it."""
    _, headers, body = ask(endpoint.port, Accept="application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
    assert headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert body.endswith(b"# EOF\n")


def test_gzip(endpoint: Endpoint) -> None:
    """Who accepts gzip gets it."""
    _, headers, body = ask(endpoint.port, **{"Accept-Encoding": "gzip"})
    assert headers["Content-Encoding"] == "gzip"
    assert b"n_total 3.0" in gzip.decompress(body)


def test_head(endpoint: Endpoint) -> None:
    """HEAD tells the length and sends nothing."""
    status, headers, body = ask(endpoint.port, method="HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["Content-Length"]) > 0


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 200), ("GET", "/favicon.ico", 404), ("POST", "/metrics", 405), ("DELETE", "/", 405)],
)
def test_other_paths(endpoint: Endpoint, method: str, path: str, status: int) -> None:
    """There is a small index and /metrics, for GET and HEAD, and nothing else."""
    assert ask(endpoint.port, path, method)[0] == status


def test_failing_collector(registry: CollectorRegistry) -> None:
    """A collector that raises gives a 500 and no stack trace."""

    class Broken:
        def collect(self) -> Iterator[object]:
            raise RuntimeError("secret")
            yield

    made = serve("127.0.0.1:0", registry)
    registry._collector_to_names[Broken()] = []  # type: ignore[index]
    status, _, body = ask(made.port)
    made.close()
    assert status == 500
    assert b"secret" not in body


def test_close_frees_the_port(registry: CollectorRegistry) -> None:
    """After a close the port can be bound again at once, and a second close does nothing."""
    first = serve("127.0.0.1:0", registry)
    port = first.port
    ask(port)
    first.close()
    first.close()
    second = serve(f"127.0.0.1:{port}", registry)
    assert second.port == port
    second.close()


def test_default_port_moves(
    registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A taken default port means the next free one, and a line that says where."""
    caplog.set_level(logging.INFO, "melodi_otel")
    holder = taken()
    free = taken()
    ports = [holder.getsockname()[1], free.getsockname()[1]]
    free.close()
    monkeypatch.setattr(endpoint_room, "DEFAULT_PORTS", ports)
    made = serve(None, registry)
    assert made.port == ports[1]
    assert f"http://127.0.0.1:{ports[1]}/metrics" in caplog.text
    made.close()
    holder.close()


def test_default_ports() -> None:
    """The default is the loopback, 9464 to 9473."""
    assert endpoint_room.DEFAULT_HOST == "127.0.0.1"
    assert list(endpoint_room.DEFAULT_PORTS) == list(range(9464, 9474))


def test_explicit_address_is_never_moved(registry: CollectorRegistry, caplog: pytest.LogCaptureFixture) -> None:
    """A taken explicit address gives one warning, and is served as soon as it is free."""
    holder = taken()
    port = holder.getsockname()[1]
    made = serve(f"127.0.0.1:{port}", registry, retry_s=0.02)
    assert made.port is None
    assert made.url is None
    holder.close()
    assert made.bound.wait(10)
    assert made.port == port
    assert ask(port)[0] == 200
    made.close()
    assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1


def test_close_while_waiting(registry: CollectorRegistry) -> None:
    """An endpoint that waits for its address can be closed at once."""
    holder = taken()
    made = serve(f"127.0.0.1:{holder.getsockname()[1]}", registry, retry_s=1000)
    made.close()
    assert made.port is None
    holder.close()


@pytest.mark.parametrize("address", ["9464", ":9464", "h:x", "h:70000"])
def test_bad_address(registry: CollectorRegistry, address: str) -> None:
    """What is no HOST:PORT is refused by name."""
    with pytest.raises(ValueError, match="no HOST:PORT"):
        serve(address, registry)


FORK = """
import os, socket
from prometheus_client import CollectorRegistry
from melodi_otel.telemetry.http import serve

endpoint = serve("127.0.0.1:0", CollectorRegistry())
port = endpoint.port
ready, go = os.pipe()
pid = os.fork()
if pid == 0:
    os.read(ready, 1)
    os._exit(0 if endpoint.port is None else 1)
endpoint.close()
again = socket.socket()
again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
again.bind(("127.0.0.1", port))
again.listen()
os.write(go, b"x")
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_fork() -> None:
    """A forked child lets go of the port."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.stdout.strip() == "0", done.stderr


def test_a_child_leaves_the_address_to_its_parent(caplog: pytest.LogCaptureFixture) -> None:
    """Who inherits that a living process serves on the address neither warns nor tries; when that process is gone it serves."""
    caplog.set_level(logging.INFO, "melodi_otel")
    environ: dict[str, str] = {}
    parent = serve("127.0.0.1:0", CollectorRegistry(), environ=environ)
    address = f"127.0.0.1:{parent.port}"
    assert environ == {SERVER_VARIABLE: f"{os.getpid()}@{address}"}
    # to a child, its parent's is the pid of another process: here that of the test's own parent, which lives
    inherited = {SERVER_VARIABLE: f"{os.getppid()}@{address}"}
    child = serve(address, CollectorRegistry(), retry_s=0.01, environ=inherited)
    assert child.port is None
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    parent.close()
    assert environ == {}
    assert child.port is None  # that process lives still, and may serve again
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    inherited[SERVER_VARIABLE] = f"{gone.pid}@{address}"
    assert child.bound.wait(10)
    assert inherited == {SERVER_VARIABLE: f"{os.getpid()}@{address}"}
    child.close()


def test_another_address_is_served(caplog: pytest.LogCaptureFixture) -> None:
    """What a parent serves elsewhere keeps nobody from serving here."""
    environ = {SERVER_VARIABLE: f"{os.getppid()}@127.0.0.1:1"}
    endpoint = serve("127.0.0.1:0", CollectorRegistry(), environ=environ)
    assert endpoint.port
    endpoint.close()
