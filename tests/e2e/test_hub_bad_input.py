"""What can be wrong with a hub: each time a message that says what and where, and a program that works."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from melodi_otel.hub import wire
from melodi_otel.testing.telemetry import OtlpReceiver

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(120),
    pytest.mark.skipif(sys.platform != "linux", reason="powercap and hubs are Linux's here"),
]
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")

PACKAGE = "intel-rapl:0"


@pytest.fixture
def package(hub_place: Any) -> Iterator[Any]:
    """A package of 50 W that counts in real time."""
    made = hub_place.tree.package(0, watts=50.0)
    with hub_place.tree.live():
        yield made


def works(place: Any, env: dict[str, str], *, local: bool, **spec: Any) -> str:
    """A program in ``env`` has joules; what it said."""
    told = place.finish(place.program(env, requests=3, **spec))
    assert told["local"] == local, place.said()
    # Its own meter begins when the hub has failed it, which may be within the first request.
    assert {row["quality"] for row in told["rows"]} <= {"measured", "interpolated", *(["partial"] if local else [])}
    assert all(row["joules"][PACKAGE] > 0 for row in told["rows"])
    return place.said()


def left_behind(path: Path) -> None:
    """The socket of a hub that was killed."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))


def test_a_stale_socket(hub_place: Any, package: Any) -> None:
    """A shared hub takes it away; where it is named, the program says that nobody listens and meters itself."""
    left_behind(hub_place.socket)
    works(hub_place, hub_place.environ(), local=False)
    named = hub_place.path / "stale" / "hub.sock"
    left_behind(named)
    said = works(hub_place, hub_place.environ(MELODI_HUB=str(named)), local=True)
    assert f"MELODI_HUB={named}: nobody listens on {named}: its hub has ended; this process has its own meter" in said


@as_root
def test_a_socket_of_another_user(hub_place: Any, package: Any) -> None:
    """Nothing is sent to it: it could tell anything."""
    path = hub_place.path / "open" / "hub.sock"
    listening = (
        "import os, socket, sys, time\n"
        "s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); os.chmod(sys.argv[1], 0o777)\n"
        "os.setgid(54321); os.setuid(54321); s.listen(); c, _ = s.accept(); print('heard', c.recv(99), flush=True)\n"
        "time.sleep(600)"
    )
    hub_place.start([sys.executable, "-c", listening, str(path)], os.environ, "stranger")
    hub_place.until("the stranger listens", path.exists)
    said = works(hub_place, hub_place.environ(MELODI_HUB=str(path)), local=True)
    assert f"user 54321 listens on {path}: it is not asked" in said
    assert "heard b''" in hub_place.said("stranger")


def old_hub(path: Path, answer: bytes) -> Callable[[], None]:
    """A hub that answers every greeting with ``answer`` and hangs up; call the result to end it."""
    path.parent.mkdir(mode=0o700)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()
    over = threading.Event()

    def serve() -> None:
        while True:
            connection, _ = listener.accept()
            with connection:
                if over.is_set():
                    return
                connection.recv(1 << 16)
                connection.sendall(answer)

    thread = threading.Thread(target=serve, name="old-hub")
    thread.start()

    def end() -> None:
        over.set()
        with socket.socket(socket.AF_UNIX) as last:
            last.connect(str(path))
        thread.join()
        listener.close()

    return end


WELCOME = wire.Welcome(0, "0.0.1", "old", "agent", [], False, 1.0, None, [], True)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (wire.encode_all(0, [wire.Refused("version", "this hub speaks version 0")]), "it refused: this hub speaks version 0"),
        (wire.encode_all(0, [WELCOME]), f"it speaks version 0 of the wire, this program {wire.VERSION}"),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], "it cannot be understood"),
    ],
    ids=["refuses", "welcomes", "other"],
)  # fmt: skip
def test_an_older_hub(hub_place: Any, package: Any, answer: Any, message: str) -> None:
    """The program says which versions do not fit, and meters itself."""
    path = hub_place.path / "old" / "hub.sock"
    end = old_hub(path, b"".join(answer))
    try:
        said = works(hub_place, hub_place.environ(MELODI_HUB=str(path)), local=True)
    finally:
        end()
    assert f"MELODI_HUB={path}: {message}" in said
    assert said.count("has its own meter") == 1


