"""When a stepping counter will step next.

A GPU's energy counter moves every 20 to 100 ms and stands still in between. Read at any time, its figure is up to one period
old; read right after it moved, it is fresh at no extra cost where a read is cheap (an H200 takes 3 ms for one, and 15 ms
where it meets the update). Each read tells one bit: moved since the last read, or not::

    counter ____|‾‾‾‾‾‾‾‾‾|‾‾‾‾‾‾‾‾‾|‾‾‾‾‾‾‾‾‾|‾‾‾‾       seeking: reads every 20 ms until two steps are bracketed;
    seek     r r r r r r r r r r r                      period and phase are known to some 20 ms
    narrow                     r         r              then reads in the middle of where the step may be: moved = it
    locked                                     r    r   was before, not moved = it comes after; the bracket halves each time

Once the bracket is narrow, reads fall just behind it. Because clocks drift, the bracket is widened a little with every
period, and is halved again when it got too wide.
"""

from __future__ import annotations

import math
from typing import Final, Literal

from melodi_otel.units import NS_PER_MS

SEEK_NS: Final = 20 * NS_PER_MS
SEEK_READS: Final = 14
"""Reads of a learning burst: two steps of a 100 ms counter lie in 11."""
FREE_PERIOD_NS: Final = 55 * NS_PER_MS
"""A counter that moves faster is never older than this: it is read at the plain rate."""
_NARROW_NS: Final = 6 * NS_PER_MS
_BEHIND_NS: Final = 1 * NS_PER_MS
_LATE_NS: Final = 5 * NS_PER_MS
_AMBIGUOUS: Final = 0.8
"""A bracket wider than this part of a period no longer tells which step was seen."""
_NOTES: Final = 8
_DRIFT: Final = 5e-4
"""Widening per period on each side, as a part of it: 0.05 ms of 100 ms, well above crystals and driver timers."""
_RELEARN_NS: Final = 10_000 * NS_PER_MS
_SEEK_AGAIN_NS: Final = 2_000 * NS_PER_MS
_KNOWN: Final = 0.15
"""A period known this well needs only one step to be found again."""

State = Literal["seek", "locked", "free"]


