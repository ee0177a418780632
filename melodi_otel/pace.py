"""When one source is read next: its budget, its failures and the counter whose steps it follows.

The budget is hard: no more than :data:`WINDOW_READS` reads begin within any :data:`WINDOW_NS`, learning included, because
every NVML call takes a lock in the driver that the application needs too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Final

from melodi_otel.phase_lock import DEAR_NS, PhaseLock
from melodi_otel.power_shape import PowerShape
from melodi_otel.sources.base import CounterSource, HistorySource, PowerSource, Source, StateSource
from melodi_otel.units import NS_PER_S, ns

WINDOW_NS: Final = 2 * NS_PER_S
WINDOW_READS: Final = 20
LEARNING_RESERVE: Final = 4
"""Reads of each window that learning leaves alone, so that no burst makes the meter blind for two seconds."""
BURST_READS: Final = 10
"""Reads that a learning burst should find room for before it begins."""
NARROWING_RESERVE: Final = 2
"""The same for reads that make a bracket narrower: they fall one to a period, so none of them is lost to the meter."""
DEAR_SHARE: Final = 0.015
"""Part of a core that reads of a dear counter may take, as long as that leaves :data:`DEAR_STEPS` (H200: 3 steps, 1.1 %)."""
DEAR_STEPS: Final = (3, 10)
"""A dear counter is read every 3 steps at most, and every 10 at least, however dear: joules are final only when it was read."""
_DEFAULT_PERIOD_NS: Final = 100_000_000
RETRIES: Final = 10
"""Failures in a row after which a source is asked at the idle rate only."""


class ReadCost:
    """CPU time that reads of one counter take, ns; ``usual_ns`` is that of reads that did not meet the update."""

    __slots__ = ("_last", "usual_ns")

    def __init__(self) -> None:
        self._last: deque[int] = deque(maxlen=9)
        self.usual_ns = 0

    def note(self, cost_ns: int) -> int:
        """One more read; returns by how much it was longer than usual, 0 where that is the usual scatter."""
        waited_ns = cost_ns - self.usual_ns if len(self._last) >= 3 and cost_ns > 2 * self.usual_ns else 0
        self._last.append(cost_ns)
        self.usual_ns = sorted(self._last)[(len(self._last) - 1) // 3]
        return waited_ns if self.usual_ns >= DEAR_NS else 0


class Track:
    """What the sampler remembers about one source."""

    def __init__(self, source: Source) -> None:
        self.source = source
        # Asked once: an isinstance of a Protocol walks all its names, ten times a second for ever.
        self.counter = source if isinstance(source, CounterSource) else None
        self.gauge = source if isinstance(source, PowerSource) else None
        self.state = source if isinstance(source, StateSource) else None
        self.known = {device.id: device for device in source.devices}
        self.gone: set[str] = set()
        self.only_gpu = all(device.type == "gpu" for device in self.known.values())
        self.cpu_ids = tuple(d.id for d in self.known.values() if d.type in ("cpu", "memory"))
        self.history = source if isinstance(source, HistorySource) and self.counter is not None else None
        self.costs = {device: ReadCost() for device in self.known} if self.counter is not None else {}
        self.shapes = {device: PowerShape() for device in self.known} if self.history is not None else {}
        self.values: dict[str, float] = {}
        self.reads: deque[int] = deque(maxlen=WINDOW_READS)
        self.locks = {d.id: PhaseLock(d.period_s) for d in self.known.values()} if self.counter is not None else {}
        self.lead: PhaseLock | None = None
        self.due_ns = 0
        self.failures = 0
        self.states_ns = 0

    def alive(self) -> tuple[str, ...]:
        return tuple(device for device in self.known if device not in self.gone)

    def steps(self, period_ns: int = _DEFAULT_PERIOD_NS) -> int:
        """Every how many steps the counters are read: a dear one is read less often where its history tells what was between."""
        cost_ns = sum(cost.usual_ns for device, cost in self.costs.items() if device not in self.gone)
        if cost_ns < DEAR_NS or self.history is None:
            return 1
        fewest, most = DEAR_STEPS
        return min(most, max(fewest, math.ceil(cost_ns / (DEAR_SHARE * period_ns))))

    def follows(self) -> bool:
        """Whether its reads follow the steps of a counter, so that their time is not free."""
        return self.lead is not None and self.lead.state == "locked"

    def lock(self) -> PhaseLock | None:
        """The counter whose steps this source is read after; chosen when every counter is learnt.

        All devices are read in one call, so one phase must do: the one after which the others' steps are the freshest.
        """
        if self.lead is not None:
            return self.lead
        locks = [lock for device, lock in self.locks.items() if device not in self.gone]
        seeking = [lock for lock in locks if lock.state == "seek"]
        if seeking:
            return seeking[0]
        locked = [lock for lock in locks if lock.state == "locked"]
        shortest = min((lock.period_s or math.inf for lock in locked), default=math.inf)
        locked = [lock for lock in locked if (lock.period_s or math.inf) < 1.2 * shortest]
        if not locked:
            return locks[0] if locks else None
        self.lead = min(locked, key=lambda lead: _staleness(lead, locked, self.reads[-1]))
        return self.lead

    def clear_ns(self, t_ns: int) -> int:
        """The first time from ``t_ns`` on at which the counter that is followed is not just stepping."""
        return self.lead.clear_ns(t_ns) if self.lead is not None else t_ns

    def allowed_ns(self, reserve: int = 0) -> int:
        """The first moment at which the budget has room for one more read beside ``reserve`` others."""
        limit = WINDOW_READS - reserve
        return self.reads[-limit] + WINDOW_NS if len(self.reads) >= limit else 0

    def next_idle(self, gap_ns: int) -> int:
        """When to read next while nobody is at work: after ``gap_ns``, or earlier where the phase would be lost by then."""
        due_ns = self.reads[-1] + gap_ns
        if self.lead is None:
            return due_ns
        return max(
            self.reads[-1] + 1, self.allowed_ns(), self.lead.next_idle(due_ns, self.allowed_ns(NARROWING_RESERVE))
        )

    def next_active(self, spacing_ns: int, idle_ns: int) -> int:
        """When to read next while somebody is at work: reads are at least ``spacing_ns`` apart but for learning ones."""
        last = self.reads[-1]
        if self.failures >= RETRIES:
            return last + idle_ns
        lock = self.lock()
        locked = lock is not None and lock.state == "locked"
        period_ns = ns(lock.period_s or 0.0) if lock is not None and locked else _DEFAULT_PERIOD_NS
        steps = self.steps(period_ns)
        if steps > 1:
            spacing_ns = max(spacing_ns, steps * period_ns)
        recent = [t_ns for t_ns in self.reads if t_ns > last - WINDOW_NS]
        # A burst has spent part of the budget: what is left is spread until its first read leaves the window.
        rest_ns = (recent[0] + WINDOW_NS - last) // (WINDOW_READS - len(recent) + 1)
        # The window bounds the mean; a single gap may be a little shorter, or reads could never move to an earlier phase.
        least_ns = spacing_ns * 9 // 10 if spacing_ns * WINDOW_READS <= WINDOW_NS else spacing_ns
        earliest = max(last + max(least_ns, rest_ns), self.allowed_ns())
        if steps > 1 and locked and lock is not None:
            # Counted from the last new figure: a look that came too early for one must not make the next one late.
            earliest = max(lock.moved_ns + spacing_ns - period_ns // 2, last + rest_ns, self.allowed_ns())
        if lock is None:
            return earliest
        if not locked:
            earliest = max(earliest, last + spacing_ns)
        learn_ns = self.allowed_ns(LEARNING_RESERVE)
        narrow_ns = self.allowed_ns(NARROWING_RESERVE) if lock.dear else learn_ns
        burst_ns = self.allowed_ns(LEARNING_RESERVE + BURST_READS)
        return max(last + 1, lock.next_read(earliest, burst_ns, learn_ns, narrow_ns, self.allowed_ns()))


def _staleness(lead: PhaseLock, locks: Sequence[PhaseLock], after_ns: int) -> int:
    """Summed age of the other counters' last steps at the moment ``lead`` steps, ns."""
    at = lead.expected_ns(after_ns) or after_ns
    age = 0
    for lock in locks:
        period = ns(lock.period_s or 0.0)
        following = lock.expected_ns(at)
        age += (at - following) % period if following is not None and period else 0
    return age
