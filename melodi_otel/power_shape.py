"""Where between two readings of a dear counter its joules lie.

A counter that costs 3 ms a read is read every third step only. What happened in between is told by the power that the driver
remembers (a value every 20 ms)::

    counter   Ja ·····································→ Jb     read twice, 300 ms apart: dJ = Jb - Ja is the counter's
    history   w w w w w w w w w w w w w w w w w w              energy by its watts: h(t), in all H
    told      Ja          a          b            Jb           Ja + dJ * h(t) / H every 100 ms

So the sums stay the counter's to the last joule, and only their place within the 300 ms is the history's. Where the history has
gaps, or where it and the counter disagree about the sum, nothing is told in between.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from itertools import pairwise
from typing import Final

from melodi_otel.sources.base import PowerReading
from melodi_otel.units import NS_PER_MS

EVERY_NS: Final = 100 * NS_PER_MS
"""Distance of the points: what the counter itself would show."""
REACH_NS: Final = 2_300 * NS_PER_MS
"""How far back drivers remember (H200: 119 values, 20 ms apart)."""
_GAP_NS: Final = 70 * NS_PER_MS
_AGREE: Final = (0.5, 2.0)
"""Counter's joules over the history's: beyond this they are not about the same thing. An undated reading may be a step off."""
_MOST: Final = 400


class PowerShape:
    """The last reading of one device's counter and its power since then."""

    def __init__(self) -> None:
        self._times: list[int] = []
        self._watts: list[float] = []
        self._anchor: tuple[int, float] | None = None

    @property
    def since_ns(self) -> int:
        """From when on power is not known yet, monotonic ns; 0: nothing is known."""
        return self._times[-1] if self._times else 0

    def reaches(self, now_ns: int) -> bool:
        """Whether a driver still remembers the power at the last reading."""
        return self._anchor is not None and now_ns - self._anchor[0] <= REACH_NS

    def add(self, history: Iterable[PowerReading]) -> None:
        """More of the power history, in order; what is older than the newest value known is left out."""
        for reading in history:
            if reading.t_ns > self.since_ns:
                self._times.append(reading.t_ns)
                self._watts.append(reading.watts)
        if len(self._times) > _MOST:
            del self._times[:-_MOST], self._watts[:-_MOST]

    def between(self, t_ns: int, joules: float) -> list[tuple[int, float]]:
        """A reading of the counter: points (monotonic ns, cumulative J) between the last one and this one, in order."""
        before, after = self._anchor, (t_ns, joules)
        if before is not None and (t_ns <= before[0] or joules == before[1]):
            return []  # not updated yet: the next change covers this time too
        self._anchor = after
        points = [] if before is None or joules < before[1] else self._points(before, after)
        keep = max(0, bisect_right(self._times, t_ns) - 1)
        del self._times[:keep], self._watts[:keep]
        return points

    def _points(self, before: tuple[int, float], after: tuple[int, float]) -> list[tuple[int, float]]:
        (t0, joules0), (t1, joules1) = before, after
        count = round((t1 - t0) / EVERY_NS)
        first = bisect_right(self._times, t0) - 1
        if count < 2 or first < 0:
            return []
        times, watts = self._times[first:], self._watts[first:]
        if t1 - times[-1] > _GAP_NS or any(b - a > _GAP_NS for a, b in pairwise(times)):
            return []
        times.append(max(t1, times[-1]) + 1)
        watts.append(watts[-1])
        sums = [0.0]
        for i in range(1, len(times)):
            sums.append(sums[-1] + (watts[i - 1] + watts[i]) / 2 * (times[i] - times[i - 1]) / 1e9)

        def until(t_ns: int) -> float:
            i = bisect_right(times, t_ns) - 1
            part_ns = t_ns - times[i]
            slope = (watts[i + 1] - watts[i]) / (times[i + 1] - times[i])
            return sums[i] + (watts[i] + slope * part_ns / 2) * part_ns / 1e9

        start, whole = until(t0), until(t1) - until(t0)
        if whole <= 0.0 or not _AGREE[0] <= (joules1 - joules0) / whole <= _AGREE[1]:
            return []
        cuts = (t0 + (t1 - t0) * k // count for k in range(1, count))
        return [(cut, joules0 + (joules1 - joules0) * ((until(cut) - start) / whole)) for cut in cuts]
