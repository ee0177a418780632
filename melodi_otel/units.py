"""Units: the one place where a number changes its scale.

Hardware speaks integers in its own unit (mJ, uJ, mW); the rest of the house speaks joules, watts and integer
nanoseconds of ``CLOCK_MONOTONIC``. Raw integers wear their unit in the name (``energy_mj``) until they pass here.
"""

from __future__ import annotations

from typing import Final, NewType

Joules = NewType("Joules", float)
Watts = NewType("Watts", float)

NS_PER_S: Final = 1_000_000_000
NS_PER_MS: Final = 1_000_000
JOULES_PER_WATT_HOUR: Final = 3600.0


def millijoules(energy_mj: int) -> Joules:
    """Joules of an NVML energy counter (mJ)."""
    return Joules(energy_mj / 1000)


def microjoules(energy_uj: int) -> Joules:
    """Joules of a powercap counter (uJ)."""
    return Joules(energy_uj / 1_000_000)


def milliwatts(power_mw: int) -> Watts:
    """Watts of an NVML power reading (mW)."""
    return Watts(power_mw / 1000)


def ns(seconds: float) -> int:
    """Integer nanoseconds of a time in seconds: ``round(t * 1e9)``, the rule of the trace format."""
    return round(seconds * 1e9)


def seconds(t_ns: int) -> float:
    """Seconds of an integer nanosecond time."""
    return t_ns / NS_PER_S


def watt_hours(joules: float) -> float:
    """Watt-hours of ``joules`` (1 Wh = 3600 J)."""
    return joules / JOULES_PER_WATT_HOUR
