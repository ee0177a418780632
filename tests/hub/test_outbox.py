"""What a program says to its hub, before it is sent: bounded, in order, and never more than the wire takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from melodi_otel.attribution.meter import Decode, EngineId, Joined, Key, Prefill
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.attribution.summary import unavailable
from melodi_otel.devices import Device
from melodi_otel.hub import fitting, outbox, wire
from melodi_otel.hub.outbox import Outbox

ENGINE = EngineId("g", 0)
LONG = "n" * 5000
T = 1_000_000_000


@pytest.fixture
def box() -> Iterator[Outbox]:
    """An outbox that nobody empties but the test."""
    made = Outbox("g", lambda: T)
    made.devices = {"GPU-0": Device("GPU-0", "gpu"), "cpu-0": Device("cpu-0", "cpu"), "psys": Device("psys", "host")}
    yield made
    made._wakes.close()
    made._woken.close()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for ten messages, and for forty opens and closes."""
    monkeypatch.setattr(outbox, "CAPACITY", 10)


def sent(box: Outbox) -> list[Any]:
    """What a hub would read, in order."""
    frames, found = wire.Frames(wire.ToHub), []
    # The numbers go on from frame to frame; a reader of this test starts with each one.
    while data := box.drain():
        found += frames.feed(data)
    return found


def fill(box: Outbox, room: int = 10) -> None:
    """No room for what may be dropped."""
    box.open(Key("g", "r"), T)
    while len(box._outbox) < room:
        box.progress(Key("g", "r"), T, 1)


def record(**changes: Any) -> RequestRecord:
    """A finished request."""
    given: dict[str, Any] = {
        "key": Key("g", "r"), "name": "chat m", "kind": "request", "operation": "chat", "provider": "p", "model": "m",
        "start_ns": T, "end_ns": T + 1, "start_wall_ns": T, "first_token_ns": None, "prompt_tokens": 1, "cached_tokens": None,
        "output_tokens": 2, "outcome": "stop", "error_type": None, "finish_reasons": (), "energy": unavailable("no_source"),
        "trace_id": 0, "span_id": 0, "sampled": False, "labels": {},
    }  # fmt: skip
    return RequestRecord(**{**given, **changes})


def test_progress_without_room_coalesces(box: Outbox, small: None) -> None:
    """The newest count wins; what only an older one knew of first token and prompt stays."""
    fill(box)
    box.progress(Key("g", "r"), T + 1, 5, first_token_ns=T, prompt_tokens=7)
    box.progress(Key("g", "r"), T + 2, 9)
    box.progress(Key("g", "r"), T + 3, 8, cached_tokens=3)
    assert len(box._outbox) == 10
    assert sent(box)[-1] == wire.Progressed("r", T + 2, 9, T, 7, 3)


def test_older_counts_do_not_come_after_newer_ones(box: Outbox, small: None) -> None:
    """What waited for room goes out with the next count, not behind it."""
    fill(box)
    box.progress(Key("g", "r"), T + 1, 5, prompt_tokens=7)
    box._outbox.clear()
    box.progress(Key("g", "r"), T + 2, 9)
    assert sent(box) == [wire.Progressed("r", T + 2, 9, None, 7, None)]


def test_a_close_keeps_what_waited(box: Outbox, small: None) -> None:
    """Counts that found no room are in the close, where that does not know better; nothing is kept of it."""
    fill(box)
    box.progress(Key("g", "r"), T + 1, 5, first_token_ns=T, prompt_tokens=7, cached_tokens=2)
    box.close(Key("g", "r"), T + 2, 6, "stop", cached_tokens=4)
    assert sent(box)[-1] == wire.Closed("r", T + 2, 6, "stop", T, 7, 4)
    assert not box._newest


def test_a_step_without_room_is_counted(box: Outbox, small: None) -> None:
    """The lane hears that it is lost, and the count says so."""
    assert box.step(ENGINE, 0, 0, T, T + 1, decode=Decode(1, 5), joined=[Joined("r", 5)])
    fill(box)
    assert not box.step(ENGINE, 0, 1, T, T + 1)
    box.observe(record())
    assert box.counts.dropped == 2


