"""Where the files of a hub lie: its socket, and beside it lock, journal and address.

One directory per user and machine. It holds a socket and locks, so it must be on a file system of this machine (locks on
NFS, Lustre and their like lie or hang) and must belong to this user alone (``/tmp`` is everybody's). The first that is fit:

1. ``XDG_RUNTIME_DIR``
2. ``/run/user/<uid>``
3. ``melodi-otel-<uid>`` in ``SLURM_TMPDIR``
4. ``melodi-otel-<uid>`` in ``TMPDIR``, then ``/tmp``
5. ``melodi-otel-<uid>`` in ``/dev/shm``

Whoever is passed over is named in a debug line. Environment, user id and the root of the file system are arguments; only
:func:`runtime_directory` touches the file system, and it makes at most the one directory that it hands out.
"""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from melodi_otel.errors import MelodiError
from melodi_otel.mountinfo import mounts_of

__all__ = [
    "AGENT_SOCKET",
    "REMOTE",
    "SOCKET_LIMIT",
    "NoPlace",
    "address_file",
    "filesystem_of",
    "journal_file",
    "lock_file",
    "runtime_directory",
    "shared_socket",
    "socket_path",
]

log = logging.getLogger("melodi_otel")

AGENT_SOCKET: Final = Path("/run/melodi-otel/hub.sock")
"""The socket of the machine's agent."""
SOCKET_LIMIT: Final = 107
"""Bytes that the path of a Unix socket may have on Linux (``sun_path`` less its closing zero)."""
REMOTE: Final = frozenset(
    {
        *(
            "nfs",
            "nfs4",
            "lustre",
            "gpfs",
            "beegfs",
            "cifs",
            "smb3",
            "smbfs",
            "ncpfs",
            "afs",
            "coda",
            "ceph",
            "glusterfs",
        ),
        *("pvfs2", "orangefs", "panfs", "wekafs", "ocfs2", "gfs2", "acfs"),
        *("9p", "virtiofs", "vboxsf", "prl_fs", "fuse", "fuseblk"),
    }
)
"""Types of file systems whose locks are not to be trusted: of the network, of another kernel, or of a user's program.
``fuse.anything`` counts as ``fuse``."""

_OURS: Final = "melodi-otel"


class NoPlace(MelodiError):
    """No directory is fit for the files of a hub; the message lists each with its reason and says what to set."""


def runtime_directory(
    environ: Mapping[str, str], *, uid: int | None = None, root: str = "/", mountinfo: str = "/proc/self/mountinfo"
) -> Path:
    """The directory for this user's hub; made, for this user alone, where only its parent is there.

    Args:
        environ: ``XDG_RUNTIME_DIR``, ``SLURM_TMPDIR``, ``TMPDIR``.
        uid: whose; None: this process's.
        root: of the file system; absolute paths are looked up below it.
        mountinfo: what is mounted where, below ``root``.

    Raises:
        NoPlace: none is fit.
    """
    owner = os.getuid() if uid is None else uid
    mounts = tuple(_mounts(_text(_below(root, mountinfo))))
    refused: list[str] = []
    for place, make in _candidates(environ, owner):
        path = _below(root, str(place))
        why = _remote(_resolved(path, root), mounts) or (_make(path, owner) if make else _unfit(path, owner))
        if why is None:
            return path
        log.debug("hub: %s is passed over: %s", place, why)
        refused.append(f"{place}: {why}")
    raise NoPlace(
        f"there is no directory for the hub's socket ({'; '.join(refused)}); "
        "set XDG_RUNTIME_DIR or TMPDIR to a directory of yours on a local disk"
    )


def shared_socket(runtime: Path) -> Path:
    """The socket of this user's shared hub.

    Raises:
        NoPlace: its path is too long for a socket.
    """
    path = runtime / _OURS / "hub.sock"
    return socket_path(str(path))


def socket_path(path: str) -> Path:
    """``path`` as that of a socket.

    Raises:
        NoPlace: it is longer than a socket's path may be.
    """
    length = len(os.fsencode(path))
    if length > SOCKET_LIMIT:
        raise NoPlace(
            f"the path of the socket {path} has {length} bytes, at most {SOCKET_LIMIT} are possible; "
            "set XDG_RUNTIME_DIR or TMPDIR to a shorter path, or MELODI_HUB to a socket in one"
        )
    return Path(path)


