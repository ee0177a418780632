"""Work that is reported when it is over takes its part of what nobody was told, and nothing else."""

from __future__ import annotations

import pytest

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import EngineId, Key, Late, Share
from melodi_otel.devices import Device

S = 1_000_000_000
IDLE_W, WATTS = 20.0, 100.0


class Meter:
    """One GPU of 20 W idle that draws 100 W all the time, read every 100 ms."""

    def __init__(self, kind: str = "gpu") -> None:
        self.ledger = Ledger(patience_s=None)
        self.ledger.device(Device("D", kind, idle_watts=IDLE_W))  # type: ignore[arg-type]
        self.now = 0
        self.ledger.counter("D", 0, 0.0)
        self.ledger.settle(0)

    def until(self, t_s: float) -> None:
        while self.now < round(t_s * S):
            self.now += S // 10
            self.ledger.counter("D", self.now, WATTS * self.now / S)
            self.ledger.settle(self.now)

    def late(self, name: str, t0_s: float, t1_s: float, *beside: float, elsewhere: bool = False) -> Share:
        """Report work of [t0, t1] now and read the meter once more."""
        key = Key("g", name)
        others = tuple(round(start * S) for start in beside)
        self.ledger.open(key, round(t0_s * S), model="m", late=Late(others, elsewhere))
        future = self.ledger.close(key, round(t1_s * S), None, "stop")
        self.until(self.now / S + 0.1)
        (share,) = future.result(0)
        return share

    def bucket(self, name: str) -> float:
        return getattr(self.ledger.snapshot().books["D"], name)

    def balanced(self) -> bool:
        return abs(self.ledger.snapshot().books["D"].imbalance()) <= 1e-9


@pytest.fixture
def meter() -> Meter:
    return Meter()


def test_alone_it_takes_what_was_left(meter: Meter) -> None:
    """Unseen from 1 s to 3 s at 100 W: 200 J, of which 40 J are idle power, all of them out of the buckets."""
    meter.until(3.0)
    booked = meter.bucket("idle") + meter.bucket("tail")
    share = meter.late("a", 1.0, 3.0)
    assert share.joules == pytest.approx(200.0, rel=1e-12)
    assert share.static == pytest.approx(40.0, rel=1e-12)
    assert meter.bucket("idle") + meter.bucket("tail") == pytest.approx(booked + 10.0 - 200.0, rel=1e-9)
    assert meter.balanced()


def test_it_says_how_it_knows(meter: Meter) -> None:
    """Start and end are all the evidence, so the tier is equal and the figure interpolated."""
    meter.until(3.0)
    share = meter.late("a", 1.0, 3.0)
    assert (share.method, share.quality, share.coverage, share.reason) == ("equal", "interpolated", 1.0, None)


def test_three_beside_each_other_get_the_same_whoever_ends_first(meter: Meter) -> None:
    """A, B and C run from 1 s; A ends at 2 s, B at 3 s, C at 4 s: 33.3 J, +50 J, +100 J, each instant shared equally."""
    meter.until(2.0)
    a = meter.late("a", 1.0, 2.0, 1.0, 1.0)
    meter.until(3.0)
    b = meter.late("b", 1.0, 3.0, 1.0)
    meter.until(4.0)
    c = meter.late("c", 1.0, 4.0)
    assert a.joules == pytest.approx(100 / 3, rel=1e-9)
    assert b.joules == pytest.approx(100 / 3 + 50, rel=1e-9)
    assert c.joules == pytest.approx(100 / 3 + 50 + 100, rel=1e-9)
    assert [share.concurrency for share in (a, b, c)] == pytest.approx([3.0, 2.5, 2.0])
    assert meter.balanced()


def test_a_neighbour_that_came_later_shares_only_its_own_time(meter: Meter) -> None:
    """Another one began at 1.5 s: half of that half second is its."""
    meter.until(2.0)
    assert meter.late("a", 1.0, 2.0, 1.5).joules == pytest.approx(75.0, rel=1e-9)


