"""A machine by hand: sources, sampler and ledger as the runtime joins them, on a manual clock and without a thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Key, Share
from melodi_otel.attribution.summary import Energy, summarize
from melodi_otel.readings import Readings
from melodi_otel.sampler import Sampler
from melodi_otel.sources.base import Discovery, Settings
from melodi_otel.sources.discovery import discover
from melodi_otel.testing.clock import ManualClock


class Machine:
    """Joules over manual time.

    Args:
        tick: moves the fake hardware by so many seconds.
        sysfs: the root of a fake powercap tree.
        nvml_library: a fake NVML library.
        environ: e.g. ``CUDA_VISIBLE_DEVICES``.
        tap: sees every message to the ledger, e.g. a recorder's.
    """

    def __init__(
        self,
        tick: Callable[[float], None],
        *,
        sysfs: str = "/nonexistent",
        nvml_library: str | None = None,
        environ: Mapping[str, str] | None = None,
        tap: Callable[[str, tuple[Any, ...]], None] | None = None,
    ) -> None:
        self._tap = tap
        self.clock = ManualClock()
        self._tick = tick
        self._settings = Settings(self.clock, environ or {}, sysfs=sysfs, nvml_library=nvml_library)
        self._count = 0

    def start(self, *wanted: str) -> None:
        """Discover, and take the first reading."""
        self.discovery: Discovery = discover(self._settings, wanted)
        self.devices = {device.id: device for device in self.discovery.devices}
        self.ledger = Ledger(
            patience_s=None, tap=self._tap, watch=lambda count, t_ns: self.sampler.activity(count, t_ns)
        )
        for device in self.discovery.devices:
            self.ledger.device(device)
        readings = Readings(self.ledger, self.devices, lambda: None, self.clock)
        self.sampler = Sampler(self.discovery.sources, readings, self.clock)
        self.run(0.0)

    def run(self, seconds: float) -> None:
        """Let time pass; the sampler reads when it would, and every reading is followed by a settling."""
        end_ns = self.clock.monotonic_ns() + round(seconds * 1e9)
        while True:
            wait_s = max(0.001, self.sampler.tick())
            now_ns = self.clock.monotonic_ns()
            self.devices.update(
                {device.id: device for device in self.discovery.devices}
            )  # a method may be found out late
            self.ledger.settle(now_ns)
            if now_ns >= end_ns:
                return
            step_s = min(wait_s, (end_ns - now_ns) / 1e9)
            self.clock.advance(step_s)
            self._tick(step_s)

    def open(self) -> Key:
        """A request begins now."""
        self._count += 1
        key = Key("g", f"r{self._count}")
        self.ledger.open(key, self.clock.monotonic_ns())
        return key

    def close(self, key: Key) -> Future[list[Share]]:
        """It ends now."""
        return self.ledger.close(key, self.clock.monotonic_ns(), None, "stop")

    def energy(self, future: Future[list[Share]]) -> Energy:
        """Its energy after the meters have been read to the end; the books of every device balance."""
        self.ledger.flush(self.clock.monotonic_ns())
        for books in self.ledger.snapshot().books.values():
            assert abs(books.imbalance()) <= 1e-9
        return summarize(future.result(0), self.devices)

    def request(self, seconds: float) -> Energy:
        """One request of that length, alone."""
        key = self.open()
        self.run(seconds)
        future = self.close(key)
        self.run(0.3)
        return self.energy(future)
