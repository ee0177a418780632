"""The delay of a meter behind the work: found by moving the work against the measured power.

A counter shows what was used some tens of milliseconds ago (sensor, board, a reading that comes late, work that the engine told
before the device began it), so work would be charged to the interval before. For every delay of a grid, costs are fitted to the
last minute anew, since costs that were learnt at a wrong delay speak for that delay: it is where they explain most, and then the
lowest point of a parabola through the best three.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from melodi_otel.attribution.fit import WIDTH, nnls
from melodi_otel.attribution.meter import EngineId
from melodi_otel.attribution.weights import Features

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

STEP_MS: Final = 10
EARLIEST_MS: Final = -60
LATEST_MS: Final = 300
LATEST_SELDOM_MS: Final = 1000
"""The same where it is read every half second at most."""
KEPT_S: Final = 60.0
_ROW: Final = 3 + WIDTH
"""Numbers of a step: begin, end, its engine's, features."""
_INTERVALS: Final = 40
"""Intervals that are needed at least."""
_EXPLAINED: Final = 0.5
"""Of the variance of measured joules, so much has to be predicted at the best delay; else nothing is known of it."""
_BETTER: Final = 0.97
"""The best delay has to leave no more than this part of what the present one leaves unexplained."""
_FAR_NS: Final = 5_000_000
"""Costs that were learnt so far from the delay are learnt again."""
_RIDGE: Final = 1e-6


@dataclass(frozen=True, slots=True)
class Row:
    """What was done in an interval, as placed by a new delay: ``work`` of each engine, J above idle, s, part of it at work."""

    work: dict[EngineId, list[float]]
    joules: float
    seconds: float
    busy: float


