"""A client against a hub whose lines are written here: it never blocks its program, and never leaves anybody waiting."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from melodi_otel.attribution.meter import Decode, EngineId, Key, Share
from melodi_otel.devices import Device
from melodi_otel.hub import client as module
from melodi_otel.hub import outbox, wire
from melodi_otel.hub.client import HubClient, HubLost
from melodi_otel.testing.clock import ManualClock

ENGINE = EngineId("g", 0)
KEY = Key("g", "r")
PATIENCE = 10.0
"""Seconds after which a test is wrong; nothing here takes so long."""


def descriptors() -> set[Path]:
    """What this process has open."""
    return set(Path("/proc/self/fd").iterdir())


class ScriptedHub:
    """The other end: says what it is told to say, and reads when it is told to read."""

    def __init__(self, far: socket.socket) -> None:
        self.sock = far
        self.sock.settimeout(PATIENCE)
        self.number = 0
        self.frames = wire.Frames(wire.ToHub)
        self.heard: list[Any] = []

    def say(self, *messages: wire.Message) -> None:
        """Send one frame."""
        self.sock.sendall(wire.encode(self.number, messages))
        self.number += 1

    def welcome(self, version: int = wire.VERSION) -> None:
        """Read the greeting and answer it."""
        self.until(wire.Hello)
        devices = [Device("GPU-0", "gpu"), Device("cpu-0", "cpu")]
        self.say(wire.Welcome(version, "0", "h", "shared", devices, False, 1.0, None, [], True))

    def until(self, kind: type, number: int = 1) -> list[Any]:
        """Read until ``number`` messages of this kind have come; all that came since the last call."""
        while sum(isinstance(told, kind) for told in self.heard) < number:
            data = self.sock.recv(1 << 18)
            assert data, "the client hung up"
            self.heard += self.frames.feed(data)
        found, self.heard = self.heard, []
        return found


class Line:
    """A client, its hub, its clock, and what became of the connection."""

    def __init__(self, **changes: Any) -> None:
        near, far = socket.socketpair()
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.clock = ManualClock()
        self.hub = ScriptedHub(far)
        self.why: Future[str] = Future()
        hello = wire.Hello(wire.VERSION, "0", "program", "g", True, "s" * 2000, None, False, [])
        given: dict[str, Any] = {
            "connect": lambda: near,
            "welcomed": self._welcomed,
            "lost": lambda _, why: self.why.set_result(why),
            "wait_s": lambda: 1.0,
            **changes,
        }
        self.client = HubClient(given.pop("connect"), hello, now_ns=self.clock.monotonic_ns, **given)
        self.near = near

    def _welcomed(self, welcome: wire.Welcome, resumed: Mapping[str, wire.Told]) -> None: ...

    def start(self) -> Line:
        """Connect and greet."""
        self.client.start()
        self.hub.welcome()
        assert self.client.known.wait(PATIENCE)
        return self

    def look(self) -> None:
        """The client's thread comes round."""
        self.client._wake()

    def close(self) -> None:
        """Nothing stays."""
        self.hub.sock.close()
        self.client.hang_up(PATIENCE)
        self.near.close()
        assert not self.client._thread.is_alive()


@pytest.fixture
def make() -> Iterator[Callable[..., Line]]:
    """Makes lines, and sees that they end."""
    made: list[Line] = []

    def line(**changes: Any) -> Line:
        made.append(Line(**changes))
        return made[-1]

    yield line
    for one in made:
        one.close()
        for end in (one.client._wakes, one.client._woken):
            end.close()


@pytest.fixture
def line(make: Callable[..., Line]) -> Line:
    """One that is connected."""
    return make().start()


def share(joules: float) -> Share:
    """What a hub says of a request, under its own name for it."""
    return Share(
        Key("1000:g:program", "r"),
        "GPU-0",
        0,
        1,
        joules,
        None,
        None,
        None,
        None,
        None,
        "equal",
        "measured",
        1.0,
        1.0,
        1,
    )


