"""The board under simulated engines, and its sensors: from steps to power over time, from power to what is read of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from melodi_otel.testing.serving_power import Floats

TICK_S = 1e-3
"""Grid of the power curve."""

_LOW_PASS_S = 0.02


@dataclass(frozen=True, slots=True)
class Sensor:
    """What is read, and how.

    Attributes:
        kind: a cumulative counter in J, or a gauge in W.
        period_s: how often it moves; ``delay_s``: how old it is then.
        window_s: of a gauge, the time it averages over.
        read: ``locked``: read just after it moved, with the time of that move; ``free``: whenever it is time to.
        every_s: how often it is read.
        lost: part of the readings that are lost, some by themselves and some in a row.
        resets: how often the counter begins again at 0.
    """

    kind: Literal["counter", "gauge"] = "counter"
    period_s: float = 0.1
    delay_s: float = 0.017
    window_s: float | None = None
    read: Literal["locked", "free"] = "locked"
    every_s: float = 0.1
    lost: float = 0.0
    resets: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """A reading: ``known`` when it was there, ``t`` the time that it is said to be of, ``value`` in J or W."""

    known: float
    t: float
    value: float


class Board:
    """Power of one device over time.

    Args:
        energy: cumulative J at each tick of the grid, from 0 on.
    """

    def __init__(self, energy: Floats) -> None:
        self._energy = energy
        self.seconds = (len(energy) - 1) * TICK_S

    def energy(self, t: Floats | float) -> Floats:
        """Cumulative J at ``t`` s."""
        at = np.clip(np.asarray(t, dtype=np.float64) / TICK_S, 0.0, len(self._energy) - 1.0)
        below = np.minimum(at.astype(np.int64), len(self._energy) - 2)
        return self._energy[below] + (at - below) * (self._energy[below + 1] - self._energy[below])

    def watts(self, t: Floats | float, window_s: float) -> Floats:
        """Mean power of the ``window_s`` s before ``t``, in W."""
        return (self.energy(t) - self.energy(np.asarray(t) - window_s)) / window_s


def wander(rng: np.random.Generator, seconds: float, sigma: float, within_s: float) -> Floats:
    """A slow random walk around 0 on the grid: ``sigma`` wide, forgotten ``within_s`` s later."""
    every_s = 0.25
    points = int(seconds / every_s) + 2
    keep = float(np.exp(-every_s / within_s))
    push = rng.standard_normal(points) * sigma * np.sqrt(1.0 - keep * keep)
    walk = np.empty(points)
    walk[0] = sigma * rng.standard_normal()
    for place in range(1, points):
        walk[place] = keep * walk[place - 1] + push[place]
    return np.asarray(np.interp(grid(seconds), np.arange(points) * every_s, walk), dtype=np.float64)


def grid(seconds: float) -> Floats:
    """Times of the ticks up to ``seconds``."""
    return np.asarray(np.arange(round(seconds / TICK_S) + 1) * TICK_S, dtype=np.float64)


def smeared(energy: Floats) -> Floats:
    """Cumulative J behind the board's low-pass; all of it arrives within a quarter of a second."""
    kernel = np.exp(-np.arange(250) * TICK_S / _LOW_PASS_S)
    passed = np.convolve(np.diff(energy), kernel / kernel.sum())[: len(energy) - 1]
    return np.concatenate(([0.0], np.cumsum(passed)))


def tail(ticks: Floats, begins: Floats, ends: Floats, watts: float, decay_s: float) -> Floats:
    """Cumulative J of what a board draws on after each of its busy times, until the next.

    Args:
        ticks: where it is wanted.
        begins, ends: of the busy times, in order, none touching the next.
        watts, decay_s: how much at first, and how fast it fades.
    """

    def drawn(since: Floats) -> Floats:
        return watts * decay_s * (1.0 - np.exp(-since / decay_s))

    pauses = np.append(begins[1:], np.inf) - ends
    before = np.concatenate(([0.0], np.cumsum(drawn(pauses))))
    place = np.searchsorted(ends, ticks, side="right")
    last = np.maximum(place - 1, 0)
    since = np.clip(ticks - ends[last], 0.0, pauses[last])
    return np.where(place > 0, before[last] + drawn(since), 0.0)


def read(board: Board, sensor: Sensor, rng: np.random.Generator) -> list[Sample]:
    """Everything that is read of a board, in order."""
    moves = rng.uniform(0.0, sensor.period_s) + np.arange(int(board.seconds / sensor.period_s)) * sensor.period_s
    moves = moves + rng.uniform(0.0, 5e-4, len(moves))
    moves = moves[moves > sensor.delay_s + (sensor.window_s or 0.0)]
    if sensor.kind == "counter":
        shown = np.floor((4321.0 + board.energy(moves - sensor.delay_s)) * 1e3) / 1e3
        for at in np.sort(rng.uniform(0.3, 0.9, sensor.resets)) * board.seconds:
            after = int(np.searchsorted(moves, float(at)))
            shown[after:] -= shown[after]
    else:
        shown = np.round(board.watts(moves - sensor.delay_s, sensor.window_s or TICK_S), 3)
    if sensor.read == "locked":
        skip = max(1, round(sensor.every_s / sensor.period_s))
        moves, shown = moves[::skip], shown[::skip]
        known = moves + rng.uniform(0.003, 0.025, len(moves))
        said = np.minimum(known, moves + np.abs(rng.normal(0.0, 0.002, len(moves))))
    else:
        known = np.arange(moves[0] + 0.01, board.seconds, sensor.every_s)
        known = known + np.abs(rng.normal(0.0, 0.002, len(known)))
        said = known
        shown = shown[np.searchsorted(moves, known, side="right") - 1]
    kept = np.ones(len(known), dtype=bool)
    if sensor.lost:
        kept = rng.random(len(known)) >= sensor.lost / 2
        for begin in np.flatnonzero(rng.random(len(known)) < sensor.lost / 2 / 8):
            kept[begin : begin + int(rng.integers(3, 14))] = False
    return [
        Sample(float(a), float(b), float(value))
        for a, b, value in zip(known[kept], said[kept], shown[kept], strict=True)
    ]
