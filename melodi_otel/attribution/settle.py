"""One closed interval of one device, divided: the conserving closed-form Shapley split.

    measured = static (idle power x time) + dynamic

- static: at each instant idle power is divided by the participants of everything that runs on the device then; an instant
  at which nothing runs is nobody's (idle, or loading).
- dynamic: cells (engine steps, or slices of requests without steps) carry weights; a cell that lies partly in the interval
  counts with that part. Every joule of ``dynamic`` is divided by weight, so the sum is the measured one whatever the
  weights are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from melodi_otel.attribution.activity import Activity
from melodi_otel.attribution.meter import Tier


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
class Cell:
    """Something that ran in [t0, t1] (already cut to the interval) with these rows, known at this tier."""

    t0_ns: int
    t1_ns: int
    tier: Tier
    rows: list[Row]
    static_each: float = 0.0
    company: float = 0.0
    alone: bool = True


@dataclass(slots=True)
class Given:
    """What one activity gets from one interval, in J; ``shared``: dynamic J it shared with others."""

    activity: Activity
    tier: Tier
    prefill: float = 0.0
    decode: float = 0.0
    unsplit: float = 0.0
    static: float = 0.0
    shared: float = 0.0
    busy_ns: int = 0
    company_ns: float = 0.0


@dataclass(slots=True)
class Pool:
    """Dynamic joules that belong to these cells and nobody else (an engine's part of a CPU, or the whole device)."""

    joules: float
    cells: Sequence[Cell]


@dataclass(slots=True)
class Division:
    """The outcome: what each activity gets, static J of instants at which nothing ran, dynamic J of pools without work."""

    given: list[Given] = field(default_factory=list[Given])
    idle_static: float = 0.0
    unclaimed: float = 0.0


def divide(t0_ns: int, t1_ns: int, static_joules: float, pools: Sequence[Pool]) -> Division:
    """Divide one interval.

    Args:
        t0_ns, t1_ns: the interval.
        static_joules: idle energy in it, ``min(idle power x length, measured)``.
        pools: dynamic joules and the cells that share them; a cell stands in one pool.
    """
    cells = [cell for pool in pools for cell in pool.cells]
    out = Division()
    out.idle_static = _share_static(t0_ns, t1_ns, static_joules, cells)
    given: dict[tuple[int, Tier], Given] = {}
    for cell in cells:
        for row in cell.rows:
            got = _slot(given, row.activity, cell)
            got.static += cell.static_each * row.participants
            got.busy_ns += cell.t1_ns - cell.t0_ns
            got.company_ns += cell.company
    for pool in pools:
        if not pool.cells:
            out.unclaimed += pool.joules
        elif pool.joules != 0.0:
            _share_dynamic(pool, given)
    out.given = list(given.values())
    return out


def unworked_part(t0_ns: int, t1_ns: int, cells: Sequence[Cell]) -> float:
    """The part of [t0, t1] in which nothing runs, 0..1; 0 where there is no cell of any length."""
    covered, until = 0, t0_ns
    for start, stop in sorted((cell.t0_ns, cell.t1_ns) for cell in cells):
        covered += max(0, stop - max(start, until))
        until = max(until, stop)
    return 1.0 - covered / (t1_ns - t0_ns) if covered else 0.0


def _slot(given: dict[tuple[int, Tier], Given], activity: Activity, cell: Cell) -> Given:
    tier: Tier = "exclusive" if cell.alone and cell.tier != "process" else cell.tier
    at = (id(activity), tier)
    found = given.get(at)
    if found is None:
        found = given[at] = Given(activity, tier)
    return found


def _share_static(t0_ns: int, t1_ns: int, joules: float, cells: Sequence[Cell]) -> float:
    # A sweep over starts and ends: between two of them the set of running cells, and so the number of participants, is
    # constant. Cells of zero length take part in nothing here.
    rate = joules / (t1_ns - t0_ns)
    if not cells:
        return joules
    edges: list[tuple[int, int, Cell]] = []
    for cell in cells:
        if cell.t1_ns > cell.t0_ns:
            edges.append((cell.t0_ns, 1, cell))
            edges.append((cell.t1_ns, 0, cell))
    edges.sort(key=lambda edge: (edge[0], edge[1]))
    running: dict[int, Cell] = {}
    participants = requests = 0
    idle_ns, last = 0, t0_ns
    for at, starts, cell in edges:
        length = at - last
        if length > 0:
            if participants:
                each = rate * length / participants
                for other in running.values():
                    other.static_each += each
                    other.company += length * requests
                    if requests > 1:
                        other.alone = False
            else:
                idle_ns += length
            last = at
        count, heads = sum(row.participants for row in cell.rows), len(cell.rows)
        if starts:
            running[id(cell)] = cell
            participants, requests = participants + count, requests + heads
        else:
            del running[id(cell)]
            participants, requests = participants - count, requests - heads
    return rate * (idle_ns + (t1_ns - last))


def _share_dynamic(pool: Pool, given: dict[tuple[int, Tier], Given]) -> None:
    _price_unknown(pool.cells)
    total = sum(row.prefill + row.decode + row.unsplit for cell in pool.cells for row in cell.rows)
    if total <= 0.0:
        # No cell shows any work in this interval (a counter that did not move): time is all that is left to share by.
        for cell in pool.cells:
            for row in cell.rows:
                row.unsplit = float(max(1, cell.t1_ns - cell.t0_ns)) * row.participants
        total = sum(row.prefill + row.decode + row.unsplit for cell in pool.cells for row in cell.rows)
    per_weight = pool.joules / total
    mine: dict[int, float] = {}
    for cell in pool.cells:
        for row in cell.rows:
            got = _slot(given, row.activity, cell)
            got.prefill += row.prefill * per_weight
            got.decode += row.decode * per_weight
            got.unsplit += row.unsplit * per_weight
            at = id(row.activity)
            mine[at] = mine.get(at, 0.0) + row.prefill + row.decode + row.unsplit
    for got in given.values():
        weight = mine.get(id(got.activity))
        if weight is not None:
            dynamic = got.prefill + got.decode + got.unsplit
            got.shared = dynamic * max(0.0, 1.0 - weight / total)


def _price_unknown(cells: Sequence[Cell]) -> None:
    # Requests of which only times are known count as much as the others do on average, per participant and time.
    unknown = [(cell, row) for cell in cells for row in cell.rows if row.unknown]
    if not unknown:
        return
    known_weight = known_time = 0.0
    for cell in cells:
        for row in cell.rows:
            if not row.unknown:
                known_weight += row.prefill + row.decode + row.unsplit
                known_time += (cell.t1_ns - cell.t0_ns) * row.participants
    rate = known_weight / known_time if known_weight > 0.0 and known_time > 0.0 else 1.0
    for cell, row in unknown:
        weight = rate * max(1, cell.t1_ns - cell.t0_ns) * row.participants
        if row.unknown == "decode":
            row.decode = weight
        else:
            row.unsplit = weight
