"""The hub's Unix socket: made so that nobody gets in who should not, met so that nobody talks to a stranger.

::

    directory    made 0755 where the socket lets others in, else 0700; one that others may write to is refused
    PATH.lock    held by fcntl.lockf for as long as the hub lives, 0600, tells its pid: gone with the process, also after kill -9
    PATH         bound under a umask that gives it its mode at once, then its group; only then it listens, and a socket that
                 does not listen refuses everybody: there is no moment at which the wrong one may connect

The lock is :mod:`melodi_otel.hub.lock`'s.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Final

from melodi_otel.errors import HubError
from melodi_otel.hub.directory import prepare, user_name
from melodi_otel.hub.lock import Lock, take
from melodi_otel.hub.refusals import Peer, Refusal, explain, group_name

LONGEST: Final = 107 if sys.platform == "linux" else 103
"""Bytes of a socket's path (``sun_path`` without its end mark)."""

SYSTEM: Final = Path("/run")
"""Directories in here are made by root, and belong to whom root gave them."""


class ConnectRefused(HubError):
    """No connection to a hub; ``refusal`` says why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.reason, fix=refusal.fix, state=refusal.state)
        self.refusal = refusal


class Listener(socket.socket):
    """A listening socket with its lock; :meth:`close` takes the socket's file away and lets go of the lock."""

    path: Path
    _lock: Lock | None = None
    _inode: tuple[int, int] = (0, 0)
    _owner: int = 0
    _listens: bool = False

    def listen(self, backlog: int = 128, /) -> None:
        """Only once.

        Each time, the kernel notes anew whom programs see at this end, and when a server does it again, root has become
        somebody whom they do not know.
        """
        if not self._listens:
            super().listen(backlog)
            self._listens = True

    def close(self) -> None:
        """Stop listening. Only the process that bound it takes the file away: a fork's copy is just closed."""
        mine, self._owner = self._owner == os.getpid(), 0
        if mine:
            with contextlib.suppress(OSError):  # after privileges are dropped the directory may not be ours to write
                if _identity(self.path.lstat()) == self._inode:
                    self.path.unlink()
        super().close()
        if self._lock is not None:
            self._lock.release()


def listen(
    path: Path | str,
    *,
    mode: int = 0o660,
    group: str | int | None = None,
    backlog: int = 128,
    owner: int | None = None,
) -> Listener:
    """Listen on the Unix socket ``path``; whatever a dead hub left there is taken away.

    Call it before threads start: for a moment it sets the process's umask and group.

    Args:
        path: an absolute path of at most :data:`LONGEST` bytes.
        mode: who may connect: write permission counts.
        group: the socket's group, by name or number; None: that of the process.
        backlog: how many may wait to be accepted.
        owner: the uid that this process is going to become; the directory is made that user's.

    Raises:
        HubBusy: another process has it; ``pid`` names it where that is known.
        HubError: it cannot be made there; reason, fix and state say why and what to do.
    """
    where = _checked(Path(path))
    gid = _gid(group)
    prepare(where.parent, 0o755 if mode & 0o077 else 0o700, owner)  # it lets in whom the socket lets in
    lock = take(where)
    try:
        _clear(where)
        listener = _bound(where, mode, gid, backlog)
    except BaseException:
        lock.release()
        raise
    listener._lock = lock
    return listener


def peer(connection: socket.socket) -> Peer | None:
    """Who is at the other end, as the kernel says it; None where this system does not tell."""
    try:
        if sys.platform == "linux":
            return Peer(*struct.unpack("iII", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)))
        if sys.platform == "darwin":
            # struct xucred {version, uid, ngroups, groups[16]} and the pid apart: SOL_LOCAL 0, LOCAL_PEERCRED 1, LOCAL_PEERPID 2.
            _, uid, _, gid = struct.unpack_from("IIh2xI", connection.getsockopt(0, 1, 76))
            return Peer(struct.unpack("i", connection.getsockopt(0, 2, 4))[0], uid, gid)
    except (OSError, struct.error):
        pass
    return None


def connect(path: Path | str, timeout: float, *, system: Path = SYSTEM) -> socket.socket:
    """Connect to the hub at ``path``; nothing is sent before its owner is known.

    Trusted are root, ourselves, and whoever owns the socket's directory where that lies directly in ``system``: only root
    makes directories there, so root has named the hub's user.

    Args:
        path: the socket.
        timeout: seconds for the connection and, afterwards, for each call on it.
        system: where root alone makes directories.

    Raises:
        ConnectRefused: why not, as a :class:`Refusal`.
    """
    where = Path(path)
    if not hasattr(socket, "AF_UNIX"):
        raise ConnectRefused(Refusal("absent", "this system has no Unix sockets"))
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            _patiently(connection, where, timeout)
        except OSError as error:
            raise ConnectRefused(explain(where, error)) from None
        refusal = _stranger(where, peer(connection), system)
        if refusal is not None:
            raise ConnectRefused(refusal)
    except BaseException:
        connection.close()
        raise
    return connection


