"""How sure a share is: 1 sigma in joules from its parts.

structure: energy really divided with others, times the error of the tier's weights (``facts``: simulated errors of
unfitted weights; see docs/accuracy.md) · idle: the idle power's own error on what was shared · borders: a start or an end
falls inside a sensor interval, of which only the sum is known · source: an estimate's own spread. The sensor's gain error is
a systematic of the device and stated apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

from melodi_otel.attribution.meter import Tier

STRUCTURE: Final[Mapping[Tier, float]] = {
    "exclusive": 0.05,
    "step": 0.10,
    "slice": 0.11,
    "phase": 0.20,
    "window": 0.30,
    "equal": 0.40,
    "process": 0.10,
}
"""Relative 1 sigma of shared energy by tier, with weights that are not fitted."""
FITTED: Final[Mapping[Tier, float]] = {"exclusive": 0.0, "step": 0.0, "slice": 0.02}
"""Tiers whose weights are fitted, and the least relative 1 sigma of what they divide: token counts at each reading leave open
when in between the work was done.
"""
PROMPT: Final = 0.10
"""Relative 1 sigma of what a prompt's token costs against a decoded one, the least certain ratio of all: the two use a device
in other ways (arithmetic, memory), and one that is busy with both takes less than the sum.
"""
PROMPT_OF_SLICE: Final = 0.40
"""The same of slices: how much of a prompt was computed between two readings is a guess."""
PROMPT_OF_MIXTURE: Final = 0.30
"""The same for a mixture of experts."""
_IDLE: Final = 0.03
_TAIL: Final = 0.25
_TAIL_S: Final = 0.25
"""Most of what follows the work has been drawn within this time."""
_FEW: Final = 0.75
"""With one other request beside it, a share is off by so much more than among many, whose errors are on both sides."""
_BESIDE: Final = (0.72, 0.11)
"""A share is off by a + b ln(1 + others) times the error of weights: the more kinds of work a step holds at once, the less it is
the sum of them (from simulated servers, mean batches of 2 to 56).
"""
FEW_SLICES: Final = 1.2
"""The same of slices, beside it."""
_JITTER_S: Final = 0.004
DELAY_S: Final = 0.03
"""Delay of a meter that nothing is known of, 1 sigma: counters of boards show 15 to 50 ms, a filter of the board included."""


def share_sigma(
    *,
    joules: float,
    static: float,
    shared: Mapping[Tier, float],
    spread: float,
    duration_s: float,
    interval_s: float,
    idle_watts: float | None,
    source: float,
    rough: float | None = None,
    delayed: bool = False,
    idle_part: float | None = None,
    alone: float = 0.0,
    others: float | None = None,
) -> float:
    """1 sigma of a share in J.

    Args:
        joules, static: the share and its idle part.
        shared: dynamic joules divided with others, by tier.
        spread: the same, each times the relative error of the weights that divided it; what is wrong by the price of prompts
            beside it.
        duration_s: time on the device.
        interval_s: mean length of the sensor intervals it lived in.
        idle_watts: the device's idle power, None where unknown.
        source: relative 1 sigma of the source itself (estimates).
        rough: relative 1 sigma of an interval about the joules that are predicted for it, where they are: the border lies where
            the prediction puts it; None: power is taken as constant up to one step in the interval.
        delayed: the meter may be late by an amount that has not been found yet.
        idle_part: how much of the joules of all is idle energy; None: not known.
        alone: how much of its own is of times at which it was alone, 0..1: only then can a tail follow it.
        others: mean number of requests beside it; None: not known.
    """
    if joules <= 0.0:
        return 0.0
    if others is not None:
        spread *= _BESIDE[0] + _BESIDE[1] * math.log1p(max(0.0, others)) + _FEW / max(1.0, others) ** 1.5
    together = math.fsum(shared.values())
    dynamic = joules - static
    mixed = min(1.0, together / dynamic) if dynamic > 0.0 else 1.0
    # Idle power that is too high takes from the dynamic part of the same requests: only who differs from the others is wrong.
    idle = _IDLE * mixed * (static if idle_part is None else abs(static - idle_part * joules))
    watts = joules / duration_s if duration_s > 0.0 else 0.0
    step = watts * interval_s * (1.0 / math.sqrt(90.0) if rough is None else min(1.0 / math.sqrt(90.0), rough))
    jitter = watts * _JITTER_S
    if idle_watts is None:
        border = math.sqrt(2.0 * step**2 + 2.0 * jitter**2)
    else:
        tail = _TAIL * idle_watts * min(interval_s, _TAIL_S) * alone
        border = math.sqrt(2.0 * (step * mixed) ** 2 + 2.0 * (jitter * mixed) ** 2 + tail**2)
    # A request cannot be wrong by more at its borders than what two border intervals hold.
    border = min(border, 2.0 * watts * interval_s, joules)
    if delayed:
        # Among many who come and go, what one loses at its end it has won at its beginning.
        border = math.hypot(border, watts * DELAY_S * max(1.0 - mixed, 0.3))
    return math.sqrt(spread**2 + idle**2 + border**2 + (source * joules) ** 2)
