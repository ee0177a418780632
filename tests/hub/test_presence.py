from __future__ import annotations

import os
import socket
import sys

import pytest

from melodi_otel.hub.presence import look
from melodi_otel.hub.sockets import listen

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")


@pytest.fixture
def seen(place):
    """What is seen where the agent's socket is ``a`` and the user's ``s``."""

    def run(setting="auto", **more):
        more = {"agent": place / "a", "shared": place / "s", "procfs": place / "proc", "timeout": 5} | more
        return look(setting, {}, "melodi-otel/test", **more)

    return run


@pytest.fixture
def procfs(place):
    """A /proc in which the process 7 has the socket 12345 and may be looked at."""
    (place / "proc" / "net").mkdir(parents=True)
    (place / "proc" / "7" / "fd").mkdir(parents=True)
    (place / "proc" / "7" / "fd" / "3").symlink_to("socket:[12345]")
    (place / "proc" / "9").mkdir()

    def hold(inode):
        (place / "proc" / "net" / "unix").write_text(
            "Num       RefCount Protocol Flags    Type St Inode Path\n"
            "0000000000000000: 00000002 00000000 00010000 0001 01 11111 /run/x.sock\n"
            f"0000000000000000: 00000002 00000000 00000000 0001 03 {inode} @melodi-otel/test\n"
        )

    return hold


def test_no_hub(seen):
    """Both places are absent, and what a program does then is said."""
    presence = seen()
    assert [(hub.tier, hub.answer.state, hub.listener, hub.page) for hub in presence.hubs] == [
        ("agent", "absent", None, None),
        ("shared", "absent", None, None),
    ]
    assert presence.used is None
    assert presence.notes[0].startswith("No hub is reachable")


def test_the_agent_goes_before_the_shared_hub(seen, place):
    """Where both are there a program uses the agent; each says whose it is and where its page is."""
    with listen(place / "a"), listen(place / "s", mode=0o600):
        (place / "a.metrics").write_text("http://127.0.0.1:9465/metrics\n")
        presence = seen()
    agent, shared = presence.hubs
    assert presence.used is agent
    assert agent.page == "http://127.0.0.1:9465/metrics"
    assert agent.listener.endswith(f", process {os.getpid()}")
    assert (shared.answer.state, shared.page, presence.notes) == ("ok", None, ())


def test_a_page_of_a_dead_hub_is_not_told(seen, place):
    """What a hub has written about itself counts while it lives."""
    (place / "a.metrics").write_text("http://127.0.0.1:9465/metrics\n")
    assert seen().hubs[0].page is None


@pytest.mark.parametrize(
    ("setting", "tiers"), [("local", []), ("shared", ["shared"]), ("auto", ["agent", "shared"]), ("/x/s", ["named"])]
)
def test_what_a_setting_asks(seen, setting, tiers):
    """Only hubs that MELODI_HUB lets a program use are asked."""
    presence = seen(setting)
    assert [hub.tier for hub in presence.hubs] == tiers
    if setting == "local":
        assert presence.notes == ("MELODI_HUB=local: each process has a meter of its own, and no hub is asked.",)


def test_in_a_container(seen, place):
    """Only the agent is right across containers, so a shared hub is not enough; with the agent there is nothing to say."""
    with listen(place / "s", mode=0o600):
        assert [note for note in seen(container=True).notes if note.startswith("This is a container")]
    with listen(place / "a"):
        assert seen(container=True).notes == ()


def test_who_publishes(seen, procfs):
    """The holder of the name, where it may be seen."""
    assert (seen().publishes, seen().publisher) == (None, None)
    procfs(12345)
    assert (seen().publishes, seen().publisher) == (True, 7)


def test_a_publisher_that_cannot_be_seen(seen, procfs):
    """Another user's process: that there is one is known, who it is not."""
    procfs(999)
    assert (seen().publishes, seen().publisher) == (True, None)


def test_nobody_publishes(seen, procfs, place):
    """The name is free; a longer name is not ours."""
    procfs(12345)
    unix = place / "proc" / "net" / "unix"
    unix.write_text(unix.read_text().replace("@melodi-otel/test", "@melodi-otel/test2"))
    assert (seen().publishes, seen().publisher) == (False, None)


@pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's")
def test_the_real_publisher(program):
    """The kernel's own list shows the name and its holder, and another process's socket is not this one's."""
    code = """
import socket, sys
held = socket.socket(socket.AF_UNIX)
held.bind("\\0" + sys.argv[1])
print(1, flush=True)
sys.stdin.read()
"""
    name = f"melodi-otel/test-{os.getpid()}"
    holder = program(code, name, wait=False)
    holder.stdout.readline()
    presence = look("local", {}, name)
    assert (presence.publishes, presence.publisher) == (True, holder.pid)
