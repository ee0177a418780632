"""A program's meter moves: from its own ledger to a hub, from hub to hub, back; and no joule is lost or told twice."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from melodi_otel.attribution.meter import Decode, EngineId, Joined, Key, Late, Prefill, Share
from melodi_otel.hub.moving import MovingMeter
from melodi_otel.testing.clock import ManualClock
from tests.hub.inprocess import Host, Hub, joules

ENGINE = EngineId("g", 0)
S = 1_000_000_000


def shared() -> Hub:
    """A shared hub on a clock of its own."""
    return Hub(ManualClock(), "shared")


def test_local_to_hub() -> None:
    """A request that a move cuts in two gets the joules of both books, with full coverage, measured."""
    host = Host()
    key = host.open("r")
    host.run(2.0)
    host.rise("shared")
    host.run(3.0)
    future = host.close(key)
    host.run(1.0)
    (share,) = future.result(0)
    assert share.joules == pytest.approx(500.0)
    assert (share.coverage, share.quality, share.reason) == (1.0, "measured", None)
    assert host.books() == pytest.approx(500.0)
    assert host.moved == ["local", "not local"]


def test_shared_to_agent() -> None:
    """The same from hub to hub; the one that was left is hung up on when it owes nothing any more."""
    host = Host(shared())
    before = host.hubs[0]
    key = host.open("r")
    host.run(2.0)
    agent = host.rise()
    host.run(1.0)
    assert before.client is None
    assert agent.client is not None
    future = host.close(key)
    host.run(1.0)
    assert joules(future) == {"GPU-0": pytest.approx(300.0)}
    assert host.books() == pytest.approx(300.0)


def test_dead_hub_with_its_journal() -> None:
    """The next hub goes on from the journal: what the first had accrued is told, the gap is nobody's and visible."""
    host = Host(shared())
    first = host.hubs[0]
    key = host.open("r")
    host.run(2.0)
    host.run(1.0, settle=False)  # read, and not settled: lost with it
    second = host.hub(page=first.page)
    host.kill(first, second)
    host.run(3.0)
    future = host.close(key)
    host.run(1.0)
    (share,) = future.result(0)
    assert share.joules == pytest.approx(500.0)
    assert share.coverage == pytest.approx(5.0 / 6.0)
    assert (share.quality, share.reason) == ("partial", "no_samples")
    assert host.books() == pytest.approx(500.0)


def test_dead_hub_with_a_promise() -> None:
    """Joules that were final and on their way when the hub died arrive from the next one, whole."""
    host = Host(shared())
    first = host.hubs[0]
    key = host.open("r")
    host.run(2.0)
    future = host.close(key)
    host.run(1.0, settle=False)
    first.settle(tell=False)
    assert not future.done()
    second = host.hub(page=first.page)
    host.kill(first, second)
    (share,) = future.result(0)
    assert (share.joules, share.coverage, share.key) == (pytest.approx(200.0), 1.0, key)
    assert host.meter.waiting() == 0


def test_dead_hub_with_nothing() -> None:
    """Without a journal the acknowledged joules count, and the time after them lowers the coverage."""
    host = Host(shared())
    first = host.hubs[0]
    key = host.open("r")
    host.run(3.0)
    host.run(1.0, settle=False)
    host.kill(first)
    future = host.close(key)
    host.run(1.0)
    (share,) = future.result(0)
    assert share.joules == pytest.approx(300.0)
    assert share.coverage == pytest.approx(0.75)
    assert (share.quality, share.reason) == ("partial", "no_samples")


def test_dead_hub_that_knew_nothing_yet() -> None:
    """A request whose hub died before it acknowledged anything does not look as if it had begun later."""
    host = Host(shared())
    key = host.open("r")
    host.run(1.0, settle=False)
    host.kill(host.hubs[0])
    host.run(3.0)
    future = host.close(key)
    host.run(1.0)
    (share,) = future.result(0)
    assert share.t1_ns - share.t0_ns == 4 * S
    assert share.coverage == pytest.approx(0.75)
    assert share.quality == "partial"


def test_closed_at_a_hub_that_dies() -> None:
    """A request that had ended, and of which nobody knows anything, says `unavailable` and why; nobody waits for ever."""
    host = Host(shared())
    future = host.close(host.open("r"))
    host.kill(host.hubs[0])
    assert [(share.device, share.quality, share.reason) for share in future.result(0)] == [
        ("GPU-0", "unavailable", "no_samples")
    ]


