"""Idle power of a device: given, or learnt while no request runs (with the model loaded: a context alone costs tens of W)."""

from __future__ import annotations

from typing import Final

QUIET_S: Final = 1.2
"""No work for this long before an interval, or its power may be the tail of the last request."""
_WARM_UP: Final = 20
_RATE: Final = 0.05
QUIET_CORES: Final = 0.15
"""Busy cores of the host below which a CPU counts as idle."""


class Baseline:
    """Idle power in W: ``watts`` is None while it is not known.

    Learnt as the mean of the first intervals, then a moving average of 5 % per interval.
    """

    __slots__ = ("_given", "_seen", "watts")

    def __init__(self, given: float | None) -> None:
        self._given = given is not None
        self._seen = 0
        self.watts = given

    def resume(self, watts: float) -> None:
        """Go on from what another process has learnt; a given figure stays."""
        if not self._given:
            self._seen, self.watts = _WARM_UP, watts

    def observe(self, watts: float) -> None:
        """An interval without work had this mean power."""
        if self._given:
            return
        self._seen += 1
        if self.watts is None:
            self.watts = watts
        else:
            self.watts += (watts - self.watts) * max(_RATE, 1.0 / min(self._seen, _WARM_UP))
