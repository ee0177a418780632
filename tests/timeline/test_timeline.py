"""Joules over time: intervals in order, interpolation with its bound, unknown time that is never 0 J."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from melodi_otel.timeline.timeline import Interval, Timeline

S = 1_000_000_000


def line(*readings: tuple[float, float], **options: float) -> Timeline:
    timeline = Timeline(**options)
    for t, joules in readings:
        timeline.counter(round(t * S), joules)
    return timeline


def test_first_reading_is_no_energy() -> None:
    """A counter that shows 5 MJ at first has used nothing yet."""
    timeline = line((10.0, 5e6))
    assert list(timeline.take()) == []
    assert timeline.covered_until == 10 * S


def test_interpolates_at_the_edges() -> None:
    """[0.5, 2.5] of 10, 20 and 30 W takes half of the first and last second."""
    between = line((0, 0), (1, 10), (2, 30), (3, 60)).between(S // 2, 5 * S // 2)
    assert between.joules == pytest.approx(5 + 20 + 15)
    assert between.coverage == 1.0


def test_edge_error_is_bounded() -> None:
    """Power between 10 and 30 W, an edge inside a second at 20 W: at most 10 x 10 / 20 x 1 s = 5 J; none at a reading."""
    timeline = line((0, 0), (1, 10), (2, 30), (3, 60))
    assert timeline.between(0, 3 * S // 2).error_bound == pytest.approx(5.0)
    assert timeline.between(0, 2 * S).error_bound == 0.0


def test_uncovered_time_lowers_coverage() -> None:
    """Half of [1, 3] has no reading."""
    between = line((0, 0), (2, 40)).between(S, 3 * S)
    assert (between.joules, between.coverage) == (pytest.approx(20.0), 0.5)
    assert line((0, 0), (2, 40)).between(5 * S, 6 * S).joules is None


def test_reset_is_unknown_time() -> None:
    """The interval of a reset has no joules."""
    timeline = line((0, 100), (1, 110), (2, 3), (3, 8))
    assert [interval.joules for interval in timeline.take()] == [10.0, None, 5.0]
    assert timeline.between(0, 3 * S).coverage == pytest.approx(2 / 3)


def test_a_repeated_value_waits_for_the_update() -> None:
    """Within two periods a repeated value means "not updated yet"; after that it is a true 0 J."""
    timeline = line((0, 0), (0.1, 0), (0.2, 7), (0.35, 7), (0.45, 7), period_s=0.1)
    assert list(timeline.take()) == [Interval(0, S // 5, 7.0), Interval(S // 5, 45 * S // 100, 0.0)]


def test_flush_decides_what_was_held_back() -> None:
    """At the end a held reading counts."""
    timeline = line((0, 0), (1, 5), (1.1, 5))
    list(timeline.take())
    assert timeline.flush()
    assert list(timeline.take()) == [Interval(S, 11 * S // 10, 0.0)]


def test_older_readings_are_left_out() -> None:
    """A reading that is not newer than the last changes nothing."""
    timeline = line((0, 0), (2, 20), (1, 10))
    assert timeline.covered_until == 2 * S


def test_window_of_a_gauge_is_shifted_back() -> None:
    """A mean over 1 s belongs to the middle of that second; the rest is decided at the end."""
    timeline = Timeline(window_s=1.0)
    for t in (1, 2, 3):
        timeline.gauge(t * S, 100.0)
    assert timeline.covered_until == 5 * S // 2
    assert timeline.between(S // 2, 5 * S // 2).joules == pytest.approx(200.0)
    assert timeline.flush()
    assert timeline.between(S // 2, 3 * S).joules == pytest.approx(250.0)


def test_memory_is_bounded() -> None:
    """Old intervals go; what is left still answers."""
    timeline = Timeline(keep_s=1.0)
    for n in range(1000):
        timeline.counter(n * S // 10, n * 1.0)
    assert len(timeline._intervals) < 40
    assert timeline.between(99 * S, 995 * S // 10).joules == pytest.approx(5.0)


@given(st.lists(st.tuples(st.floats(0.001, 3.0), st.floats(0.0, 500.0)), min_size=2, max_size=40), st.floats(0, 1))
def test_parts_sum_to_the_whole(steps: list[tuple[float, float]], cut: float) -> None:
    """Energy of two adjacent windows is the energy of their union."""
    timeline, t, joules = Timeline(), 0, 0.0
    timeline.counter(0, 0.0)
    for dt, watts in steps:
        t += max(1, round(dt * S))
        joules += watts * dt
        timeline.counter(t, joules)
    timeline.flush()
    end = timeline.covered_until or 0
    middle = round(end * cut)
    parts = [timeline.between(0, middle).joules or 0.0, timeline.between(middle, end).joules or 0.0]
    assert sum(parts) == pytest.approx(joules, rel=1e-9, abs=1e-9)
