"""Evidence about other work on a device: CPU time of processes, and shares of foreign processes on a GPU."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from typing import Final

from melodi_otel.attribution.meter import EngineId

WHOLE: Final = -1
"""Number of the series of all processes of a key group: ``EngineId(group, WHOLE)``."""


class Cumulative:
    """A pair of counters over time (CPU seconds of a process tree, CPU seconds of the host), joined by straight lines."""

    __slots__ = ("_busy", "_host", "_t", "ended")

    def __init__(self) -> None:
        self.ended = False
        self._t: list[int] = []
        self._busy: list[float] = []
        self._host: list[float] = []

    @property
    def last_ns(self) -> int:
        """When it was last read."""
        return self._t[-1]

    def read(self, t_ns: int, busy_s: float, host_busy_s: float) -> None:
        """Take a reading; one that is not newer is left out."""
        if self._t and t_ns <= self._t[-1]:
            return
        self._t.append(t_ns)
        self._busy.append(busy_s)
        self._host.append(host_busy_s)
        if len(self._t) > 4096:
            del self._t[:2048], self._busy[:2048], self._host[:2048]

    def delta(self, t0_ns: int, t1_ns: int) -> tuple[float, float] | None:
        """(busy, host busy) CPU seconds within [t0, t1]; None where the readings do not reach.

        Readings and sensor updates are not taken at the same instant, so a window that ends a little after the last
        reading is cut to it.
        """
        if len(self._t) < 2:
            return None
        a, b = max(t0_ns, self._t[0]), min(t1_ns, self._t[-1])
        if b <= a:
            return None
        busy = self._at(self._busy, b) - self._at(self._busy, a)
        host = self._at(self._host, b) - self._at(self._host, a)
        if self.ended and b < t1_ns:
            # It used nothing more, and the host went on, at the same pace as far as this series can tell.
            host *= (t1_ns - a) / (b - a)
        return busy, host

    def _at(self, values: list[float], t_ns: int) -> float:
        at = bisect_right(self._t, t_ns)
        if at >= len(self._t):
            return values[-1]
        t0, t1 = self._t[at - 1], self._t[at]
        return values[at - 1] + (values[at] - values[at - 1]) * (t_ns - t0) / (t1 - t0)


class CpuTime:
    """CPU-time evidence of one device: a series per engine or per group of processes (:data:`WHOLE`, in which engines with
    a series of their own are contained), None for the process that holds all the others.
    """

    def __init__(self) -> None:
        self.series: dict[EngineId | None, Cumulative] = {}
        self.told = False

    def read(self, engine: EngineId | None, t_ns: int, busy_s: float, host_busy_s: float) -> None:
        """Take a reading of one series; one that had ended begins anew, with other processes."""
        self.told = True
        one = self.series.get(engine)
        if one is None or one.ended:
            one = self.series[engine] = Cumulative()
        one.read(t_ns, busy_s, host_busy_s)

    @property
    def last_ns(self) -> int | None:
        """Until when all series reach that go on; None: there is none."""
        return min((one.last_ns for one in self.series.values() if not one.ended), default=None)

    def end(self, engine: EngineId | None) -> None:
        """The processes of this series are gone: it counts up to its last reading, and nobody waits for another."""
        if engine in self.series:
            self.series[engine].ended = True

    def forget_before(self, t_ns: int) -> None:
        """Series that ended before are over."""
        over = [engine for engine, one in self.series.items() if one.ended and one.last_ns <= t_ns]
        for engine in over:
            del self.series[engine]

    def shares(self, t0_ns: int, t1_ns: int) -> dict[EngineId | None, float] | None:
        """Each tree's part of the host's CPU time in [t0, t1], together at most 1; None: nothing is known."""
        deltas = {engine: one.delta(t0_ns, t1_ns) for engine, one in self.series.items()}
        # One that ended has seen the host up to its end only; the others have seen it to the end of the interval.
        hosts = [delta[1] for engine, delta in deltas.items() if delta is not None and not self.series[engine].ended]
        found: dict[EngineId | None, float] = {}
        for engine, delta in deltas.items():
            if delta is None:
                continue
            host = max(hosts) if hosts and self.series[engine].ended else delta[1]
            if host > 0.0:
                found[engine] = max(0.0, min(1.0, delta[0] / host))
        if not found:
            return None
        for engine, share in list(found.items()):
            if engine is not None and engine.number == WHOLE:
                own = sum(s for e, s in found.items() if e is not None and e.group == engine.group and e != engine)
                found[engine] = max(0.0, share - own)
        total = sum(found.values())
        return {engine: share / total for engine, share in found.items()} if total > 1.0 else found

    def busy_cores(self, t0_ns: int, t1_ns: int) -> float | None:
        """Mean number of busy cores of the host in [t0, t1]."""
        for one in self.series.values():
            delta = one.delta(t0_ns, t1_ns)
            if delta is not None:
                return delta[1] / ((t1_ns - t0_ns) / 1e9)
        return None


class Foreign:
    """Part of a device's dynamic energy that other processes use: holds from when it is told until it is told anew."""

    def __init__(self) -> None:
        self._told: list[tuple[int, float, bool | None]] = []

    def tell(self, t_ns: int, share: float, others: bool | None = False) -> None:
        """``share`` (0..1) from ``t_ns`` on; ``others``: whether others compute there at all (None: not known)."""
        self._told.append((t_ns, max(0.0, min(1.0, share)), others))
        if len(self._told) > 256:
            del self._told[:128]

    def __bool__(self) -> bool:
        return bool(self._told)

    def share(self, t0_ns: int, t1_ns: int) -> float:
        """Time-mean share in [t0, t1]; 0 before anything was told."""
        held = 0.0
        for (t, share, _), stop in zip(self._told, self._ends(t1_ns), strict=True):
            held += share * max(0, min(stop, t1_ns) - max(t, t0_ns))
        return held / (t1_ns - t0_ns)

    def exclusive(self, t0_ns: int, t1_ns: int) -> bool | None:
        """Whether nobody else computed in [t0, t1]; None: not known. What is told first holds for what was before, too."""
        ends = self._ends(max(t1_ns, self._told[-1][0])) if self._told else ()
        said = [
            others
            for at, ((t, _, others), stop) in enumerate(zip(self._told, ends, strict=True))
            if (t <= t1_ns) and (stop > t0_ns or at == len(self._told) - 1)
        ]
        if True in said:
            return False
        return None if not said or None in said else True

    def _ends(self, t1_ns: int) -> Iterable[int]:
        return [t for t, _, _ in self._told[1:]] + [t1_ns]
