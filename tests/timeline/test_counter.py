"""Counter repair: first, advanced, wrapped and reset are told apart."""

from __future__ import annotations

import pytest

from melodi_otel.timeline.counter import Change, Counter

S = 1_000_000_000
RANGE_J = 262_143.32885

CASES = [
    # seconds later, joules, range, expected
    (0.1, 110.0, RANGE_J, Change("advanced", 10.0)),
    (0.1, 100.0, RANGE_J, Change("advanced", 0.0)),
    (0.1, 5.0, None, Change("reset", None)),  # a counter that does not wrap
    (0.1, 5.0, RANGE_J, Change("reset", None)),  # far from its top: 262 kJ in 0.1 s are no wrap
]


@pytest.mark.parametrize(("later", "joules", "range_j", "expected"), CASES)
def test_change(later: float, joules: float, range_j: float | None, expected: Change) -> None:
    """A reading after 100 J says what happened in between."""
    counter = Counter()
    assert counter.read(0, 100.0, range_j) == Change("first", None)
    assert counter.read(round(later * S), joules, range_j) == expected


def test_wrap_near_the_top() -> None:
    """A counter that passes its range goes on from 0: the joules are those on both sides."""
    counter = Counter()
    counter.read(0, RANGE_J - 4.0, RANGE_J)
    change = counter.read(S // 10, 6.0, RANGE_J)
    assert change.event == "wrapped"
    assert change.joules == pytest.approx(10.0)


def test_after_a_reset_it_counts_on() -> None:
    """The reading that fell is the next baseline."""
    counter = Counter()
    for t, joules in enumerate((1000.0, 3.0)):
        counter.read(t * S, joules)
    assert counter.read(2 * S, 8.0) == Change("advanced", 5.0)
