"""Points between two readings of a counter: the sum is the counter's, the place the history's."""

from __future__ import annotations

import pytest

from melodi_otel.power_shape import PowerShape
from melodi_otel.sources.base import PowerReading

MS = 1_000_000
T0 = 10_000
"""ms on the monotonic clock at which the counter was read first; times below are from here."""


def at(ms: int) -> int:
    return (T0 + ms) * MS


def history(*watts: tuple[int, int, float], every_ms: int = 20) -> list[PowerReading]:
    """Values every 20 ms: (from ms, to ms, watts) pieces."""
    return [PowerReading("G", at(t), w) for a, b, w in watts for t in range(a, b, every_ms)]


def shape(*pieces: tuple[int, int, float], **more: int) -> PowerShape:
    """One whose counter showed 1000 J at 0 ms."""
    made = PowerShape()
    made.between(at(0), 1000.0)
    made.add(history(*pieces, **more))
    return made


def test_the_history_tells_where_the_joules_lie() -> None:
    """100 W for 100 ms, 300 W for 200 ms: the counter's 70 J lie so (the edge is a slope 20 ms long).

    ms      0        100       200       300
    W       100 100 / 300 ...  300 ...   300
    h(t)    0        12        42        72         J: 8 until 80 ms, 4 on the slope to 100 ms, then 30 in 100 ms
    """
    points = shape((-40, 100, 100.0), (100, 340, 300.0)).between(at(300), 1070.0)
    assert [t // MS - T0 for t, _ in points] == [100, 200]
    assert [joules for _, joules in points] == pytest.approx([1000 + 70 * 12 / 72, 1000 + 70 * 42 / 72])


def test_joules_between_two_readings_are_the_counters() -> None:
    """Whatever the history's sum is, the points rise from one reading to the other and never beyond."""
    points = shape((-40, 160, 50.0), (160, 340, 700.0)).between(at(300), 1123.0)
    joules = [1000.0, *(value for _, value in points), 1123.0]
    assert len(points) == 2
    assert joules == sorted(joules)


def test_the_newest_value_may_be_some_ms_older_than_the_reading() -> None:
    """The history ends 15 ms before the reading: its last power goes on until there."""
    points = shape((-40, 300, 100.0)).between(at(300), 1030.0)
    assert [joules for _, joules in points] == pytest.approx([1010.0, 1020.0])


@pytest.mark.parametrize(
    "pieces",
    [
        ((-40, 100, 100.0), (200, 340, 100.0)),  # a gap of 100 ms
        ((20, 340, 100.0),),  # it begins after the last reading
        ((-40, 200, 100.0),),  # it ends 100 ms before this one
        ((-40, 340, 30.0),),  # 9 J where the counter says 30
        ((-40, 340, 400.0),),  # 120 J
        ((-40, 340, 0.0),),
        (),
    ],
)
def test_nothing_is_told_where_the_history_cannot_tell(pieces: tuple[tuple[int, int, float], ...]) -> None:
    """Gaps, missing ends and sums that are not the counter's: no point in between."""
    assert shape(*pieces).between(at(300), 1030.0) == []


def test_no_points_across_a_reset() -> None:
    """A counter that fell was reset: nothing is known in between."""
    assert shape((-40, 340, 100.0)).between(at(300), 5.0) == []


def test_a_figure_that_stands_still_waits_for_its_change() -> None:
    """A reading before the update moves nothing; the next change is spread over the whole time."""
    made = shape((-40, 640, 100.0))
    assert made.between(at(300), 1000.0) == []
    assert [t // MS - T0 for t, _ in made.between(at(600), 1060.0)] == [100, 200, 300, 400, 500]


def test_one_step_has_nothing_in_between() -> None:
    """Two readings a step apart are as fine as the counter itself."""
    assert shape((-40, 140, 100.0)).between(at(100), 1010.0) == []


def test_what_is_known_is_asked_no_more() -> None:
    """Values that came before are left out, and what lies before the reading is forgotten."""
    made = shape((-40, 340, 100.0))
    made.add(history((-40, 340, 999.0)))
    assert made.since_ns == at(320)
    made.between(at(300), 1030.0)
    made.add(history((340, 640, 100.0)))
    assert [j for _, j in made.between(at(600), 1060.0)] == pytest.approx([1040.0, 1050.0])


def test_how_far_back_drivers_remember() -> None:
    """2.3 s after the last reading the history no longer reaches it."""
    made = shape()
    assert made.reaches(at(2_300))
    assert not made.reaches(at(2_301))
    assert not PowerShape().reaches(0)
