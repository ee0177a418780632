from __future__ import annotations

import os
import socket
import sys

import pytest

from melodi_otel.hub.notify import Notifier
from melodi_otel.testing.clock import ManualClock

pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")
ABSTRACT = pytest.param("@", marks=pytest.mark.skipif(sys.platform != "linux", reason="abstract sockets are Linux's"))


@pytest.fixture
def manager():
    """Stands in for systemd; what it heard, one datagram after the other."""

    class Manager:
        def __init__(self):
            self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self.socket.setblocking(False)

        def heard(self):
            found = []
            while True:
                try:
                    found.append(self.socket.recv(4096).decode())
                except BlockingIOError:
                    return found

    made = Manager()
    yield made
    made.socket.close()


@pytest.fixture
def notifier(manager, place):
    manager.socket.bind(str(place / "n"))
    return Notifier({"NOTIFY_SOCKET": str(place / "n")}, ManualClock(1234.5))


def test_what_is_said(notifier, manager):
    """Each message is one datagram in the manager's words; a reload carries its time in microseconds."""
    notifier.ready("2 meters")
    notifier.status("one\n meter")
    notifier.reloading()
    notifier.ready()
    notifier.alive()
    notifier.stopping("settling")
    assert manager.heard() == [
        "READY=1\nSTATUS=2 meters",
        "STATUS=one meter",
        "RELOADING=1\nMONOTONIC_USEC=1234500000",
        "READY=1",
        "WATCHDOG=1",
        "STOPPING=1\nSTATUS=settling",
    ]


@pytest.mark.parametrize("mark", [ABSTRACT])
def test_an_abstract_socket(manager, mark):
    """@ stands for the zero byte."""
    name = f"melodi-otel-test-{os.getpid()}"
    manager.socket.bind(f"\0{name}")
    Notifier({"NOTIFY_SOCKET": mark + name}, ManualClock()).alive()
    assert manager.heard() == ["WATCHDOG=1"]


@pytest.mark.parametrize("name", ["", "/nowhere/at/all", "vsock:2:1", "relative", "/" + "x" * 200, "/with\0zero"])
def test_nobody_to_tell(name):
    """Without a manager, or with one that is gone, nothing happens."""
    notifier = Notifier({"NOTIFY_SOCKET": name}, ManualClock())
    for say in (notifier.ready, notifier.reloading, notifier.stopping, notifier.alive):
        say()
    notifier.status("x")


def test_a_manager_that_does_not_listen(notifier, manager):
    """A full queue is not waited for."""
    for _ in range(5000):
        notifier.alive()
    assert 0 < len(manager.heard()) < 5000


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog(environ, seconds):
    """Half of what the manager waits, where it waits for this process."""
    assert Notifier(environ, ManualClock()).watchdog_s == seconds
