"""Our processes as the machine numbers them, which is how a GPU driver names whom it sees.

A process in a PID namespace (most containers) has one number there and another on the machine. Whether that is so, the
kernel tells: the machine's own namespace has a fixed inode. What the driver then answers differs by its version, so both
numbers are needed:

=========================  ===============================  ============================================
where we run               older drivers list               newer drivers list
=========================  ===============================  ============================================
on the machine (or with    everybody, by the numbers        the same
``hostPID``)               that we use
in a PID namespace         everybody, by the machine's      only processes of our namespace, by its
                           numbers                          numbers
=========================  ===============================  ============================================

The machine's number of one of ours is known inside a namespace only where the machine's ``/proc`` is mounted as well
(``MELODI_PROCFS_ROOT``): there ``NSpid`` in ``/proc/<pid>/status`` lists every number of a process, outermost first.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final

__all__ = ["HostPids", "family"]

_INITIAL: Final = "pid:[4026531836]"
"""The machine's PID namespace: PROC_PID_INIT_INO (0xEFFFFFFC) in the kernel's include/linux/proc_ns.h."""
_KTHREADD: Final = "kthreadd"
"""Process 2 of a machine, and of no namespace below it."""


class HostPids:
    """Translates pids of this process's namespace into those of the machine.

    Args:
        procfs: the machine's procfs where it is mounted, else the same as ``own_procfs``.
        own_procfs: procfs of this process.

    Attributes:
        nested: whether this process runs in a PID namespace of its own, so that its pids are not the machine's. True where
            it cannot be found out: then nobody is taken for somebody else by mistake.
    """

    def __init__(self, procfs: str = "/proc", own_procfs: str = "/proc") -> None:
        self._own = Path(own_procfs)
        self._machine = Path(procfs)
        self.nested = _nested(self._own)
        self._visible = not self.nested or _name(self._machine / "2") == _KTHREADD
        self._known: dict[int, int] = {}

    def host(self, pids: Collection[int]) -> frozenset[int] | None:
        """``pids`` as the machine numbers them; None: not known here."""
        if not self.nested:
            return frozenset(pids)
        if not self._visible:
            return None
        self._known = {pid: host for pid, host in self._known.items() if self._numbers(host)[-1:] == [pid]}
        if any(pid not in self._known for pid in pids):
            self._known |= dict(self._search(pids))
        found = frozenset(self._known[pid] for pid in pids if pid in self._known)
        return found or None

    def live_here(self, pids: Collection[int]) -> bool:
        """Whether every one of ``pids`` is the number of a process of this namespace."""
        return all((self._own / str(pid)).is_dir() for pid in pids)

    def name(self, host_pid: int) -> str:
        """Short name of a process by the machine's number; empty: not known."""
        return _name(self._machine / str(host_pid)) if self._visible else ""

    def name_here(self, pid: int) -> str:
        """Short name of a process by the number of this namespace; empty: there is none."""
        return _name(self._own / str(pid))

    def _search(self, pids: Collection[int]) -> Iterator[tuple[int, int]]:
        own = _link(self._own / "self" / "ns" / "pid")
        for host in _processes(self._machine):
            numbers = self._numbers(host)
            # Another container of the same depth may use the same number: only the namespace tells them apart.
            if (
                len(numbers) > 1
                and numbers[-1] in pids
                and own == _link(self._machine / str(host) / "ns" / "pid") != ""
            ):
                yield numbers[-1], host

    def _numbers(self, host: int) -> list[int]:
        for line in _text(self._machine / str(host) / "status").splitlines():
            if line.startswith("NSpid:"):
                return [int(word) for word in line.split()[1:]]
        return []


def family(roots: Iterable[int], own_procfs: str = "/proc") -> frozenset[int]:
    """``roots`` and every process below them, as this namespace numbers them; a walk over all processes."""
    children: dict[int, list[int]] = {}
    root = Path(own_procfs)
    for pid in _processes(root):
        parent = parent_of(root / str(pid))
        if parent is not None:
            children.setdefault(parent, []).append(pid)
    found: set[int] = set()
    waiting = list(roots)
    while waiting:
        pid = waiting.pop()
        if pid not in found:
            found.add(pid)
            waiting += children.get(pid, ())
    return frozenset(found)


def parent_of(process: Path) -> int | None:
    """The pid of the parent of the process at ``/proc/PID``; None: it is gone."""
    # The name stands in brackets and may hold any character: what follows the last bracket is state and parent.
    fields = _text(process / "stat").rpartition(")")[2].split()
    return int(fields[1]) if len(fields) > 1 and fields[1].isdecimal() else None


def _nested(own: Path) -> bool:
    if not own.is_dir():
        return sys.platform == "linux"  # elsewhere there are no PID namespaces
    link = _link(own / "self" / "ns" / "pid")
    return link != _INITIAL if link else _name(own / "2") != _KTHREADD


def _processes(root: Path) -> list[int]:
    try:
        return [int(entry.name) for entry in root.iterdir() if entry.name.isdecimal()]
    except OSError:
        return []


def _name(process: Path) -> str:
    return _text(process / "comm").strip()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _link(path: Path) -> str:
    try:
        return os.readlink(path)  # noqa: PTH115 - the target is no path
    except OSError:
        return ""
