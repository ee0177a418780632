"""Which hubs there are on this host, seen from a program that would use one: what ``doctor`` tells.

Asking is connecting and hanging up; nothing is sent. So what a hub measures is not known here, only that one is there, whose
it is, and why it cannot be reached.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from melodi_otel.hub.directory import user_name
from melodi_otel.hub.places import AGENT_SOCKET, NoPlace, address_file, runtime_directory
from melodi_otel.hub.places import shared_socket as shared_in
from melodi_otel.hub.sockets import SYSTEM, Refusal, attempt

Tier = Literal["agent", "shared", "named"]


@dataclass(frozen=True, slots=True)
class Hub:
    """One place where a hub may be.

    Attributes:
        tier: ``agent``: the host's, ``shared``: this user's, ``named``: what ``MELODI_HUB`` names.
        socket: its path.
        answer: what a program gets that connects there.
        listener: the user whose hub it is, in words; None where nobody listens.
        page: where it serves metrics, as it has written beside its socket; None where it has not.
    """

    tier: Tier
    socket: Path
    answer: Refusal
    listener: str | None = None
    page: str | None = None


@dataclass(frozen=True, slots=True)
class Presence:
    """What there is.

    Attributes:
        setting: ``MELODI_HUB``.
        hubs: the places, the most capable first.
        publishes: whether somebody publishes the machine's energy in this network namespace; None where it cannot be seen.
        publisher: that process's pid; None where it is nobody's or cannot be seen.
        notes: what to know or to do, in sentences.
    """

    setting: str
    hubs: tuple[Hub, ...]
    publishes: bool | None = None
    publisher: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def used(self) -> Hub | None:
        """The hub that a program started now would use; None: none of these."""
        return next((hub for hub in self.hubs if hub.answer.state == "ok"), None)


def look(
    setting: str,
    environ: Mapping[str, str],
    publisher: str,
    *,
    agent: Path = AGENT_SOCKET,
    shared: Path | None = None,
    container: bool = False,
    procfs: Path = Path("/proc"),
    timeout: float = 1.0,
    system: Path = SYSTEM,
) -> Presence:
    """Look at every hub that ``setting`` lets a program use.

    Args:
        setting: ``MELODI_HUB``.
        environ: where ``XDG_RUNTIME_DIR`` stands.
        publisher: name of the abstract socket that the host's publisher holds.
        agent, shared: the sockets; default: where they are on this system for this user.
        container: whether this process runs in one.
        procfs: this process's own /proc.
        timeout: seconds for each socket.
        system: where root alone makes directories, see :func:`melodi_otel.hub.sockets.connect`.
    """
    uid = os.getuid() if hasattr(os, "getuid") else 0
    places: list[tuple[Tier, Path]] = []
    no_place = None
    if setting.startswith("/"):
        places.append(("named", Path(setting)))
    elif setting == "auto":
        places.append(("agent", agent))
    if setting in ("auto", "shared"):
        try:
            places.append(("shared", shared or shared_in(runtime_directory(environ, uid=uid))))
        except NoPlace as error:
            no_place = str(error)
    hubs = tuple(_hub(tier, path, timeout, system) for tier, path in places)
    held, pid = _publisher(publisher, procfs)
    return Presence(setting, hubs, held, pid, (*_notes(hubs, setting, container), *([no_place] if no_place else [])))


def _hub(tier: Tier, path: Path, timeout: float, system: Path) -> Hub:
    answer = attempt(path, timeout, system=system)
    listener = None
    if answer.peer is not None:
        listener = user_name(answer.peer.uid) + (f", process {answer.peer.pid}" if answer.peer.pid else "")
    page = None
    if answer.state == "ok":
        page = _line(address_file(path))
    return Hub(tier, path, answer, listener, page)


def _notes(hubs: tuple[Hub, ...], setting: str, container: bool) -> list[str]:
    notes: list[str] = []
    working = [hub for hub in hubs if hub.answer.state == "ok"]
    if setting == "local":
        notes.append("MELODI_HUB=local: each process has a meter of its own, and no hub is asked.")
    elif not working:
        notes.append(
            "No hub is reachable: a program has a meter of its own, or starts a shared one where it has workers."
        )
    if container and not any(hub.tier != "shared" for hub in working):
        notes.append(
            "This is a container: only the host's agent is right across containers, for a meter in here takes the work of all "
            f"others for its own host's. Run melodi-otel agent on the host and mount {AGENT_SOCKET.parent} into the container."
        )
    return notes


def _publisher(name: str, procfs: Path) -> tuple[bool | None, int | None]:
    """(whether somebody holds the publisher's name, who); the doctor itself does not count."""
    try:
        lines = (procfs / "net/unix").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None, None
    inodes = {f"socket:[{line.split()[6]}]" for line in lines if line.endswith(f" @{name}")}
    if not inodes:
        return False, None
    for entry in sorted(procfs.glob("[0-9]*"), key=lambda entry: int(entry.name)):
        if int(entry.name) != os.getpid() and _holds(entry, inodes):
            return True, int(entry.name)
    return True, None  # another user's, or in a pid namespace that we do not see


def _holds(process: Path, inodes: set[str]) -> bool:
    try:
        return any(_link(descriptor) in inodes for descriptor in (process / "fd").iterdir())
    except OSError:
        return False


def _link(path: Path) -> str:
    try:
        return str(path.readlink())
    except OSError:
        return ""


def _line(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeError):
        return None
