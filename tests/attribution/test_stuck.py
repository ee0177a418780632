"""A counter that stands still while the device cannot: nobody is told 0 J for it."""

from __future__ import annotations

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Key, Share
from melodi_otel.devices import Device

S = 1_000_000_000


def share_of(idle_watts: float) -> tuple[Share, Ledger]:
    """A request of 20 s; the counter shows 10 J each 0.1 s for 5 s and then nothing more."""
    ledger = Ledger(patience_s=None)
    ledger.device(Device("G", "gpu", idle_watts=idle_watts))
    ledger.counter("G", 0, 0.0)
    ledger.open(Key("g", "r"), 0, devices=("G",))
    for n in range(1, 201):
        ledger.counter("G", n * S // 10, 10.0 * min(n, 50))
        ledger.settle(n * S // 10)
    future = ledger.close(Key("g", "r"), 20 * S, None, "stop")
    ledger.flush(21 * S)
    return future.result(0)[0], ledger


def test_what_it_does_not_count_is_not_known() -> None:
    """Of 20 s five were counted, 2.8 more are believed to be 0 J; the rest is missing, and the request says so."""
    share, ledger = share_of(50.0)
    assert (share.joules, share.quality) == (500.0, "partial")
    assert share.coverage == 0.39
    assert ledger.snapshot().books["G"].imbalance() == 0.0


def test_a_device_that_may_draw_nothing() -> None:
    share, _ = share_of(0.0)
    assert (share.joules, share.coverage) == (500.0, 1.0)
