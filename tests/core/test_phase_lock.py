"""The counter of an H200, as measured: a read takes 3.3 ms of CPU time, and one that meets the update waits for its end."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence

import pytest

from melodi_otel.devices import Device
from melodi_otel.sampler import Sampler
from melodi_otel.sources.base import CounterReading, PowerReading
from melodi_otel.testing.clock import ManualClock

GPU = Device("GPU-1", "gpu")
S, MS = 1_000_000_000, 1_000_000
WATTS = 130.0

COSTS = ((0.0, 3.3), (1.0, 4.0), (2.0, 15.0), (4.0, 13.3), (6.0, 11.3), (8.0, 9.5), (10.0, 7.5), (12.0, 5.8), (17.0, 3.4))
"""(ms between the step and the beginning of a read, ms that the read takes); before the next step as at first."""


def cost_ms(behind_ms: float) -> float:
    """What a read costs that begins so long after the step."""
    for (at, cost), (after, following) in zip(COSTS, COSTS[1:], strict=False):
        if at <= behind_ms < after:
            return cost + (following - cost) * (behind_ms - at) / (after - at)
    return COSTS[-1][1]


class H200:
    """A counter that steps every ``period_ms``, first ``phase_ms`` after the start, a little irregularly."""

    name = "h200"
    devices = (GPU,)

    def __init__(self, clock: ManualClock, phase_ms: float, period_ms: float = 99.99, cost: float = 1.0) -> None:
        self.clock = clock
        self.cost = cost
        self.random = random.Random(round(phase_ms * 1000))
        self.start_ns = clock.monotonic_ns()
        uneven = self.random
        self.steps = [
            self.start_ns + round((phase_ms + period_ms * k + uneven.uniform(-0.5, 0.5)) * MS) for k in range(2000)
        ]
        self.reads: list[tuple[int, int]] = []

    def counters(self) -> Sequence[CounterReading]:
        began = self.clock.monotonic_ns()
        last = bisect_left(self.steps, began) - 1
        behind = (began - self.steps[last]) / MS if last >= 0 else 99.0
        took = (cost_ms(behind) + self.random.uniform(0.0, 0.6)) * self.cost
        self.clock.advance(took / 1e3)
        # The figure is taken somewhere within the read; one that waited shows what it waited for.
        taken = began + round(self.random.random() * took * MS)
        self.reads.append((began, self.clock.monotonic_ns()))
        return [CounterReading(GPU.id, self.clock.monotonic_ns(), WATTS * 0.1 * bisect_left(self.steps, taken))]

    def close(self) -> None:
        pass


class Remembering(H200):
    """With the driver's power history: every 20 ms, the newest 15 ms old."""

    def history(self, device_id: str, since_ns: int) -> Sequence[PowerReading]:
        now = self.clock.monotonic_ns()
        self.clock.advance(0.0005)
        grid = 20 * MS
        newest = (now - 15 * MS) // grid
        return [
            PowerReading(device_id, k * grid, WATTS) for k in range(newest - 118, newest + 1) if k * grid > since_ns
        ]


class Dates:
    """A sink that keeps when each figure is said to have been true."""

    def __init__(self) -> None:
        self.dated: list[tuple[int, float]] = []
        self.between: list[tuple[int, float]] = []

    def counter(self, device_id: str, t_ns: int, joules: float, range_j: float | None) -> None:
        self.dated.append((t_ns, joules))

    def shaped(self, device_id: str, t_ns: int, joules: float, range_j: float | None) -> None:
        self.between.append((t_ns, joules))

    def gauge(self, device_id: str, t_ns: int, watts: float) -> None: ...

    def cpu(self, t_ns: int, device_ids: Sequence[str], busy_s: float, host_busy_s: float) -> None: ...

    def failed(self, device_ids: Sequence[str], t_ns: int, reason: str) -> None: ...

    def gone(self, device_id: str, t_ns: int) -> None: ...

    def round_done(self, t_ns: int, moved: bool) -> None: ...


class Run:
    """Three seconds of idleness, then work for ``seconds``."""

    def __init__(self, phase_ms: float, seconds: float, kind: type[H200] = H200, **more: float) -> None:
        self.clock = ManualClock()
        self.source = kind(self.clock, phase_ms, **more)
        self.sink = Dates()
        self.sampler = Sampler([self.source], self.sink, self.clock, thread_time_ns=self.clock.monotonic_ns)
        late = random.Random(round(phase_ms))
        self.unlocked: list[float] = []
        work = self.clock.monotonic_ns() + 3 * S
        at_work = False
        while (now := self.clock.monotonic_ns()) < work + seconds * S:
            if now >= work and not at_work:
                at_work = True
                self.sampler.activity(1, now)
            wait = self.sampler.tick()
            if at_work and not self.sampler.periods:
                self.unlocked.append((self.clock.monotonic_ns() - work) / S)
            self.clock.advance(max(wait, 0.0005) + late.random() * 0.0005)
        self.work_ns = work

    def dating_errors_ms(self, after_s: float) -> list[float]:
        """Said minus true time of each figure, risen, from ``after_s`` seconds of work on."""
        true = self.source.steps
        errors = [
            (t_ns - true[round(joules / (WATTS * 0.1)) - 1]) / MS
            for t_ns, joules in self.sink.dated
            if t_ns > self.work_ns + after_s * S
        ]
        return sorted(errors)

    def most_reads_in_2_s(self) -> int:
        begun = [began for began, _ in self.source.reads]
        return max(bisect_left(begun, t + 2 * S) - i for i, t in enumerate(begun))

    def cpu_part(self, after_s: float) -> float:
        """Part of a core that the reads took."""
        since = self.work_ns + after_s * S
        took = sum(b - a for a, b in self.source.reads if a > since)
        return took / (self.clock.monotonic_ns() - since)