def test_a_request(line: Line) -> None:
    """Opened, closed, settled, acknowledged; the share carries the program's own key."""
    line.client.open(KEY, line.clock.monotonic_ns())
    future = line.client.close(KEY, line.clock.monotonic_ns(), 3, "stop")
    assert [type(told).__name__ for told in line.hub.until(wire.Closed)] == ["Opened", "Closed"]
    line.hub.say(wire.Settled(7, [wire.Told("r", True, [share(2.0)])]))
    assert [(found.key, found.joules) for found in future.result(PATIENCE)] == [(KEY, 2.0)]
    assert line.hub.until(wire.Got) == [wire.Got(7)]
    assert line.client.waiting() == 0


def test_the_greeting_fits(make: Callable[..., Line]) -> None:
    """A service with a very long name is greeted for under a shorter one."""
    line = make()
    line.client.start()
    (hello,) = line.hub.until(wire.Hello)
    assert hello.service == "s" * 1024


def test_asked_and_answered(line: Line) -> None:
    """At Ask the counts of probes come, and the steps that they hand over before them; then the answer."""
    client = line.client

    def probe() -> int:
        client.step(ENGINE, 0, 1, 1, 2, decode=Decode(1, 1))
        return 5

    client.open(KEY, line.clock.monotonic_ns(), probe=probe)
    line.hub.until(wire.Opened)
    line.hub.say(wire.Ask(1))
    assert [type(told).__name__ for told in line.hub.until(wire.Answered)] == ["Stepped", "Progressed", "Answered"]


