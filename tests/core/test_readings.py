"""Readings on their way into the ledger: a device's gain is corrected where it is known."""

from __future__ import annotations

import pytest

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.devices import Device
from melodi_otel.readings import Readings
from melodi_otel.testing.clock import ManualClock

S = 1_000_000_000


@pytest.fixture
def ledger() -> Ledger:
    ledger = Ledger()
    for name in ("right", "low"):
        ledger.device(Device(name, "gpu", idle_watts=0.0))
    return ledger


def test_a_counter_that_shows_too_little(ledger: Ledger) -> None:
    """One that shows 95 J of 100 counts 100 J, also across its wrap; the other stays as it is."""
    readings = Readings(ledger, {}, lambda: None, ManualClock(), None, {"low": 1.0 / 0.95})
    for name, gain in (("right", 1.0), ("low", 0.95)):
        for n, joules in enumerate((65_400.0, 65_500.0, 64.0)):
            readings.counter(name, (n + 1) * S, gain * joules, gain * 65_536.0)
    ledger.flush(4 * S)
    books = ledger.snapshot().books
    assert books["low"].measured == pytest.approx(books["right"].measured) == pytest.approx(200.0)


def test_a_gauge_that_shows_too_much(ledger: Ledger) -> None:
    readings = Readings(ledger, {}, lambda: None, ManualClock(), None, {"low": 0.5})
    for n in range(3):
        readings.gauge("low", (n + 1) * S, 200.0)
    ledger.flush(4 * S)
    assert ledger.snapshot().books["low"].measured == pytest.approx(200.0)
