"""Work of which the meter hears only when it is over: it takes from what nobody was told.

A span of somebody else's instrumentation says what it was when it ends, and the intervals it ran in are closed by then. No
settled share is revised for it. What those intervals left to nobody (idle, tail, other processes) is kept for a while, and
work that is reported late takes its part of that: per instant the same for everybody who was there unseen. Others who ran
beside it and have not been reported yet find their part untouched::

    left to nobody    |======================|          A, B and C unseen; A is reported first
    A takes           |  1/3 of it  |                   beside = starts of B and C
    B takes           |  1/2 of what is left      |     = 1/3
    C takes           |  the rest                    |  = 1/3
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from melodi_otel.attribution.books import Bucket
from melodi_otel.attribution.meter import Late

KEPT: Final = 6_000
"""Closed intervals that are kept per device: ten minutes at ten readings a second."""
Holder = tuple[str, str]


@dataclass(slots=True)
class Left:
    """What one closed interval left to nobody, in J.

    Attributes:
        free: the part of it (0..1) in which no known request worked.
        static: idle energy of that part.
        dynamic: energy above idle that no known request claimed; it was booked under ``bucket``.
        foreign: energy of other processes.
        holder: under whose name static and dynamic joules were booked.
        based: whether idle power was known; else ``static`` is 0 and ``dynamic`` has it.
        taken_by: mean number of those who have taken their part already.
    """

    t0_ns: int
    t1_ns: int
    free: float
    static: float
    dynamic: float
    foreign: float
    bucket: Bucket
    holder: Holder | None
    based: bool = True
    taken_by: float = 0.0


@dataclass(slots=True)
class Taken:
    """What late work takes from one interval.

    Attributes:
        left: what the interval left before.
        static, dynamic, foreign: J of each kind.
        length_ns: how long it ran in the interval, and ``covered_ns`` the part of that in which something was left.
        company: mean number of those who shared, itself included.
    """

    left: Left
    static: float
    dynamic: float
    foreign: float
    length_ns: int
    covered_ns: float
    company: float


class Leavings:
    """What the closed intervals of one device left to nobody, the newest :data:`KEPT` of them."""

    def __init__(self) -> None:
        self._kept: deque[Left] = deque(maxlen=KEPT)

    def keep(self, left: Left) -> None:
        """An interval has been closed."""
        self._kept.append(left)

    def take(self, t0_ns: int, t1_ns: int, late: Late) -> Iterator[Taken]:
        """Take the part of work that ran in [t0, t1]; what is taken is gone."""
        beside = Beside(late.beside)
        for left in reversed(self._kept):
            if left.t1_ns <= t0_ns:
                return
            start, stop = max(t0_ns, left.t0_ns), min(t1_ns, left.t1_ns)
            if stop <= start:
                continue
            waiting = 1.0 + beside.company(start, stop)
            length = (stop - start) / (left.t1_ns - left.t0_ns)
            part = length / waiting
            # Work of another process is in what other processes used; work of this one is not.
            known = 1.0 if late.elsewhere and left.foreign > 0.0 else left.free
            taken = Taken(
                left,
                left.static * part,
                left.dynamic * part,
                left.foreign * part if late.elsewhere else 0.0,
                stop - start,
                (stop - start) * known,
                waiting + left.taken_by,
            )
            left.taken_by += length
            left.static -= taken.static
            left.dynamic -= taken.dynamic
            left.foreign -= taken.foreign
            yield taken


class Beside:
    """Others who began at these times (monotonic ns, in any order) and are still there."""

    def __init__(self, starts: Sequence[int]) -> None:
        self._starts = sorted(starts)
        self._sums = list(accumulate(self._starts, initial=0))

    def company(self, t0_ns: int, t1_ns: int) -> float:
        """Mean number of them in [t0, t1]."""
        before = bisect_right(self._starts, t0_ns)
        until = bisect_left(self._starts, t1_ns, lo=before)
        # Who was there at t0 stays for the whole time, who came later for what is left of it.
        stay = before * (t1_ns - t0_ns) + (until - before) * t1_ns - (self._sums[until] - self._sums[before])
        return stay / (t1_ns - t0_ns)


class Unseen:
    """How many pieces of work run that will be reported late; stretches of time in which there were any."""

    def __init__(self) -> None:
        self._number = 0
        self._stretches: deque[tuple[int, int | None]] = deque(maxlen=1_000)

    def change(self, t_ns: int, number: int) -> None:
        """From ``t_ns`` on there are ``number`` more (or fewer)."""
        before, self._number = self._number, max(0, self._number + number)
        if before == 0 and self._number > 0:
            self._stretches.append((t_ns, None))
        elif before > 0 and self._number == 0 and self._stretches:
            self._stretches[-1] = (self._stretches[-1][0], t_ns)

    def any_in(self, t0_ns: int, t1_ns: int) -> bool:
        """Whether there was any at some time in [t0, t1]."""
        for start, stop in reversed(self._stretches):
            if stop is not None and stop <= t0_ns:
                return False
            if start < t1_ns:
                return True
        return False