def test_what_others_were_told_stays_theirs(meter: Meter) -> None:
    """A request that was there from 1 s to 2 s has that second; late work of 1 s to 3 s gets the other one and is partial."""
    meter.until(1.0)
    meter.ledger.open(Key("g", "known"), S, engine=EngineId("g", 0), devices=("D",))
    meter.until(2.0)
    future = meter.ledger.close(Key("g", "known"), 2 * S, 1, "stop")
    meter.until(3.0)
    share = meter.late("a", 1.0, 3.0)
    assert future.result(0)[0].joules == pytest.approx(100.0, rel=1e-9)
    assert share.joules == pytest.approx(100.0, rel=1e-9)
    assert (share.coverage, share.quality, share.reason) == (pytest.approx(0.5), "partial", "late")
    assert meter.balanced()


def test_nothing_left_is_unavailable() -> None:
    """Before the first reading there is nothing to take: no joules, and never 0."""
    meter = Meter()
    meter.ledger.open(Key("g", "a"), -2 * S, late=Late())
    future = meter.ledger.close(Key("g", "a"), -S, None, "stop")
    meter.until(0.2)
    (share,) = future.result(0)
    assert (share.joules, share.quality, share.reason) == (None, "unavailable", "late")


@pytest.mark.parametrize(("elsewhere", "joules"), [(True, 200.0), (False, 40.0 + 160.0 * 0.25)])
def test_other_processes_joules_are_for_work_elsewhere(elsewhere: bool, joules: float) -> None:
    """Three quarters of the dynamic joules are other processes': only work that another process computed takes them."""
    meter = Meter()
    meter.ledger.foreign("D", 0, 0.75)
    meter.until(3.0)
    share = meter.late("a", 1.0, 3.0, elsewhere=elsewhere)
    assert share.joules == pytest.approx(joules, rel=1e-9)
    assert share.exclusive is (not elsewhere)
    assert meter.balanced()


def test_unseen_work_teaches_no_idle_power() -> None:
    """While somebody works of whom the meter hears later, an interval without requests is not taken for an idle one."""
    ledger = Ledger(patience_s=None)
    ledger.device(Device("D", "gpu"))
    ledger.counter("D", 0, 0.0)
    ledger.unseen(0, 1)
    for tick in range(1, 31):
        ledger.counter("D", tick * S // 10, 30.0 * tick)
        ledger.settle(tick * S // 10)
    assert ledger._core.accounts["D"].baseline.watts is None
    ledger.unseen(3 * S, -1)
    for tick in range(31, 61):
        ledger.counter("D", tick * S // 10, 900.0 + 2.0 * (tick - 30))
        ledger.settle(tick * S // 10)
    assert ledger._core.accounts["D"].baseline.watts == pytest.approx(20.0)


def test_a_counter_that_shows_it_never_falls(meter: Meter) -> None:
    """What moves from a bucket to a request keeps the sum of the books' series; see SteadyBooks for the counters."""
    meter.until(3.0)
    meter.late("a", 1.0, 3.0)
    view = meter.ledger.snapshot()
    whole = sum(view.attributed.values()) + sum(view.unattributed.values()) + view.books["D"].residual
    assert whole == pytest.approx(view.books["D"].measured, rel=1e-12)


def test_a_block_around_it_contains_it() -> None:
    """Late work inside a measured block is the block's: nothing is counted twice."""
    meter = Meter()
    meter.until(1.0)
    block = Key("g", "block")
    meter.ledger.open(block, S)
    meter.until(3.0)
    inner = Key("g", "inner")
    meter.ledger.open(inner, round(1.5 * S), parent=block, late=Late())
    inside = meter.ledger.close(inner, round(2.5 * S), None, "stop")
    outside = meter.ledger.close(block, 3 * S, None, "stop")
    meter.until(3.2)
    (share,) = inside.result(0)
    (whole,) = outside.result(0)
    assert (share.joules, share.quality, share.reason) == (None, "unavailable", "late")
    assert whole.rollup == pytest.approx(200.0, rel=1e-9)
    assert meter.balanced()
