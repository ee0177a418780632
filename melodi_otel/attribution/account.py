"""The account of one device: its timeline, its evidence, its idle power and where its joules went."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Final

from melodi_otel.attribution.baseline import QUIET_CORES, QUIET_S, Baseline
from melodi_otel.attribution.books import BUCKETS, Books, Bucket, Phase, Who
from melodi_otel.attribution.engines import Step
from melodi_otel.attribution.evidence import CpuTime, Foreign
from melodi_otel.attribution.late import Holder, Leavings
from melodi_otel.devices import Device
from melodi_otel.timeline.timeline import Interval, Timeline

TAIL_NS: Final = 1_000_000_000
"""Power above idle this soon after work is the tail of that work (board capacitors, clocks stepping down)."""


class Account:
    """State of one device; touched by the settle thread only."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.timeline = Timeline(device.period_s, device.window_s)
        self.waiting: deque[Interval] = deque()
        self.gap_end_ns: int | None = None
        self.steps: list[Step] = []
        self.cpu = CpuTime()
        self.foreign = Foreign()
        self.baseline = Baseline(device.idle_watts)
        self.closed_until: int | None = None
        self.last_work_ns: int | None = None
        self.gone = False
        self.lost: list[tuple[int, int]] = []
        self.leavings = Leavings()
        self.interval_s = device.period_s or 0.1
        self.measured = 0.0
        self.settled = 0.0
        self.residual = 0.0
        self.buckets: dict[tuple[Bucket, Holder | None], float] = {}
        self.attributed: dict[tuple[Who, Phase, str], float] = {}

    def collect(self) -> bool:
        """Move newly closed timeline intervals into the queue; whether there were any."""
        before = len(self.waiting)
        for interval in self.timeline.take():
            self.waiting.append(interval)
            if interval.joules is None:
                self.gap_end_ns = interval.t1_ns
        return len(self.waiting) > before

    def begin(self) -> None:
        """The timeline has started: everything before it is uncovered."""
        if self.closed_until is None and self.timeline.first_ns is not None:
            self.closed_until = self.timeline.first_ns

    def book(self, bucket: Bucket, joules: float, holder: Holder | None) -> None:
        """Put ``joules`` into a bucket."""
        if joules != 0.0:
            at = (bucket, holder)
            self.buckets[at] = self.buckets.get(at, 0.0) + joules

    def bucket(self, bucket: Bucket) -> float:
        """J of one bucket over all holders."""
        return math.fsum(joules for (name, _), joules in self.buckets.items() if name == bucket)

    def books(self, in_flight: float) -> Books:
        """The balance, given what open requests have accrued here."""
        parts = {name: self.bucket(name) for name in BUCKETS}
        return Books(self.device.id, self.measured, self.settled, in_flight, **parts, residual=self.residual)

    def lost_interval(self, interval: Interval) -> None:
        """Time without known energy."""
        self.lost.append((interval.t0_ns, interval.t1_ns))

    def coverage(self, t0_ns: int, t1_ns: int) -> float:
        """Part of [t0, t1] with known energy, 0..1."""
        first, until = self.timeline.first_ns, self.closed_until
        if first is None or until is None:
            return 0.0
        if t1_ns <= t0_ns:
            return 1.0 if first <= t0_ns <= until else 0.0
        held = max(0, min(until, t1_ns) - max(first, t0_ns))
        held -= sum(max(0, min(b, t1_ns) - max(a, t0_ns)) for a, b in self.lost)
        return max(0.0, held / (t1_ns - t0_ns))

    def had_reset(self, t0_ns: int, t1_ns: int) -> bool:
        """Whether time without known energy lies in [t0, t1]."""
        return any(a < t1_ns and b > t0_ns for a, b in self.lost)

    def forget_before(self, t_ns: int) -> None:
        """Lost stretches that no open request can reach any more."""
        if self.lost and self.lost[0][1] < t_ns:
            self.lost = [stretch for stretch in self.lost if stretch[1] >= t_ns]

    def steps_in(self, interval: Interval) -> list[Step]:
        """Steps that lie at least partly in the interval; those that ended before it are dropped."""
        t0, t1 = interval.t0_ns, interval.t1_ns
        self.steps = [step for step in self.steps if step.t1_ns > t0]
        return [step for step in self.steps if step.t0_ns < t1 or step.t1_ns == t1]

    def learn(self, interval: Interval, loading: bool, foreign: float) -> None:
        """Let an interval without work teach the idle power."""
        if interval.joules is None or loading or foreign > 0.0:
            return
        if self.last_work_ns is not None and interval.t0_ns - self.last_work_ns < QUIET_S * 1e9:
            return
        cores = self.cpu.busy_cores(interval.t0_ns, interval.t1_ns)
        if cores is not None and cores > QUIET_CORES:
            return
        first = interval.t0_ns in (self.timeline.first_ns, self.gap_end_ns)
        self.baseline.observe((interval.t1_ns - interval.t0_ns) / 1e9, interval.joules, first)

    def worked(self, ends: Iterable[int]) -> None:
        """Work ended at these times."""
        for end in ends:
            self.last_work_ns = end if self.last_work_ns is None else max(self.last_work_ns, end)
