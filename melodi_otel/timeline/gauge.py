"""Power readings made into joules.

A gauge that averages over a window W shows at t the mean power of [t - W, t]; that mean belongs to the middle of the window.
So readings are shifted back by W/2 and joined by straight lines: exact for constant power and for the sum over a whole
burst, smeared at its edges by at most the window (isolated bursts shorter than W keep only a part of their energy at their
own place: see ``docs/accuracy.md``). A counter, where there is one, always wins.
"""

from __future__ import annotations


class Gauge:
    """The last reading of one gauge; ``window_ns`` is its averaging window in ns."""

    __slots__ = ("_first", "_window_ns", "centre_ns", "read_ns", "watts")

    def __init__(self, window_ns: int) -> None:
        self._window_ns = window_ns
        self._first = True
        self.watts = 0.0
        self.read_ns = 0
        self.centre_ns = 0

    def read(self, t_ns: int, watts: float) -> tuple[int, float] | None:
        """(end of the new interval in ns, its joules), or None for the first reading and for one that is not newer."""
        if self._first:
            self._first = False
            self.watts, self.read_ns, self.centre_ns = watts, t_ns, t_ns - self._window_ns // 2
            return None
        if t_ns <= self.read_ns:
            return None
        centre_ns = t_ns - self._window_ns // 2
        joules = (self.watts + watts) / 2 * (centre_ns - self.centre_ns) / 1e9
        self.watts, self.read_ns, self.centre_ns = watts, t_ns, centre_ns
        return centre_ns, joules

    def rest(self) -> tuple[int, float] | None:
        """After the last reading: its power up to the time it was read, as (end in ns, joules); None if nothing is left."""
        if self.read_ns <= self.centre_ns:
            return None
        end_ns, joules = self.read_ns, self.watts * (self.read_ns - self.centre_ns) / 1e9
        self.centre_ns = self.read_ns
        return end_ns, joules