class PhaseLock:
    """Period and offset of one counter.

    Args:
        period_s: update period where the device states it; a short one needs no learning.
    """

    def __init__(self, period_s: float | None = None) -> None:
        self._sought_ns: int | None = None
        self._last_ns: int | None = None
        self._violations = 0
        self._early = 0
        self._known: tuple[float, float] | None = None
        self.state: State = "seek"
        self._begin()
        if period_s is not None and period_s * 1e9 <= FREE_PERIOD_NS:
            self.state = "free"

    @property
    def period_s(self) -> float | None:
        """The learnt period in s, None while unknown or where the counter moves all the time."""
        return (self._short + self._long) / 2e9 if self.state == "locked" else None

    def expected_ns(self, after_ns: int) -> int | None:
        """The middle of the bracket of the first step after ``after_ns``; None while unknown."""
        if self.state != "locked":
            return None
        period = (self._short + self._long) / 2
        middle = (self._low + self._high) / 2
        return round(middle + max(0, math.ceil((after_ns - middle) / period)) * period)

    def stepped_ns(self, t_ns: int) -> int | None:
        """The middle of where the last step at or before ``t_ns`` lies; None where that is not known.

        What a counter shows at ``t_ns`` is the energy up to that step, not up to the reading. Half of a bracket is a
        smaller error than the whole age of a figure that was read at any time.
        """
        if self.state == "locked":
            period = (self._short + self._long) / 2
            middle = (self._low + self._high) / 2
            return min(t_ns, round(middle + math.floor((t_ns - middle) / period) * period))
        if self.state == "seek" and self._high == t_ns and t_ns - self._low <= 2 * SEEK_NS:
            return round((self._low + self._high) / 2)
        return None

    def seen(self, t_ns: int, moved: bool) -> None:
        """A read at ``t_ns``; ``moved``: the counter differs from the read before."""
        before, self._last_ns = self._last_ns, t_ns
        if before is None or self.state == "free":
            return
        if self.state == "seek":
            self._seek(before, t_ns, moved)
            return
        informative = before >= self._previous_high
        if moved:
            self._violations = 0
            if informative and t_ns < self._low:
                self._low, self._high = float(before), float(t_ns)  # it came earlier than it could: believe the counter
            elif informative and t_ns < self._high:
                # Five times in the first half: it may well have left the bracket at the front, unseen.
                self._early = self._early + 1 if t_ns <= (self._low + self._high) / 2 + NS_PER_MS else 0
                self._high = float(t_ns)
                if self._early >= 5:
                    self._low = max(float(before), self._low - _NARROW_NS)
            if t_ns >= self._low:
                if informative:
                    self._note()
                self._advance(t_ns)
        elif t_ns < self._low:
            pass
        elif t_ns < self._high:
            self._early = 0
            self._low = float(t_ns)
        else:
            self._violations += 1
            self._low, self._high = float(t_ns), t_ns + 2 * max(self._high - self._low, float(_NARROW_NS))
            if self._violations > 3:
                self.lose(t_ns)

    def lose(self, t_ns: int) -> None:
        """Forget the phase and seek it again, unless that was tried a moment ago; a period that is known is kept."""
        if self.state == "locked" and self._long - self._short < _KNOWN * self._short:
            self._known = (self._short, self._long)
        rest_ns = _RELEARN_NS if self._known is None else _SEEK_AGAIN_NS
        if self._sought_ns is not None and t_ns - self._sought_ns < rest_ns:
            self.state = "free"
            return
        self.state = "seek"
        self._begin()

    def next_read(self, earliest_ns: int, learn_ns: int, allowed_ns: int) -> int:
        """When to read.

        Args:
            earliest_ns: the first time that the plain rate allows.
            learn_ns: the first time that a learning read is allowed at.
            allowed_ns: the first time that any read is allowed at.
        """
        if self.state == "free" or self._last_ns is None:
            if self.state == "free" and self._sought_ns is not None:
                self.lose(earliest_ns)  # seeks again when enough time has passed
            return earliest_ns
        if self.state == "seek":
            if self._reads >= SEEK_READS:
                return earliest_ns
            return max(self._last_ns + SEEK_NS, learn_ns)
        follow, self._follow = self._follow, False
        skipped = False
        while True:
            width = self._high - self._low
            if width > _AMBIGUOUS * self._short:
                self.lose(earliest_ns)
                return earliest_ns
            # What is not known well yet may be read ahead of the plain rate, as far as the budget goes.
            eager = width + self._long - self._short > 2 * _NARROW_NS
            first_ns = min(earliest_ns, allowed_ns if follow else learn_ns) if eager else earliest_ns
            behind = math.ceil(self._high) + _BEHIND_NS
            # A budget that ends a moment after the step: a little late beats a period later.
            if behind + _LATE_NS < max(first_ns, self._last_ns + 1):
                self._step()
                continue
            if self._last_ns >= self._previous_high:
                middle = math.ceil((self._low + self._high) / 2)
                at = middle if width > _NARROW_NS and self._last_ns < middle else behind
                if at == middle < first_ns and width > 2 * _NARROW_NS and not skipped:
                    # The budget ends behind the middle, period after period: one step left out makes room to look there.
                    skipped = True
                    self._step()
                    continue
                return max(at, first_ns)
            # Steps were skipped, so this read cannot tell which one it sees; the one a period later can.
            self._follow = eager
            return max(behind, first_ns)

    def _begin(self) -> None:
        self._reads = self._runs = 0
        self._follow = False
        self._low = self._high = self._previous_high = 0.0
        self._short = self._long = 0.0
        self._index = 0
        self._early = self._violations = 0
        self._notes: list[tuple[int, float, float]] = []

    def _seek(self, before: int, t_ns: int, moved: bool) -> None:
        self._sought_ns = t_ns
        self._reads += 1
        if not moved:
            return
        adjacent = bool(self._notes) and self._high == before
        self._low, self._high = float(before), float(t_ns)
        if adjacent:  # no pause between two moves: there may have been more steps than seen
            self._runs += 1
            self._notes.clear()
            if self._runs >= 3 or self._reads > SEEK_READS:
                self._give_up()
                return
        if self._notes:
            self._index += 1
        else:
            self._index, self._short, self._long = 0, 0.0, math.inf
        self._note(every=1)
        if self._index == 0 and self._known is not None:
            (self._short, self._long), self._known = self._known, None
        elif self._index == 0:
            return
        bracket, spread = self._high - self._low, self._long - self._short
        if self._long <= FREE_PERIOD_NS or (self._reads >= SEEK_READS and self._short < FREE_PERIOD_NS):
            self._give_up()
        elif bracket + spread < _AMBIGUOUS * self._short:
            self.state = "locked"
            self._advance(t_ns)

    def _give_up(self) -> None:
        """The counter is faster than its steps could be followed, and fresh enough whenever it is read."""
        self.state, self._sought_ns = "free", None

    def _note(self, every: int = 4) -> None:
        """Take the present bracket for the period: over many steps its width hardly matters."""
        for index, low, high in self._notes:
            steps = self._index - index
            if steps > 0:
                self._short = max(self._short, (self._low - high) / steps)
                self._long = min(self._long, (self._high - low) / steps)
        if self._short > self._long:  # the counter changed its pace: what was learnt long ago is no longer true
            middle = (self._short + self._long) / 2
            self._short, self._long = middle * (1 - 4 * _DRIFT), middle * (1 + 4 * _DRIFT)
            self._notes.clear()
        if self._high - self._low <= 2 * _NARROW_NS:
            self._notes = [note for note in self._notes if note[2] - note[1] <= 2 * _NARROW_NS]
        if not self._notes or self._index - self._notes[-1][0] >= every:
            self._notes.append((self._index, self._low, self._high))
            if len(self._notes) > _NOTES:
                del self._notes[1:-1:2]  # the oldest stays: the longer the base, the better the period

    def _advance(self, t_ns: int) -> None:
        while self._low <= t_ns:
            self._step()

    def _step(self) -> None:
        self._index += 1
        self._previous_high = self._high
        self._low += self._short * (1 - _DRIFT)
        self._high += self._long * (1 + _DRIFT)
