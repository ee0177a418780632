"""The parts of a share's 1 sigma, one at a time."""

from __future__ import annotations

import math

import pytest

from melodi_otel.attribution.engines import Work
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import EngineId, Key
from melodi_otel.attribution.uncertainty import STRUCTURE, share_sigma
from melodi_otel.devices import Device

S = 1_000_000_000
BORDERLESS = {"interval_s": 0.0, "idle_watts": 100.0, "source": 0.0, "rough": 0.0, "duration_s": math.inf}
"""No joules at the borders."""


def test_idle_power_is_wrong_for_who_differs_from_the_others() -> None:
    """3 % of the 20 J of idle energy that it has more than its part, 30 of 100 J instead of the usual tenth."""
    sigma = share_sigma(joules=100.0, static=30.0, shared={"step": 70.0}, spread=0.0, idle_part=0.1, **BORDERLESS)
    assert sigma == pytest.approx(0.03 * 20.0)


def test_who_is_as_the_others_are_has_no_error_of_idle_power() -> None:
    assert share_sigma(joules=100.0, static=30.0, shared={"step": 70.0}, spread=0.0, idle_part=0.3, **BORDERLESS) == 0.0


def spread_among(others: float | None) -> float:
    """Sigma of a share of 100 J whose weights leave 2 J open."""
    return share_sigma(
        joules=100.0, static=0.0, shared={"step": 100.0}, spread=2.0, idle_part=0.0, others=others, **BORDERLESS
    )


def test_company_that_is_not_known_changes_nothing() -> None:
    assert spread_among(None) == pytest.approx(2.0)


def test_few_others_leave_more_of_the_error() -> None:
    """One other, whose error is one's own: more than among ten."""
    assert spread_among(0.2) > spread_among(1.0) * 0.9 > spread_among(10.0)


def test_many_kinds_of_work_at_once_are_less_their_sum() -> None:
    assert spread_among(10.0) < spread_among(30.0) < spread_among(200.0) < 3.0


def test_a_tail_follows_who_was_alone() -> None:
    """A quarter of the idle power of an interval, for the half of its joules that it used by itself."""
    sigma = share_sigma(
        joules=100.0,
        static=0.0,
        shared={},
        spread=0.0,
        duration_s=1.0,
        interval_s=0.1,
        idle_watts=100.0,
        source=0.0,
        rough=0.0,
        alone=0.5,
    )
    assert sigma == pytest.approx(0.25 * 100.0 * 0.1 * 0.5)


def sigmas(work: dict[str, tuple[int, int]]) -> dict[str, float]:
    """Relative uncertainty of requests that live within one interval of a meter."""
    ledger = Ledger(patience_s=None, step_wait_s=60.0)
    ledger.device(Device("G", "gpu", idle_watts=10.0))
    ledger.counter("G", 0, 0.0)
    engine = EngineId("g", 0)
    futures = {}
    for name in work:
        ledger.open(Key("g", name), 100_000_000, engine=engine, devices=("G",))
    ledger.settle(100_000_000)
    for n in range(10):
        rows = [Work(name, prompt, decoded, 100 + n) for name, (prompt, decoded) in work.items()]
        ledger.work(engine, 100_000_000 + n * 10_000_000, 110_000_000 + n * 10_000_000, ("G",), rows)
    for name in work:
        futures[name] = ledger.close(Key("g", name), 200_000_000, 10, "stop")
    ledger.counter("G", S, 200.0)
    ledger.counter("G", 2 * S, 210.0)
    ledger.settle(2 * S)
    found = {}
    for name, future in futures.items():
        (share,) = future.result(0)
        assert share.joules is not None
        found[name] = share.uncertainty / share.joules
    return found


def test_a_short_request_has_the_error_of_its_weights() -> None:
    """Two decode together within one interval, half of the joules each: the error of weights that are not fitted is in it."""
    found = sigmas({"a": (0, 1), "b": (0, 1)})
    assert found["a"] == found["b"]
    assert found["a"] > 0.4 * STRUCTURE["step"]
