"""Counter repair: what a cumulative reading says about the interval since the one before.

First, advanced, wrapped and reset are different events with different repairs, so they are different answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

PLAUSIBLE_WATTS: Final = 5000.0
"""No single device draws more for a whole reading interval; a larger jump after a fall is a reset, not a wrap."""


@dataclass(frozen=True, slots=True)
class Reading:
    """A good reading of a counter: ``joules`` at ``t_ns``; it wraps to 0 at ``range_j`` J (None: never)."""

    t_ns: int
    joules: float
    range_j: float | None = None


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


def turn_missed(joules: float, since_s: float, range_j: float | None) -> bool:
    """Whether a counter that shows ``joules`` more after ``since_s`` could have gone round its whole range once more.

    For long gaps only: between readings at a sensor's pace no turn can be missed.
    """
    return range_j is not None and joules + range_j <= PLAUSIBLE_WATTS * since_s


class Counter:
    """The last good reading of one counter; ``last`` is that of another process whose readings it goes on from."""

    __slots__ = ("_joules", "_range_j", "_t_ns")

    def __init__(self, last: Reading | None = None) -> None:
        self._joules = None if last is None else last.joules
        self._t_ns = 0 if last is None else last.t_ns
        self._range_j = None if last is None else last.range_j

    @property
    def last(self) -> Reading | None:
        """The last reading; None before the first."""
        return None if self._joules is None else Reading(self._t_ns, self._joules, self._range_j)

    def read(self, t_ns: int, joules: float, range_j: float | None = None) -> Change:
        """Take the reading ``joules`` at ``t_ns``; ``range_j`` is where the counter wraps to 0 (None: never)."""
        before, since_s = self._joules, (t_ns - self._t_ns) / 1e9
        self._joules, self._t_ns, self._range_j = joules, t_ns, range_j
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
