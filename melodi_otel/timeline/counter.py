"""Counter repair: what a cumulative reading says about the interval since the one before.

First, advanced, wrapped and reset are different events with different repairs, so they are different answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

PLAUSIBLE_WATTS: Final = 5000.0
"""No single device draws more for a whole reading interval; a larger jump after a fall is a reset, not a wrap."""

Event = Literal["first", "advanced", "wrapped", "reset"]


@dataclass(frozen=True, slots=True)
class Change:
    """What happened between two readings.

    Attributes:
        event: ``first`` (a baseline, never energy), ``advanced``, ``wrapped`` or ``reset``.
        joules: energy of the interval in J; None where it is not known (``first``, ``reset``).
    """

    event: Event
    joules: float | None


class Counter:
    """The last good reading of one counter."""

    __slots__ = ("_joules", "_t_ns")

    def __init__(self) -> None:
        self._joules: float | None = None
        self._t_ns = 0

    def read(self, t_ns: int, joules: float, range_j: float | None = None) -> Change:
        """Take the reading ``joules`` at ``t_ns``; ``range_j`` is where the counter wraps to 0 (None: never)."""
        before, since_s = self._joules, (t_ns - self._t_ns) / 1e9
        self._joules, self._t_ns = joules, t_ns
        if before is None:
            return Change("first", None)
        if joules >= before:
            return Change("advanced", joules - before)
        if range_j is not None:
            wrapped = joules - before + range_j
            # One correction is only sound while a full turn is impossible within the interval, and a counter that
            # restarts far from its top (suspend, driver reload) would look like an absurd amount of energy.
            if 0.0 <= wrapped <= PLAUSIBLE_WATTS * since_s and since_s * PLAUSIBLE_WATTS < 2 * range_j:
                return Change("wrapped", wrapped)
        return Change("reset", None)
