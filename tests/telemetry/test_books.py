"""Counters never fall, and what they show closes in every collection."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from melodi_otel.attribution.books import Books, Snapshot, Who
from melodi_otel.telemetry.books import SteadyBooks

WHO = Who("m", "p")


def snapshot(attributed: float, idle: float, residual: float = 0.0) -> Snapshot:
    books = Books("d", measured=attributed + idle + residual, attributed=attributed, idle=idle, residual=residual)
    return Snapshot(
        0, {"d": books}, {("d", WHO, "decode", "measured"): attributed}, {("d", "idle", None): idle}, {WHO: 1}
    )


def test_one_snapshot_per_collection() -> None:
    """All instruments of a collection read one snapshot; the next collection reads a new one."""
    taken: list[int] = []

    def take() -> Snapshot:
        taken.append(1)
        return snapshot(float(len(taken)), 0.0)

    books = SteadyBooks(take)
    assert books.attributed("a")["d", WHO, "decode", "measured"] == 1.0
    assert books.measured("b")["d"] == 1.0
    assert books.residual("c")["d"] == 0.0
    assert books.attributed("a")["d", WHO, "decode", "measured"] == 2.0
    assert books.measured("b")["d"] == 2.0


def test_fall_is_held() -> None:
    """A series that falls stands still; the residual takes the difference until it has risen again."""
    states = iter([snapshot(10.0, 5.0), snapshot(8.0, 7.0), snapshot(12.0, 7.0)])
    books = SteadyBooks(lambda: next(states))
    seen = []
    for _ in range(3):
        attributed = books.attributed("a")["d", WHO, "decode", "measured"]
        seen.append((attributed, books.residual("r")["d"], books.measured("m")["d"]))
    assert seen == [(10.0, 0.0, 15.0), (10.0, -2.0, 15.0), (12.0, 0.0, 19.0)]


@given(st.lists(st.tuples(*[st.floats(-1e3, 1e3)] * 3), min_size=1, max_size=20))
def test_books_close(states: list[Any]) -> None:
    """Attributed + unattributed + residual = hw.energy to 1e-9 in every collection, and no counter falls."""
    rows = iter([snapshot(*state) for state in states])
    books = SteadyBooks(lambda: next(rows))
    before = [0.0, 0.0, 0.0]
    for _ in states:
        now = [
            sum(books.attributed("a").values()),
            sum(books.unattributed("u").values()),
            books.measured("m")["d"],
        ]
        assert abs(now[0] + now[1] + books.residual("r")["d"] - now[2]) <= 1e-9 * max(1.0, abs(now[2]))
        assert all(new >= old for old, new in zip(before, now, strict=True))
        before = now
