"""The account of one device: its timeline, its evidence, its idle power and where its joules went."""

from __future__ import annotations

import math
from collections import deque
from typing import Final

from melodi_otel.attribution.activity import Accrual
from melodi_otel.attribution.baseline import QUIET_CORES, QUIET_S, Baseline
from melodi_otel.attribution.books import BUCKETS, Books, Bucket, Phase, Who
from melodi_otel.attribution.evidence import CpuTime, Foreign
from melodi_otel.attribution.lanes import Lane, Step
from melodi_otel.attribution.late import Holder, Leavings
from melodi_otel.attribution.learning import Learner
from melodi_otel.attribution.riding import Clock
from melodi_otel.attribution.state import Attributed, Booked, DeviceState, Known
from melodi_otel.devices import Device
from melodi_otel.timeline.timeline import Interval, Timeline

TAIL_NS: Final = 1_000_000_000
"""Power above idle this soon after work is the tail of that work (board capacitors, clocks stepping down)."""
_USUAL_S: Final = 30.0
"""Half-life of what is known of how much of requests' joules is idle energy."""
STUCK_S: Final = 3.0
"""A counter of a device with idle power that does not move for longer than this is stuck."""
RETURN_NS: Final = 5_000_000_000
"""After a gap, requests that ran all the time take so long to be announced again: until then no interval counts as idle."""


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
        self.busy_ns: int | None = None  # when a GPU was last seen at work, for whomever
        self.gone = False
        self.learn_from_ns: int | None = None
        self.lost: list[Interval] = []
        self.leavings = Leavings()
        self.learner = Learner(device.window_s or 0.0)
        self.interval_s = device.period_s or 0.1
        self._still_s = 0.0
        self._static = self._all = 0.0
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

    def attribute(self, at: tuple[Who, Phase, str], joules: float) -> None:
        """Put ``joules`` down as some requests'."""
        if joules != 0.0:
            self.attributed[at] = self.attributed.get(at, 0.0) + joules

    def shared(self, static: float, dynamic: float, seconds: float) -> None:
        """J of requests in an interval: how much of all is idle energy, within the last half minute or so."""
        keep = 0.5 ** (seconds / _USUAL_S)
        self._static = keep * self._static + static
        self._all = keep * self._all + static + dynamic

    def withdraw(self, accrual: Accrual) -> None:
        """What a request has accrued here is for nobody to see on a span: it counts as ``unavailable`` from now on."""
        for who, phase, quality in list(accrual.booked):
            self._move(accrual, (who, phase, quality), (who, phase, "unavailable"))

    def rename(self, accrual: Accrual, who: Who) -> None:
        """It is known only now whose the joules are that somebody has accrued here: they count as ``who``'s from now on."""
        for known, phase, quality in list(accrual.booked):
            self._move(accrual, (known, phase, quality), (who, phase, quality))

    def _move(self, accrual: Accrual, at: tuple[Who, Phase, str], to: tuple[Who, Phase, str]) -> None:
        if at != to:
            joules = accrual.booked.pop(at)
            self.attributed[at] = self.attributed.get(at, 0.0) - joules
            for booked in (self.attributed, accrual.booked):
                booked[to] = booked.get(to, 0.0) + joules

    def books(self, in_flight: float) -> Books:
        """The balance, given what open requests have accrued here."""
        held: dict[Bucket, list[float]] = {}
        for (name, _), joules in self.buckets.items():
            held.setdefault(name, []).append(joules)
        parts = {name: math.fsum(held[name]) if name in held else 0.0 for name in BUCKETS}
        return Books(self.device.id, self.measured, self.settled, in_flight, **parts, residual=self.residual)

    def missed(self, gap: Interval) -> None:
        """Time in which nobody sampled; its joules, where the counter shows them, are nobody's."""
        self.lost.append(gap)
        self.learn_from_ns = gap.t1_ns + RETURN_NS
        self._unsampled(gap.joules or 0.0)

    def state(self, in_flight: float) -> DeviceState:
        """The account as the next process needs it; ``in_flight`` is what unsettled requests have accrued here."""
        return DeviceState(
            self.device,
            self.measured,
            self.settled,
            in_flight,
            self.residual,
            tuple(Booked(bucket, holder, joules) for (bucket, holder), joules in self.buckets.items()),
            tuple(Attributed(*at, joules) for at, joules in self.attributed.items()),
            math.fsum(interval.joules or 0.0 for interval in self.waiting),
            self.baseline.watts,
            self.closed_until,
            self.timeline.reading,
            self.interval_s,
            self.gone,
            bool(self.cpu.series),
            self.learner.rough,
            self._delayed(),
            self.learner.state(),
            self._idle_part(),
        )

    def known(self) -> Known:
        """What shares are told of it."""
        watts, process = self.baseline.watts, bool(self.cpu.series)
        return Known(
            self.device,
            watts,
            self.interval_s,
            self.gone,
            process,
            self.learner.rough,
            self._delayed(),
            self._idle_part(),
        )

    def _idle_part(self) -> float | None:
        return self._static / self._all if self._all > 0.0 else None

    def _delayed(self) -> bool:
        # Only costs of steps tell a delay; where there are none nobody looks for it.
        return self.learner.fit.holds and not self.learner.lag.known

    def restore(self, state: DeviceState) -> None:
        """Continue the account of another process: its open requests are settled here, what was pending is nobody's."""
        self.measured += state.measured
        self.settled += state.settled + state.in_flight
        self.residual += state.residual
        for booked in state.buckets:
            self.book(booked.bucket, booked.joules, booked.holder)
        for part in state.attributed:
            at = (part.who, part.phase, part.quality)
            self.attributed[at] = self.attributed.get(at, 0.0) + part.joules
        self._unsampled(state.pending)
        if state.idle_watts is not None:
            self.baseline.resume(state.idle_watts)
        if state.learnt is not None:
            self.learner.resume(state.learnt)
        if state.closed_ns is not None and self.timeline.first_ns is None:
            self.timeline.resume(state.closed_ns, state.reading)
            self.begin()

    def _unsampled(self, joules: float) -> None:
        self.measured += joules
        if self.device.type == "host":
            self.residual += joules  # as all its joules: see IntervalCloser
        else:
            self.book("unsampled", joules, None)

    def coverage(self, t0_ns: int, t1_ns: int) -> float:
        """Part of [t0, t1] with known energy, 0..1."""
        first, until = self.timeline.first_ns, self.closed_until
        if first is None or until is None:
            return 0.0
        if t1_ns <= t0_ns:
            return 1.0 if first <= t0_ns <= until else 0.0
        if first <= t0_ns and t1_ns <= until and not self.lost:
            return 1.0
        held = max(0, min(until, t1_ns) - max(first, t0_ns))
        if self.lost:
            held -= sum(max(0, min(lost.t1_ns, t1_ns) - max(lost.t0_ns, t0_ns)) for lost in self.lost)
        return max(0.0, held / (t1_ns - t0_ns))

    def stuck(self, interval: Interval) -> bool:
        """Whether the counter has stood still for so long that it cannot be true: what the device uses is not known then.

        A device that draws power when idle draws some at any time; a counter that is renewed seldom still moves within seconds.
        """
        if interval.joules != 0.0 or not self.baseline.watts:
            self._still_s = 0.0
            return False
        self._still_s += (interval.t1_ns - interval.t0_ns) / 1e9
        return self._still_s > STUCK_S

    def had_reset(self, t0_ns: int, t1_ns: int) -> bool:
        """Whether readings that say nothing of their interval lie in [t0, t1]; a gap without readings is none."""
        return any(lost.t0_ns < t1_ns and lost.t1_ns > t0_ns and not lost.gap for lost in self.lost)

    def forget_before(self, t_ns: int) -> None:
        """Lost stretches that no open request can reach any more."""
        if self.lost and self.lost[0].t1_ns < t_ns:
            self.lost = [lost for lost in self.lost if lost.t1_ns >= t_ns]

    def steps_in(self, interval: Interval) -> list[Step]:
        """Steps that lie at least partly in the interval; those that ended before it are dropped."""
        t0, t1 = interval.t0_ns, interval.t1_ns
        kept: list[Step] = []
        found: list[Step] = []
        for step in self.steps:
            if step.t1_ns <= t0:
                self.clock(step.lane).enter(step.number, step.changes)
                step.over = True
                continue
            kept.append(step)
            if step.t0_ns < t1 or step.t1_ns == t1:
                found.append(step)
        self.steps = kept
        return found

    def clock(self, lane: Lane) -> Clock:
        """What counts the joules of a lane's decode set here."""
        name = self.device.id
        clock = lane.clocks.get(name)
        if clock is None:
            clock = lane.clocks[name] = Clock(name, self.attribute)
        return clock

    def attributed_joules(self) -> float:
        """J of all requests, settled or not."""
        return math.fsum(self.attributed.values())

    def learn(self, interval: Interval, loading: bool, foreign: float) -> None:
        """Let an interval without work teach the idle power."""
        if interval.joules is None or loading or foreign > 0.0:
            return
        if self.learn_from_ns is not None and interval.t0_ns < self.learn_from_ns:
            return
        for ended_ns in (self.last_work_ns, self.busy_ns):
            if ended_ns is not None and interval.t0_ns - ended_ns < QUIET_S * 1e9:
                return
        cores = self.cpu.busy_cores(interval.t0_ns, interval.t1_ns)
        if cores is None and self.cpu.told:
            return  # somebody read the CPU's time, and not of this interval: it may have been a busy one
        if cores is not None and cores > QUIET_CORES:
            return
        first = interval.t0_ns in (self.timeline.first_ns, self.gap_end_ns)
        self.baseline.observe((interval.t1_ns - interval.t0_ns) / 1e9, interval.joules, first)

    def worked(self, end_ns: int) -> None:
        """Work ended at this time."""
        self.last_work_ns = end_ns if self.last_work_ns is None else max(self.last_work_ns, end_ns)
