"""When a stepping counter will step next.

A GPU's energy counter moves every 20 to 100 ms and stands still in between. Read at any time, its figure is up to one period
old; read behind a step that is known, it can be dated by that step. Each read tells one bit: moved since the last, or not::

    counter ____|‾‾‾‾‾‾‾‾‾|‾‾‾‾‾‾‾‾‾|‾‾‾‾‾‾‾‾‾|‾‾‾‾       seeking: reads every 20 ms until two steps are bracketed;
    seek     r r r r r r r r r r r                      period and phase are known to some 20 ms
    narrow                     r         r              then reads in the middle of where the step may be: moved = it
    locked                                     r    r   was before, not moved = it comes after; the bracket halves each time

Once the bracket is narrow, reads fall behind it. Because clocks drift, the bracket is widened a little with every period, and
is halved again when it got too wide.

How far behind depends on what a read costs. A cheap one falls 1 ms behind the step. An H200 takes 3.3 ms of CPU time for a
read, and one that meets the update waits for its end (ms behind the step: cost in ms; docs/accuracy.md)::

    -3: 3.3    0: 3.9    2: 15    4: 13.3    6: 11.3    8: 9.5    10: 7.5    12: 5.8    17 and later: 3.4 to 4.7

so a dear read falls 20 ms behind: it is answered at 23.4 ms, 6 ms later than one that begins at 2 ms, for less than a quarter.
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
DEAR_NS: Final = 1 * NS_PER_MS
"""CPU time from which on a read counts as dear: ten of them a second are 1 % of a core."""
_DEAR_BEHIND_NS: Final = 20 * NS_PER_MS
_DEAR_BEFORE_NS: Final = 4 * NS_PER_MS
_DEAR_NARROW_NS: Final = 10 * NS_PER_MS
"""Narrowing costs a dear read that may meet the update: half of this is as well as a figure can be dated for a fair price."""
LATE_NS: Final = 5 * NS_PER_MS
_KNOWING: Final = 0.8
_AMBIGUOUS: Final = 0.95
"""A bracket wider than this part of a period no longer tells which step was seen; one of :data:`_KNOWING` is a beginning."""
_NOTES: Final = 8
_DRIFT: Final = 5e-4
"""Widening per period on each side, as a part of it: 0.05 ms of 100 ms, well above crystals and driver timers."""
_EAGER: Final = 0.3
_IDLE_WIDE: Final = 0.5
_SPARSE_NS: Final = 350 * NS_PER_MS
"""Distance of reads that save up for a learning burst."""
_RELEARN_NS: Final = 10_000 * NS_PER_MS
_SEEK_AGAIN_NS: Final = 2_000 * NS_PER_MS
_KNOWN: Final = 0.25
"""A period known this well needs only one step to be found again."""

State = Literal["seek", "locked", "free"]


class PhaseLock:
    """Period and offset of one counter.

    Args:
        period_s: update period where the device states it; a short one needs no learning.

    Attributes:
        state: ``seek``, ``locked``, or ``free`` where the counter is followed by nobody (now, or for good).
        moved_ns: when a read last showed a new figure.
        dear: a read costs more than :data:`DEAR_NS`; whoever measures that sets it.
    """

    def __init__(self, period_s: float | None = None) -> None:
        self._sought_ns: int | None = None
        self._last: tuple[int, int] | None = None
        self._moved = False
        self._violations = 0
        self._early = 0
        self._known: tuple[float, float] | None = None
        self.dear = False
        self.moved_ns = 0
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
        if self.state == "seek" and self._shown_ns == t_ns and self._high - self._low <= 2 * SEEK_NS:
            return round((self._low + self._high) / 2)
        return None

    def clear_ns(self, t_ns: int) -> int:
        """The first time from ``t_ns`` on at which a read can be dated: not where the counter may just be stepping.

        There nobody can tell whether a figure is a moment or a period old, and a dear read would wait.
        """
        if self.state != "locked":
            return t_ns
        before_ns, behind_ns = (_DEAR_BEFORE_NS, _DEAR_BEHIND_NS) if self.dear else (0, _BEHIND_NS)
        low, high = self._low, self._high
        while high - low < _AMBIGUOUS * self._short:
            if t_ns < low - before_ns:
                return t_ns
            if t_ns < high + behind_ns:
                return math.ceil(high) + behind_ns
            low, high = self._following(low, high)
        return t_ns

    def seen(self, began_ns: int, ended_ns: int, moved: bool, waited_ns: int = 0) -> None:
        """A read that took from ``began_ns`` to ``ended_ns``.

        A read that shows a new figure says that the step came before its end; one that does not, that it comes after its
        beginning.

        Args:
            began_ns: monotonic ns.
            ended_ns: monotonic ns.
            moved: the counter differs from the read before.
            waited_ns: how much longer than usual the driver worked for it: it met the update, so the step is that much older.
        """
        before, self._last = self._last, (began_ns, ended_ns)
        moved_before, self._moved = self._moved, moved
        self.moved_ns = ended_ns if moved else self.moved_ns
        if before is None or self.state == "free":
            return
        latest_ns = max(began_ns, ended_ns - waited_ns)
        if self.state == "seek":
            # Only reads close to each other can tell a counter that moves all the time: a gap of a period always shows a move.
            dense = began_ns - before[1] < FREE_PERIOD_NS
            self._sure_ns = ended_ns
            self._seek(before[0], latest_ns, ended_ns, moved, moved_before, dense)
            return
        informative = self._sure_ns >= self._previous_high
        self._sure_ns = ended_ns if moved and informative else began_ns
        if moved:
            self._violations = 0
            if informative and latest_ns < self._low:
                # It came earlier than it could: believe the counter.
                self._low, self._high = float(before[0]), float(latest_ns)
            elif informative and latest_ns < self._high:
                # Five times in the first half: it may well have left the bracket at the front, unseen.
                self._early = self._early + 1 if latest_ns <= (self._low + self._high) / 2 + NS_PER_MS else 0
                self._high = float(latest_ns)
                if self._early >= 5:
                    self._low = max(float(before[0]), self._low - _NARROW_NS)
            if latest_ns >= self._low:
                if informative:
                    self._note()
                self._advance(ended_ns)
        elif began_ns < self._low:
            pass
        elif began_ns < self._high:
            self._early = 0
            self._low = float(began_ns)
            self._note()
        else:
            self._violations += 1
            self._low, self._high = float(began_ns), ended_ns + 2 * max(self._high - self._low, float(_NARROW_NS))
            if self._violations > 3:
                self.lose(ended_ns)

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

    def next_read(self, earliest_ns: int, burst_ns: int, learn_ns: int, narrow_allowed_ns: int, allowed_ns: int) -> int:
        """When to read.

        Args:
            earliest_ns: the first time that the plain rate allows.
            burst_ns: the first time that a learning burst may begin at.
            learn_ns: the first time that a read of a learning burst is allowed at.
            narrow_allowed_ns: the first time that a read is allowed at which makes a wide bracket narrower.
            allowed_ns: the first time that any read is allowed at.
        """
        if self.state == "free" or self._last is None:
            if self.state == "free" and self._sought_ns is not None:
                self.lose(earliest_ns)  # seeks again when enough time has passed
            return earliest_ns
        last_ns = self._last[1]
        if self.state == "seek":
            if self._reads == 0 and burst_ns > last_ns + _SPARSE_NS:
                return max(earliest_ns, last_ns + _SPARSE_NS)
            if self._reads < SEEK_READS:
                self._asked = True
                # Between two steps whose distance is roughly known there is nothing to see.
                return max(last_ns + SEEK_NS, round(self._low + self._short) - 2 * NS_PER_MS, learn_ns)
            if earliest_ns - self._burst_ns >= _RELEARN_NS:
                self._begin()
            return earliest_ns
        narrow_ns, behind_ns = (_DEAR_NARROW_NS, _DEAR_BEHIND_NS) if self.dear else (_NARROW_NS, _BEHIND_NS)
        follow, self._follow = self._follow, False
        skipped = False
        while True:
            width = self._high - self._low
            if width > _AMBIGUOUS * self._short:
                self.lose(earliest_ns)
                return earliest_ns
            # What is not known well yet may be read ahead of the plain rate, as far as the budget goes.
            spread = self._long - self._short
            # A dear counter is read at few steps, and its period is best learnt over many: budget is kept for later ones.
            patient = self.dear and spread >= narrow_ns / 2
            eager = width + spread > max(2 * narrow_ns, _EAGER * self._short if patient else 0)
            first_ns = min(earliest_ns, allowed_ns if follow else narrow_allowed_ns) if eager else earliest_ns
            behind = math.ceil(self._high) + behind_ns
            # A budget that ends a moment after the step: a little late beats a period later.
            if behind + LATE_NS < max(first_ns, last_ns + 1):
                self._step()
                continue
            if self._sure_ns >= self._previous_high:
                middle = math.ceil((self._low + self._high) / 2)
                # While the period is the lesser known of both, one look into each step brings more than two into one.
                looked = patient and last_ns >= self._low
                at = middle if width > narrow_ns and last_ns < middle and not looked else behind
                if at == middle < first_ns and width > 2 * narrow_ns and not skipped:
                    # The budget ends behind the middle, period after period: one step left out makes room to look there.
                    skipped = True
                    self._step()
                    continue
                return max(at, first_ns)
            # Steps were skipped, so this read cannot tell which one it sees; the one a period later can.
            self._follow = eager
            return max(behind, first_ns)

    def next_idle(self, due_ns: int, allowed_ns: int) -> int:
        """When to read while nobody is at work: at ``due_ns``, or as often as it takes not to lose the phase meanwhile.

        A period that is known to 1 ms only would be lost after some seconds; two or three reads make it known ten times better.
        """
        if self.state != "locked" or self._last is None:
            return due_ns
        width, last_ns = self._high - self._low, self._last[1]
        growth = self._long - self._short + 2 * _DRIFT * self._short
        steps = (_IDLE_WIDE * self._short - width) / growth
        wide_ns = max(allowed_ns, last_ns + round(max(0.0, steps) * self._short))
        if due_ns <= wide_ns:
            return self.clear_ns(due_ns)
        return self.next_read(wide_ns, wide_ns, wide_ns, allowed_ns, allowed_ns)

    def _begin(self) -> None:
        self._reads = self._runs = 0
        self._follow = self._asked = False
        self._low = self._high = self._previous_high = 0.0
        self._short = self._long = 0.0
        self._index = 0
        self._burst_ns = self._shown_ns = 0
        self._sure_ns = 0  # what stepped before this is in the last figure
        self._early = self._violations = 0
        self._notes: list[tuple[int, float, float]] = []

    def _seek(self, began_ns: int, latest_ns: int, ended_ns: int, moved: bool, moved_before: bool, dense: bool) -> None:
        self._sought_ns = ended_ns
        if self._reads == 0:
            self._burst_ns = ended_ns
        self._reads += dense or self._asked  # those while nobody is at work are none of the burst
        self._asked = False
        if not moved:
            return
        if moved_before:  # no pause between two moves: there may have been more steps than seen
            self._notes.clear()
            if not dense:
                return
            self._runs += 1
            if self._runs >= 3:
                self._give_up()
                return
        self._low, self._high, self._shown_ns = float(began_ns), float(latest_ns), ended_ns
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
        elif bracket + spread < _KNOWING * self._short:
            self.state = "locked"
            self._advance(ended_ns)

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
        enough_ns = 2 * (_DEAR_NARROW_NS if self.dear else _NARROW_NS)
        if self._high - self._low <= enough_ns:
            self._notes = [note for note in self._notes if note[2] - note[1] <= enough_ns]
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
        self._low, self._high = self._following(self._low, self._high)

    def _following(self, low: float, high: float) -> tuple[float, float]:
        return low + self._short * (1 - _DRIFT), high + self._long * (1 + _DRIFT)
