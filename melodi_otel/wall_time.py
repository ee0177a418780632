"""Between monotonic time and wall time: pairs of both, taken while time passes.

Records carry monotonic time; spans and metrics tell wall time. One offset would be wrong as soon as somebody sets the
clock, so the pair that was current at that moment is used: what happened before the step keeps the time it had.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from typing import Final, NamedTuple

from melodi_otel.clock import Clock

_EVERY_NS: Final = 1_000_000_000
_SLEW: Final = 1e-3
"""A clock that is corrected smoothly runs at most this much off; a larger difference between two pairs is a step."""


class Pair(NamedTuple):
    """One moment on both clocks, ns."""

    monotonic_ns: int
    wall_ns: int

    @property
    def offset_ns(self) -> int:
        return self.wall_ns - self.monotonic_ns


class WallTime:
    """The last (monotonic, wall) pairs.

    Written by one thread, read by any: the tuple of pairs is replaced, never changed.

    Args:
        clock: both clocks.
        keep: how many pairs.
    """

    def __init__(self, clock: Clock, keep: int = 600) -> None:
        self._clock = clock
        self._ring: deque[Pair] = deque(maxlen=keep)
        self._pairs: tuple[Pair, ...] = ()
        self.note()

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """Oldest first."""
        return self._pairs

    def note(self) -> None:
        """Take a pair, at most once a second."""
        best: tuple[int, Pair] | None = None
        for _ in range(3):
            # Whoever is interrupted between the two reads gets a wrong pair: the tightest of three is taken.
            before = self._clock.monotonic_ns()
            if self._ring and before - self._ring[-1].monotonic_ns < _EVERY_NS:
                return
            wall = self._clock.wall_ns()
            gap = self._clock.monotonic_ns() - before
            if best is None or gap < best[0]:
                best = gap, Pair(before + gap // 2, wall)
            if gap < 50_000:
                break
        if best is not None:
            self._ring.append(best[1])
            self._pairs = tuple(self._ring)

    def wall_ns(self, monotonic_ns: int) -> int:
        """Wall time of a monotonic one, as the host believed it then."""
        pairs = self._pairs
        i = bisect_right(pairs, monotonic_ns, key=lambda pair: pair.monotonic_ns) - 1
        pair = pairs[max(i, 0)]
        if 0 <= i < len(pairs) - 1:
            following = pairs[i + 1]
            span = following.monotonic_ns - pair.monotonic_ns
            moved = following.offset_ns - pair.offset_ns
            if abs(moved) <= _SLEW * span:
                return monotonic_ns + pair.offset_ns + moved * (monotonic_ns - pair.monotonic_ns) // span
        return monotonic_ns + pair.offset_ns

    def monotonic_ns(self, wall_ns: int) -> int:
        """Monotonic time of a wall one; where the wall clock showed it twice, the later occasion."""
        pairs = self._pairs
        for i in range(len(pairs) - 1, -1, -1):
            if wall_ns >= pairs[i].wall_ns:
                t_ns = wall_ns - pairs[i].offset_ns
                # In a gap that a forward step left, no such moment existed: the next pair's is the nearest.
                return t_ns if i == len(pairs) - 1 else min(t_ns, pairs[i + 1].monotonic_ns)
        return wall_ns - pairs[0].offset_ns
