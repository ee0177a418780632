"""One closed interval of one device, divided: the conserving closed-form Shapley split.

    measured = static (idle power x time) + dynamic

- static: at each instant idle power is divided by the participants of everything that runs on the device then; an instant
  at which nothing runs is nobody's (idle, or loading).
- dynamic: cells (engine steps, or slices of requests without steps) carry weights; a cell that lies partly in the interval
  counts with that part. Every joule of ``dynamic`` is divided by weight, so the sum is the measured one whatever the
  weights are.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from melodi_otel.attribution.activity import Activity
from melodi_otel.attribution.meter import EngineId, Tier
from melodi_otel.attribution.riding import Clock, Rider


@dataclass(slots=True)
class Row:
    """One activity in one cell.

    Attributes:
        activity: who.
        participants: its sequences in the cell (rows of a batch, beams).
        prefill, decode: weights of the two phases, in the cost model's unit, for the part inside the interval.
        unsplit: weight whose phase is not known.
        unknown: the amount of work is not known either: it counts as much as the others do, per participant and time; the
            phase it is booked under.
    """

    activity: Activity
    participants: int
    prefill: float = 0.0
    decode: float = 0.0
    unsplit: float = 0.0
    unknown: Literal["", "unsplit", "decode"] = ""


@dataclass(slots=True)
class Pack:
    """The decode set of a step: all of its members at once.

    Attributes:
        clock: where their joules are counted.
        number, changes: of the step, which the clock is told of before it runs.
        members: its sequences; ``heads``: different requests among them that stand in no row, ``only``: the one, where there
            is one.
        each: weight of every member apart from its context; ``per_context``: weight of a token of context.
        tick: contexts are offset + tick; ``contexts``: their sum. Of several steps: the mean of each.
    """

    clock: Clock
    number: int
    changes: Sequence[tuple[Rider, int, int]]
    members: int
    heads: int
    only: Activity | None
    each: float
    per_context: float
    tick: float
    contexts: float

    @property
    def weight(self) -> float:
        """Of all members together."""
        return self.members * self.each + self.per_context * self.contexts


@dataclass(slots=True)
class Cell:
    """Something that ran in [t0, t1] (already cut to the interval) with these rows, known at this tier.

    Attributes:
        t0_ns, t1_ns: from when to when.
        tier: how it is known.
        rows: who, with weights; never changed here.
        part: the part of the weights that is in this cell (0..1); of several steps in one: the sum of their parts.
        pack: the decode set beside the rows.
        engine: whose step it is; None: that of the rows' requests.
        alone: whether at no time another request ran beside.
        static_each: idle J per participant, and ``company`` ns times requests that were there: set by :func:`divide`.
    """

    t0_ns: int
    t1_ns: int
    tier: Tier
    rows: Sequence[Row]
    part: float = 1.0
    pack: Pack | None = None
    engine: EngineId | None = None
    alone: bool = True
    static_each: float = 0.0
    company: float = 0.0

    def present(self) -> tuple[int, int]:
        """(different requests in it, their sequences)."""
        heads = len(self.rows)
        count = self.rows[0].participants if heads == 1 else sum([row.participants for row in self.rows])
        if self.pack is None:
            return heads, count
        return heads + self.pack.heads, count + self.pack.members

    @property
    def told(self) -> Tier:
        """The tier under which its joules are booked: nobody's weights matter for who is alone."""
        return "exclusive" if self.alone and self.tier != "process" else self.tier


@dataclass(slots=True)
class Given:
    """What one activity gets from one interval, in J; ``shared``: dynamic J it shared with others, ``tilt``: J of
    prompts that it has more than its part of them.
    """

    activity: Activity
    tier: Tier
    prefill: float = 0.0
    decode: float = 0.0
    unsplit: float = 0.0
    static: float = 0.0
    shared: float = 0.0
    tilt: float = 0.0
    busy_ns: int = 0
    company_ns: float = 0.0


@dataclass(slots=True)
class Pool:
    """Dynamic joules that belong to these cells and nobody else (an engine's part of a CPU, or the whole device)."""

    joules: float
    cells: Sequence[Cell]


@dataclass(slots=True)
class Division:
    """The outcome: what each activity gets outside of decode sets, which clocks ran, with (the joules that they had a part of,
    the part of prompts in these), static J of instants at which nothing ran, dynamic J of pools without work.
    """

    given: list[Given] = field(default_factory=list[Given])
    clocks: dict[Clock, tuple[float, float]] = field(default_factory=dict[Clock, tuple[float, float]])
    idle_static: float = 0.0
    unclaimed: float = 0.0


