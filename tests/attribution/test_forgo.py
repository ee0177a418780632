"""Joules that nobody waits for any more keep their place in the books and lose their quality."""

from __future__ import annotations

import pytest

from melodi_otel.attribution.books import Who
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import EngineId, Key, Prefill
from melodi_otel.devices import Device

S = 1_000_000_000
ENGINE = EngineId("g", 0)
A, B = Key("g", "a"), Key("g", "b")


@pytest.fixture
def made() -> Ledger:
    """Two requests at 100 W, 20 W of them idle power, with the first second in the books: 50 J each."""
    ledger = Ledger(patience_s=None)
    ledger.device(Device("D", "gpu", idle_watts=20.0))
    ledger.counter("D", 0, 0.0)
    for key in (A, B):
        ledger.open(key, 0, engine=ENGINE, devices=("D",), model="m")
    read(ledger, 1)
    return ledger


def read(ledger: Ledger, t_s: int) -> None:
    ledger.counter("D", t_s * S, 100.0 * t_s)
    ledger.settle(t_s * S + 10 * S)


def attributed(ledger: Ledger) -> dict[tuple[str, str], float]:
    """(phase, quality) -> J, without what has become nothing."""
    view = ledger.snapshot()
    assert view.books["D"].imbalance() == pytest.approx(0.0, abs=1e-9)
    found = {(phase, quality): joules for (_, _, phase, quality), joules in view.attributed.items()}
    return {at: round(joules, 9) for at, joules in found.items() if abs(joules) > 1e-9}


EXPECTED = {
    ("static", "interpolated"): 20.0,
    ("unsplit", "interpolated"): 80.0,
    ("static", "unavailable"): 20.0,
    ("unsplit", "unavailable"): 80.0,
}


@pytest.mark.parametrize("closed_first", [True, False])
def test_its_joules_move_and_the_total_stays(made: Ledger, closed_first: bool) -> None:
    """Of two equal requests of 100 J one is forgone, before or after its close: half of each phase is unavailable."""
    future = made.close(A, 2 * S, None, "stop") if closed_first else None
    made.settle(S)
    made.forgo(A)
    read(made, 2)
    future = future or made.close(A, 2 * S, None, "stop")
    made.close(B, 2 * S, None, "stop")
    made.settle(20 * S)
    assert attributed(made) == EXPECTED
    (share,) = future.result(0)
    assert share.joules == 100.0
    assert made.snapshot().books["D"].attributed == 200.0


def test_what_it_had_moves_at_once(made: Ledger) -> None:
    """A ledger killed now leaves no joules under a usable quality that no span will tell."""
    made.forgo(A)
    made.settle(S)
    assert attributed(made)[("unsplit", "unavailable")] == 40.0
    assert sum(part.joules for part in made.state(S).devices[0].attributed if part.quality == "unavailable") == 50.0


def test_unknown_and_settled_keys_change_nothing(made: Ledger) -> None:
    """Neither a key that was never there nor one that has its joules already."""
    made.close(A, S, None, "stop")
    made.settle(20 * S)
    before = attributed(made)
    made.forgo(A)
    made.forgo(Key("g", "nobody"))
    made.settle(21 * S)
    assert attributed(made) == before
    assert made.refused == 0


def test_steps_of_an_id_that_was_bound_later_move_too() -> None:
    """Joules booked before the id was known are the request's by name, and move with it."""
    ledger = Ledger(patience_s=None)
    ledger.device(Device("D", "gpu", idle_watts=0.0))
    ledger.counter("D", 0, 0.0)
    ledger.step(ENGINE, 0, 1, 0, S, ("D",), prefill=[Prefill("child", 5, 0)])
    ledger.counter("D", S, 100.0)
    ledger.settle(S)
    ledger.open(A, S, engine=ENGINE, devices=("D",), model="m")
    ledger.bind(A, "child")
    ledger.forgo(A)
    ledger.settle(S)
    assert {at: joules for at, joules in ledger.snapshot().attributed.items() if joules} == {
        ("D", Who("m"), "prefill", "unavailable"): 100.0
    }


def test_forgone_after_it_was_settled() -> None:
    """Joules that are under way can still be given up; once they have arrived they cannot."""
    for arrived, quality in ((False, "unavailable"), (True, "measured")):
        made = Ledger(patience_s=None, deliveries=True)
        made.device(Device("GPU-0", "gpu", idle_watts=0.0))
        made.counter("GPU-0", 0, 0.0)
        made.open(Key("g", "a"), 0, devices=("GPU-0",), prompt_tokens=1)
        made.progress(Key("g", "a"), 500_000_000, 3, first_token_ns=400_000_000)
        future = made.close(Key("g", "a"), 1_000_000_000, 5, "stop")
        made.counter("GPU-0", 1_000_000_000, 100.0)
        made.settle(1_000_000_000)
        assert future.result(0)[0].joules == 100.0
        if arrived:
            made.delivered(Key("g", "a"))
        made.forgo(Key("g", "a"))
        made.settle(1_000_000_001)
        found = made.snapshot().attributed
        assert {key[3] for key in found if found[key]} == {quality}
        assert sum(found.values()) == 100.0
