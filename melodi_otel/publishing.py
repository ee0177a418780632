"""One publisher of the machine's own energy per host.

Several processes may meter the same host; each would publish the same joules of the same package, and a sum over them
would be a multiple. The one that holds the name publishes ``hw.*``, unattributed and residual; the others only their requests.
The name is an abstract socket where the system has them: it is gone with its holder, also after ``kill -9``. A holder of a
lower tier (local, shared, agent) gives it up when one of a higher tier asks: whoever asks is told apart by the kernel, and
must be root, the agent's user or the same one.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

log = logging.getLogger("melodi_otel")

NAME: Final = "melodi-otel/publisher"
AGENT_DIRECTORY: Final = Path("/run/melodi-otel")
TIERS: Final = ("local", "shared", "agent")
_AGAIN_S: Final = 1.0
_HOLD_OFF_S: Final = 5.0
"""Whoever gave the name up does not try to take it back so soon: the one that asked is about to."""
_ANSWER_S: Final = 0.2


class Publisher:
    """A try at being the host's publisher.

    Args:
        name: what to hold; one name per host.
        tier: of this process's meter.
        agent: the user of the host's agent, who may ask as well; None: there is none.
    """

    def __init__(self, name: str = NAME, tier: str = "local", agent: Callable[[], int | None] | None = None) -> None:
        self._name = name
        self._tier = tier
        self._held: Any = None
        self._pid = os.getpid()
        self._agent = agent or agent_user
        self._asking = threading.Lock()
        self._tried = -_AGAIN_S
        self._over = False

    def __call__(self) -> bool:
        """Whether this process publishes; asks again at most once a second while somebody else does."""
        if self._pid != os.getpid():
            self.forked()
        if self._held is not None:
            return True
        # Whoever finds another thread asking does not wait for the answer.
        if self._over or not self._asking.acquire(blocking=False):
            return False
        try:
            now = time.monotonic()
            if now - self._tried >= _AGAIN_S and self._held is None:
                self._tried = now
                held = self._take()
                if held is None and self._ask():
                    held = self._take()
                self._held = held
                if self._over:
                    self.release()
        finally:
            self._asking.release()
        return self._held is not None

    def forked(self) -> None:
        """In a child: close the copy of the descriptor; the parent goes on holding the name."""
        self._asking = threading.Lock()
        self.release()
        self._pid = os.getpid()

    def attend(self) -> None:
        """Give the name up where a higher tier has asked for it.

        Call it now and then; never raises, and takes 0.2 s at most, however many ask and say nothing.
        """
        held = self._held
        if not isinstance(held, socket.socket) or self._pid != os.getpid():
            return
        end = time.monotonic() + _ANSWER_S
        while time.monotonic() < end:
            try:
                asker, _ = held.accept()
            except OSError:
                return
            with asker:
                if self._must_yield(asker, end):
                    log.info("the machine's energy is published by another meter of the tier above from now on")
                    self.release()
                    self._tried = time.monotonic() + _HOLD_OFF_S
                    with contextlib.suppress(OSError):
                        asker.send(b"yes\n")
                    return

    def close(self) -> None:
        """Let somebody else publish, for good: a collection that comes late does not take the name back."""
        self._over = True
        self.release()

    def release(self) -> None:
        """Let somebody else publish."""
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def _must_yield(self, asker: socket.socket, end: float) -> bool:
        try:
            _, uid, _ = struct.unpack("iII", asker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
            if uid not in (0, os.geteuid()) and uid != self._agent():
                return False
            asker.settimeout(max(0.001, end - time.monotonic()))
            tier = asker.recv(64).decode("ascii", "replace").strip()
        except OSError:
            return False
        return tier in TIERS and TIERS.index(tier) > TIERS.index(self._tier)

    def _ask(self) -> bool:
        """Ask whoever holds the name for it; whether it was given up."""
        if sys.platform != "linux" or self._tier == TIERS[0]:
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
            try:
                asking.settimeout(_ANSWER_S)
                asking.connect("\0" + self._name)
                asking.sendall(self._tier.encode() + b"\n")
                # The holder looks once a second; who asks on its own thread may wait that long.
                asking.settimeout(2 * _AGAIN_S)
                return asking.recv(16) == b"yes\n"
            except OSError:
                return False

    def _take(self) -> Any:
        if sys.platform == "linux":
            holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                holder.bind("\0" + self._name)
                holder.listen(8)
                holder.setblocking(False)
            except OSError:
                holder.close()
                return None
            return holder
        return _lock_file(Path(tempfile.gettempdir()) / (self._name.replace("/", "-") + ".lock"))


def agent_user(directory: Path = AGENT_DIRECTORY) -> int | None:
    """The user whom root gave the agent's directory: only root makes one in ``/run``; None where there is no such thing."""
    try:
        above, found = directory.parent.stat(), directory.lstat()
    except OSError:
        return None
    made_by_root = above.st_uid == 0 and not above.st_mode & 0o022
    return found.st_uid if made_by_root and stat.S_ISDIR(found.st_mode) and not found.st_mode & 0o022 else None


def _lock_file(path: Path) -> Any:
    try:
        held = path.open("a+b")
    except OSError:
        return None
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(held.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        held.close()
        return None
    return held
