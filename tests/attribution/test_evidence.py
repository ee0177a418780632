"""Evidence about other work on a device."""

from __future__ import annotations

import pytest

from melodi_otel.attribution.evidence import Foreign


@pytest.mark.parametrize(
    ("told", "t0", "t1", "exclusive"),
    [
        ([], 0, 10, None),
        ([(0, 0.0, False)], 5, 10, True),
        ([(5, 0.0, False)], 0, 10, True),
        ([(11, 0.0, False)], 0, 10, None),
        ([(0, 0.0, True)], 5, 10, False),
        ([(0, 0.0, True), (5, 0.0, False)], 5, 10, True),
        ([(0, 0.0, True), (5, 0.0, False)], 4, 10, False),
        ([(0, 0.0, False), (5, 0.0, None)], 0, 10, None),
        ([(0, 0.0, None), (5, 0.0, True)], 0, 10, False),
        ([(0, 0.3, True)], 0, 10, False),
        ([(0, 0.0, False), (20, 0.0, True)], 0, 10, True),
    ],
)
def test_who_was_there(told, t0, t1, exclusive) -> None:
    """One who computed is enough for False; a part that is not known is enough for None; else True."""
    foreign = Foreign()
    for t, share, others in told:
        foreign.tell(t, share, others)
    assert foreign.exclusive(t0, t1) is exclusive
