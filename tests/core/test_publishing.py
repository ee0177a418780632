"""One publisher of the machine's own energy per host, and how the name goes up from tier to tier."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from melodi_otel import publishing
from melodi_otel.publishing import Publisher, agent_user
from melodi_otel.tending import Tender

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets")


class Host:
    """Publishers of one name, and a clock for their patience."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.name = f"melodi-otel/test-{secrets.token_hex(4)}"
        self.made: list[Publisher] = []
        self.ahead = 0.0
        now = time.monotonic
        monkeypatch.setattr(publishing.time, "monotonic", lambda: now() + self.ahead)

    def publisher(self, tier: str, agent: int | None = None) -> Publisher:
        """One of this tier."""
        self.made.append(Publisher(self.name, tier, lambda: agent))
        return self.made[-1]

    def asks(self, who: Publisher, holder: Publisher) -> bool:
        """Whether ``who`` gets the name while ``holder`` looks now and then."""
        over = threading.Event()

        def looking() -> None:
            while not over.wait(0.01):
                holder.attend()

        thread = threading.Thread(target=looking)
        thread.start()
        try:
            return who()
        finally:
            over.set()
            thread.join()

    def knock(self) -> socket.socket:
        """Somebody connects and says nothing."""
        asker = socket.socket(socket.AF_UNIX)
        asker.setblocking(False)
        asker.connect("\0" + self.name)
        return asker


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    """A host on which nobody publishes."""
    made = Host(monkeypatch)
    yield made
    for publisher in made.made:
        publisher.close()


@pytest.mark.parametrize(("low", "high"), [("local", "shared"), ("shared", "agent"), ("local", "agent")])
def test_the_name_goes_up(host: Host, low: str, high: str) -> None:
    """A holder gives the name up to a higher tier, and does not try to take it back for a while."""
    below, above = host.publisher(low), host.publisher(high)
    assert below()
    assert host.asks(above, below)
    assert not below()
    above.close()
    host.ahead += 4.0
    assert not below()
    host.ahead += 3.0
    assert below()


@pytest.mark.parametrize(
    ("low", "high"), [("local", "local"), ("shared", "shared"), ("local", "agent"), ("shared", "agent")]
)
def test_the_name_never_goes_down(host: Host, low: str, high: str) -> None:
    """Neither to a lower tier nor to the same one."""
    holder, asker = host.publisher(high), host.publisher(low)
    assert holder()
    assert not host.asks(asker, holder)
    assert holder()


