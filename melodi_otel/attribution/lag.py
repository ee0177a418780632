"""The delay of a meter behind the work: found by moving the predicted power against the measured one.

A counter shows what was used some tens of milliseconds ago (sensor, board, and a reading that comes late), so work would be
charged to the interval before. The delay is where predicted and measured joules of the last minute agree best: a grid first, then
the lowest point of a parabola through the best three.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable
from typing import Final

from melodi_otel.attribution.meter import EngineId
from melodi_otel.attribution.weights import Features, Theta

STEP_MS: Final = 10
EARLIEST_MS: Final = -60
LATEST_MS: Final = 300
LATEST_SELDOM_MS: Final = 1000
"""The same where it is read every half second at most."""
KEPT_S: Final = 60.0
_ROW: Final = 3 + len(Features._fields)
"""Numbers of a step: begin, end, its engine's, features."""
_INTERVALS: Final = 40
"""Intervals that are needed at least."""
_EXPLAINED: Final = 0.5
"""Of the variance of measured joules, so much has to be predicted at the best delay; else nothing is known of it."""
_BETTER: Final = 0.97
"""The best delay has to leave no more than this part of what the present one leaves unexplained."""


class Lag:
    """Delay of one device, in ns; 0 until something is ``known``."""

    def __init__(self) -> None:
        self.ns = 0
        self.known = False
        # Rows of numbers, from an origin near to them so that nanoseconds are whole.
        self._steps = array("d")
        self._origin_ns = 0
        self._engines: dict[EngineId, float] = {}
        self._intervals: deque[tuple[int, int, float]] = deque()
        self._next_s = 8.0
        self._pause_s = 4.0
        self._seen_s = 0.0

    def step(self, t0_ns: int, t1_ns: int, engine: EngineId, x: Features) -> None:
        """A step."""
        if not self._steps:
            self._origin_ns = t0_ns
        number = self._engines.get(engine)
        if number is None:
            number = self._engines[engine] = float(len(self._engines))
        self._steps.extend((t0_ns - self._origin_ns, t1_ns - self._origin_ns, number, *x))

    def interval(self, t0_ns: int, t1_ns: int, joules: float) -> bool:
        """An interval, as placed by the present delay, with ``joules`` above idle; whether it is time to look again."""
        self._intervals.append((t0_ns + self.ns, t1_ns + self.ns, joules))
        old = t1_ns - round(KEPT_S * 1e9)
        while self._intervals[0][1] < old:
            self._intervals.popleft()
        self._seen_s += (t1_ns - t0_ns) / 1e9
        return self._seen_s >= self._next_s

    def skip(self) -> None:
        """What was kept does not go together: begin anew."""
        self._forget()
        self._intervals.clear()

    def look(self, theta: Callable[[EngineId], Theta]) -> None:
        """Find the delay anew, from what was seen in the last minute; ``theta`` prices an engine's steps."""
        import numpy as np

        # Where nothing was found there is perhaps nothing to be found: an even load shows no delay.
        self._pause_s = 60.0 if self.known and self._seen_s > 60.0 else min(60.0, 1.5 * self._pause_s)
        self._next_s = self._seen_s + self._pause_s
        self._forget(self._intervals[0][0] if self._intervals else None)
        if len(self._intervals) < _INTERVALS or len(self._steps) < _INTERVALS * _ROW:
            return
        steps = np.frombuffer(self._steps).reshape(-1, _ROW).copy()
        joules = np.zeros(len(steps))
        for engine, number in self._engines.items():
            mine = steps[:, 2] == number
            if mine.any():  # one that is gone has no price
                joules[mine] = steps[mine, 3:] @ np.array(theta(engine))
        origin = float(steps[:, 0].min())
        # Work over time: steps of several lanes may overlap, so power is added up at their edges.
        t0, t1 = steps[:, 0] - origin, steps[:, 1] - origin
        watts = joules / np.maximum(t1 - t0, 1.0)
        edges = np.concatenate([t0, t1])
        change = np.concatenate([watts, -watts])
        order = np.argsort(edges, kind="stable")
        edges, power = edges[order], np.cumsum(change[order])
        total = np.concatenate([[0.0], np.cumsum(power[:-1] * np.diff(edges))])
        origin += self._origin_ns
        begin, end, measured = (np.array(column) for column in zip(*self._intervals, strict=True))
        begin, end = begin - origin, end - origin
        # A meter is read seldom while nobody works; how often it can be read is said by its shortest intervals.
        seldom = float(np.percentile(end - begin, 10)) >= 0.5e9
        stride = 2 * STEP_MS if seldom else STEP_MS
        low, high = EARLIEST_MS, LATEST_SELDOM_MS if seldom else LATEST_MS
        # The same intervals for every delay: those that all of them see.
        inside = (begin - high * 1e6 >= edges[0]) & (end - low * 1e6 <= edges[-1])
        if int(inside.sum()) < _INTERVALS:
            return
        begin, end, measured = begin[inside], end[inside], measured[inside]
        # Power, and not joules: those of a long interval are more whatever is done in it. Each counts by its length, for a
        # reading's grain is much power in a short one.
        lengths = end - begin
        counts = lengths / lengths.sum()

        def left(delay_ms: float) -> float:
            until = np.asarray(np.interp(end - delay_ms * 1e6, edges, total), dtype=np.float64)
            since = np.asarray(np.interp(begin - delay_ms * 1e6, edges, total), dtype=np.float64)
            spread = (until - since) / lengths
            spread = spread - float(counts @ spread)
            held = float(counts @ (spread * spread))
            slope = float(counts @ (spread * y)) / held if held > 0.0 else 0.0
            rest = y - slope * spread
            return float(counts @ (rest * rest))

        y = measured / lengths
        y = y - float(counts @ y)
        grid = list(range(low, high + 1, stride))
        rests = [left(delay) for delay in grid]
        at = int(np.argmin(rests))
        if at in (0, len(grid) - 1) or rests[at] > (1.0 - _EXPLAINED) * float(counts @ (y * y)):
            return
        self.known = True
        if rests[at] > _BETTER * left(self.ns / 1e6):
            return
        before, here, after = rests[at - 1 : at + 2]
        bend = before - 2.0 * here + after
        self.ns = round(1e6 * (grid[at] + (stride * 0.5 * (before - after) / bend if bend > 0.0 else 0.0)))

    def _forget(self, before_ns: int | None = None) -> None:
        """Steps that ended before this time, or all."""
        import numpy as np

        if before_ns is None:
            del self._steps[:]
            self._engines.clear()
            return
        ends = np.frombuffer(self._steps)[1::_ROW] if self._steps else np.empty(0)
        old = int(np.searchsorted(np.maximum.accumulate(ends), float(before_ns - self._origin_ns)))
        del ends
        del self._steps[: old * _ROW]
