"""CPU time of a hub's programs: one figure per group of processes, read with the CPU meters.

A group's processes are those that are connected, each with everything below it. One that stands below another connected one
is in that one's tree already: of the same group it adds nothing, of another group (a server and its workers, where each has
engines of its own) its time is its own group's and taken out of the other's. Time of a process that has left stays counted:
figures never fall.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from melodi_otel.attribution.evidence import WHOLE
from melodi_otel.attribution.meter import EngineId
from melodi_otel.processes import CpuTimes, ProcessClock

log = logging.getLogger("melodi_otel")


@dataclass(slots=True)
class _Tree:
    """A connected process with everything below it: its clock, what that showed last, and seconds since it connected."""

    clock: ProcessClock
    seen_s: float | None = None
    used_s: float = 0.0


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
        self._own = ProcessClock(procfs)
        self._trees: dict[tuple[str, int], _Tree] = {}
        self._connections: dict[tuple[str, int], int] = {}
        self._around: dict[int, int] = {}  # pid -> the connected one above it
        self._told: dict[str, float] = {}
        self._kept: dict[str, float] = {}

    def add(self, group: str, pid: int) -> None:
        """A process of ``group`` has connected; 0: one that cannot be seen from here, whose time stays unknown."""
        if pid <= 0:
            return
        at = (group, pid)
        with self._lock:
            self._connections[at] = self._connections.get(at, 0) + 1
            if at not in self._trees:
                self._trees[at] = _Tree(self._make(pid))
                self._around.clear()

    def remove(self, group: str, pid: int) -> list[EngineId]:
        """A connection of that process has ended; the series that have ended with it."""
        at = (group, pid)
        with self._lock:
            left = self._connections.get(at, 0) - 1
            if left > 0:
                self._connections[at] = left
                return []
            self._connections.pop(at, None)
            tree = self._trees.pop(at, None)
            if tree is None:
                return []
            tree.clock.close()
            self._around.clear()
            self._kept[group] = self._kept.get(group, 0.0) + tree.used_s
            if any(other == group for other, _ in self._trees):
                return []
            self._kept.pop(group, None)
            self._told.pop(group, None)
            return [EngineId(group, WHOLE)]

    def pids(self) -> list[int]:
        """The processes that are connected."""
        with self._lock:
            return [pid for _, pid in self._trees]

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
            groups = {pid: group for group, pid in self._trees}
            more: dict[int, float] = {}
            for (_, pid), tree in self._trees.items():
                if pid not in self._around:
                    self._around[pid] = self._above(pid, groups)
                times = tree.clock.read()
                if times is not None:
                    # From 0 on: what a process had used before it came is nothing that happened here.
                    more[pid] = 0.0 if tree.seen_s is None else times.busy_s - tree.seen_s
                    tree.seen_s = times.busy_s
            for (group, pid), tree in self._trees.items():
                around = self._around[pid]
                if groups.get(around) == group:
                    continue
                tree.used_s += more.get(pid, 0.0)
                outer = self._trees.get((groups.get(around, ""), around))
                if outer is not None and around in more:
                    outer.used_s -= more.get(pid, 0.0)
            for group in groups.values():
                engine = EngineId(group, WHOLE)
                if engine not in found:
                    used = sum(tree.used_s for (other, _), tree in self._trees.items() if other == group)
                    # Both clocks look for new children at times of their own, so for a moment the outer one may lag.
                    self._told[group] = max(self._told.get(group, 0.0), self._kept.get(group, 0.0) + used)
                    found[engine] = self._told[group]
        return found

    def close(self) -> None:
        """Give descriptors back."""
        with self._lock:
            for clock in (self._own, *(tree.clock for tree in self._trees.values())):
                clock.close()
            self._trees.clear()

    def _above(self, pid: int, others: Mapping[int, str]) -> int:
        """The nearest process above it that is one of ``others``; 0: none."""
        for _ in range(64):
            try:
                stat = (self._root / str(pid) / "stat").read_bytes()
            except OSError:
                return 0
            pid = int(stat.rpartition(b")")[2].split()[1])
            if pid <= 1:
                return 0
            if pid in others:
                return pid
        return 0
