"""One publisher of the machine's own energy per host.

Several processes may meter the same host; each would publish the same joules of the same package, and a sum over them
would be a multiple. The one that holds the name publishes ``hw.*``, unattributed and residual; the others only their requests.
The name is an abstract socket where the system has them: it is gone with its holder, also after ``kill -9``.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

NAME: Final = "melodi-otel/publisher"
_AGAIN_S: Final = 1.0


class Publisher:
    """A try at being the host's publisher.

    Args:
        name: what to hold; one name per host.
    """

    def __init__(self, name: str = NAME) -> None:
        self._name = name
        self._held: Any = None
        self._pid = os.getpid()
        self._tried = -_AGAIN_S
        self._over = False

    def __call__(self) -> bool:
        """Whether this process publishes; asks again at most once a second while somebody else does."""
        if self._pid != os.getpid():
            self.release()  # the fork's copy of the descriptor: the parent goes on holding the name
            self._pid = os.getpid()
        if self._held is not None:
            return True
        if self._over:
            return False
        now = time.monotonic()
        if now - self._tried >= _AGAIN_S:
            self._tried = now
            self._held = self._take()
        return self._held is not None

    def close(self) -> None:
        """Let somebody else publish, for good: a collection that comes late does not take the name back."""
        self._over = True
        self.release()

    def release(self) -> None:
        """Let somebody else publish."""
        held, self._held = self._held, None
        if held is not None:
            held.close()

    def _take(self) -> Any:
        if sys.platform == "linux":
            holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                holder.bind("\0" + self._name)
            except OSError:
                holder.close()
                return None
            return holder
        return _lock_file(Path(tempfile.gettempdir()) / (self._name.replace("/", "-") + ".lock"))


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