def test_two_deaths_in_a_row() -> None:
    """The second hub dies before it has answered: the third gives what the first had."""
    host = Host(shared())
    first = host.hubs[0]
    key = host.open("r")
    host.run(2.0)
    second = Hub(host.clock, "shared")
    first.alive = False
    host.next = second
    host.clients[0].lose()
    assert not host.clients[1].known.is_set()
    host.run(1.0, settle=False)
    third = host.hub(page=first.page)
    host.next = third
    host.clients[1].lose()
    host.greet()
    host.run(1.0)
    future = host.close(key)
    host.run(1.0)
    assert joules(future) == {"GPU-0": pytest.approx(300.0)}
    assert host.books() == pytest.approx(300.0)


def test_a_left_hub_dies_while_the_next_has_not_answered() -> None:
    """Parts that wait for the next hub's answer are not given up because a hub that was left long ago dies as well."""
    host = Host(shared())
    old = host.hubs[0]
    host.close(host.open("owed"))  # the shared hub owes this one and stays
    agent = host.rise()
    key = host.open("r")
    host.run(1.0, settle=False)
    agent.settle()
    future = host.close(key)
    host.clients[1].pump()
    host.run(1.0, settle=False)
    agent.settle(tell=False)
    agent.alive = False
    following = host.hub("agent", agent.page)
    host.next = following
    host.clients[1].lose()
    old.alive = False
    host.clients[0].lose()
    assert not future.done()
    host.greet()
    assert joules(future)["GPU-0"] == pytest.approx(100.0)


def test_nested_requests_and_late_ones() -> None:
    """A nested request keeps its parent, a late one is told once; the block holds nothing twice."""
    host = Host()
    block = host.open("block", engine=None)
    inner = host.open("inner", parent=block)
    host.run(1.0)
    host.rise()
    host.run(1.0)
    ended = host.close(inner)
    outer = host.close(block)
    start = host.now - S // 2
    host.meter.open(Key("g", "late"), start, late=Late())
    late = host.meter.close(Key("g", "late"), host.now, 1, "stop")
    host.run(1.0)
    assert joules(ended)["GPU-0"] == pytest.approx(200.0)
    assert joules(outer).get("GPU-0", 0.0) == pytest.approx(0.0)
    assert outer.result(0)[0].rollup == pytest.approx(200.0)
    assert joules(late) == {"GPU-0": None, "GPU-1": pytest.approx(25.0)}
    assert host.books() == pytest.approx(200.0)


def test_work_that_is_not_seen_moves() -> None:
    """The meter that is left hears of no unseen work any more, the next one of all of it."""
    host = Host()
    host.meter.unseen(host.now, 2)
    host.meter.unseen(host.now, 1)
    host.run(0.5)
    left = host.now
    agent = host.rise()
    host.run(0.5)
    unseen = host.ledger._core._closer.unseen
    assert (unseen.any_in(left - 1, left), unseen.any_in(left, host.now)) == (True, False)
    session = agent._session
    assert session is not None
    assert session.unseen == 3
    host.meter.unseen(host.now, -3)
    host.run(0.5)
    assert session.unseen == 0


def test_engines_are_told_again() -> None:
    """The next meter knows an engine's facts, devices and state; one that is gone is not told again."""
    host = Host()
    host.meter.engine(ENGINE, host.now, "loading", model="m", devices=("GPU-1",), layers=3)
    host.meter.engine(ENGINE, host.now, "ready", parameters=8e9)
    host.meter.engine(EngineId("g", 1), host.now, "ready", model="old")
    host.meter.engine(EngineId("g", 1), host.now, "gone")
    agent = host.rise()
    key = host.open("r", engine=ENGINE, devices=None)
    host.run(1.0)
    future = host.close(key)
    host.run(1.0)
    assert joules(future) == {"GPU-1": pytest.approx(50.0)}
    engines = agent.ledger._core.roster.engines
    (state,) = engines.values()
    assert (state.model, state.facts.layers, state.facts.parameters) == ("m", 3, 8e9)


def test_configured_devices_hold_at_a_hub() -> None:
    """MELODI_ENGINE_DEVICES of a program is heard where a hub meters it."""
    host = Host(shared(), engine_devices=("GPU-1",))
    host.meter.engine(ENGINE, host.now, devices=("GPU-0",))
    key = host.open("r", engine=ENGINE, devices=("GPU-0",))
    host.run(1.0)
    future = host.close(key)
    host.run(1.0)
    assert list(joules(future)) == ["GPU-1"]


