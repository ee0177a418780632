"""Idle power that is learnt: windows of quiet time, the middle of the latest ones."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from melodi_otel.attribution.baseline import Baseline
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.devices import Device

S = 1_000_000_000

RECORDED_1 = [(88, 137.3), (98, 122.9), (100, 120.4), (93, 130.2), (277, 87.2), (267, 135.2), (277, 130.6), (257, 93.6),
              (267, 135.4), (275, 131.3), (1000, 120.4), (112, 118.6)]  # fmt: skip
"""Quiet intervals on an H200 that drew 120.7 W, dated by the reading: (ms, W)."""
RECORDED_2 = [(100, 122.9), (100, 123.2), (100, 123.1), (100, 123.1), (102, 240.9), (100, 123.2), (100, 123.0),
              (100, 123.2), (936, 118.3)]  # fmt: skip
"""And at 123.2 W, with an interval that holds two steps."""


def learnt(intervals: Iterable[tuple[float, float]], baseline: Baseline | None = None) -> float:
    """W after these intervals of (ms, W)."""
    made = baseline or Baseline(None)
    for ms, watts in intervals:
        made.observe(ms / 1e3, watts * ms / 1e3)
    assert made.watts is not None
    return made.watts


def test_before_a_window_is_full_all_that_was_quiet_counts() -> None:
    """0.1 s at 240 W and 0.4 s at 120 W: 72 J in 0.5 s."""
    assert learnt([(100, 240.0), (400, 120.0)]) == pytest.approx(144.0)


def test_intervals_weigh_by_their_length() -> None:
    """0.1 s at 240 W and 0.9 s at 120 W are 132 W."""
    assert learnt([(100, 240.0), (900, 120.0)]) == pytest.approx(132.0)


def test_windows_with_a_stray_step_are_left_out() -> None:
    """Five windows of 123 W and one of 135: the middle half is 123."""
    stray = [(100, 123.0)] * 9 + [(100, 246.0)]
    assert learnt([(100, 123.0)] * 20 + stray + [(100, 123.0)] * 30) == pytest.approx(123.0)


def test_a_step_too_many_and_a_step_too_few() -> None:
    """Windows of 110, 120, 121, 122 and 133 W: the mean of the middle three."""
    assert learnt([(1000, w) for w in (121.0, 133.0, 110.0, 122.0, 120.0)]) == pytest.approx(121.0)


def test_it_follows_the_temperature() -> None:
    """From 120 to 130 W within a minute, then still: after five more seconds it is there, and never ahead."""
    baseline = Baseline(None)
    for second in range(60):
        told = learnt([(1000, 120.0 + second / 6)], baseline)
        assert 120.0 <= told <= 120.0 + second / 6
    assert learnt([(1000, 130.0)] * 5, baseline) == pytest.approx(130.0)


def test_it_goes_on_from_what_another_learnt() -> None:
    """123 W of the process before, then 130 W: believed when four of the last five windows say so."""
    baseline = Baseline(None)
    baseline.resume(123.0)
    assert baseline.watts == 123.0
    assert learnt([(1000, 130.0)], baseline) == pytest.approx(123.0)
    assert learnt([(1000, 130.0)] * 3, baseline) == pytest.approx(130.0)


def test_a_given_one_is_not_learnt() -> None:
    """Idle power by configuration stays."""
    given = Baseline(50.0)
    given.resume(80.0)
    assert learnt([(1000, 300.0)], given) == 50.0


def test_recorded_intervals_dated_by_the_reading() -> None:
    """Without the phase: 120.7 W within 1 %, then 123.2 W, with a stray step, within 2.5 %; plain means: 122 and 136 W."""
    baseline = Baseline(None)
    assert learnt(RECORDED_1[1:], baseline) == pytest.approx(120.7, rel=0.01)
    assert learnt(RECORDED_2, baseline) == pytest.approx(123.2, rel=0.025)


def readings(ledger: Ledger, start_ns: int, *intervals: tuple[int, float]) -> int:
    """Counter readings at the ends of intervals of (ms, W); the last time."""
    joules, t_ns = 0.0, start_ns
    ledger.counter("D", t_ns, joules)
    for ms, watts in intervals:
        t_ns += ms * 1_000_000
        joules += watts * ms / 1e3
        ledger.counter("D", t_ns, joules)
    return t_ns


def test_the_first_interval_teaches_nothing() -> None:
    """It begins at a reading that may be a step old: 100 ms at 246 W, then 123 W are 123 W."""
    ledger = Ledger(patience_s=None)
    ledger.device(Device("D", "gpu"))
    readings(ledger, 1000 * S, (100, 246.0), *[(100, 123.0)] * 20)
    ledger.settle(1002 * S)
    assert ledger._core.accounts["D"].baseline.watts == pytest.approx(123.0)


def test_the_first_interval_after_a_reset_teaches_nothing() -> None:
    """The counter starts over: the interval behind the gap is left out as the first one is."""
    ledger = Ledger(patience_s=None)
    ledger.device(Device("D", "gpu"))
    end = readings(ledger, 1000 * S, *[(100, 123.0)] * 12)
    readings(ledger, end + S // 10, (100, 246.0), *[(100, 123.0)] * 8)
    ledger.settle(1003 * S)
    assert ledger._core.accounts["D"].baseline.watts == pytest.approx(123.0)