def divide(t0_ns: int, t1_ns: int, static_joules: float, pools: Sequence[Pool]) -> Division:
    """Divide one interval.

    Args:
        t0_ns, t1_ns: the interval.
        static_joules: idle energy in it, ``min(idle power x length, measured)``.
        pools: dynamic joules and the cells that share them; a cell stands in one pool.
    """
    out = Division()
    cells = pools[0].cells if len(pools) == 1 else [cell for pool in pools for cell in pool.cells]
    out.idle_static = share_static(t0_ns, t1_ns, static_joules, cells)
    known: dict[tuple[Activity, Tier], Given] = {}
    for pool in pools:
        if not pool.cells:
            out.unclaimed += pool.joules
            continue
        given, weights, prompts = _share_pool(pool)
        for cell in pool.cells:
            if cell.pack is not None and cell.pack.members:
                out.clocks[cell.pack.clock] = (pool.joules, prompts)
        if len(pools) > 1:
            given = _joined(known, given)
        out.given += given
        if pool.joules != 0.0:
            _part_shared(out.given, weights)
    return out


_begin = operator.attrgetter("t0_ns")


def unworked_part(t0_ns: int, t1_ns: int, cells: Sequence[Cell]) -> float:
    """The part of [t0, t1] in which nothing runs, 0..1; 0 where there is no cell of any length."""
    covered, until = 0, t0_ns
    # Cells mostly come in order already.
    for cell in sorted(cells, key=_begin):
        stop = cell.t1_ns
        if stop > until:
            covered += stop - max(cell.t0_ns, until)
            until = stop
    return 1.0 - covered / (t1_ns - t0_ns) if covered else 0.0


def share_static(t0_ns: int, t1_ns: int, joules: float, cells: Sequence[Cell]) -> float:
    """Divide idle joules at each instant by the participants of all that runs then; what is left where nothing runs, in J.

    Sets ``static_each`` and ``company`` of the cells, and ``alone`` where it is not; cells of zero length take part in nothing.
    """
    if _one_by_one(cells):
        return _static_in_turn(t0_ns, t1_ns, joules, cells)
    # Between two neighbouring starts or ends the number of participants is constant. One walk over these times adds up what
    # each participant gets from t0 on; a cell gets the difference between its end and its start. So that a short cell behind
    # a long stretch loses no digits in it, the sum is carried with its rounding error beside it.
    changes: dict[int, list[int]] = {}
    for cell in cells:
        start, stop = cell.t0_ns, cell.t1_ns
        if stop <= start:
            continue
        heads, count = cell.present()
        if heads > 1:
            cell.alone = False
        for at, sign in ((start, 1), (stop, -1)):
            change = changes.get(at)
            if change is None:
                changes[at] = [sign * count, sign * heads]
            else:
                change[0] += sign * count
                change[1] += sign * heads
    rate = joules / (t1_ns - t0_ns)
    participants = requests = 0
    each = lost = 0.0  # ns per participant since t0, and what the sum of them has lost to rounding
    company = crowded = idle_ns = 0
    last = t0_ns
    until: dict[int, tuple[float, float, int, int]] = {}
    for at in sorted(changes):
        length = at - last
        if participants:
            more = length / participants
            total = each + more
            lost += (each - total) + more if each >= more else (more - total) + each
            each = total
            company += length * requests
            if requests > 1:
                crowded += length
        else:
            idle_ns += length
        until[at] = (each, lost, company, crowded)
        last = at
        change = changes[at]
        participants += change[0]
        requests += change[1]
    for cell in cells:
        if cell.t1_ns > cell.t0_ns:
            each0, lost0, company0, crowded0 = until[cell.t0_ns]
            each1, lost1, company1, crowded1 = until[cell.t1_ns]
            cell.static_each = rate * ((each1 - each0) + (lost1 - lost0))
            cell.company = company1 - company0
            if crowded1 > crowded0:
                cell.alone = False
    return rate * (idle_ns + (t1_ns - last)) if cells else joules


def _one_by_one(cells: Sequence[Cell]) -> bool:
    """Whether each begins when the one before is over, as the steps of one lane do."""
    until = 0
    for cell in cells:
        if cell.t0_ns < until or cell.t1_ns <= cell.t0_ns:
            return False
        until = cell.t1_ns
    return True


def _static_in_turn(t0_ns: int, t1_ns: int, joules: float, cells: Sequence[Cell]) -> float:
    """:func:`share_static` where no two cells run at once."""
    rate = joules / (t1_ns - t0_ns)
    idle_ns, last = 0, t0_ns
    for cell in cells:
        heads, count = cell.present()
        idle_ns += cell.t0_ns - last
        last = cell.t1_ns
        length = last - cell.t0_ns
        cell.static_each = rate * (length / count)
        cell.company = length * heads
        if heads > 1:
            cell.alone = False
    return rate * (idle_ns + (t1_ns - last)) if cells else joules


