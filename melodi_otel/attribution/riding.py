"""Members of a decode set, charged without being looked at: clocks of joules that run for all of them at once.

Every member of a set computes one token per step, over a context that grows by one. So what a step costs a member is
``a + b x context``, with the same ``a`` and ``b`` for all, and a member owes the difference between what the clocks show when
it leaves and what they showed when it joined::

    step        1      2      3      4      5            A += a + b x tick      (tick: number of the step)
    A          |------|------|------|------|------       K += b
    member            joins ............. leaves         owes  ΔA + (context - tick at joining) x ΔK

A step costs the ledger the same whether eight requests run or a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from melodi_otel.attribution.activity import Accrual, Activity
from melodi_otel.attribution.books import Phase, Who
from melodi_otel.attribution.meter import Tier

_A, _K, _STATIC, _BUSY, _COMPANY, _INTERVALS, _LENGTH, _FOREIGN, _UNFIT = range(9)
_SQUARES: Final = 9
"""Where Σ a²/E, Σ 2ab/E and Σ b²/E begin, E being the joules of an interval: what of its own part nobody shared."""
_SPREAD: Final = 12
"""Where the same sums and those of a and b begin, times the relative error of the weights: what is uncertain of it."""
_TILT: Final = 17
"""Where a and b stand times the part of prompts in what was divided, times the relative error of these's price."""
_VALUES: Final = 19


class Mode(NamedTuple):
    """How a clock's joules are booked: by which evidence, at which quality, and whether idle power is known."""

    tier: Tier
    quality: str
    based: bool


class Rider:
    """A request in the decode set of a lane; it may stand there with several sequences."""

    __slots__ = ("activity", "marks")

    def __init__(self, activity: Activity) -> None:
        self.activity = activity
        self.marks: dict[Clock, Mark] = {}


class Mark:
    """What a clock showed when something was last reckoned up, for ``members`` sequences whose contexts at tick 0 would sum
    to ``offset``.
    """

    __slots__ = ("at", "members", "offset")

    def __init__(self, at: list[float]) -> None:
        self.at = at
        self.members = 0
        self.offset = 0


