"""The delay of a meter: found where power changes, left alone where nothing shows it."""

from __future__ import annotations

import random

import pytest

from melodi_otel.attribution.lag import Lag
from melodi_otel.attribution.meter import EngineId
from melodi_otel.attribution.weights import Features, Theta

ENGINE = EngineId("g", 0)
THETA = Theta(1.0, 0.0, 0.0, 0.0, 0.0, 0.0)
MS = 1_000_000


def told(lag: Lag, delay_ms: float, *, even: bool = False) -> None:
    """A minute of bursts of steps of 10 ms at 400 W, read every 100 ms by a counter that is late; then look."""
    chance = random.Random(5)
    steps: list[tuple[int, int]] = []
    at = 0
    while at < 60_000:
        for _ in range(chance.randint(20, 150)):
            steps.append((at * MS, (at + 10) * MS))
            at += 10
        at += 0 if even else chance.randint(50, 900)
    for t0, t1 in steps:
        lag.step(t0, t1, ENGINE, Features(4.0))
    for n in range(600):
        t0, t1 = (100 * n - delay_ms) * MS, (100 * n + 100 - delay_ms) * MS
        busy = sum(max(0.0, min(b, t1) - max(a, t0)) for a, b in steps)
        noise = chance.gauss(0.0, 0.5)
        lag.interval(100 * n * MS, (100 * n + 100) * MS, 400.0 * busy / 1e9 + noise)
    lag.look(lambda _: THETA)


@pytest.mark.parametrize("delay_ms", [-40, 0, 37, 130, 270])
def test_the_delay_is_found(delay_ms: int) -> None:
    lag = Lag()
    told(lag, delay_ms)
    assert lag.ns / MS == pytest.approx(delay_ms, abs=3.0)
    assert lag.known


def test_even_power_says_nothing() -> None:
    lag = Lag()
    told(lag, 90, even=True)
    assert (lag.ns, lag.known) == (0, False)


def test_too_little_says_nothing() -> None:
    lag = Lag()
    lag.step(0, 10 * MS, ENGINE, Features(1.0))
    lag.interval(0, 100 * MS, 5.0)
    lag.look(lambda _: THETA)
    assert not lag.known


def test_how_often_a_meter_is_read_is_no_power() -> None:
    """Read once a second while nothing runs and ten times while something does, at constant power: nothing is known."""
    lag, chance = Lag(), random.Random(6)
    at = 0
    for _ in range(30):
        for _ in range(2):
            lag.interval(at, at + 1000 * MS, 100.0 + chance.gauss(0.0, 0.2))
            at += 1000 * MS
        for _ in range(10):
            for n in range(10):
                lag.step(at + 10 * n * MS, at + 10 * (n + 1) * MS, ENGINE, Features(4.0))
            lag.interval(at, at + 100 * MS, 10.0 + chance.gauss(0.0, 0.2))
            at += 100 * MS
    lag.look(lambda _: THETA)
    assert (lag.ns, lag.known) == (0, False)
