"""What open requests have accrued so far, and what the hub asks before it settles."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Decode, EngineId, Joined, Key, Late, Prefill
from melodi_otel.devices import Device

S = 1_000_000_000
ENGINE = EngineId("g", 0)
A = Key("g", "a")


def ledger(*names: str) -> Ledger:
    made = Ledger(patience_s=None)
    for name in names or ("GPU-0",):
        made.device(Device(name, "gpu", idle_watts=20.0))
        made.counter(name, 0, 0.0)
    return made


def read(made: Ledger, t_s: float, *names: str) -> None:
    """100 W on each device up to ``t_s``, settled long after."""
    for name in names or ("GPU-0",):
        made.counter(name, round(t_s * S), 100.0 * t_s)
    made.settle(round(t_s * S) + 10 * S)


def test_it_is_what_a_close_now_would_give() -> None:
    """At 2 s of 100 W an open request has 200 J; closed at 2 s, its final share says the same, but for when it was final."""
    made = ledger()
    made.open(A, 0, engine=ENGINE, devices=("GPU-0",))
    read(made, 1.0)
    read(made, 2.0)
    (so_far,) = made.accrued()[A]
    assert (so_far.joules, so_far.dynamic, so_far.static) == (200.0, 160.0, 40.0)
    assert (so_far.t0_ns, so_far.t1_ns, so_far.final_ns, so_far.coverage) == (0, 2 * S, 2 * S, 1.0)
    future = made.close(A, 2 * S, None, "stop")
    made.settle(20 * S)
    (final,) = future.result(0)
    assert final == replace(so_far, final_ns=20 * S)
    assert made.accrued() == {}


def test_each_device_up_to_its_own_books() -> None:
    """A device that is read more rarely has closed less: its share ends there, fully covered."""
    made = ledger("GPU-0", "GPU-1")
    made.open(A, 0, engine=ENGINE, devices=("GPU-0", "GPU-1"))
    read(made, 1.0, "GPU-0", "GPU-1")
    read(made, 2.0, "GPU-0")
    shares = {share.device: (share.t1_ns, share.joules, share.coverage) for share in made.accrued()[A]}
    assert shares == {"GPU-0": (2 * S, 200.0, 1.0), "GPU-1": (S, 100.0, 1.0)}


def test_a_closed_request_goes_no_further_than_its_end() -> None:
    """Closed at 1.5 s and waiting for another device: what is accrued ends at 1.5 s."""
    made = ledger("GPU-0", "GPU-1")
    made.open(A, 0, engine=ENGINE, devices=("GPU-0", "GPU-1"))
    future = made.close(A, 3 * S // 2, None, "stop")
    read(made, 1.0, "GPU-0", "GPU-1")
    read(made, 2.0, "GPU-0")
    assert not future.done()
    assert {share.device: share.t1_ns for share in made.accrued()[A]} == {"GPU-0": 3 * S // 2, "GPU-1": S}


def test_time_without_known_energy_lowers_coverage() -> None:
    """The counter was reset in the second of two seconds: half of the time so far is known."""
    made = ledger()
    made.open(A, 0, engine=ENGINE, devices=("GPU-0",))
    read(made, 1.0)
    made.counter("GPU-0", 2 * S, 1.0)
    made.settle(20 * S)
    (share,) = made.accrued()[A]
    assert (share.joules, share.coverage, share.quality, share.reason) == (100.0, 0.5, "partial", "counter_reset")


def test_nothing_closed_nothing_said() -> None:
    """A request without a closed interval since its opening, an anonymous one and a late one are left out."""
    made = ledger()
    made.step(ENGINE, 0, 1, 0, S, ("GPU-0",), prefill=[Prefill("nobody's", 5, 0)])
    made.counter("GPU-0", S, 100.0)
    made.open(A, S, engine=ENGINE, devices=("GPU-0",))
    made.open(Key("g", "late"), 0, devices=("GPU-0",), late=Late())
    made.settle(2 * S)
    assert made.accrued() == {}
    assert made.snapshot().books["GPU-0"].in_flight == 100.0


def test_joules_from_before_its_steps_named_a_device_stay_its_own() -> None:
    """Seen as a slice on two devices first, then in steps on one: both devices have a share, and the books balance."""
    made = ledger("GPU-0", "GPU-1")
    made.open(A, 0, engine=ENGINE, devices=("GPU-0", "GPU-1"))
    read(made, 1.0, "GPU-0", "GPU-1")
    made.step(ENGINE, 0, 1, S, 2 * S, ("GPU-0",), joined=[Joined("a", 5)], decode=Decode(1, 5))
    read(made, 2.0, "GPU-0", "GPU-1")
    future = made.close(A, 2 * S, 1, "stop")
    read(made, 3.0, "GPU-0", "GPU-1")
    assert {share.device: share.joules for share in future.result(0)} == {"GPU-0": 200.0, "GPU-1": 100.0}
    assert all(books.imbalance() == pytest.approx(0.0, abs=1e-9) for books in made.snapshot().books.values())


def test_stir_asks_once_per_movement() -> None:
    """News are wanted when the sensor has moved while a request is open, until the next settling, and then no more."""
    made = ledger()
    assert not made.stir(0)
    made.counter("GPU-0", S, 100.0)
    assert not made.stir(S)  # nobody is open
    made.settle(S)
    made.open(A, S, engine=ENGINE, devices=("GPU-0",))
    assert not made.stir(S)  # nothing moved
    made.counter("GPU-0", 2 * S, 200.0)
    assert made.stir(2 * S)
    assert made.stir(2 * S)
    made.settle(2 * S)
    assert not made.stir(2 * S)


def test_settle_after_stir_closes_with_the_answers() -> None:
    """Tokens that come between stir and settle count in the interval that stir saw, by slices: 30 tokens against 10."""
    made = ledger()
    b = Key("g", "b")
    for key in (A, b):
        made.open(key, 0, engine=ENGINE, devices=("GPU-0",))
        made.progress(key, 0, 1, first_token_ns=0)
    made.counter("GPU-0", S, 120.0)
    assert made.stir(S)
    assert made.snapshot().books == {}
    made.progress(A, S, 31)
    made.progress(b, S, 11)
    made.settle(S)
    mine, others = (made.accrued()[key][0] for key in (A, b))
    assert (mine.method, mine.t1_ns, mine.static) == ("slice", S, 10.0)
    assert mine.dynamic is not None and others.dynamic is not None
    assert mine.dynamic + others.dynamic == pytest.approx(100.0, rel=1e-12)
    assert mine.dynamic > 1.5 * others.dynamic


def test_a_share_is_a_share_however_it_was_made() -> None:
    """It equals one that was made field by field, hashes like it, and cannot be changed."""
    made = ledger()
    made.open(A, 0, engine=ENGINE, devices=("GPU-0",))
    read(made, 1.0)
    (share,) = made.accrued()[A]
    again = replace(share)
    assert (share, hash(share), repr(share)) == (again, hash(again), repr(again))
    with pytest.raises(FrozenInstanceError):
        share.joules = 0.0  # type: ignore[misc]