@as_root
def test_a_full_disk(hub_place: Any, package: Any) -> None:
    """A journal that cannot be written is one warning; metering goes on."""
    if shutil.which("unshare") is None:
        pytest.skip("unshare is not there")
    full = hub_place.path / "full"
    full.mkdir()
    script = f'mount -t tmpfs -o size=8k none {full} && (cat /dev/zero > {full}/fill; true) 2>/dev/null && exec "$@"'
    path = hub_place.path / "agent" / "hub.sock"
    hub_place.agent(
        hub_place.environ(), path, "--metrics-addr", "off", "--journal", str(full / "journal"),
        before=["unshare", "--mount", "sh", "-c", script, "sh"],
    )  # fmt: skip
    works(hub_place, hub_place.environ(MELODI_HUB=str(path)), local=False)
    said = hub_place.said("agent")
    assert f"the journal {full}/journal cannot be written (No space left on device); metering goes on" in said
    assert said.count("cannot be written") == 1


def test_a_stepping_wall_clock(hub_place: Any, package: Any, receiver: OtlpReceiver) -> None:
    """An hour back and two forward while requests are open: joules and durations are those of monotonic time."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not there")
    library = hub_place.path / "clock.so"
    source = Path(__file__).with_name("stepping_clock.c")
    subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    offset = hub_place.path / "offset"
    offset.write_text("0")
    env = hub_place.environ(receiver, LD_PRELOAD=str(library), STEPPING_CLOCK=str(offset))
    until = hub_place.path / "until"
    program = hub_place.program(env, requests=1, held=2, seconds=0.3, until=str(until))
    hub_place.ready("out")
    for step in ("-3600", "7200"):
        before = len(receiver.spans())
        offset.write_text(step)
        receiver.spans(before + 3)
    until.touch()
    rows = hub_place.finish(program)["rows"]
    spans = receiver.spans(len(rows))
    assert {row["quality"] for row in rows} <= {"measured", "interpolated"}
    assert sum(row["total"] for row in rows) == pytest.approx(hub_place.settled()[PACKAGE]["settled"], rel=1e-9)
    seconds = [(span.end_time_unix_nano - span.start_time_unix_nano) / 1e9 for span in spans]
    assert min(seconds) > 0.1
    assert max(seconds) < 60


def test_a_busy_default_port(hub_place: Any, package: Any) -> None:
    """The next free one is taken, and stands beside the socket."""
    env = hub_place.environ()
    del env["MELODI_METRICS_ADDR"]
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            holder.bind(("127.0.0.1", 9464))
            holder.listen()
        except OSError:
            pass  # somebody else keeps it busy
        works(hub_place, env, local=False)
        assert "melodi_requests_total{" in hub_place.fetch()
    assert 9464 < int(hub_place.page().rpartition(":")[2].split("/")[0]) < 9474
    assert "port 9464 is taken; metrics are served on http://127.0.0.1:" in hub_place.said_by_hub()


def test_a_busy_explicit_address(hub_place: Any, package: Any) -> None:
    """It is not moved: one warning, and served as soon as it is free."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        address = f"127.0.0.1:{holder.getsockname()[1]}"
        works(hub_place, hub_place.environ(MELODI_METRICS_ADDR=address), local=False)
        assert hub_place.page() is None
        assert hub_place.said_by_hub().count(f"metrics cannot be served on {address}: Address already in use") == 1
    assert "melodi_requests_total{" in hub_place.fetch()
    assert address in hub_place.page()
    assert hub_place.said_by_hub().count("cannot be served") == 1
