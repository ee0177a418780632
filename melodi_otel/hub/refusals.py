"""Why there is no connection to a hub, in words that say what to do."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from melodi_otel.hub.directory import user_name

State = Literal["ok", "absent", "stale", "permission_denied", "foreign_owner", "no_answer"]


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end.

    Attributes:
        pid: its process; 0 where that is in another pid namespace, which we do not see.
        uid: its user.
        gid: its group.
    """

    pid: int
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """What became of a try to connect.

    Attributes:
        state: ``ok``; ``absent``: no socket; ``stale``: a socket that nobody listens on; ``permission_denied``: it, or its
            directory, lets in others only; ``foreign_owner``: somebody listens whom we do not trust; ``no_answer``: its queue
            is full.
        reason: one sentence for people; empty where ``ok``.
        fix: what helps, with the exact command; empty where nothing does.
        peer: who listens, where that is known.
    """

    state: State
    reason: str = ""
    fix: str = ""
    peer: Peer | None = None


def explain(path: Path, error: OSError) -> Refusal:
    """What the error of a connect to ``path`` means."""
    if isinstance(error, FileNotFoundError | NotADirectoryError) or error.errno == errno.ENAMETOOLONG:
        return Refusal("absent", f"there is no socket {path}")
    if isinstance(error, PermissionError):
        return _denied(path)
    if isinstance(error, TimeoutError | BlockingIOError):
        return Refusal("no_answer", f"whoever listens on {path} does not take new connections")
    if isinstance(error, ConnectionRefusedError):
        if not _is_socket(path):
            return Refusal("stale", f"{path} is there and is no socket")
        return Refusal(
            "stale", f"nobody listens on {path}: its hub has ended", "start it again; it takes the old one away"
        )
    return Refusal("absent", f"{path} cannot be reached: {error.strerror or error}")


def _denied(path: Path) -> Refusal:
    import grp
    import pwd

    closed = path
    for parent in [path, *path.parents]:
        try:
            found = parent.lstat()
            closed = parent
            break
        except OSError:
            continue
    else:
        return Refusal("permission_denied", f"{path} may not be reached")
    if closed != path:  # lstat of what is below failed: this directory may not be passed
        return Refusal(
            "permission_denied",
            f"the directory {closed} of {user_name(found.st_uid)} may not be entered",
            "ask its owner",
        )
    try:
        me = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        me = str(os.geteuid())
    group = group_name(found.st_gid)
    if not found.st_mode & stat.S_IWGRP or found.st_gid == 0:
        return Refusal(
            "permission_denied",
            f"only {user_name(found.st_uid)} may connect to {path}",
            "start the agent with --socket-group GROUP and join that group",
        )
    try:
        joined = me in grp.getgrgid(found.st_gid).gr_mem
    except KeyError:
        joined = False
    reason = f"only root and members of the group {group} may connect to {path}"
    if joined:
        return Refusal("permission_denied", f"{reason}; {me} has joined it since this session began", "log in again")
    return Refusal("permission_denied", reason, f"sudo usermod -aG {group} {me}, then log in again")


def _is_socket(path: Path) -> bool:
    try:
        return stat.S_ISSOCK(path.stat().st_mode)
    except OSError:
        return False


def group_name(gid: int) -> str:
    """The group's name, or its number where it has none here."""
    import grp

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)
