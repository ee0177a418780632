"""A meter that follows a script: any power over time, any update period, any failure, at any moment of a clock."""

from __future__ import annotations

import math
import threading
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence

from melodi_otel.clock import Clock
from melodi_otel.devices import Device
from melodi_otel.sources.base import CounterReading, PowerReading
from melodi_otel.units import NS_PER_S


class PowerCurve:
    """Watts over time, constant between the given times, with an exact integral.

    Args:
        points: (seconds since the start, watts from then on), in order; the first counts from 0.
    """

    def __init__(self, *points: tuple[float, float]) -> None:
        self._times = [t for t, _ in points]
        self._watts = [w for _, w in points]
        self._sums = [0.0]
        for i in range(1, len(points)):
            self._sums.append(self._sums[-1] + self._watts[i - 1] * (self._times[i] - self._times[i - 1]))

    def watts(self, t_s: float) -> float:
        """Power at ``t_s``, W."""
        return self._watts[max(0, bisect_right(self._times, t_s) - 1)]

    def joules(self, t_s: float) -> float:
        """Energy from the first point to ``t_s``, J."""
        i = max(0, bisect_right(self._times, t_s) - 1)
        return self._sums[i] + self._watts[i] * (t_s - self._times[i])


class _Script:
    """What scripted counters and gauges have in common."""

    def __init__(
        self,
        clock: Clock,
        curves: dict[Device, PowerCurve | float],
        *,
        name: str = "scripted",
        period_s: float | None = None,
        offset_s: float = 0.0,
        range_j: float | None = None,
        start_j: float = 0.0,
        read_s: float = 0.0,
    ) -> None:
        self.name = name
        self.reads_ns: list[int] = []
        self.closed = False
        self._clock = clock
        self._curves = {d: c if isinstance(c, PowerCurve) else PowerCurve((0.0, c)) for d, c in curves.items()}
        self._period_s = period_s
        self._offset_s = offset_s
        self._range_j = range_j
        self._start_j = {device.id: start_j for device in curves}
        self._start_ns = clock.monotonic_ns()
        self._read_s = read_s
        self._failures: deque[Exception | None] = deque()

    @property
    def devices(self) -> Sequence[Device]:
        return tuple(self._curves)

    def fail(self, *errors: Exception | None) -> None:
        """Let the next reads raise these, one each; None lets one succeed in between."""
        self._failures.extend(errors)

    def reset(self, device_id: str) -> None:
        """Let a counter begin at 0 again, as after a driver reload."""
        device = next(d for d in self._curves if d.id == device_id)
        self._start_j[device_id] = -self._curves[device].joules(self._stepped_s())

    def lose(self, device_id: str) -> None:
        """Let a device vanish from :attr:`devices` and from the readings."""
        self._curves = {device: curve for device, curve in self._curves.items() if device.id != device_id}

    def joules(self, device: Device) -> float:
        """What the counter of ``device`` shows now, J."""
        total = self._start_j[device.id] + self._curves[device].joules(self._stepped_s())
        return total if self._range_j is None else total % self._range_j

    def close(self) -> None:
        """Remember that it was closed."""
        self.closed = True

    def _begin_read(self) -> None:
        self.reads_ns.append(self._clock.monotonic_ns())
        if self._read_s:
            self._clock.wait(threading.Event(), self._read_s)
        error = self._failures.popleft() if self._failures else None
        if error is not None:
            raise error

    def _stepped_s(self) -> float:
        t_s = (self._clock.monotonic_ns() - self._start_ns) / NS_PER_S
        if self._period_s is None:
            return t_s
        steps = math.floor((t_s - self._offset_s) / self._period_s + 1e-9)
        return max(0.0, self._offset_s + steps * self._period_s)


class ScriptedSource(_Script):
    """A :class:`~melodi_otel.sources.base.CounterSource` by script; arguments as below, all about its devices' counters.

    Args:
        clock: its time; the curves begin when the source is made.
        curves: power by device; a number is constant power.
        name: of the source.
        period_s: the counters move only so often; None: continuously.
        offset_s: when they first move, from the start.
        range_j: where the counters wrap; None: never.
        start_j: what the counters show at the start.
        read_s: how long a read takes: a manual clock is moved on by it.
    """

    def counters(self) -> Sequence[CounterReading]:
        """A reading per device, or the next scripted failure."""
        self._begin_read()
        t_ns = self._clock.monotonic_ns()
        return [CounterReading(device.id, t_ns, self.joules(device), self._range_j) for device in self._curves]


class ScriptedGauge(_Script):
    """A :class:`~melodi_otel.sources.base.PowerSource` by script; arguments as :class:`ScriptedSource`."""

    def power(self) -> Sequence[PowerReading]:
        """Watts per device, or the next scripted failure."""
        self._begin_read()
        t_ns = self._clock.monotonic_ns()
        return [PowerReading(device.id, t_ns, curve.watts(self._stepped_s())) for device, curve in self._curves.items()]
