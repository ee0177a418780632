"""Steps that another process tells: an ended request waits for those that are on their way, bounded."""

from __future__ import annotations

from concurrent.futures import Future

import pytest

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Decode, EngineId, Joined, Key, Prefill, Share
from melodi_otel.devices import Device

S = 1_000_000_000
MS = 1_000_000
FIRST, SECOND = EngineId("g", 1000), EngineId("g", 1001)
REQUEST = Key("g", "a")


def ledger(*engines: EngineId) -> Ledger:
    """One GPU of 100 W that is idle at 0 W, and engines of other processes, heard until 0."""
    made = Ledger(patience_s=None)
    made.device(Device("GPU-0", "gpu", idle_watts=0.0))
    made.counter("GPU-0", 0, 0.0)
    for engine in engines:
        made.engine(engine, 0, devices=("GPU-0",))
        made.heard(engine, 0)
    return made


def ended(made: Ledger, outcome: str = "stop") -> Future[list[Share]]:
    """A request of 0.6 s with ten tokens, whose steps nobody has told yet; the counter has been read after it."""
    made.open(REQUEST, 0, engine=FIRST)
    future = made.close(REQUEST, 600 * MS, 10, outcome)  # type: ignore[arg-type]
    made.counter("GPU-0", S, 100.0)
    return future


def test_steps_that_come_after_the_end() -> None:
    """The request's steps come after its end and after the reading: it settles when they are there, and has their joules."""
    made = ledger(FIRST)
    future = ended(made)
    assert made.stir(S)
    made.settle(S)
    assert not future.done()
    made.step(FIRST, 0, 1, 0, 500 * MS, prefill=[Prefill("a", 5, 0)])
    made.heard(FIRST, S)
    made.settle(S)
    (share,) = future.result(0)
    assert (share.joules, share.method) == (100.0, "exclusive")
    assert not made.stir(S)


def test_steps_that_never_come() -> None:
    """The wait is bounded; a request with tokens of which no step tells is divided as a slice, and never has 0 J."""
    made = ledger(FIRST)
    future = ended(made)
    made.settle(3 * S)
    (share,) = future.result(0)
    assert share.joules == 100.0
    assert share.method != "step"


def test_an_engine_of_this_process_needs_no_word() -> None:
    """Who tells each step as it ends has nothing under way: its requests settle with the first reading."""
    made = Ledger(patience_s=None)
    made.device(Device("GPU-0", "gpu", idle_watts=0.0))
    made.counter("GPU-0", 0, 0.0)
    made.step(FIRST, 0, 1, 0, 0)
    future = ended(made)
    made.settle(S)
    assert future.done()


def test_an_engine_that_is_gone() -> None:
    """An engine that has gone tells nothing more."""
    made = ledger(FIRST)
    future = ended(made)
    made.engine(FIRST, S, "gone")
    made.settle(S)
    assert future.done()


def test_any_engine_of_the_group_may_compute_it() -> None:
    """A front end knows no engine: one that is opened with the first and stands in no step waits for the second's, too."""
    made = ledger(FIRST, SECOND)
    for engine in (FIRST, SECOND):  # both have shown steps before
        made.step(engine, 0, 1, 0, 0)
    future = ended(made)
    made.heard(FIRST, S)
    made.settle(S)
    assert not future.done()
    made.step(SECOND, 0, 2, 0, 500 * MS, prefill=[Prefill("a", 5, 0)])
    made.heard(SECOND, S)
    made.settle(S)
    assert future.result(0)[0].joules == 100.0


def test_another_engine_that_computes_it_is_waited_for() -> None:
    """A request moves to the engine whose step names it first: one that runs there across a reading is waited for."""
    made = ledger(FIRST, SECOND)
    for engine in (FIRST, SECOND):
        made.step(engine, 0, 1, 0, 0)
    made.open(REQUEST, 0, engine=FIRST)
    made.step(SECOND, 0, 2, 0, 500 * MS, prefill=[Prefill("a", 5, 0)])
    made.counter("GPU-0", S, 100.0)
    made.settle(S)
    assert made.accrued() == {}
    made.step(SECOND, 0, 3, 500 * MS, 1500 * MS, computed=[Prefill("a", 1, 5)])
    made.settle(S)
    assert sum(share.joules or 0.0 for share in made.accrued()[REQUEST]) == pytest.approx(100.0)


def test_who_leaves_in_the_first_step() -> None:
    """An abort in a request's first step waits for the end of that step."""
    made = ledger(FIRST)
    made.step(FIRST, 0, 1, 0, 0)
    future = ended(made, "abort")
    made.heard(FIRST, S)
    made.settle(S)
    assert not future.done()
    made.step(FIRST, 0, 2, 0, 2 * S, prefill=[Prefill("a", 5, 0)])
    made.counter("GPU-0", 2 * S, 200.0)
    made.settle(2 * S)
    assert future.result(0)[0].joules == 200.0