def test_the_decode_set_is_told_whole() -> None:
    """After a move the next step carries every member with its context; the new books give the requests equal parts."""
    host = Host()
    host.meter.engine(ENGINE, host.now, devices=("GPU-0",))
    keys = [host.open(name, engine=ENGINE, devices=None) for name in ("a", "b")]
    host.meter.bind(keys[1], "child")

    def step(seq: int, seconds: float, **told: object) -> None:
        t0 = host.now
        host.run(seconds, settle=False)
        host.meter.step(ENGINE, 0, seq, t0, host.now, **told)  # type: ignore[arg-type]
        host.settle()

    step(0, 1.0, prefill=[Prefill("a", 10, 0), Prefill("child", 10, 0)])
    step(1, 1.0, decode=Decode(2, 20), joined=[Joined("a", 10), Joined("child", 10)])
    agent = host.rise()
    step(2, 1.0, decode=Decode(2, 22))
    step(3, 1.0, decode=Decode(2, 24))
    futures = [host.close(key) for key in keys]
    host.run(1.0)
    host.run(1.0)
    assert [joules(future)["GPU-0"] for future in futures] == [pytest.approx(200.0)] * 2
    lane = agent.ledger._core.roster.engines[EngineId("1000:g:program", 0)].lanes[0]
    assert {name: offset + lane.tick for name, (_, offset) in lane.members.items()} == {"a": 13, "child": 13}
    assert {share.method for future in futures for share in future.result(0)} == {"step"}


def test_probes_are_asked_before_a_move() -> None:
    """Steps and counts up to a move go to the meter that is left, later ones to the next; the prompt is not charged again."""
    host = Host()
    host.meter.engine(ENGINE, host.now, devices=("GPU-0",))
    heard: list[tuple[str, int]] = []
    tokens = [0]

    def probe() -> int:
        heard.append((type(host.meter._target).__name__, tokens[0]))
        return tokens[0]

    key = host.open("r", prompt_tokens=100, probe=probe)
    host.run(1.0)
    tokens[0] = 7
    heard.clear()
    agent = host.rise()
    assert heard[0] == ("Ledger", 7)
    host.run(1.0)
    activity = agent.ledger._core.roster.activities[Key("1000:g:program", "r~1")]
    assert activity.cached_tokens == 100
    assert ("Client", 7) in heard
    future = host.close(key, 9)
    host.run(1.0)
    assert joules(future)["GPU-0"] == pytest.approx(200.0)


