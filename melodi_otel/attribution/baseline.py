"""Idle power of a device: given, or learnt while no request runs (with the model loaded: a context alone costs tens of W).

One interval says little: a counter moves in steps, and an interval that begins just before a step and ends just behind the
next may be 1.1 periods long and hold two steps. So quiet intervals are summed up to windows, joules by seconds, and what
is believed is the middle of the latest windows::

    intervals   |100 ms 12.3 J|102 ms 24.6 J|100 ms 12.3 J|…      123, 241, 123 W …: each by itself wrong by up to twice
    windows     |------------------ 1.0 s ------------------|     one step too many in ten: 10 %
    learnt      mean of the middle half of the last 5 windows     the window with the stray step is left out
"""

from __future__ import annotations

import math
from collections import deque
from typing import Final

QUIET_S: Final = 1.2
"""No work for this long before an interval, or its power may be the tail of the last request."""
WINDOW_S: Final = 1.0
"""Quiet seconds that make a window: a step of a 100 ms counter is 10 % of it."""
WINDOWS: Final = 5
"""Windows that are remembered: idle power drifts with the temperature, by 2 % within a minute and a half on an H200."""
QUIET_CORES: Final = 0.15
"""Busy cores of the host below which a CPU counts as idle."""


class Baseline:
    """Idle power in W: ``watts`` is None while it is not known.

    Until the first window is full it is the mean power of all that was quiet.
    """

    __slots__ = ("_given", "_joules", "_seconds", "_windows", "watts")

    def __init__(self, given: float | None) -> None:
        self._given = given is not None
        self._joules = self._seconds = 0.0
        self._windows: deque[float] = deque(maxlen=WINDOWS)
        self.watts = given

    def resume(self, watts: float) -> None:
        """Go on from what another process has learnt; a given figure stays."""
        if not self._given:
            self._windows.extend([watts] * WINDOWS)
            self.watts = watts

    def observe(self, seconds: float, joules: float, first: bool = False) -> None:
        """A quiet interval of this length used so much.

        The ``first`` one after a start or a gap begins at a reading of which nobody knows how old its figure is: it teaches
        something only where it is as long as a window.
        """
        if self._given or seconds <= 0.0 or (first and seconds < WINDOW_S):
            return
        self._seconds += seconds
        self._joules += joules
        mean = self._joules / self._seconds
        if self._seconds >= WINDOW_S - 1e-9:
            self._windows.append(mean)
            self._joules = self._seconds = 0.0
        self.watts = _middle(self._windows) if self._windows else mean


def _middle(windows: deque[float]) -> float:
    """Mean of the middle half; of three their median."""
    left_out = (len(windows) + 1) // 4
    middle = sorted(windows)[left_out : len(windows) - left_out]
    return math.fsum(middle) / len(middle)