def lock_file(socket: Path) -> Path:
    """Who holds the lock on this file may bind ``socket``. It is never removed: a lock on a removed file guards nothing."""
    return socket.with_name(f"{socket.name}.lock")


def journal_file(socket: Path) -> Path:
    """Where the hub at ``socket`` writes each second what the next one needs."""
    return socket.with_name(f"{socket.name}.journal")


def address_file(socket: Path) -> Path:
    """Where the hub at ``socket`` writes the URL of its metrics."""
    return socket.with_name(f"{socket.name}.metrics")


def filesystem_of(path: Path, mountinfo: str) -> str:
    """Type of the file system that ``path`` is on, by the text of a mountinfo; empty: not told."""
    return _kind(path, tuple(_mounts(mountinfo)))


def _candidates(environ: Mapping[str, str], uid: int) -> Iterator[tuple[Path, bool]]:
    """(directory, whether it is to be made)."""
    given = environ.get("XDG_RUNTIME_DIR", "")
    if given.startswith("/"):
        yield Path(given), False
    yield Path(f"/run/user/{uid}"), False
    for variable in ("SLURM_TMPDIR", "TMPDIR"):
        # TMPDIR may be relative for a compiler; a socket that two programs must find may not.
        if environ.get(variable, "").startswith("/"):
            yield Path(environ[variable], f"{_OURS}-{uid}"), True
    for parent in ("/tmp", "/dev/shm"):  # noqa: S108 - the directory below is checked: owner, mode, no link
        yield Path(parent, f"{_OURS}-{uid}"), True


def _make(path: Path, uid: int) -> str | None:
    """Make a directory for ``uid`` alone, or take the one that is there if it is fit; why not, else None."""
    try:
        parent = path.parent.stat().st_mode
        if parent & 0o022 and not parent & stat.S_ISVTX:
            return f"others may put another one in its place ({path.parent} has no sticky bit)"
        path.mkdir(mode=0o700)
    except FileExistsError:
        pass
    except OSError as error:
        return error.strerror or str(error)
    return _unfit(path, uid)


def _unfit(path: Path, uid: int) -> str | None:
    """Why a directory may not be used; None: it may. A link is none: what it names can change between look and use."""
    try:
        facts = path.lstat()
    except OSError as error:
        return error.strerror or str(error)
    if not stat.S_ISDIR(facts.st_mode):
        return "it is a symbolic link" if stat.S_ISLNK(facts.st_mode) else "it is no directory"
    if facts.st_uid != uid:
        return f"it belongs to user {facts.st_uid}, not to {uid}"
    if facts.st_mode & 0o022:
        return f"others may write there (mode {stat.S_IMODE(facts.st_mode):04o})"
    if not os.access(path, os.W_OK | os.X_OK):
        return "it cannot be written"
    return None


def _remote(place: Path, mounts: tuple[tuple[str, str], ...]) -> str | None:
    kind = _kind(place, mounts)
    if kind in REMOTE or kind.split(".")[0] in REMOTE:
        return f"it is on a file system of type {kind}, on which locks are not to be trusted"
    return None


def _kind(path: Path, mounts: Iterable[tuple[str, str]]) -> str:
    """The longest mount point that holds ``path``; of equal ones the last, which lies on top."""
    best, kind = -1, ""
    for point, found in mounts:
        if len(point) >= best and (path == Path(point) or Path(point) in path.parents):
            best, kind = len(point), found
    return kind


def _mounts(text: str) -> Iterator[tuple[str, str]]:
    """(mount point, type) of every line."""
    for mount in mounts_of(text):
        yield _unescaped(mount.point), mount.kind


def _unescaped(point: str) -> str:
    for octal, sign in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        point = point.replace(octal, sign)
    return point


def _resolved(path: Path, root: str) -> Path:
    """``path`` as the mount table knows it: without links on the way, and counted from ``root``."""
    real = Path(os.path.realpath(path.parent), path.name)
    top = Path(os.path.realpath(root))
    return Path("/") / real.relative_to(top) if real.is_relative_to(top) else real


def _below(root: str, path: str) -> Path:
    return Path(root, path.lstrip("/"))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
