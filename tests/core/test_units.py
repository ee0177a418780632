from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from melodi_otel import units


def test_hardware_units():
    """mJ, uJ and mW of the hardware become J and W."""
    assert units.millijoules(1500) == 1.5
    assert units.microjoules(2_500_000) == 2.5
    assert units.milliwatts(250) == 0.25


def test_watt_hours():
    """3600 J are 1 Wh."""
    assert units.watt_hours(3600.0) == 1.0


@pytest.mark.parametrize(("seconds", "ns"), [(0.0, 0), (12.3, 12_300_000_000), (-1e-9, -1), (2.5e-9, 2), (3.5e-9, 4)])
def test_times_are_rounded_as_the_trace_format_says(seconds, ns):
    """round(t * 1e9), halves to the even neighbour."""
    assert units.ns(seconds) == ns


@given(st.integers(min_value=0, max_value=10**15))
def test_times_survive_seconds(t_ns):
    """Up to eleven days of monotonic time no nanosecond is lost on the way through seconds."""
    assert units.ns(units.seconds(t_ns)) == t_ns