def attempt(path: Path | str, timeout: float = 1.0, *, system: Path = SYSTEM) -> Refusal:
    """Connect and hang up: what would become of a client, with the listener's :class:`Peer` where it may be asked."""
    try:
        with connect(path, timeout, system=system) as connection:
            return Refusal("ok", peer=peer(connection))
    except ConnectRefused as error:
        return error.refusal


# --- making it ----------------------------------------------------------------------------------------------------------


def _checked(path: Path) -> Path:
    if not hasattr(socket, "AF_UNIX"):
        raise HubError("this system has no Unix sockets", fix="MELODI_HUB=local", state="unsupported")
    if not path.is_absolute():
        raise HubError(f"the socket's path {str(path)!r} is not absolute", fix="name it from / on", state="bad_path")
    length = len(os.fsencode(path))
    if length > LONGEST:
        raise HubError(
            f"the socket's path {path} has {length} bytes, and the system takes at most {LONGEST}",
            fix="choose a directory with a shorter name",
            state="bad_path",
        )
    return path


def _gid(group: str | int | None) -> int | None:
    if group is None or isinstance(group, int):
        return group
    import grp

    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise HubError(
            f"there is no group {group!r} for the socket", fix=f"sudo groupadd --system {group}", state="no_group"
        ) from None


def _clear(path: Path) -> None:
    """Take away what a dead hub left; called with the lock held, so no living one has it."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise HubError(f"{path} cannot be looked at: {error.strerror}", state="bad_path") from None
    if not stat.S_ISSOCK(found.st_mode):
        raise HubError(f"{path} is there and is no socket", fix="move it away, or name another path", state="bad_path")
    if found.st_uid != os.geteuid():
        raise HubError(
            f"the socket {path} belongs to {user_name(found.st_uid)}",
            fix=f"if nothing of {user_name(found.st_uid)} runs there: rm {path}",
            state="foreign_owner",
        )
    try:
        path.unlink()
    except OSError as error:
        raise HubError(
            f"the old socket {path} cannot be removed: {error.strerror}", fix=f"rm {path}", state="permission_denied"
        ) from None


def _bound(path: Path, mode: int, gid: int | None, backlog: int) -> Listener:
    listener = Listener(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.path = path
    try:
        with _born(mode, gid):
            try:
                listener.bind(str(path))
            except OSError as error:
                raise HubError(
                    f"the socket {path} cannot be made: {error.strerror}",
                    fix="start it as root, or name a socket elsewhere",
                    state="permission_denied",
                ) from None
        listener._inode, listener._owner = _identity(path.lstat()), os.getpid()
        if gid is not None and path.lstat().st_gid != gid:
            try:
                os.chown(path, -1, gid, follow_symlinks=False)
            except OSError as error:
                raise HubError(
                    f"the socket {path} cannot be given to the group {group_name(gid)}: {error.strerror}",
                    fix=f"start it as root or as a member of {group_name(gid)}",
                    state="permission_denied",
                ) from None
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


@contextlib.contextmanager
def _born(mode: int, gid: int | None) -> Generator[None]:
    """Files made meanwhile have this mode and, where we may choose it, this group: nothing is put right by path later, when
    something else could lie there.
    """
    mask, own = os.umask(0o777 & ~mode), os.getegid()
    try:
        if gid not in (None, own):
            with contextlib.suppress(PermissionError):
                os.setegid(gid or 0)
        try:
            yield
        finally:
            if os.getegid() != own:
                os.setegid(own)
    finally:
        os.umask(mask)


# --- meeting it ---------------------------------------------------------------------------------------------------------


def _patiently(connection: socket.socket, path: Path, timeout: float) -> None:
    """Connect; while the queue is full, wait for a place in it.

    Raises:
        OSError: not connected.
    """
    if sys.platform != "linux":
        connection.settimeout(timeout)
        connection.connect(str(path))
        return
    # A non-blocking connect to a full queue fails at once on Linux, so a burst of programs would be turned away: the kernel's
    # own send timeout waits.
    seconds, part = divmod(max(timeout, 0.000001), 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(seconds), int(part * 1e6)))
    connection.connect(str(path))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", 0, 0))
    connection.settimeout(timeout)


def _stranger(path: Path, listens: Peer | None, system: Path) -> Refusal | None:
    own = os.geteuid() if hasattr(os, "geteuid") else -1
    if listens is not None and (listens.uid in (0, own) or listens.uid == _named_by_root(path, system)):
        return None
    who = "somebody this system does not name" if listens is None else user_name(listens.uid)
    return Refusal(
        "foreign_owner",
        f"{who} listens on {path}: it is not asked, for it could tell anything and would hear everything",
        "set MELODI_HUB to a socket of root's or your own",
        listens,
    )


def _named_by_root(path: Path, system: Path) -> int | None:
    """The owner of the socket's directory, where only root can have made it."""
    try:
        directory = path.parent.resolve(strict=True)
        above = system.resolve(strict=True).stat()
        if directory.parent != system.resolve() or above.st_uid != 0 or above.st_mode & 0o022:
            return None
        found = directory.stat()
    except OSError:
        return None
    return None if found.st_mode & 0o022 else found.st_uid


def _identity(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino
