"""Ids that collide, nest in circles or come back: whatever a program says, no joule falls out of the books."""

from __future__ import annotations

import pytest

from melodi_otel.attribution.activity import NESTED
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import EngineId, Key, Prefill
from melodi_otel.devices import Device

S = 1_000_000_000
ENGINE = EngineId("g", 0)
A, B = Key("g", "a"), Key("g", "b")


@pytest.fixture
def ledger():
    made = Ledger(patience_s=None)
    made.device(Device("D", "gpu", idle_watts=20.0))
    made.counter("D", 0, 0.0)
    yield made
    made.flush(60 * S)
    assert made.waiting() == 0
    assert made.refused == 0
    assert made.snapshot().books["D"].imbalance() == pytest.approx(0.0, abs=1e-9)


def read(made, t_s):
    made.counter("D", round(t_s * S), 100.0 * t_s)
    made.settle(round(t_s * S) + 2 * S)


def test_two_that_hold_each_other(ledger):
    """The work of `a` is seen before it opens, `b` opens inside it, and `a` inside `b`: both settle."""
    ledger.step(ENGINE, 0, 1, 0, S // 2, ("D",), prefill=[Prefill("a", 5, 0)])
    ledger.open(B, 0, engine=ENGINE, devices=("D",), parent=A)
    ledger.open(A, 0, engine=ENGINE, devices=("D",), parent=B)
    read(ledger, 1.0)
    futures = [ledger.close(key, S, 1, "stop") for key in (A, B)]
    read(ledger, 2.0)
    assert [share.joules is not None for future in futures for share in future.result(0)] == [True, True]


def test_nested_deeper_than_anybody_programs(ledger):
    """A chain of 2,000 requests, each opened inside the one before: all settle, and what is too deep is nobody's child."""
    keys = [Key("g", str(number)) for number in range(2000)]
    for number, key in enumerate(keys):
        ledger.open(key, 0, devices=("D",), parent=keys[number - 1] if number else None)
    read(ledger, 1.0)
    futures = [ledger.close(key, S, None, "stop") for key in reversed(keys)]
    read(ledger, 2.0)
    assert all(future.done() for future in futures)
    (outermost,) = futures[-1].result(0)
    assert outermost.rollup < 100.0  # of those that may be nested in it, not of all
    assert NESTED == 64


def test_a_block_settles_with_the_last_of_what_is_in_it(ledger):
    """Closed before it, and looked at before it: not a round later."""
    ledger.open(A, 0, devices=("D",))
    ledger.open(B, 0, devices=("D",), parent=A)
    futures = [ledger.close(key, S, None, "stop") for key in (A, B)]
    read(ledger, 2.0)
    assert [future.done() for future in futures] == [True, True]


def test_work_that_finds_its_request_while_it_settles(ledger):
    """Nobody's work is over and waits for a reading; a bind says whose it was: it is told once, as that request's."""
    told = []
    ledger._core._finished = lambda key, shares: told.append((key, [share.joules for share in shares]))
    ledger.step(ENGINE, 0, 1, 0, S, ("D",), prefill=[Prefill("row", 5, 0)])
    ledger.counter("D", S // 2, 50.0)
    ledger.settle(S)
    ledger.settle(10 * S)  # given up waiting for a name
    assert ledger.waiting() == 1
    ledger.open(A, 0, engine=ENGINE, devices=("D",))
    ledger.bind(A, "row")
    ledger.close(A, S, 1, "stop")
    read(ledger, 20.0)
    assert [key for key, _ in told] == [A]
    assert told[0][1] == [pytest.approx(ledger.snapshot().books["D"].attributed)]


def test_a_request_with_the_name_of_late_work(ledger):
    """A request called `anonymous` is open when a step comes after another one's close: no joule falls out of the books."""
    odd = Key("g", "anonymous")
    ledger.open(odd, 0, engine=ENGINE, devices=("D",))
    ledger.open(A, 0, engine=ENGINE, devices=("D",))
    ledger.close(A, S, 1, "stop")
    ledger.step(ENGINE, 0, 1, 0, S, ("D",), prefill=[Prefill("a", 5, 0), Prefill("anonymous", 5, 0)])
    read(ledger, 1.0)
    ledger.step(ENGINE, 0, 2, S, 2 * S, ("D",), prefill=[Prefill("a", 5, 0)])
    read(ledger, 2.0)
    ledger.close(odd, 2 * S, 1, "stop")
    read(ledger, 3.0)
