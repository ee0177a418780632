"""Dividing an interval: the walk over starts and ends gives what the plain definition gives, and every joule is somebody's."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from melodi_otel.attribution.activity import Activity
from melodi_otel.attribution.late import Beside
from melodi_otel.attribution.meter import Key
from melodi_otel.attribution.settle import Cell, Pool, Row, divide, share_static, unworked_part

T0, T1 = 1_000_000_000_000, 1_000_100_000_000
Bounds = list[tuple[int, int, int]]

times = st.one_of(st.integers(T0, T1), st.integers(T0, T0 + 20), st.integers(T1 - 20, T1), st.sampled_from([T0, T1]))
bounds = st.lists(st.tuples(times, times, st.integers(1, 5)), max_size=30)


def cells_of(found: Bounds) -> list[Cell]:
    cells: list[Cell] = []
    for a, b, rows in found:
        made = [Row(Activity(Key("g", f"{len(cells)}-{n}"), 0), n + 1, decode=1.0) for n in range(rows)]
        cells.append(Cell(min(a, b), max(a, b), "slice", made))
    return cells


def by_definition(t0_ns: int, t1_ns: int, joules: float, cells: list[Cell]) -> float:
    """At every instant among all who run then: each piece between two edges told to each cell in it."""
    rate = joules / (t1_ns - t0_ns)
    edges = sorted({t0_ns, t1_ns} | {edge for cell in cells for edge in (cell.t0_ns, cell.t1_ns)})
    idle: list[float] = []
    static: dict[int, list[float]] = {id(cell): [] for cell in cells}
    for start, stop in pairwise(edges):
        running = [cell for cell in cells if cell.t0_ns <= start and cell.t1_ns >= stop]
        if not running:
            idle.append(rate * (stop - start))
            continue
        participants = sum(row.participants for cell in running for row in cell.rows)
        requests = sum(len(cell.rows) for cell in running)
        for cell in running:
            static[id(cell)].append(rate * (stop - start) / participants)
            cell.company += (stop - start) * requests
            cell.alone = cell.alone and requests == 1
    for cell in cells:
        cell.static_each = math.fsum(static[id(cell)])
    return math.fsum(idle)


@given(bounds, st.floats(1e-6, 1e5))
def test_idle_power_is_shared_as_defined(found: Bounds, joules: float) -> None:
    plain, walked = cells_of(found), cells_of(found)
    idle = by_definition(T0, T1, joules, plain)
    assert share_static(T0, T1, joules, walked) == pytest.approx(idle, rel=1e-12, abs=0.0)
    for expected, cell in zip(plain, walked, strict=True):
        assert cell.static_each == pytest.approx(expected.static_each, rel=1e-12, abs=0.0)
        assert (cell.company, cell.alone) == (expected.company, expected.alone)


def test_a_nanosecond_behind_a_long_stretch_keeps_its_digits() -> None:
    long, short = cells_of([(T0, T1 - 1, 1), (T1 - 1, T1, 2)])
    share_static(T0, T1, 7.0, [long, short])
    assert short.static_each == pytest.approx(7.0 / (T1 - T0) / 3, rel=1e-15, abs=0.0)  # participants: 1 + 2


@given(bounds, st.floats(0.0, 1e5), st.floats(-10.0, 1e5))
def test_every_joule_is_somebodys(found: Bounds, static: float, dynamic: float) -> None:
    division = divide(T0, T1, static, [Pool(dynamic, cells_of(found))])
    parts = [part for one in division.given for part in (one.static, one.prefill, one.decode, one.unsplit)]
    total = math.fsum([*parts, division.idle_static, division.unclaimed])
    assert total == pytest.approx(static + dynamic, rel=1e-12, abs=1e-9)


@given(bounds)
def test_the_part_without_work_is_what_no_cell_covers(found: Bounds) -> None:
    cells = cells_of(found)
    idle = by_definition(T0, T1, 1.0, cells)
    covered = any(cell.t1_ns > cell.t0_ns for cell in cells)
    assert unworked_part(T0, T1, cells) == pytest.approx(idle if covered else 0.0, rel=1e-9, abs=1e-12)


def step(part: float, *rows: Row) -> Cell:
    return Cell(T0, T1, "step", rows, part)


def one(name: str, *, prefill: float = 0.0, decode: float = 0.0) -> Row:
    return Row(Activity(Key("g", name), 0), 1, prefill, decode)


def test_a_cell_counts_with_its_part_of_the_weights() -> None:
    whole, half = one("a", prefill=4.0), one("b", decode=4.0)
    a, b = divide(T0, T1, 0.0, [Pool(90.0, [step(1.0, whole), step(0.5, half)])]).given
    assert (a.prefill, b.decode) == (60.0, 30.0)


@pytest.mark.parametrize("weight", [4.0, 0.0], ids=["with weights", "by time alone"])
def test_rows_stay_as_they_are_for_the_next_device(weight: float) -> None:
    rows = [one("a", decode=weight), one("b")]
    if weight:
        rows[1].unknown = "unsplit"
    first = divide(T0, T1, 1.0, [Pool(90.0, [step(1.0, *rows)])]).given
    again = divide(T0, T1, 1.0, [Pool(90.0, [step(1.0, *rows)])]).given
    assert first == again
    assert [(row.prefill, row.decode, row.unsplit) for row in rows] == [(0.0, weight, 0.0), (0.0, 0.0, 0.0)]


def test_who_stands_in_two_pools_gets_of_both_under_one_tier() -> None:
    row, other = one("a", decode=1.0), one("b", decode=3.0)
    pools = [Pool(10.0, [step(1.0, row)]), Pool(40.0, [step(1.0, row, other)])]
    a, b = divide(T0, T1, 0.0, pools).given
    assert (a.decode, b.decode) == (20.0, 30.0)


@pytest.mark.parametrize(("beside", "shared"), [(False, 0.0), (True, 22.5)], ids=["alone", "one in four"])
def test_shared_is_the_part_that_others_had_in_it(beside: bool, shared: float) -> None:
    """30 J for it, alone or of 120 J: of its own 30 J three quarters are a matter of weights."""
    rows = [one("a", decode=1.0), one("b", decode=3.0)] if beside else [one("a", decode=1.0)]
    joules = 120.0 if beside else 30.0
    (first, *_) = divide(T0, T1, 0.0, [Pool(joules, [step(1.0, *rows)])]).given
    assert (first.decode, first.shared) == (30.0, shared)


@given(st.lists(st.integers(-50, 150), max_size=40), st.integers(0, 100), st.integers(1, 100))
def test_company_of_who_began_at_these_times(starts: list[int], t0: int, length: int) -> None:
    t1 = t0 + length
    expected = sum(max(0, t1 - max(start, t0)) for start in starts) / length
    assert Beside(starts).company(t0, t1) == expected
