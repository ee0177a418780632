"""Whose CPU time: busy CPU seconds of this process and everything it started, beside those of the whole host.

Two clocks of different grain meet here. This process is read in nanoseconds, its children and the host in jiffies of 10 ms;
divided as they are, a share could exceed 1 in a short interval. So what is handed out never lets the process outrun the host
(:class:`ProcessClock`). Off Linux nothing is known and nothing is said.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from melodi_otel.errors import Transient
from melodi_otel.sources.procstat import HostBusy, cpu_count, ticks_per_second

_REFRESH_NS: Final = 1_000_000_000
"""Children are looked for once a second: the walk costs milliseconds where a program has hundreds of threads."""
_KEPT: Final = 64
"""Children whose file stays open and is read every time; the rest are read at each refresh."""
_JIFFIES: Final = 2


class CpuTimes(NamedTuple):
    """Cumulative CPU seconds: of the process tree, and of all processes of the host."""

    busy_s: float
    host_busy_s: float


@dataclass(slots=True)
class _Child:
    """A process below the root: its last known time, what it collected from children that ended, and its file."""

    pid: int
    started: int
    parent: int
    fd: int
    own_s: float = 0.0
    reaped_s: float = 0.0
    reaped_before_s: float = 0.0
    lost_s: float = 0.0

    @property
    def ended_s(self) -> float:
        # Time of ended children shows up in what the parent collected only if the parent waited for them; what we saw of
        # them ourselves is the other lower bound.
        return max(self.reaped_s - self.reaped_before_s, self.lost_s)

    @property
    def total_s(self) -> float:
        return self.own_s + self.ended_s


class ProcessClock:
    """CPU time of a process tree and of its host, monotone, with ``busy_s`` never growing faster than ``host_busy_s``.

    Processes that end keep their time: what they had used when last seen, or what their parent collected for them when it
    waited, whichever is more. A process that was ours stays ours when its parent ends.

    Args:
        procfs: where the host's ``stat`` is (a container may have the host's tree mounted elsewhere).
        pid: the root of the tree; None: this process.
        own_procfs: where the processes of this PID namespace are.
        own_time: CPU nanoseconds of the root; None: ``time.process_time_ns`` for this process, else its ``stat``.
        now: monotonic ns, for the pace of looking for children.
    """

    def __init__(
        self,
        procfs: str = "/proc",
        pid: int | None = None,
        *,
        own_procfs: str = "/proc",
        own_time: Callable[[], int] | None = None,
        now: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._pid = os.getpid() if pid is None else pid
        self._root = Path(own_procfs)
        self._own_time = own_time if own_time or pid is not None else time.process_time_ns
        self._now = now
        self._hz = ticks_per_second()
        self._refreshed_ns: int | None = None
        self._children: dict[int, _Child] = {}
        self._me = _Child(self._pid, 0, 0, -1)
        self._orphans_s = 0.0
        self._owed_s = 0.0
        self._raw_s: float | None = None
        self._busy_s = 0.0
        self._host_s = 0.0
        try:
            self._host: HostBusy | None = HostBusy(procfs)
            self._slack_s = _JIFFIES * cpu_count(procfs) / self._hz
        except (OSError, ValueError):
            self._host, self._slack_s = None, 0.0

    def read(self) -> CpuTimes | None:
        """Both times now, or None where the host does not tell them. Never raises, never falls.

        Starts at what tree and host have used so far; only differences mean anything.
        """
        if self._host is None:
            return None
        try:
            host_s = self._host.read()
            late_s = self._look()
            raw_s = self._tree()
        except (OSError, ValueError, IndexError, Transient):
            return None
        if self._raw_s is None:
            self._raw_s, self._busy_s, self._host_s = raw_s, min(raw_s, host_s), host_s
            return CpuTimes(self._busy_s, self._host_s)
        self._owed_s += late_s
        advanced = max(0.0, raw_s - self._raw_s - late_s)
        self._raw_s = max(self._raw_s, raw_s)
        # The host's figure may lag by a jiffy per CPU: it is pulled up by that much, not more. What the process claims
        # beyond that cannot have happened in this interval. Time of a child that was found late did happen, in the last
        # second: it is handed out as soon as there is room for it.
        room = max(0.0, max(host_s + self._slack_s, self._host_s) - self._host_s)
        granted = min(advanced, room)
        late = min(self._owed_s, max(0.0, max(host_s, self._host_s + granted) - self._host_s - granted))
        self._owed_s -= late
        self._busy_s += granted + late
        self._host_s = max(host_s, self._host_s + granted + late)
        return CpuTimes(self._busy_s, self._host_s)

    def close(self) -> None:
        """Give the descriptors back."""
        if self._host is not None:
            self._host.close()
            self._host = None
        for child in self._children.values():
            _close(child)
        self._children.clear()

    def _tree(self) -> float:
        if self._own_time is not None:
            self._me.own_s = self._own_time() / 1e9
        elif raw := _read(self._root / str(self._pid) / "stat"):
            self._take(self._me, raw)
        for child in list(self._children.values()):
            if child.fd >= 0:
                try:
                    self._take(child, os.pread(child.fd, 1024, 0))
                except (OSError, ValueError):
                    self._ended(child)
        return self._me.total_s + self._orphans_s + sum(child.total_s for child in self._children.values())

    def _look(self) -> float:
        """Find new children, notice ended ones; returns CPU seconds that new ones used before they were found."""
        now_ns = self._now()
        if self._refreshed_ns is not None and now_ns - self._refreshed_ns < _REFRESH_NS:
            return 0.0
        first, self._refreshed_ns = self._refreshed_ns is None, now_ns
        own_s, ended_s = self._me.own_s, self._me.ended_s
        if raw := _read(self._root / str(self._pid) / "stat"):
            self._take(self._me, raw)
            if self._own_time is not None:
                self._me.own_s = own_s
            if first:
                self._me.reaped_before_s = self._me.reaped_s
        found = self._walk()
        late_s = max(0.0, self._me.ended_s - ended_s)  # children too short-lived to be seen
        for pid, parent in found.items():
            known = self._children.get(pid)
            raw = _read(self._root / str(pid) / "stat")
            if raw is None:
                continue
            started = int(_fields(raw)[19])
            if known is not None and known.started != started:
                self._ended(known)  # the number was given to another process
                known = None
            if known is None:
                known = self._children[pid] = _Child(pid, started, parent, self._keep(pid))
                self._take(known, raw)
                late_s += known.total_s
            elif known.fd < 0:
                self._take(known, raw)
        for child in list(self._children.values()):
            if child.pid not in found and child.fd < 0:
                raw = _read(self._root / str(child.pid) / "stat")
                if raw is None or int(_fields(raw)[19]) != child.started:
                    self._ended(child)
                else:
                    self._take(child, raw)
        return 0.0 if first else late_s

    def _walk(self) -> dict[int, int]:
        """Pid → parent of every process below the root."""
        listed = (self._root / str(self._pid) / "task" / str(self._pid) / "children").exists()
        # Kernels without CONFIG_PROC_CHILDREN list no children: every process is asked for its parent.
        table = None if listed else self._by_parent()
        found: dict[int, int] = {}
        waiting = [self._pid, *self._children]
        while waiting:
            parent = waiting.pop()
            for pid in table.get(parent, ()) if table is not None else self._by_task(parent):
                if pid not in found and pid != self._pid:
                    found[pid] = parent
                    waiting.append(pid)
        return found

    def _by_task(self, pid: int) -> Iterator[int]:
        try:
            for task in (self._root / str(pid) / "task").iterdir():
                raw = _read(task / "children")
                if raw:
                    yield from map(int, raw.split())
        except OSError:
            return

    def _by_parent(self) -> dict[int, list[int]]:
        table: dict[int, list[int]] = {}
        for entry in self._root.iterdir():
            if entry.name.isdigit() and (raw := _read(entry / "stat")):
                table.setdefault(int(_fields(raw)[1]), []).append(int(entry.name))
        return table

    def _keep(self, pid: int) -> int:
        if sum(child.fd >= 0 for child in self._children.values()) >= _KEPT:
            return -1
        try:
            return os.open(str(self._root / str(pid) / "stat"), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError:
            return -1

    def _take(self, child: _Child, raw: bytes) -> None:
        fields = _fields(raw)
        own, reaped = int(fields[11]) + int(fields[12]), int(fields[13]) + int(fields[14])
        child.own_s = max(child.own_s, own / self._hz)
        child.reaped_s = max(child.reaped_s, reaped / self._hz)

    def _ended(self, child: _Child) -> None:
        self._children.pop(child.pid, None)
        _close(child)
        if child.parent == self._pid:
            self._me.lost_s += child.total_s
        elif child.parent in self._children:
            self._children[child.parent].lost_s += child.total_s
        else:
            self._orphans_s += child.total_s


def _fields(raw: bytes) -> list[bytes]:
    """Fields of a process's ``stat`` after its name, which may hold blanks and brackets: [0] is the state, [1] the parent."""
    fields = raw.rpartition(b")")[2].split()
    if len(fields) < 20:
        raise ValueError("not a process's stat")
    return fields


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _close(child: _Child) -> None:
    fd, child.fd = child.fd, -1
    if fd >= 0:
        try:
            os.close(fd)
        except OSError:
            pass