class _Work:
    """Steps as quantities over time, summed up from the first one on; steps of several lanes may overlap."""

    def __init__(self, t0: Array, t1: Array, quantities: Array) -> None:
        import numpy as np

        rates = quantities / np.maximum(t1 - t0, 1.0)[:, None]
        edges = np.concatenate([t0, t1])
        order = np.argsort(edges, kind="stable")
        self.edges = edges[order]
        self._rates = np.cumsum(np.concatenate([rates, -rates])[order], axis=0)
        parts = self._rates[:-1] * np.diff(self.edges)[:, None]
        self._sums = np.concatenate([np.zeros((1, parts.shape[1])), np.cumsum(parts, axis=0)])

    def between(self, begin: Array, end: Array) -> Array:
        """One row per interval, one column per quantity."""
        return self._until(end) - self._until(begin)

    def _until(self, t: Array) -> Array:
        import numpy as np

        at = np.clip(np.searchsorted(self.edges, t, side="right") - 1, 0, len(self.edges) - 1)
        return self._sums[at] + self._rates[at] * (t - self.edges[at])[:, None]


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
        """A step, or several that are alike."""
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

    def look(self) -> list[Row] | None:
        """Find the delay anew, from what was seen in the last minute.

        Returns:
            What was done in each interval of that minute, where the delay is now another: costs are to be learnt from it.
        """
        import numpy as np

        # Where nothing was found there is perhaps nothing to be found: an even load shows no delay.
        self._pause_s = 60.0 if self.known and self._seen_s > 60.0 else min(60.0, 1.5 * self._pause_s)
        self._next_s = self._seen_s + self._pause_s
        self._forget(self._intervals[0][0] if self._intervals else None)
        if len(self._intervals) < _INTERVALS or len(self._steps) < _INTERVALS * _ROW:
            return None
        steps = np.frombuffer(self._steps).reshape(-1, _ROW).copy()
        origin = float(steps[:, 0].min())
        t0, t1 = steps[:, 0] - origin, steps[:, 1] - origin
        # A column per engine and quantity, and one for being at work.
        width = WIDTH * len(self._engines)
        quantities = np.zeros((len(steps), width + 1))
        for number in range(len(self._engines)):
            mine = steps[:, 2] == number
            quantities[mine, WIDTH * number : WIDTH * (number + 1)] = steps[mine, 3:]
        quantities[:, width] = t1 - t0
        work = _Work(t0, t1, quantities)
        origin += self._origin_ns
        begin, end, measured = (np.array(column) for column in zip(*self._intervals, strict=True))
        begin, end = begin - origin, end - origin
        # A meter is read seldom while nobody works; how often it can be read is said by its shortest intervals.
        seldom = float(np.percentile(end - begin, 10)) >= 0.5e9
        stride = 2 * STEP_MS if seldom else STEP_MS
        low, high = EARLIEST_MS, LATEST_SELDOM_MS if seldom else LATEST_MS
        # The same intervals for every delay: those that all of them see.
        inside = (begin - high * 1e6 >= work.edges[0]) & (end - low * 1e6 <= work.edges[-1])
        if int(inside.sum()) < _INTERVALS:
            return None
        rest = _Rest(
            work, begin[inside], end[inside], measured[inside], np.flatnonzero(quantities[:, :width].any(axis=0))
        )
        grid = list(range(low, high + 1, stride))
        rests = [rest.left(delay) for delay in grid]
        at = int(np.argmin(rests))
        if at in (0, len(grid) - 1) or rests[at] > (1.0 - _EXPLAINED) * rest.all:
            return None
        self.known = True
        if rests[at] > _BETTER * rest.left(self.ns / 1e6):
            return None
        before, here, after = rests[at - 1 : at + 2]
        bend = before - 2.0 * here + after
        old_ns = self.ns
        self.ns = round(1e6 * (grid[at] + (stride * 0.5 * (before - after) / bend if bend > 0.0 else 0.0)))
        if abs(self.ns - old_ns) <= _FAR_NS:
            return None
        done = work.between(begin - self.ns, end - self.ns)
        seconds = (end - begin) / 1e9
        seen = np.maximum(0.0, np.minimum(end - self.ns, work.edges[-1]) - np.maximum(begin - self.ns, work.edges[0]))
        return [
            Row(
                {
                    engine: list(map(float, row[WIDTH * number : WIDTH * (number + 1)]))
                    for number, engine in enumerate(self._engines)
                    if row[WIDTH * number : WIDTH * (number + 1)].any()
                },
                float(joules),
                float(length),
                min(1.0, float(row[width]) / 1e9 / float(length)),
            )
            for row, joules, length, part in zip(done, measured, seconds, seen, strict=True)
            if part >= 1e9 * length
        ]

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


class _Rest:
    """What costs leave unexplained of intervals' power, at a delay.

    Power, and not joules: those of a long interval are more whatever is done in it. Each counts by its length, for a reading's
    grain is much power in a short one. Means are taken off: they are idle power that is not known well.
    """

    def __init__(self, work: _Work, begin: Array, end: Array, joules: Array, columns: NDArray[np.intp]) -> None:
        self._work, self._begin, self._end, self._columns = work, begin, end, columns
        self._lengths = end - begin
        self._counts = self._lengths / self._lengths.sum()
        power = joules / self._lengths
        self._power = power - float(self._counts @ power)
        self.all = float(self._counts @ (self._power * self._power))
        self._last: Array | None = None

    def left(self, delay_ms: float) -> float:
        """Mean square of it; ``all`` where nothing was explained."""
        import numpy as np

        by = delay_ms * 1e6
        done = self._work.between(self._begin - by, self._end - by)[:, self._columns] / self._lengths[:, None]
        done = done - self._counts @ done
        scale = np.sqrt(np.maximum(self._counts @ (done * done), 1e-300))
        done = done / scale
        gram = (done * self._counts[:, None]).T @ done
        moment = (done * self._counts[:, None]).T @ self._power
        self._last = nnls(gram + _RIDGE * np.eye(len(moment)), moment, self._last)
        rest = self._power - done @ self._last
        return float(self._counts @ (rest * rest))