class Clock:
    """The clocks of one lane on one device.

    Attributes:
        error: relative 1 sigma of the weights of what runs next.

    Args:
        device: whose joules they count.
        attribute: books joules under (who, phase, quality) on the device's account.
    """

    __slots__ = ("_a", "_attribute", "_b", "_groups", "device", "entered", "error", "marks", "mode", "values")

    def __init__(self, device: str, attribute: Callable[[tuple[Who, Phase, str], float], None]) -> None:
        self.device = device
        self.values = [0.0] * _VALUES
        self.marks: dict[Rider, Mark] = {}
        self.mode = Mode("step", "measured", True)
        self.entered = 0
        self.error = 0.0
        self._attribute = attribute
        self._groups: dict[Who, Mark] = {}
        self._a = self._b = 0.0

    def enter(self, number: int, changes: Iterable[tuple[Rider, int, int]]) -> None:
        """The lane's step ``number`` begins: who rides from here on; a step that began before changes nothing."""
        if number > self.entered:
            self.entered = number
            for rider, members, offset in changes:
                self.change(rider, members, offset)

    # --- who rides ----------------------------------------------------------------------------------------------------

    def change(self, rider: Rider, members: int, offset: int) -> None:
        """``members`` sequences more (or fewer) with this sum of offsets ride from here on."""
        mark = self.marks.get(rider)
        if mark is None:
            if members <= 0:
                return
            mark = self.marks[rider] = rider.marks[self] = Mark(self.values.copy())
        else:
            self.reckon(rider)
        mark.members += members
        mark.offset += offset
        self._group(rider.activity.who, members, offset)
        if mark.members <= 0:
            del self.marks[rider], rider.marks[self]
            if not self.marks:
                # Nobody remembers anything: begin anew at zero, where differences have all their digits.
                self.book()
                self._groups.clear()
                self.values = [0.0] * _VALUES

    def reckon(self, rider: Rider) -> None:
        """Let the rider's request have what it owes up to now."""
        mark = self.marks[rider]
        values = self.values
        if mark.at == values:
            return
        d = [now - before for now, before in zip(values, mark.at, strict=True)]
        mark.at = values.copy()
        m, o = mark.members, mark.offset
        activity, (tier, quality, based) = rider.activity, self.mode
        accrual = activity.accruals.get(self.device)
        if accrual is None:
            accrual = activity.accruals[self.device] = Accrual()
        decode, static = m * d[_A] + o * d[_K], m * d[_STATIC]
        accrual.decode += decode
        accrual.static += static
        accrual.busy_ns += round(d[_BUSY])
        accrual.company_ns += round(d[_COMPANY])
        accrual.intervals += round(d[_INTERVALS])
        accrual.interval_ns += round(d[_LENGTH])
        accrual.foreign |= d[_FOREIGN] > 0.0
        accrual.unbased |= not based
        if d[_INTERVALS] > 0.0:
            accrual.unfit += (decode + static) * d[_UNFIT] / d[_INTERVALS]
        accrual.tiers[tier] = accrual.tiers.get(tier, 0.0) + decode + static
        own = m * m * d[_SQUARES] + m * o * d[_SQUARES + 1] + o * o * d[_SQUARES + 2]
        accrual.shared[tier] = accrual.shared.get(tier, 0.0) + max(0.0, decode - own)
        mine = m * m * d[_SPREAD + 2] + m * o * d[_SPREAD + 3] + o * o * d[_SPREAD + 4]
        accrual.spread += max(0.0, m * d[_SPREAD] + o * d[_SPREAD + 1] - mine)
        accrual.tilt -= m * d[_TILT] + o * d[_TILT + 1]
        for phase, joules in _booked(based, decode, static):
            if joules == 0.0:
                continue
            at = (activity.who, phase, quality)
            accrual.booked[at] = accrual.booked.get(at, 0.0) + joules

    def rename(self, rider: Rider, activity: Activity) -> None:
        """From now on ``activity`` pays for what ``rider`` rides; what it owed before is the other's."""
        self.reckon(rider)
        self.regroup(rider, activity.who)

    def regroup(self, rider: Rider, who: Who) -> None:
        """What ``rider`` uses is booked for ``who`` from now on."""
        mark = self.marks[rider]
        self.reckon(rider)
        self._group(rider.activity.who, -mark.members, -mark.offset)
        self._group(who, mark.members, mark.offset)

    def _group(self, who: Who, members: int, offset: int) -> None:
        group = self._groups.get(who)
        if group is None:
            group = self._groups[who] = Mark(self.values.copy())
        else:
            self._book(who, group)
        group.members += members
        group.offset += offset
        if group.members <= 0:
            del self._groups[who]

    # --- time ---------------------------------------------------------------------------------------------------------

    def become(self, mode: Mode) -> None:
        """Book what follows otherwise than what was."""
        if mode != self.mode:
            self.book()
            for rider in self.marks:
                self.reckon(rider)
            self.mode = mode

    def add(self, a: float, b: float, static: float, length_ns: float, company_ns: float) -> None:
        """A step, or the part of it in one interval: ``a + b x offset`` dynamic J and ``static`` J for each member."""
        values = self.values
        values[_A] += a
        values[_K] += b
        values[_STATIC] += static
        values[_BUSY] += length_ns
        values[_COMPANY] += company_ns
        values[_SPREAD] += self.error * a
        values[_SPREAD + 1] += self.error * b
        self._a += a
        self._b += b

    def close(self, joules: float, length_ns: int, foreign: bool, unfit: bool, tilt: float = 0.0) -> None:
        """An interval is over in which ``joules`` were divided; ``tilt``: the part of prompts in them, times the error of their
        price.
        """
        a, b = self._a, self._b
        self._a = self._b = 0.0
        values = self.values
        values[_INTERVALS] += 1.0
        values[_LENGTH] += length_ns
        values[_FOREIGN] += foreign
        values[_UNFIT] += unfit
        values[_TILT] += tilt * a
        values[_TILT + 1] += tilt * b
        squares = (a * a / joules, 2.0 * a * b / joules, b * b / joules) if joules > 0.0 else (0.0, 0.0, 0.0)
        for at, square in enumerate(squares):
            values[_SQUARES + at] += square
            values[_SPREAD + 2 + at] += self.error * square
        self.book()

    def book(self) -> None:
        """Bring the account's attributed joules up to date."""
        for who, group in self._groups.items():
            self._book(who, group)

    def _book(self, who: Who, group: Mark) -> None:
        values, at = self.values, group.at
        decode = group.members * (values[_A] - at[_A]) + group.offset * (values[_K] - at[_K])
        static = group.members * (values[_STATIC] - at[_STATIC])
        group.at = values.copy()
        for phase, joules in _booked(self.mode.based, decode, static):
            self._attribute((who, phase, self.mode.quality), joules)


def _booked(based: bool, decode: float, static: float) -> tuple[tuple[Phase, float], ...]:
    # Without idle power the phases cannot be told from it, neither on spans (see finishing) nor in metrics.
    return (("decode", decode), ("static", static)) if based else (("unsplit", decode + static),)


def reckon(activity: Activity) -> None:
    """Let a request have all that it owes on every device up to the last closed intervals."""
    for rider in activity.riders:
        for clock in rider.marks:
            clock.reckon(rider)
