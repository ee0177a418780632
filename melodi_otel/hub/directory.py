"""The directory of a hub's socket: nobody may put something else in the socket's place."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from melodi_otel.errors import HubError


def prepare(directory: Path, mode: int, owner: int | None = None) -> None:
    """Make ``directory``, or see that the one that is there is safe.

    Args:
        directory: an absolute path.
        mode: of a new one.
        owner: the uid that root is going to become: a new or empty directory is given to that user, one that is theirs is as
            good as our own.

    Raises:
        HubError: it cannot be made, or others may write to it.
    """
    made = False
    try:
        directory.mkdir(mode=mode, parents=True)
        made = True
    except FileExistsError:
        pass
    except OSError as error:
        raise HubError(
            f"the directory {directory} cannot be made: {error.strerror}",
            fix="start it as root, or name a socket elsewhere",
            state="permission_denied",
        ) from None
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise HubError(
            f"the directory {directory} cannot be used: {error.strerror}",
            fix="name a socket elsewhere",
            state="bad_path",
        ) from None
    try:
        found = os.fstat(descriptor)
        if found.st_uid not in (0, os.geteuid(), owner):
            # Whoever owns the directory may put something else in the socket's place between two of our calls.
            raise HubError(
                f"the directory {directory} belongs to {user_name(found.st_uid)}, who could take the socket's place",
                fix="start it as that user, or name a socket elsewhere",
                state="foreign_owner",
            )
        if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
            raise HubError(
                f"the directory {directory} may be written to by others (mode {stat.S_IMODE(found.st_mode):04o})",
                fix=f"chmod go-w {directory}",
                state="foreign_owner",
            )
        if made:
            os.fchmod(descriptor, mode)  # whatever the umask took
        if owner is not None and found.st_uid != owner and os.geteuid() == 0 and (made or not any(directory.iterdir())):
            os.fchown(descriptor, owner, -1)
    finally:
        os.close(descriptor)


def user_name(uid: int) -> str:
    """``user NAME``, or the number where it has no name here."""
    import pwd

    try:
        return f"user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"user {uid}"