def test_other_threads_go_on_during_moves() -> None:
    """Requests that other threads open, count and close while the meter moves to and fro all get their joules once."""
    host = Host()
    over = threading.Event()
    futures: list[Future[list[Share]]] = []

    def work(name: str) -> None:
        number = 0
        while not over.is_set() and number < 300:
            number += 1
            key = host.open(f"{name}-{number}")
            host.meter.progress(key, host.now, 1)
            host.meter.bind(key, f"{name}-{number}.0")
            futures.append(host.close(key))

    threads = [threading.Thread(target=work, args=(str(n),)) for n in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        hub = host.rise()
        host.run(0.1)
        host.kill(hub)
        host.run(0.1)
    over.set()
    for thread in threads:
        thread.join()
    host.run(1.0)
    host.run(1.0)
    assert all(future.done() for future in futures)
    assert host.meter.open_count == 0
    assert host.meter.waiting() == 0


def test_the_end_resolves_everything() -> None:
    """After the end nothing waits: neither what was owed, nor what is closed later, nor what is opened then."""
    host = Host(shared())
    owed, still = host.close(host.open("owed")), host.open("still")
    host.meter.end(0.0)
    assert [share.reason for share in owed.result(0)] == ["shutdown"]
    assert [share.reason for share in host.close(still).result(0)] == ["shutdown"]
    late = host.open("late")
    host.close(late)
    assert host.meter.open_count == 0
    host.clients[0].lose()
    assert host.moved == []  # a hub that dies after the end brings no meter back


def test_a_meter_that_cannot_start_raises_nowhere() -> None:
    """Where this process's own meter cannot be started after a hub's death, requests go on and are settled."""
    host = Host(shared())
    key = host.open("r")
    host.run(1.0)

    def broken() -> None:
        raise OSError("no file")

    host.meter._local = broken
    host.kill(host.hubs[0])
    assert host.meter.is_local
    future = host.close(key)
    host.run(1.0)
    assert joules(future)["GPU-0"] == pytest.approx(100.0)


def test_answers_come_without_the_lock() -> None:
    """Whoever waits for a request is called while the meter may be used by other threads."""
    host = Host(shared())
    future = host.close(host.open("r"))
    reached: list[bool] = []

    def called(_: object) -> None:
        thread = threading.Thread(target=lambda: reached.append(bool(host.open("other"))))
        thread.start()
        thread.join(2.0)

    future.add_done_callback(called)
    host.kill(host.hubs[0])
    assert reached == [True]


def test_a_fork_leaves_the_parents_meter_alone() -> None:
    """In a child nothing is open, no descriptor of the connection is left, and the first open chooses anew."""
    host = Host(shared())
    host.open("parents")
    asked: list[str] = []
    host.meter.forked(host, lambda: asked.append("chosen"))
    assert (host.meter.open_count, host.meter.hub, host.meter.waiting()) == (0, None, 0)
    assert host.clients[0]._wakes.fileno() == -1
    host.open("own")
    assert (asked, host.meter.is_local) == (["chosen"], True)


def test_an_engine_in_a_forked_child_chooses_the_meter() -> None:
    """An engine core that was forked has no requests: its first word about itself is what chooses."""
    host = Host(shared())
    asked: list[str] = []
    host.meter.forked(host, lambda: asked.append("chosen"))
    host.meter.engine(EngineId("g", 1), host.now, "gone")
    assert asked == []
    host.meter.engine(EngineId("g", 1), host.now, "loading")
    host.meter.engine(EngineId("g", 1), host.now, "ready")
    assert asked == ["chosen"]


operations = st.lists(
    st.tuples(
        st.sampled_from(["run", "run", "open", "open", "nested", "close", "tokens", "rise", "kill", "journal", "drop"]),
        st.integers(0, 7),
    ),
    min_size=4,
    max_size=40,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(operations)
def test_nothing_twice_nothing_lost(told: list[tuple[str, int]]) -> None:
    """Whatever moves: Σ shares of all requests = Σ over the ledgers of what was attributed, and every ledger balances.

    A hub that dies without a journal takes what it had not acknowledged with it: then the sum is at most the books'.
    """
    host = Host()
    keys: list[Key] = []
    futures: list[Future[list[Share]]] = []
    lost: list[float] = []
    dead: dict[str, float] = {"GPU-0": 0.0, "GPU-1": 0.0}
    for number, (what, argument) in enumerate(told):
        current = next((hub for hub in host.hubs if hub.alive and hub.client and hub.client is host.meter.hub), None)
        if what == "run":
            host.run((argument + 1) / 10)
        elif what == "open":
            keys.append(host.open(f"r{number}", devices=(("GPU-0",), ("GPU-1",), ("GPU-0", "GPU-1"))[argument % 3]))
        elif what == "nested" and keys:
            keys.append(host.open(f"r{number}", parent=keys[argument % len(keys)]))
        elif what == "tokens" and keys:
            host.meter.progress(keys[argument % len(keys)], host.now, number)
        elif what == "close" and keys:
            futures.append(host.close(keys.pop(argument % len(keys)), argument))
        elif what == "rise" and (current is None or current.tier == "shared"):
            host.rise("shared" if current is None and argument % 2 else "agent")
        elif what == "journal" and current is not None:
            host.run(0.1, settle=bool(argument % 2))
            current.settle(tell=argument % 3 != 0)
            host.kill(current, host.hub(current.tier, current.page))
        elif what in ("kill", "drop") and current is not None:
            current.settle(tell=what == "kill")
            for device in dead:
                book = current.ledger.snapshot().books.get(device)
                if book is not None:
                    dead[device] += book.attributed + book.in_flight
            if what == "drop" or not argument % 2:
                host.run(0.1, settle=False)
            lost.append(1.0)
            host.kill(current)
    host.run(0.5)
    futures += [host.close(key) for key in keys]
    for _ in range(4):
        host.run(0.5)
    assert all(future.done() for future in futures)
    assert host.meter.waiting() == 0
    for device, gone in dead.items():
        shares = sum(joules(future).get(device) or 0.0 for future in futures)
        booked = host.books(device) + gone
        if lost:
            assert shares <= booked + 1e-6
        else:
            assert shares == pytest.approx(booked, rel=1e-9, abs=1e-6)
    for ledger in (host.ledger, *(hub.ledger for hub in host.hubs if hub.alive)):
        assert all(abs(book.imbalance()) < 1e-9 for book in ledger.snapshot().books.values())
    for hub in host.hubs:
        assert not hub.refusals.counts
    host.meter.end(0.0)
    assert MovingMeter.waiting(host.meter) == 0