def test_the_other_engines_device_waits_too() -> None:
    """Two engines with a GPU each: a request that neither has told of is charged on none before both were heard."""
    made = Ledger(patience_s=None)
    for name in ("GPU-0", "GPU-1"):
        made.device(Device(name, "gpu", idle_watts=0.0))
        made.counter(name, 0, 0.0)
    for engine, name in ((FIRST, "GPU-0"), (SECOND, "GPU-1")):
        made.engine(engine, 0, devices=(name,))
        made.heard(engine, 0)
        made.step(engine, 0, 1, 0, 0)
    made.open(REQUEST, 0, engine=FIRST)
    future = made.close(REQUEST, 600 * MS, 10, "stop")
    for name in ("GPU-0", "GPU-1"):
        made.counter(name, S, 100.0)
    made.heard(FIRST, S)
    made.settle(S)
    made.step(SECOND, 0, 2, 0, 500 * MS, prefill=[Prefill("a", 5, 0)])
    made.heard(SECOND, S)
    made.settle(S)
    assert {share.device: share.joules for share in future.result(0)} == {"GPU-1": 100.0}


def test_steps_that_come_before_it_is_known_whose_they_are() -> None:
    """An engine tells steps of an id before the front end tells whose it is: the request is that engine's, on its GPU alone."""
    made = Ledger(patience_s=None)
    for engine, name in ((FIRST, "GPU-0"), (SECOND, "GPU-1")):
        made.device(Device(name, "gpu", idle_watts=0.0))
        made.counter(name, 0, 0.0)
        made.engine(engine, 0, devices=(name,))
        made.heard(engine, 0)
    made.open(REQUEST, 0, engine=FIRST)
    made.step(SECOND, 0, 1, 0, 300 * MS, prefill=[Prefill("child", 5, 0)])
    made.bind(REQUEST, "child")
    for name in ("GPU-0", "GPU-1"):
        made.counter(name, 500 * MS, 50.0)
        made.counter(name, S, 100.0)
    made.heard(FIRST, S)
    made.settle(S)
    # It stands in the newest step there: the interval waits for the next one.
    made.step(SECOND, 0, 2, 300 * MS, S, computed=[Prefill("child", 1, 5)])
    future = made.close(REQUEST, S, 2, "stop")
    made.heard(SECOND, S)
    made.settle(S)
    assert {share.device: share.joules for share in future.result(0)} == {"GPU-1": pytest.approx(100.0)}


@pytest.mark.parametrize("how", ["bind", "open"])
def test_joules_that_were_nobodys_yet_count_as_the_requests(how: str) -> None:
    """An interval closes between a step and the word whose it is: metrics count its joules as the request's all the same."""
    made = ledger(FIRST)
    name = "child" if how == "bind" else "a"
    if how == "bind":
        made.open(REQUEST, 0, engine=FIRST, model="m")
    made.step(FIRST, 0, 1, 0, S, prefill=[Prefill(name, 5, 0)])
    made.counter("GPU-0", S, 100.0)
    made.heard(FIRST, S)
    made.settle(S)
    if how == "bind":
        made.bind(REQUEST, "child")
    else:
        made.open(REQUEST, 0, engine=FIRST, model="m")
    future = made.close(REQUEST, S, 1, "stop")
    made.settle(S)
    assert future.result(0)[0].joules == 100.0
    attributed = made.snapshot().attributed
    assert sum(joules for at, joules in attributed.items() if "m" in str(at)) == pytest.approx(100.0)
    assert sum(attributed.values()) == pytest.approx(100.0)


@pytest.mark.parametrize(("pause_ns", "idle"), [(400_000, 0.0), (2_000_000, 0.2 * 10)])
def test_what_the_host_does_between_two_steps(pause_ns: int, idle: float) -> None:
    """A step soon behind the one before begins where that ended; a longer pause is nobody's: 2 ms of 100 W, ten times."""
    made = Ledger(patience_s=None)
    made.device(Device("GPU-0", "gpu", idle_watts=100.0))
    made.counter("GPU-0", 0, 0.0)
    made.engine(FIRST, 0, devices=("GPU-0",))
    made.open(REQUEST, 0, engine=FIRST)
    at, joined = 0, [Joined("a", 5)]
    for number in range(1, 12):
        made.step(FIRST, 0, number, at, at + 10 * MS, decode=Decode(1, 5 + number), joined=joined)
        at, joined = at + 10 * MS + pause_ns, []
    at -= pause_ns
    made.counter("GPU-0", at, at * 100.0 / 1e9)
    made.close(REQUEST, at, 11, "stop")
    made.settle(at + S)
    books = made.snapshot().books["GPU-0"]
    assert books.idle + books.tail == pytest.approx(idle, abs=1e-9)
    assert books.attributed == pytest.approx(at * 100.0 / 1e9 - idle, rel=1e-9)