@pytest.mark.parametrize(
    ("uid", "agent", "yields"),
    [(os.geteuid(), None, True), (0, None, True), (4711, None, False), (4711, 4711, True), (4711, 4712, False)],
)
def test_to_whom(host: Host, uid: int, agent: int | None, yields: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same user, to root and to the agent's user, as the kernel tells them; to nobody else."""
    holder, asker = host.publisher("local", agent), host.publisher("agent")
    monkeypatch.setattr(publishing.struct, "unpack", lambda _form, _data: (1, uid, uid))
    assert holder()
    assert host.asks(asker, holder) is yields


def test_the_agents_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It owns a directory that only root can have made: one in a place where others may write names nobody."""
    directory = tmp_path / "run" / "melodi-otel"
    assert agent_user(directory) is None
    directory.mkdir(parents=True)
    given = os.stat_result
    found: dict[str, Any] = {"above": (0o755, 0), "below": (0o755, 997)}

    def told(kind: int, mode: int, uid: int) -> os.stat_result:
        return given((kind | mode, 0, 0, 1, uid, uid, 0, 0, 0, 0))

    monkeypatch.setattr(Path, "stat", lambda _self, **_: told(0o040000, *found["above"]))
    monkeypatch.setattr(Path, "lstat", lambda _self: told(found.get("kind", 0o040000), *found["below"]))
    assert agent_user(directory) == 997
    found["above"] = (0o777, 0)
    assert agent_user(directory) is None
    found["above"] = (0o755, 1000)
    assert agent_user(directory) is None
    found.update(above=(0o755, 0), below=(0o775, 997))
    assert agent_user(directory) is None
    found.update(below=(0o777, 997), kind=0o120000)
    assert agent_user(directory) is None


def test_silent_askers_cost_little(host: Host) -> None:
    """However many connect and say nothing, a look takes 0.2 s at most; whoever speaks is heard at one of the next."""
    holder = host.publisher("local")
    assert holder()
    silent = [host.knock() for _ in range(5)]
    begin = time.monotonic()
    holder.attend()
    assert time.monotonic() - begin < 0.35
    with host.knock() as asker:
        asker.send(b"agent\n")
        for one in silent:
            one.close()
        holder.attend()
        asker.settimeout(5.0)
        assert asker.recv(16) == b"yes\n"


def test_a_stranger_is_not_listened_to(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another user's connection ends at once: nobody waits for what it says."""
    holder = host.publisher("local")
    assert holder()
    monkeypatch.setattr(publishing.struct, "unpack", lambda _form, _data: (1, 4711, 4711))
    knocks = [host.knock() for _ in range(5)]
    begin = time.monotonic()
    holder.attend()
    assert time.monotonic() - begin < 0.15
    for one in knocks:
        one.setblocking(True)
        assert one.recv(16) == b""
        one.close()


def test_nonsense_is_no_tier(host: Host) -> None:
    """Whatever else is said there changes nothing."""
    holder = host.publisher("local")
    assert holder()
    for said in (b"\xff\xfe\n", b"king\n", b"local\n", b""):
        with host.knock() as asker:
            asker.send(said)
            asker.shutdown(socket.SHUT_WR)
            holder.attend()
    assert holder()


def test_two_threads_ask_once(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread waits for an answer another is told `no` at once, and the name is not lost between them."""
    holder, asker = host.publisher("local"), host.publisher("shared")
    assert holder()
    asking, go_on = threading.Event(), threading.Event()

    def slow() -> bool:
        asking.set()
        go_on.wait(10.0)
        holder.close()
        return True

    monkeypatch.setattr(asker, "_ask", slow)
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(asker()))
    thread.start()
    assert asking.wait(10.0)
    assert not asker()
    go_on.set()
    thread.join()
    assert found == [True]
    assert asker()


def test_closing_while_asking(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was closed meanwhile keeps nothing."""
    asker = host.publisher("shared")

    def closes() -> bool:
        asker.close()
        return True

    taken = [None]
    take = asker._take
    monkeypatch.setattr(asker, "_take", lambda: taken.pop() if taken else take())
    monkeypatch.setattr(asker, "_ask", closes)
    assert not asker()
    assert host.publisher("local")()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_childs_copy_does_not_hold_the_name(host: Host) -> None:
    """The child of a publisher closes its copy: when the parent ends, the name is free."""
    first, second = host.publisher("local"), host.publisher("local")
    assert first()
    go_on = os.pipe()
    child = os.fork()
    if child == 0:
        first.forked()
        os.write(go_on[1], b"1" if first._held is None else b"0")
        time.sleep(30.0)  # as long as the parent lets it
        os._exit(0)
    try:
        assert os.read(go_on[0], 1) == b"1"
        first.close()
        assert second()
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        for end in go_on:
            os.close(end)


def test_elsewhere_a_lock_file(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without abstract sockets a locked file is the name; nobody is asked for it, and attending does nothing."""
    import fcntl

    monkeypatch.setattr(publishing.sys, "platform", "darwin")
    monkeypatch.setattr(publishing.tempfile, "gettempdir", lambda: str(tmp_path))
    first, second = host.publisher("local"), host.publisher("agent")
    assert first()
    (path,) = tmp_path.iterdir()
    assert path.name == host.name.replace("/", "-") + ".lock"
    first.attend()
    # Locks are a process's own, so another one is played by a lock that is refused.
    refused: Callable[..., None] = fcntl.lockf

    def refuse(*_: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert not second()
    monkeypatch.setattr(fcntl, "lockf", refused)
    host.ahead += 2.0
    assert second()
    second.close()
    monkeypatch.setattr(publishing.tempfile, "gettempdir", lambda: str(tmp_path / "none"))
    assert not host.publisher("local")()


def test_who_asks_is_the_kernels_word() -> None:
    """The credentials of a connection are pid, uid and gid of the other end."""
    near, far = socket.socketpair()
    with near, far:
        told = struct.unpack("iII", near.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    assert told == (os.getpid(), os.geteuid(), os.getegid())


def test_one_tending_thread() -> None:
    """However many threads need it at once, one tends; a turn that fails ends nothing; after the end none starts."""
    turns: list[str] = []
    turned = threading.Event()

    def turn() -> None:
        turns.append(threading.current_thread().name)
        if len(turns) > 1:
            turned.set()
        raise ValueError

    tender = Tender(turn)
    callers = [threading.Thread(target=tender.soon) for _ in range(8)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert sum(thread.name == "melodi-otel-tend" for thread in threading.enumerate()) == 1
    assert turned.wait(5.0)
    tender.end(5.0)
    tender.soon()
    assert not any(thread.name == "melodi-otel-tend" for thread in threading.enumerate())
