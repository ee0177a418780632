"""Joules over time for one device.

Readings come in; closed intervals come out, in order and without overlap. An interval without joules (``None``) is time
whose energy is not known (reset, lost device): it lowers the coverage of whoever lived in it and never becomes 0 J.
Between two readings energy is interpolated linearly, with a bound of the error that this can make.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from melodi_otel.timeline.counter import Counter, Reading, turn_missed
from melodi_otel.timeline.gauge import Gauge

DEFAULT_PERIOD_S: Final = 0.1
"""Update period that is assumed until readings show another: the commonest of GPU energy counters."""


@dataclass(frozen=True, slots=True)
class Interval:
    """Energy of a device between two readings: ``joules`` in J, or None where it is not known.

    ``gap``: nobody sampled meanwhile and nobody listened to who was at work, so its joules, known or not, are no request's.
    """

    t0_ns: int
    t1_ns: int
    joules: float | None
    gap: bool = False

    @property
    def watts(self) -> float | None:
        """Mean power in W."""
        return None if self.joules is None else self.joules / ((self.t1_ns - self.t0_ns) / 1e9)


@dataclass(frozen=True, slots=True)
class Between:
    """Energy of a device in a window.

    Attributes:
        joules: J of the covered part; None where nothing is covered.
        coverage: part of the window with known energy, 0..1.
        error_bound: the most by which linear interpolation at the two edges can be wrong, J, given the power range seen.
    """

    joules: float | None
    coverage: float
    error_bound: float


class Timeline:
    """Cumulative joules of one device over monotonic time.

    Args:
        period_s: update period of the sensor, None: :data:`DEFAULT_PERIOD_S` until known better.
        window_s: averaging window of the gauge, None: instantaneous.
        keep_s: how long closed intervals stay for :meth:`between`.
    """

    def __init__(self, period_s: float | None = None, window_s: float | None = None, keep_s: float = 300.0) -> None:
        self.period_s = period_s
        self._keep_ns = round(keep_s * 1e9)
        self._counter: Counter | None = None
        self._gauge: Gauge | None = None
        self._window_ns = round((window_s or 0.0) * 1e9)
        self._last_ns: int | None = None
        self._last_joules = 0.0
        self._unmoved_ns: int | None = None
        self._resumed: Reading | None = None
        self._gap = False
        self._starts: list[int] = []
        self._intervals: list[Interval] = []
        self._fresh: deque[Interval] = deque()
        self._low_w: float | None = None
        self._high_w = 0.0
        self.first_ns: int | None = None

    @property
    def covered_until(self) -> int | None:
        """Monotonic ns up to which energy is decided; None before the first reading."""
        return self._last_ns

    @property
    def reading(self) -> Reading | None:
        """The last reading of the counter; None where there is none."""
        return self._resumed if self._counter is None else self._counter.last

    def pause(self) -> None:
        """Nobody reads from here on: the next reading is a baseline, and what lies between is not known here."""
        if self._last_ns is not None:
            self._counter = self._gauge = None
            self._unmoved_ns = None
            self.resume(self._last_ns, None)

    def resume(self, t_ns: int, last: Reading | None) -> None:
        """Go on from a timeline of another process, before any reading.

        What lies between ``t_ns`` and the first reading is a gap. Its joules are those that the counter has advanced since
        its ``last`` reading, and not known where it was reset, could have turned round unseen, or is a gauge (None).
        """
        self._begin(t_ns)
        self._resumed, self._gap = last, True

    def counter(self, t_ns: int, joules: float, range_j: float | None = None) -> bool:
        """Take a cumulative reading; whether it moved the timeline.

        A reading that repeats the last value within two update periods says that the counter has not been updated yet: it
        is held back, and the interval ends at the next change. One that stays longer is a true 0 J.
        """
        if self._counter is None:
            self._counter = Counter(self._resumed if self._gap else None)
            if self._gap and self._resumed is not None:
                self._last_joules = self._resumed.joules
            self._hand_over(t_ns)
        if self._last_ns is not None and t_ns <= self._last_ns:
            return False
        if self._last_ns is not None and joules == self._last_joules and self.first_ns is not None:
            hold_ns = round(2e9 * (self.period_s or DEFAULT_PERIOD_S))
            if t_ns - self._last_ns < hold_ns:
                self._unmoved_ns = t_ns
                return False
        before = self._counter.last
        change = self._counter.read(t_ns, joules, range_j)
        self._last_joules = joules
        self._unmoved_ns = None
        gained = change.joules
        if self._gap and before and gained is not None and turn_missed(gained, (t_ns - before.t_ns) / 1e9, range_j):
            gained = None
        if change.event == "first" and not self._gap:
            self._begin(t_ns)
            return False
        self._append(t_ns, gained)
        return True

    def gauge(self, t_ns: int, watts: float) -> bool:
        """Take a power reading (mean of the window that ends at ``t_ns``); whether it moved the timeline.

        Ignored once the device has shown a counter: there the gauge is a cross-check only.
        """
        if self._counter is not None:
            return False
        if self._gauge is None:
            self._gauge = Gauge(self._window_ns)
        if self._gap and self._last_ns is not None and t_ns - self._window_ns // 2 <= self._last_ns:
            return False  # this part of the time is booked already
        moved = self._gauge.read(t_ns, watts)
        if moved is None:
            if self.first_ns is None:
                self._begin(self._gauge.centre_ns)
            elif self._gap:
                self._append(self._gauge.centre_ns, None)
                return True
            return False
        t1_ns, joules = moved
        self._append(t1_ns, joules)
        return True

    def lose(self, t_ns: int) -> None:
        """The energy up to ``t_ns`` is not known (device lost, gap of the sampler)."""
        if self._last_ns is not None and t_ns > self._last_ns:
            self._append(t_ns, None)

    def flush(self) -> bool:
        """The readings have ended: decide what was held back; whether that moved the timeline."""
        if self._unmoved_ns is not None and self._last_ns is not None and self._unmoved_ns > self._last_ns:
            self._append(self._unmoved_ns, 0.0)
            self._unmoved_ns = None
            return True
        if self._gauge is not None and self._counter is None:
            rest = self._gauge.rest()
            if rest is not None:
                self._append(*rest)
                return True
        return False

    def take(self) -> Iterator[Interval]:
        """Intervals that have closed since the last call, in order."""
        while self._fresh:
            yield self._fresh.popleft()

    def between(self, t0_ns: int, t1_ns: int) -> Between:
        """Energy in ``[t0_ns, t1_ns]`` by linear interpolation at the edges."""
        if t1_ns <= t0_ns:
            return Between(None, 0.0, 0.0)
        joules, covered, error = 0.0, 0, 0.0
        first = max(0, bisect_right(self._starts, t0_ns) - 1)
        for interval in self._intervals[first:]:
            if interval.t0_ns >= t1_ns:
                break
            overlap = min(interval.t1_ns, t1_ns) - max(interval.t0_ns, t0_ns)
            if overlap <= 0 or interval.joules is None:
                continue
            length = interval.t1_ns - interval.t0_ns
            joules += interval.joules * (overlap / length)
            covered += overlap
            for edge in (t0_ns, t1_ns):
                if interval.t0_ns < edge < interval.t1_ns:
                    error += self._edge_error(interval)
        if covered == 0:
            return Between(None, 0.0, 0.0)
        return Between(joules, covered / (t1_ns - t0_ns), error)

    def _edge_error(self, interval: Interval) -> float:
        # The power inside the interval is somewhere in [low, high] with the known mean: the worst arrangement is high
        # first and low last (or the reverse), which bounds the error of a linear cut.
        low, high, mean = self._low_w, self._high_w, interval.watts
        if low is None or mean is None or high <= low:
            return 0.0
        return max(0.0, (high - mean) * (mean - low) / (high - low)) * (interval.t1_ns - interval.t0_ns) / 1e9

    def _begin(self, t_ns: int) -> None:
        self.first_ns = t_ns if self.first_ns is None else self.first_ns
        self._last_ns = t_ns

    def _hand_over(self, t_ns: int) -> None:
        # A counter that appears after gauge readings takes over where it starts; the gauge's last power bridges the rest.
        if self._gauge is not None and not self._gap and self._last_ns is not None and t_ns > self._last_ns:
            self._append(t_ns, self._gauge.watts * (t_ns - self._last_ns) / 1e9)

    def _append(self, t1_ns: int, joules: float | None) -> None:
        t0_ns = self._last_ns
        assert t0_ns is not None  # _begin has run: first readings never get here
        interval = Interval(t0_ns, t1_ns, joules, self._gap)
        self._gap = False
        self._last_ns = t1_ns
        self._starts.append(t0_ns)
        self._intervals.append(interval)
        self._fresh.append(interval)
        watts = interval.watts
        if watts is not None:
            self._low_w = watts if self._low_w is None else min(self._low_w, watts)
            self._high_w = max(self._high_w, watts)
        if self._intervals[0].t1_ns < t1_ns - 2 * self._keep_ns:
            # Cut rarely and in one go: deleting from the front of a list costs its length.
            cut = bisect_right(self._starts, t1_ns - self._keep_ns)
            del self._starts[:cut], self._intervals[:cut]
