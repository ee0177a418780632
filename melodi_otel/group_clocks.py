"""CPU time of a hub's programs: one figure per group of processes, read with the CPU meters.

A group's processes are those that are connected, each with everything below it but the trees of others that are connected:
a server's master and its workers may be groups of their own, and no second is counted twice. Time of a process that has left
stays counted: figures never fall.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

from melodi_otel.attribution.evidence import WHOLE
from melodi_otel.attribution.meter import EngineId
from melodi_otel.host_pids import parent_of
from melodi_otel.processes import CpuTimes, ProcessClock

log = logging.getLogger("melodi_otel")


class GroupClocks:
    """The clocks of all connected programs and, for its own energy, of the hub itself.

    Args:
        procfs: where the host's ``stat`` is.
        processes: where the processes of this pid namespace are.
        clock: makes the clock of a process.
    """

    def __init__(
        self, procfs: str = "/proc", processes: str = "/proc", clock: Callable[[int], ProcessClock] | None = None
    ) -> None:
        self._root = Path(processes)

        def process_clock(pid: int) -> ProcessClock:
            return ProcessClock(procfs, pid, own_procfs=processes)

        self._make = clock or process_clock
        self._lock = threading.Lock()
        self._hidden = 0
        self._own = ProcessClock(procfs)
        self._clocks: dict[tuple[str, int], ProcessClock] = {}
        self._connections: dict[tuple[str, int], int] = {}
        self._counted: dict[tuple[str, int], float] = {}
        self._before: dict[tuple[str, int], float] = {}
        # Files of two processes are not read at one instant: what an inner one is ahead is taken from the outer one later.
        self._ahead: dict[tuple[str, int], float] = {}
        self._outer: dict[int, int | None] = {}
        self._kept: dict[str, float] = {}

    @property
    def hidden(self) -> bool:
        """Whether a program is connected whose process cannot be seen from here."""
        return self._hidden > 0

    def add(self, group: str, pid: int) -> None:
        """A process of ``group`` has connected; 0: one that cannot be seen from here, whose time stays unknown."""
        if pid <= 0:
            self._hidden += 1
            return
        at = (group, pid)
        with self._lock:
            self._connections[at] = self._connections.get(at, 0) + 1
            if at not in self._clocks:
                self._clocks[at] = self._make(pid)
                self._counted[at] = 0.0
                self._outer.clear()

    def remove(self, group: str, pid: int) -> list[EngineId]:
        """A connection of that process has ended; the series that have ended with it."""
        if pid <= 0:
            self._hidden -= 1
            return []
        at = (group, pid)
        with self._lock:
            left = self._connections.get(at, 0) - 1
            if left > 0:
                self._connections[at] = left
                return []
            self._connections.pop(at, None)
            clock = self._clocks.pop(at, None)
            if clock is None:
                return []
            clock.close()
            self._outer.clear()
            self._before.pop(at, None)
            self._ahead.pop(at, None)
            self._kept[group] = self._kept.get(group, 0.0) + self._counted.pop(at)
            if any(other == group for other, _ in self._clocks):
                return []
            self._kept.pop(group, None)
            return [EngineId(group, WHOLE)]

    def pids(self) -> list[int]:
        """The processes that are connected."""
        with self._lock:
            return [pid for _, pid in self._clocks]

    def read(self) -> CpuTimes | None:
        """CPU seconds of the hub itself and of the host."""
        return self._own.read()

    def groups(self) -> Mapping[EngineId, float]:
        """Cumulative CPU seconds by group, of those whose processes can be seen."""
        found: dict[EngineId, float] = {}
        own = self._own.read()
        if own is not None:
            # The hub itself, always: the host's load stays known without any program, and with it what is foreign or idle.
            found[EngineId("", WHOLE)] = own.busy_s
        with self._lock:
            self._count()
            for at, counted in self._counted.items():
                engine = EngineId(at[0], WHOLE)
                found.setdefault(engine, self._kept.get(at[0], 0.0))
                found[engine] += counted
        return found

    def close(self) -> None:
        """Give descriptors back."""
        with self._lock:
            for clock in (self._own, *self._clocks.values()):
                clock.close()
            self._clocks.clear()

    def _count(self) -> None:
        pids = {pid for _, pid in self._clocks}
        used: dict[int, float] = {}
        inner: dict[int, float] = {}
        for at, clock in self._clocks.items():
            times = clock.read()
            if times is not None:
                # What a process had used before it came is nothing that happened here.
                before = self._before.get(at, times.busy_s)
                self._before[at] = max(times.busy_s, before)
                used[at[1]] = max(0.0, times.busy_s - before)
        for pid, seconds in used.items():
            if pid not in self._outer:
                self._outer[pid] = self._above(pid, pids)
            outer = self._outer[pid]
            if outer is not None:
                inner[outer] = inner.get(outer, 0.0) + seconds
        for at in self._clocks:
            own = used.get(at[1], 0.0) - inner.get(at[1], 0.0) - self._ahead.get(at, 0.0)
            self._counted[at] += max(0.0, own)
            self._ahead[at] = max(0.0, -own)

    def _above(self, pid: int, others: set[int]) -> int | None:
        """The nearest one of ``others`` below which it runs."""
        for _ in range(64):
            parent = parent_of(self._root / str(pid))
            if parent is None or parent <= 1:
                return None
            if parent in others:
                return parent
            pid = parent
        return None