def test_a_hub_that_does_not_read(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    """Socket and outbox full: the program goes on at once, loses what may be lost, and the newest count arrives in the end."""
    monkeypatch.setattr(outbox, "CAPACITY", 200)
    client, now = line.client, line.clock.monotonic_ns()
    client.open(KEY, now)
    done: Future[bool] = Future()

    def work() -> None:
        for number in range(1, 20_001):
            client.progress(KEY, now, number, first_token_ns=now if number == 1 else None)
            client.step(ENGINE, 0, number, now, now)
        done.set_result(True)

    threading.Thread(target=work).start()
    assert done.result(PATIENCE)
    assert client.counts.dropped > 10_000
    assert len(client._outbox) <= 200
    told: list[Any] = []
    while not any(isinstance(one, wire.Progressed) and one.output_tokens == 20_000 for one in told):
        told += line.hub.until(wire.Progressed)
    counts = [one.output_tokens for one in told if isinstance(one, wire.Progressed)]
    assert counts == sorted(counts)
    assert not line.why.done()


def test_a_frozen_hub(line: Line, caplog: pytest.LogCaptureFixture) -> None:
    """No byte for 2 s: what waits longer than a span may says `unavailable`, `late`; the hub is told; later answers are late."""
    client, clock = line.client, line.clock
    client.open(KEY, clock.monotonic_ns(), devices=("GPU-0",))
    future = client.close(KEY, clock.monotonic_ns(), 3, "stop")
    clock.advance(0.9)
    line.look()
    line.hub.until(wire.Closed)
    assert not future.done()
    clock.advance(1.2)
    line.look()
    found = {one.device: (one.quality, one.reason) for one in future.result(PATIENCE)}
    assert found == {"GPU-0": ("unavailable", "late"), "cpu-0": ("unavailable", "late")}
    assert line.hub.until(wire.Forgone) == [wire.Forgone("r")]
    assert client.frozen
    assert client.between("GPU-0", 0, 1) is None  # and nobody waits for a frozen hub
    line.hub.say(wire.Settled(1, [wire.Told("r", True, [share(2.0)])]))
    line.hub.until(wire.Got)
    assert future.result(0)[0].joules is None
    other = Key("g", "s")
    client.open(other, clock.monotonic_ns())
    late = client.close(other, clock.monotonic_ns(), 1, "stop")
    line.hub.until(wire.Closed)
    line.hub.say(wire.Settled(2, [wire.Told("s", True, [share(1.0)])]))
    assert late.result(PATIENCE)[0].joules == 1.0
    said = [record.message for record in caplog.records if "hub" in record.message]
    assert [text.partition("hub ")[2][:7] for text in said] == ["does no", "answers"]


@pytest.mark.parametrize("how", ["hangs up", "resets", "garbage", "refuses", "too large"])
def test_a_hub_that_goes(line: Line, how: str) -> None:
    """Whatever ends the connection is told once, in words, and what waits is left for whoever replaces the hub."""
    client, hub = line.client, line.hub
    client.open(KEY, 1)
    future = client.close(KEY, 2, 1, "stop")
    hub.until(wire.Closed)
    if how == "hangs up":
        hub.sock.close()
    elif how == "resets":
        hub.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        client.progress(KEY, 1, 1)
        hub.sock.close()
    elif how == "garbage":
        hub.sock.sendall(b"\0\0\0\4oops")
    elif how == "refuses":
        hub.say(wire.Refused("malformed", "it was too long"))
    else:
        hub.sock.sendall(b"\xff\xff\xff\xff")
    why = line.why.result(PATIENCE)
    expected = {
        "hangs up": ("it hung up", "Broken pipe", "Connection reset"),
        "resets": ("it hung up", "Broken pipe", "Connection reset"),
        "garbage": ("it cannot be understood",),
        "refuses": ("it refused: it was too long",),
        "too large": ("it cannot be understood: a frame of 4294967295 bytes",),
    }[how]
    assert why.startswith(expected)
    assert not future.done()
    assert [pending.key for pending, _ in client.give_up()] == [KEY]
    client.open(Key("g", "after"), 1)  # the program goes on speaking until it is moved
    assert client.between("GPU-0", 0, 1) is None


def test_another_version(make: Callable[..., Line]) -> None:
    """A hub of another version is not spoken to."""
    line = make()
    line.client.start()
    line.hub.welcome(version=99)
    assert line.why.result(PATIENCE) == "it speaks version 99 of the wire, this program 1"
    assert line.client.hub is None


def test_nobody_there(make: Callable[..., Line]) -> None:
    """A hub that cannot be connected to is lost, with the reason."""

    def nobody() -> socket.socket:
        raise HubLost("there is no socket")

    line = make(connect=nobody)
    line.client.start()
    assert line.why.result(PATIENCE) == "there is no socket"
    assert line.client.known.is_set()


def test_hanging_up_on_a_hub_that_never_greets(make: Callable[..., Line]) -> None:
    """A program that ends does not wait for a hub that has accepted and says nothing."""
    line = make()
    line.client.start()
    line.hub.until(wire.Hello)
    line.client.hang_up(5.0)
    assert not line.client._thread.is_alive()
    assert not line.why.done()


def test_hanging_up_sends_what_waits(line: Line) -> None:
    """What was said before is sent, also where the socket was full."""
    client = line.client
    for number in range(2000):
        client.open(Key("g", f"{number:0500d}"), 1)
    threading.Thread(target=client.hang_up, args=(PATIENCE,)).start()
    heard = 0
    with suppress(AssertionError):
        while True:
            heard += sum(isinstance(told, wire.Opened) for told in line.hub.until(wire.Opened))
    assert heard == 2000


def test_an_answer_that_breaks_whoever_waits(line: Line) -> None:
    """A callback that raises, a future that was cancelled, an answer that comes twice: the connection goes on."""
    client = line.client
    keys = [Key("g", name) for name in ("a", "b", "c")]
    futures = []
    for key in keys:
        client.open(key, 1)
        futures.append(client.close(key, 2, 1, "stop"))

    def broken(_: object) -> None:
        raise ValueError("an observer failed")

    futures[0].add_done_callback(broken)
    futures[1].cancel()
    told = [wire.Told(key.request, True, [share(1.0)]) for key in keys]
    line.hub.say(wire.Settled(1, [*told, *told]))
    assert futures[2].result(PATIENCE)[0].joules == 1.0
    line.hub.until(wire.Got)
    assert not line.why.done()


def test_questions(line: Line) -> None:
    """Joules between two times; one that is not answered in time is None and forgotten."""
    answers: list[float | None] = []
    thread = threading.Thread(target=lambda: answers.append(line.client.between("GPU-0", 1, 2, PATIENCE)))
    thread.start()
    (asked,) = line.hub.until(wire.Between)
    line.hub.say(wire.BetweenAnswered(asked.question, 3.5))
    thread.join()
    assert answers == [3.5]
    assert line.client.between("GPU-0", 1, 2, 0.01) is None
    assert not line.client._questions


def test_acknowledged_joules(line: Line) -> None:
    """What is acknowledged is kept for open requests only, and not longer than they are."""
    client = line.client
    client.open(KEY, 1)
    line.hub.say(
        wire.Accrued(1, [wire.Told("r", False, [share(1.0)]), wire.Told("x", False, [share(1.0)])]), wire.Ask(1)
    )
    line.hub.until(wire.Answered)
    assert list(client.accrued) == ["r"]
    future = client.close(KEY, 2, 1, "stop")
    line.hub.until(wire.Closed)
    line.hub.say(wire.Settled(1, [wire.Told("r", True, [share(1.0)])]))
    future.result(PATIENCE)
    assert not client.accrued
    assert not client.opened


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_takes_nothing(line: Line) -> None:
    """The child closes its copies, so that the hub hears of the parent's end; the parent goes on."""
    told: tuple[int, int] = os.pipe()
    client = line.client
    # The connection, and the pair that wakes the thread.
    copies = [copy.fileno() for copy in (client._socket, client._wakes, client._woken) if copy is not None]
    child = os.fork()
    if child == 0:
        client.forked()
        os.write(told[1], str(sum(_is_closed(copy) for copy in copies)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    os.close(told[1])
    assert os.read(told[0], 16) == b"3"
    os.close(told[0])
    line.client.open(KEY, 1)
    assert line.hub.until(wire.Opened)


def _is_closed(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return True
    return False


def test_no_descriptor_stays(make: Callable[..., Line]) -> None:
    """When the thread has ended the connection and the pair that wakes it are closed, and no other descriptor was its own."""
    before = descriptors()
    line = make().start()
    line.hub.say(wire.Ask(1))
    line.hub.until(wire.Answered)
    # Near and far end, and the pair that wakes the thread: a selector's own descriptor would stay in every forked child.
    assert len(descriptors() - before) == 4
    line.client.hang_up(PATIENCE)
    line.hub.sock.close()
    assert descriptors() <= before


def test_onwards_tells_of_requests_alone(line: Line) -> None:
    """A measured block is nothing that metrics show; without a hub nothing is told."""
    from tests.hub.test_outbox import record

    module.Onwards(lambda: None).finished(record())
    onwards = module.Onwards(lambda: line.client)
    onwards.finished(record(kind="block"))
    onwards.finished(record(model="shown"))
    (told,) = line.hub.until(wire.Observed)
    assert told.model == "shown"


def test_steps_alone_arrive(line: Line) -> None:
    """Steps wait a moment for each other and for nothing else: all arrive, in order, though nothing follows them."""
    line.client.engine(ENGINE, 0)
    line.hub.until(wire.EngineTold)
    for number in range(1, 101):
        assert line.client.step(ENGINE, 0, number, number, number + 1, decode=Decode(3, 30))
    assert [told.seq for told in line.hub.until(wire.Stepped, 100)] == list(range(1, 101))


def test_what_is_urgent_takes_steps_along(line: Line) -> None:
    """A close right behind steps is sent with them, and behind them."""
    line.client.open(KEY, 0)
    line.client.step(ENGINE, 0, 1, 1, 2, decode=Decode(3, 30))
    line.client.step(ENGINE, 0, 2, 2, 3, decode=Decode(3, 30))
    line.client.close(KEY, 4, 5, "stop")
    told = line.hub.until(wire.Closed)
    assert [type(one) for one in told if not isinstance(one, wire.EngineTold)] == [
        wire.Opened,
        wire.Stepped,
        wire.Stepped,
        wire.Closed,
    ]
