"""CPU time of several groups of processes: each group's requests share its joules, and nobody else's."""

from __future__ import annotations

import pytest

from melodi_otel.attribution.evidence import WHOLE
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import EngineId, Key
from melodi_otel.devices import Device

S = 1_000_000_000
X, Y = EngineId("x", WHOLE), EngineId("y", WHOLE)


class Host:
    """A package of 100 W without idle power, two busy cores, read every second."""

    def __init__(self) -> None:
        self.ledger = Ledger(patience_s=None)
        self.ledger.device(Device("C", "cpu", idle_watts=0.0))
        self.ledger.counter("C", 0, 0.0)

    def cpu(self, t_s: float, **busy_s: float) -> None:
        """CPU seconds of groups so far."""
        for group, seconds in busy_s.items():
            self.ledger.cpu("C", EngineId(group, WHOLE), round(t_s * S), seconds, 2.0 * t_s)

    def open(self, group: str, name: str = "a", number: int | None = 0) -> Key:
        key = Key(group, name)
        self.ledger.open(key, 0, engine=None if number is None else EngineId(group, number), devices=("C",))
        self.ledger.progress(key, 0, 1, first_token_ns=0)
        return key

    def read(self, t_s: float) -> None:
        self.ledger.counter("C", round(t_s * S), 100.0 * t_s)
        self.ledger.settle(round((t_s + 0.2) * S))

    def got(self, key: Key) -> float | None:
        return self.ledger.accrued()[key][0].joules

    def bucket(self, name: str) -> float:
        books = self.ledger.snapshot().books["C"]
        assert abs(books.imbalance()) <= 1e-9
        return getattr(books, name)


def test_a_group_has_its_part_and_what_it_uses_outside_requests_is_not_foreign() -> None:
    """x uses 1 of 2 cores and has a request: 50 J. y uses half a core and has none: 25 J idle. The rest is foreign."""
    host = Host()
    key = host.open("x")
    host.cpu(0, x=0.0, y=0.0)
    host.cpu(1, x=1.0, y=0.5)
    host.read(1)
    assert host.got(key) == 50.0
    assert host.ledger.accrued()[key][0].method == "process"
    assert (host.bucket("idle"), host.bucket("foreign")) == (25.0, 25.0)


def test_requests_of_two_groups_do_not_share() -> None:
    """Two requests in y and one in x: 25 J are divided among two, 50 J stay one's."""
    host = Host()
    x, y, z = host.open("x"), host.open("y"), host.open("y", "b")
    host.cpu(0, x=0.0, y=0.0)
    host.cpu(1, x=1.0, y=0.5)
    host.read(1)
    assert [host.got(key) for key in (x, y, z)] == [50.0, 12.5, 12.5]
    assert host.bucket("foreign") == 25.0


def test_an_engine_with_a_series_of_its_own_is_taken_out_of_its_group() -> None:
    """The group uses 1 core, 0.6 of it the engine: 30 J for its request, 20 J for a block beside it, nothing twice."""
    host = Host()
    request, block = host.open("x"), host.open("x", "block", number=None)
    for t_s in (0, 1):
        host.cpu(t_s, x=1.0 * t_s)
        host.ledger.cpu("C", EngineId("x", 0), t_s * S, 0.6 * t_s, 2.0 * t_s)
    host.read(1)
    assert host.got(request) == pytest.approx(30.0, rel=1e-12)
    assert host.got(block) == pytest.approx(20.0, rel=1e-12)
    assert host.bucket("foreign") == pytest.approx(50.0, rel=1e-12)


def test_a_group_that_is_gone_is_not_waited_for() -> None:
    """The interval up to 2 s waits for y's CPU time, until it is known that there will be no more of it."""
    host = Host()
    host.open("x")
    for t_s in (0, 1):
        host.cpu(t_s, x=1.0 * t_s, y=0.5 * t_s)
    host.read(1)
    host.cpu(2, x=2.0)
    host.read(2)
    assert host.bucket("measured") == 100.0
    host.ledger.cpu_gone(Y)
    host.ledger.settle(round(2.2 * S))
    assert host.bucket("measured") == 200.0


@pytest.mark.parametrize("alone", [False, True])
def test_its_joules_up_to_its_end_stay_right(alone: bool) -> None:
    """y uses 1 of 2 cores until 1.5 s and is gone: 25 J of the second second, whether or not another series goes on."""
    host = Host()
    key = host.open("y")
    others = {} if alone else {"x": 0.0}
    for t_s in (0.0, 1.0, 1.5):
        host.cpu(t_s, y=t_s, **others)
        if t_s == 1.0:
            host.read(1)
    host.ledger.cpu_gone(Y)
    host.cpu(2, **others)
    host.read(2)
    assert host.got(key) == pytest.approx(50.0 + 25.0, rel=1e-12)
    assert host.bucket("foreign") == pytest.approx(50.0 + 75.0, rel=1e-12)


def test_after_its_end_a_series_says_nothing() -> None:
    """A request of a group whose series ended is in what no series holds, as one that never had any."""
    host = Host()
    key = host.open("y")
    for t_s in (0, 1):
        host.cpu(t_s, x=0.5 * t_s, y=1.0 * t_s)
    host.read(1)
    host.ledger.cpu_gone(Y)
    for t_s in (2, 3):
        host.cpu(t_s, x=0.5 * t_s)
        host.read(t_s)
    assert host.got(key) == pytest.approx(50.0 + 75.0 + 75.0, rel=1e-12)
    assert set(host.ledger._core.accounts["C"].cpu.series) == {X}


def test_a_series_that_has_just_begun_hides_nobody() -> None:
    """One reading says nothing yet: the group's request gets what no other series holds, and not nothing."""
    host = Host()
    key = host.open("y")
    host.cpu(0, x=0.0)
    host.cpu(1, x=0.5, y=7.0)
    host.read(1)
    assert host.got(key) == 75.0
    assert host.bucket("foreign") == 0.0


def test_without_a_live_series_no_idle_power_is_learnt() -> None:
    """All groups are gone: the host may be busy with what nobody reads, so its power is not taken for idle power."""
    ledger = Ledger(patience_s=None)
    ledger.device(Device("C", "cpu"))
    for t_s in range(4):
        ledger.counter("C", t_s * S, 100.0 * t_s)
        if t_s < 2:
            ledger.cpu("C", X, t_s * S, 0.0, 2.0 * t_s)
        if t_s == 2:
            ledger.cpu_gone(X)
        ledger.settle(t_s * S + S)
    assert ledger.state(0).devices[0].idle_watts is None


def test_a_group_that_comes_back_begins_anew() -> None:
    """y ends and returns with processes that count from zero: its first two readings give its part again."""
    host = Host()
    key = host.open("y")
    for t_s in (0, 1):
        host.cpu(t_s, x=0.5 * t_s, y=1.0 * t_s)
    host.read(1)
    host.ledger.cpu_gone(Y)
    for t_s in (1.5, 2, 3):
        host.cpu(t_s, x=0.5 * t_s, y=0.2 * (t_s - 1.5))
    host.read(3)
    assert host.got(key) == pytest.approx(50.0 + 20.0, rel=1e-12)