def test_a_step_larger_than_a_frame_is_lost_with_a_word(box: Outbox) -> None:
    """Ten thousand rows of 110 characters fit no frame: the step is counted, and the next one tells the set."""
    rows = [Joined(f"{n:0110d}", 1) for n in range(10_000)]
    assert not box.step(ENGINE, 0, 0, T, T + 1, decode=Decode(10_000, 10_000), joined=rows)
    assert box.step(ENGINE, 0, 1, T, T + 1, decode=Decode(5000, 5000), joined=rows[:5000])
    assert box.counts.dropped == 1
    assert len(sent(box)[0].joined) == 5000


def test_opens_have_four_times_the_room(box: Outbox, small: None) -> None:
    """Beyond that an open is counted, its close says `overflow` on the devices that it may have used, and nobody waits."""
    fill(box, 10)
    for number in range(40):
        box.open(Key("g", f"o{number}"), T)
    assert box.counts.requests == 10
    future = box.close(Key("g", "o39"), T + 1, 1, "stop")
    assert [(share.device, share.quality, share.reason) for share in future.result(0)] == [
        ("GPU-0", "unavailable", "overflow"), ("cpu-0", "unavailable", "overflow")
    ]  # fmt: skip
    assert box.waiting() == 0


def test_a_close_without_room_reaches_the_hub(box: Outbox, small: None) -> None:
    """The request says `overflow`; the hub hears all the same that it is over, or it would go on paying."""
    fill(box, 10)
    box.open(Key("g", "x"), T, devices=())
    for number in range(29):
        box.open(Key("g", f"o{number}"), T)
    future = box.close(Key("g", "x"), T + 1, 3, "stop")
    assert {(share.device, share.reason) for share in future.result(0)} == {("cpu-0", "overflow")}
    assert (box.counts.requests, box.waiting()) == (1, 0)
    assert sent(box)[-2:] == [wire.Forgone("x"), wire.Closed("x", T + 1, 3, "stop", None, None, None)]


def test_everything_is_bounded(box: Outbox, small: None) -> None:
    """Whatever a program says while its hub does not read: the outbox does not grow, and the sum of what ran unseen is kept."""
    fill(box)
    for number in range(1000):
        box.bind(Key("g", "r"), str(number))
        box.engine(EngineId("g", number), T)
        box.unseen(T, 1)
        box.observe(record())
        box.progress(Key("g", "r"), T, number)
    assert len(box._outbox) <= 40
    assert [told.change for told in sent(box) if isinstance(told, wire.Unseen)] == [1000]


def test_names_fit_the_wire(box: Outbox) -> None:
    """Long names, half characters and strange counts reach a hub in a form that it takes: nothing costs the connection."""
    key = Key("g", LONG)
    box.engine(ENGINE, T, model=LONG, devices=[LONG], world=-1, pids=[-1, 7], layers=2.5, parameters=float("nan"))  # type: ignore[arg-type]
    box.engine(EngineId("g", -1), T)
    labels = {LONG: LONG, "header\udcff": "value\udcff"}
    box.open(key, T, engine=EngineId("g", -1), devices=[LONG], model=LONG, prompt_tokens=-1, labels=labels, parent=key)
    box.bind(key, LONG)
    box.progress(key, T, -1)
    box.progress(key, -5, 1 << 60)
    box.progress(key, -5, 3, first_token_ns=-1, prompt_tokens=-1, cached_tokens=-1)
    rows, joined = [Prefill(LONG, 1, 2), Prefill("r", -1, 0)], [Joined(LONG, 3), Joined("r", -1)]
    box.step(ENGINE, 0, 0, -1, T, [LONG], decode=Decode(1, 1), prefill=rows, computed=rows, joined=joined, left=[LONG])
    assert not box.step(ENGINE, -1, 0, T, T)
    box.close(key, T, -7, "error", prompt_tokens=-1)
    box.observe(record(key=key, model=LONG, provider=LONG, error_type=LONG, end_ns=0, output_tokens=-1, labels=labels))
    told = sent(box)
    engine, opened, bound, progressed, step, closed, observed = told
    name = fitting.name(LONG)
    assert (len(name), name[:960]) == (993, LONG[:960])
    assert (len(engine.model), engine.world, engine.pids, engine.facts[0], engine.facts[3]) == (
        1024,
        None,
        [7],
        None,
        None,
    )
    assert (opened.request, opened.parent, opened.engine, opened.prompt_tokens) == (name, name, None, None)
    assert opened.labels == {LONG[:1024]: LONG[:1024], "header?": "value?"}
    assert (bound.request, bound.child, progressed.output_tokens, progressed.t_ns) == (name, name, 3, 0)
    assert (step.prefill, step.joined, step.left) == ([Prefill(name, 1, 2)], [Joined(name, 3)], [name])
    assert (closed.request, closed.output_tokens) == (name, None)
    assert (observed.request, observed.error_type, observed.end_ns) == (name, LONG[:1024], T)


