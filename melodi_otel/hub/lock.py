"""One hub per socket: ``PATH.lock``, held by ``fcntl.lockf`` and gone with its process, also after ``kill -9``.

Such a lock belongs to the process, and closing *any* descriptor of its file lets go of it. So a process looks into
:data:`_held` before it opens a lock file that may be its own. The file itself stays: taken away, two hubs could each hold
a lock on a file of the same name.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from melodi_otel.errors import HubBusy, HubError

_held: dict[str, int] = {}
"""Lock files of this process and the pid that took them: a forked child has the table, but not the locks."""


class Lock:
    """A held lock; made by :func:`take`."""

    def __init__(self, name: str, descriptor: int) -> None:
        self._name = name
        self._descriptor = descriptor
        _held[name] = os.getpid()

    def release(self) -> None:
        """Let somebody else have it; a second call does nothing, and a fork's copy only closes its descriptor."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            if _held.get(self._name) == os.getpid():
                del _held[self._name]
            os.close(descriptor)


def take(socket_path: Path) -> Lock:
    """The lock of the socket at ``socket_path``, whose directory is there.

    Raises:
        HubBusy: another process, or this one, holds it.
        HubError: the lock file cannot be used.
    """
    import fcntl

    name = _name(socket_path)
    if _held.get(name) == os.getpid():
        raise HubBusy(f"the hub at {socket_path} is in this process already", pid=os.getpid())
    try:
        # 0600: whoever may open it may lock it, and a stranger's lock would keep every hub away.
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    except OSError as error:
        why = "it is a link" if error.errno == errno.ELOOP else error.strerror
        raise HubError(
            f"the lock file {name} cannot be opened: {why}",
            fix="start it as root, or name a socket elsewhere" if isinstance(error, PermissionError) else f"rm {name}",
            state="permission_denied",
        ) from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink != 1 or found.st_uid != os.geteuid():
            raise HubError(
                f"the lock file {name} is not one of ours", fix=f"look at it, then: rm {name}", state="foreign_owner"
            )
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            pid = _told(descriptor)
            raise HubBusy(
                f"the socket {socket_path} is taken: {f'process {pid}' if pid else 'another process'} is the hub there",
                fix=f"stop it first: kill {pid}" if pid else "stop it first",
                pid=pid,
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return Lock(name, descriptor)


def _name(socket_path: Path) -> str:
    return f"{socket_path.parent.resolve() / socket_path.name}.lock"


def _told(descriptor: int) -> int | None:
    text = os.pread(descriptor, 32, 0).strip()
    return int(text) if text.isdigit() else None
