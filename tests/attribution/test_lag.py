"""The delay of a meter: found where power changes, left alone where nothing shows it."""

from __future__ import annotations

import random

import pytest

from melodi_otel.attribution.lag import Lag
from melodi_otel.attribution.meter import EngineId
from melodi_otel.attribution.weights import Features

ENGINE = EngineId("g", 0)
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
    lag.look()


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
    lag.look()
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
    lag.look()
    assert (lag.ns, lag.known) == (0, False)


def test_prices_that_were_learnt_wrongly_do_not_hide_it() -> None:
    """Steps are even, only prompts in some of them cost: what moved is found without knowing what a prompt costs."""
    lag, chance = Lag(), random.Random(7)
    late_ns = 70 * MS
    costs: list[tuple[int, int, float]] = []
    for n in range(1000):
        t0, t1 = 50 * n * MS, 50 * (n + 1) * MS
        prompt = 400.0 if chance.random() < 0.1 else 0.0
        lag.step(
            t0, t1, ENGINE, Features(1.0 if not prompt else 0.0, 8.0, prompt, fixed_prefill=1.0 if prompt else 0.0)
        )
        costs.append((t0, t1, 2.0 + 0.02 * prompt))
    for n in range(499):
        t0, t1 = 100 * n * MS, 100 * (n + 1) * MS
        used = sum(
            joules * max(0, min(b + late_ns, t1) - max(a + late_ns, t0)) / (b - a)
            for a, b, joules in costs[max(0, 2 * n - 4) : 2 * n + 4]
        )
        lag.interval(t0, t1, used + chance.gauss(0.0, 0.3))
    rows = lag.look()
    assert lag.ns / MS == pytest.approx(70.0, abs=3.0)
    assert rows is not None, "what was learnt at another delay has to be learnt again"
    for row in rows:
        ((decoded, prompt),) = [(x[1], x[2]) for x in row.work.values()]
        assert row.joules == pytest.approx(2.0 * decoded / 8.0 + 0.02 * prompt, abs=3.0)


def test_who_stays_at_his_delay_learns_nothing_again() -> None:
    lag = Lag()
    told(lag, 37)
    before = lag.ns
    assert lag.look() is None
    assert lag.ns == before