def _share_pool(pool: Pool) -> tuple[list[Given], dict[Activity, float], float]:
    """Who gets what of a pool (``shared`` is still open), each one's part of its weight, and that of prompts, 0..1."""
    out: list[Given] = []
    by_tier: dict[Tier, dict[Activity, Given]] = {}
    unknown: list[tuple[Cell, Row, Given]] = []
    # Weights are added up first, in the fields of the joules, and priced when their sum is known.
    total = 0.0
    for cell in pool.cells:
        tier = cell.told
        slots = by_tier.get(tier)
        if slots is None:
            slots = by_tier[tier] = {}
        length, company, each, part = cell.t1_ns - cell.t0_ns, cell.company, cell.static_each, cell.part
        pack = cell.pack
        if pack is not None:
            total += pack.weight * part
            if tier == "exclusive" and pack.only is not None:
                # It is there by itself: what the whole set uses is its own, and its clock stands still.
                got = slots.get(pack.only)
                if got is None:
                    got = slots[pack.only] = Given(pack.only, tier)
                    out.append(got)
                got.static += each * pack.members
                got.decode += pack.weight * part
                if pack.heads:  # else a row of its own counts the time
                    got.busy_ns += length
                    got.company_ns += company
        for row in cell.rows:
            activity = row.activity
            got = slots.get(activity)
            if got is None:
                got = slots[activity] = Given(activity, tier)
                out.append(got)
            got.static += each * row.participants
            got.busy_ns += length
            got.company_ns += company
            if row.unknown:
                unknown.append((cell, row, got))
                continue
            prefill, decode, unsplit = row.prefill * part, row.decode * part, row.unsplit * part
            got.prefill += prefill
            got.decode += decode
            got.unsplit += unsplit
            total += prefill + decode + unsplit
    total += _price_unknown(pool.cells, unknown, total)
    timed = total <= 0.0
    if timed:
        total = _price_by_time(pool.cells, by_tier, out)
    per_weight = pool.joules / total
    for cell in pool.cells:
        if cell.pack is not None:
            _run_clock(cell, cell.pack, per_weight, timed)
    weights: dict[Activity, float] = {}
    prompts = sum([got.prefill for got in out]) / total
    for got in out:
        weight = (got.prefill + got.decode + got.unsplit) / total
        activity = got.activity
        weights[activity] = weights[activity] + weight if activity in weights else weight
        got.prefill *= per_weight
        got.decode *= per_weight
        got.unsplit *= per_weight
        if prompts:
            got.tilt = got.prefill - prompts * (got.prefill + got.decode + got.unsplit)
    return out, weights, prompts


def _run_clock(cell: Cell, pack: Pack, per_weight: float, timed: bool) -> None:
    clock = pack.clock
    clock.enter(pack.number, pack.changes)
    if not pack.members or (cell.told == "exclusive" and pack.only is not None):
        return
    length = cell.t1_ns - cell.t0_ns
    if timed:
        a, b = per_weight * max(1, length), 0.0
    else:
        b = per_weight * cell.part * pack.per_context
        a = per_weight * cell.part * pack.each + b * pack.tick
    clock.add(a, b, cell.static_each, length, cell.company)


def _price_unknown(cells: Sequence[Cell], unknown: Sequence[tuple[Cell, Row, Given]], known_weight: float) -> float:
    # Requests of which only times are known count as much as the others do on average, per participant and time.
    if not unknown:
        return 0.0
    known_time = 0
    for cell in cells:
        if cell.pack is not None:
            known_time += (cell.t1_ns - cell.t0_ns) * cell.pack.members
        for row in cell.rows:
            if not row.unknown:
                known_time += (cell.t1_ns - cell.t0_ns) * row.participants
    rate = known_weight / known_time if known_weight > 0.0 and known_time > 0 else 1.0
    total = 0.0
    for cell, row, got in unknown:
        weight = rate * max(1, cell.t1_ns - cell.t0_ns) * row.participants
        total += weight
        if row.unknown == "decode":
            got.decode += weight
        else:
            got.unsplit += weight
    return total


def _price_by_time(cells: Sequence[Cell], by_tier: dict[Tier, dict[Activity, Given]], given: Sequence[Given]) -> float:
    # No cell shows any work in this interval (a counter that did not move): time is all that is left to share by.
    for got in given:
        got.prefill = got.decode = got.unsplit = 0.0
    total = 0.0
    for cell in cells:
        tier = cell.told
        pack = cell.pack
        if pack is not None:
            weight = float(max(1, cell.t1_ns - cell.t0_ns)) * pack.members
            total += weight
            if tier == "exclusive" and pack.only is not None:
                by_tier[tier][pack.only].unsplit += weight
        for row in cell.rows:
            weight = float(max(1, cell.t1_ns - cell.t0_ns)) * row.participants
            by_tier[tier][row.activity].unsplit += weight
            total += weight
    return total


def _joined(known: dict[tuple[Activity, Tier], Given], given: Sequence[Given]) -> list[Given]:
    """Add to those who had something from another pool already; the others."""
    new: list[Given] = []
    for got in given:
        at = (got.activity, got.tier)
        before = known.get(at)
        if before is None:
            known[at] = got
            new.append(got)
            continue
        before.prefill += got.prefill
        before.decode += got.decode
        before.unsplit += got.unsplit
        before.static += got.static
        before.tilt += got.tilt
        before.busy_ns += got.busy_ns
        before.company_ns += got.company_ns
    return new


def _part_shared(given: Sequence[Given], weights: dict[Activity, float]) -> None:
    # What an activity got is what it shared, but for the part that would have been its own: its part of the weight.
    for got in given:
        weight = weights.get(got.activity)
        if weight is not None:
            got.shared = (got.prefill + got.decode + got.unsplit) * max(0.0, 1.0 - weight)