def test_long_ids_stay_apart() -> None:
    """Two ids that begin alike stay two, and one stays itself."""
    assert fitting.name(LONG + "a") != fitting.name(LONG + "b")
    assert fitting.name(LONG) == fitting.name(LONG)
    assert len({fitting.name("é" * 3000 + end) for end in "ab"}) == 2


def test_counts_of_other_types() -> None:
    """What counts like an integer is one; what does not is not known."""

    class Seven:
        def __index__(self) -> int:
            return 7

    assert [fitting.count(value) for value in (Seven(), 0, None, "7", 7.0, -1, 1 << 49)] == [
        7,
        0,
        None,
        None,
        None,
        None,
        None,
    ]
    assert type(fitting.count(True)) is int


def test_one_message_that_no_encoder_takes(box: Outbox) -> None:
    """It is left out and counted; all others go."""
    box.open(Key("g", "r"), T)
    box._put(wire.Unseen(T, 10**30))
    box.progress(Key("g", "r"), T, 1)
    assert [type(told).__name__ for told in sent(box)] == ["Opened", "Progressed"]
    assert box.counts.dropped == 1


def test_probes_answer_in_order(box: Outbox) -> None:
    """At Ask: steps that a probe hands over come before its count, and the answer last; a failing probe is asked no more."""
    box._ident = threading.get_ident()
    asked: list[str] = []

    def probe() -> int:
        asked.append("good")
        box.step(ENGINE, 0, len(asked), T, T + 1)
        return 4

    def broken() -> int:
        asked.append("broken")
        raise ValueError

    box.open(Key("g", "r"), T, probe=probe)
    box.open(Key("g", "s"), T, probe=broken)
    box.answer(1)
    box.answer(2)
    kinds = [type(told).__name__ for told in sent(box)]
    assert kinds == ["Opened", "Opened", *["Stepped", "Progressed", "Answered"] * 2]
    assert asked == ["good", "broken", "good"]


def test_the_last_probe_comes_before_the_close(box: Outbox) -> None:
    """Once more before Closed: the last steps are in front of it, and it is never asked again."""
    box._ident = threading.get_ident()
    asked: list[int] = []

    def probe() -> int:
        asked.append(1)
        box.step(ENGINE, 0, len(asked), T, T + 1)
        return 4

    box.open(Key("g", "r"), T, probe=probe)
    box.close(Key("g", "r"), T + 1, 4, "stop")
    box.answer(1)
    assert [type(told).__name__ for told in sent(box)] == ["Opened", "Stepped", "Closed", "Answered"]
    box.answer(2)
    assert len(asked) == 1


def test_a_greeting_always_fits() -> None:
    """However many requests are asked for again: the greeting is one frame."""
    ids = [f"{number:0900d}" for number in range(5000)]
    kept = fitting.fits(ids)
    assert kept == ids[: len(kept)]
    hello = wire.Hello(1, "0", "n", "g", True, None, None, False, kept)
    assert 800_000 < len(wire.encode(0, [hello])) < wire.FRAME_LIMIT


def test_concurrent_counts_while_draining(box: Outbox, small: None) -> None:
    """Threads that count without room while the outbox is drained break nothing."""
    fill(box)
    over = threading.Event()
    errors: list[BaseException] = []

    def count() -> None:
        number = 0
        while not over.is_set():
            number += 1
            box._newest[f"r{number % 5000}"] = wire.Progressed("r", T, number)

    threads = [threading.Thread(target=count) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(300):
            box.drain()
    except RuntimeError as error:
        errors.append(error)
    over.set()
    for thread in threads:
        thread.join()
    assert not errors
