"""Time by hand: exact figures without a sleep."""

from __future__ import annotations

import threading


class ManualClock:
    """A clock that moves only when told; usable from several threads.

    Args:
        monotonic_s: first monotonic time in seconds.
        wall_s: first wall time in seconds since the epoch.
    """

    def __init__(self, monotonic_s: float = 1000.0, wall_s: float = 1_700_000_000.0) -> None:
        self._lock = threading.Lock()
        self._monotonic_ns = round(monotonic_s * 1e9)
        self._wall_ns = round(wall_s * 1e9)

    def monotonic_ns(self) -> int:
        """The hand's position in ns."""
        return self._monotonic_ns

    def wall_ns(self) -> int:
        """The wall's position in ns."""
        return self._wall_ns

    def wait(self, event: threading.Event, seconds: float | None) -> bool:
        """Move on by ``seconds`` unless ``event`` is set; never sleeps (None: returns at once)."""
        if not event.is_set() and seconds is not None:
            self.advance(seconds)
        return event.is_set()

    def advance(self, seconds: float) -> int:
        """Move both hands; returns the new monotonic ns."""
        with self._lock:
            self._monotonic_ns += round(seconds * 1e9)
            self._wall_ns += round(seconds * 1e9)
            return self._monotonic_ns

    def step_wall(self, seconds: float) -> None:
        """Move the wall clock alone, as an administrator would."""
        with self._lock:
            self._wall_ns += round(seconds * 1e9)
