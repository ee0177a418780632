"""The counter of an H200, as measured: a read takes 3.3 ms of CPU time, and one that meets the update waits for its end."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Sequence

import pytest

from melodi_otel.devices import Device
from melodi_otel.sampler import Sampler
from melodi_otel.sources.base import CounterReading
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


class Dates:
    """A sink that keeps when each figure is said to have been true."""

    def __init__(self) -> None:
        self.dated: list[tuple[int, float]] = []

    def counter(self, device_id: str, t_ns: int, joules: float, range_j: float | None) -> None:
        self.dated.append((t_ns, joules))

    def gauge(self, device_id: str, t_ns: int, watts: float) -> None: ...

    def cpu(self, t_ns: int, device_ids: Sequence[str], busy_s: float, host_busy_s: float) -> None: ...

    def failed(self, device_ids: Sequence[str], t_ns: int, reason: str) -> None: ...

    def gone(self, device_id: str, t_ns: int) -> None: ...

    def round_done(self, t_ns: int, moved: bool) -> None: ...


class Run:
    """Three seconds of idleness, then work for ``seconds``."""

    def __init__(self, phase_ms: float, seconds: float, **more: float) -> None:
        self.clock = ManualClock()
        self.source = H200(self.clock, phase_ms, **more)
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


if __name__ == "__main__":
    for more in ({}, {"cost": 0.01}, {"cost": 0.3}, {"cost": 1.5}, {"period_ms": 103.0}, {"period_ms": 80.0}):
        runs = [Run(phase, 40.0, **more) for phase in range(0, 100, 5)]
        last = sorted(max(r.unlocked, default=0.0) for r in runs)
        errors = sorted(e for r in runs for e in r.dating_errors_ms(5.0))
        n = len(errors)
        print(more, "locked for good after", [round(x, 1) for x in last[::4]], round(last[-2], 1), round(last[-1], 1))
        print("   err p1 p5 p50 p95 p99", [round(errors[int(n * q)], 1) for q in (0.01, 0.05, 0.5, 0.95, 0.99)],
              "cpu %", round(100 * sum(r.cpu_part(5.0) for r in runs) / 20, 2), "most", max(r.most_reads_in_2_s() for r in runs))
