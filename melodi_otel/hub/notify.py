"""What a service manager is told: sd_notify(3), a datagram of ``NAME=value`` lines to ``NOTIFY_SOCKET``.

Everything here does nothing where there is no such manager, and never raises: whoever measures goes on when nobody listens.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from melodi_otel.clock import Clock


class Notifier:
    """The line to systemd, or to nobody.

    Args:
        environ: where ``NOTIFY_SOCKET``, ``WATCHDOG_USEC`` and ``WATCHDOG_PID`` stand.
        clock: a reload is told with its time.
    """

    def __init__(self, environ: Mapping[str, str], clock: Clock) -> None:
        self._clock = clock
        self._address = _address(environ.get("NOTIFY_SOCKET", ""))
        self.watchdog_s = _watchdog_s(environ)
        """Seconds between two :meth:`alive`: half of what the manager waits; None where it does not wait."""

    def ready(self, status: str = "") -> None:
        """It works (also after a reload)."""
        self._send("READY=1", *_status(status))

    def reloading(self) -> None:
        """It reads its configuration again, until :meth:`ready`."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={self._clock.monotonic_ns() // 1000}")

    def stopping(self, status: str = "") -> None:
        """It ends."""
        self._send("STOPPING=1", *_status(status))

    def status(self, status: str) -> None:
        """One line for ``systemctl status``."""
        self._send(*_status(status))

    def alive(self) -> None:
        """It is not stuck."""
        self._send("WATCHDOG=1")

    def _send(self, *lines: str) -> None:
        if self._address is None or not lines:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
                # A manager whose queue is full is not waited for.
                line.setblocking(False)
                line.sendto("\n".join(lines).encode(), self._address)
        except (OSError, ValueError, AttributeError):
            pass


def _address(name: str) -> str | None:
    # "@" stands for the zero byte of an abstract socket; other kinds (vsock:) are no Unix sockets.
    if name.startswith("@"):
        return "\0" + name[1:]
    return name if name.startswith("/") else None


def _status(status: str) -> list[str]:
    return [f"STATUS={' '.join(status.split())}"] if status else []


def _watchdog_s(environ: Mapping[str, str]) -> float | None:
    pid, wait = environ.get("WATCHDOG_PID", ""), environ.get("WATCHDOG_USEC", "")
    if not wait.isdigit() or int(wait) == 0 or (pid and pid != str(os.getpid())):
        return None
    return int(wait) / 2e6
