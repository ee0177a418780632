"""Clocks: one time for measuring, one for telling others.

Everything that is measured or attributed carries integer nanoseconds of ``CLOCK_MONOTONIC``, which no administrator
steps. Spans and metrics want wall time; only ``telemetry`` converts, by the (monotonic, wall) pairs the sampler keeps.
A clock is always an argument, so a test hands in :class:`melodi_otel.testing.ManualClock`.
"""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """What the house needs to know about time."""

    def monotonic_ns(self) -> int:
        """Nanoseconds that never go back; only differences mean anything."""
        ...

    def wall_ns(self) -> int:
        """Nanoseconds since the Unix epoch, as the host believes them now."""
        ...

    def wait(self, event: threading.Event, seconds: float | None) -> bool:
        """Wait for ``event`` at most ``seconds`` (None: for ever); whether it was set."""
        ...


class SystemClock:
    """The host's clocks. The functions themselves, without a call around them: the step clock asks once per token."""

    monotonic_ns = staticmethod(time.monotonic_ns)
    wall_ns = staticmethod(time.time_ns)

    def wait(self, event: threading.Event, seconds: float | None) -> bool:
        """``event.wait(seconds)``."""
        return event.wait(seconds)
