from __future__ import annotations

import logging
import select
import socket
import struct
import threading
import time

import msgspec
import pytest

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Decode, Key, Prefill, Share
from melodi_otel.devices import Device
from melodi_otel.hub import server as server_module
from melodi_otel.hub import wire
from melodi_otel.hub.journal import Journal
from melodi_otel.hub.server import CONNECTIONS, Host, Server
from melodi_otel.hub.sockets import attempt, listen, peer
from melodi_otel.testing.clock import ManualClock

S = 1_000_000_000
GPU = Device("GPU-0", "gpu", idle_watts=20.0)
SHARE = Share(Key("old", "r"), "GPU-0", 0, S, 7.0, *([None] * 4), 1.0, "equal", "interpolated", 1.0, 1.0, S)


class Diary(Journal):
    """A journal that remembers the order of things."""

    def __init__(self, path, clock):
        super().__init__(path, "boot", clock.monotonic_ns)
        self.pages = []
        self.said = []

    def save(self, hub, state, promises):
        self.pages.append((state, list(promises)))
        self.said.append("journal")
        return super().save(hub, state, promises)


class Program:
    """One end of a connection, by hand."""

    def __init__(self, place, *, name="n", group="g", alone=True, greet=True, version=wire.VERSION, resume=()):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(str(place))
        self.number = 0
        self.frames = wire.Frames(wire.ToProgram)
        self.inbox = []
        self.welcome = None
        if greet:
            self.say(wire.Hello(version, "0.3", name, group, alone, "s", None, False, list(resume)))
            self.welcome = self.hear(wire.Welcome, wire.Refused)

    def say(self, *messages):
        self.sock.sendall(wire.encode(self.number, list(messages)))
        self.number += 1

    def hear(self, *kinds):
        """The next message of these kinds; others are left out."""
        while True:
            while self.inbox:
                message = self.inbox.pop(0)
                if isinstance(message, kinds):
                    return message
            data = self.sock.recv(1 << 16)
            if not data:
                return None
            self.inbox += self.frames.feed(data)

    def settled(self, request="r"):
        """The joules of a request, acknowledged."""
        while True:
            message = self.hear(wire.Settled)
            for told in message.told:
                if told.request == request:
                    self.say(wire.Got(message.number))
                    return told.shares

    def ended(self):
        """Whether the hub hangs up."""
        return self.hear() is None

    def close(self):
        self.sock.close()


class Hub:
    """A server on a real socket, with a ledger of one GPU of 100 W whose counter and clock are moved by hand."""

    def __init__(self, place, clock, known=None):
        self.place = place / "hub.sock"
        self.clock = clock
        self.ledger = Ledger(patience_s=None)
        self.ledger.device(GPU)
        self.ledger.counter("GPU-0", clock.monotonic_ns(), 0.0)
        self.joules = 0.0
        self.diary = Diary(place / "journal", clock)
        self.came, self.went, self.observed, self.settled = [], [], [], []
        self.listener = listen(self.place, mode=0o600)
        self.programs = []
        self.joined = threading.Event()
        host = Host(
            tier="shared",
            release="0.3",
            hub="name",
            devices=lambda: [GPU],
            denied=lambda: False,
            wait_s=lambda: 2.5,
            url=lambda: "http://127.0.0.1:9464/metrics",
            status=lambda: {"open": 3},
            observed=lambda session, told: self.observed.append((session.group, told)),
            joined=lambda *who: self.came.append(who),
            left=lambda *who: self.went.append(who),
            settled=lambda: self.settled.append(self.joules),
        )
        self.server = Server(
            self.listener, self.ledger, host, self.diary, known, peer=self.peer, now_ns=clock.monotonic_ns
        )
        self.server.start()

    def peer(self, sock):
        found = peer(sock)
        return found.pid, found.uid

    def connect(self, **more):
        program = Program(self.place, **more)
        self.programs.append(program)
        return program

    def read(self, seconds=1.0):
        self.clock.advance(seconds)
        self.joules += 100.0 * seconds
        self.ledger.counter("GPU-0", self.clock.monotonic_ns(), self.joules)
        self.server.moved()

    def books(self, part):
        """One figure of the GPU's books, J."""
        found = self.ledger.snapshot().books.get("GPU-0")
        return None if found is None else getattr(found, part)

    def until(self, holds):
        """Wait for what the server does on its own thread."""
        deadline = time.monotonic() + 10
        while not holds():
            assert time.monotonic() < deadline
            select.select([], [], [], 0.002)

    def end(self):
        for program in self.programs:
            program.close()
        self.server.stop(5)
        self.listener.close()


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def hub(place, clock):
    made = Hub(place, clock)
    yield made
    made.end()


def opened(hub, request="r", *, probed=False, devices=("GPU-0",)):
    return wire.Opened(
        request, hub.clock.monotonic_ns(), None, list(devices), "m", None, None, {}, None, False, probed, None
    )


def closed(hub, request="r"):
    return wire.Closed(request, hub.clock.monotonic_ns(), 5, "stop", None, None, None)


def metered(hub, program, request="r"):
    """Open for one second of 100 W; its joules."""
    program.say(opened(hub, request), wire.StatusAsked(1))
    program.hear(wire.StatusAnswered)
    hub.read()
    program.say(closed(hub, request), wire.StatusAsked(2))
    program.hear(wire.StatusAnswered)
    hub.read()
    (share,) = program.settled(request)
    return share.joules


# --- coming in ---


def test_greeting(hub):
    """A program is told what there is to know, and the host hears who came and who left, as the kernel says it."""
    import os

    program = hub.connect(name="n", group="g")
    said = program.welcome
    assert (said.version, said.release, said.hub, said.tier) == (wire.VERSION, "0.3", "name", "shared")
    assert (said.devices, said.denied, said.wait_s, said.url) == ([GPU], False, 2.5, "http://127.0.0.1:9464/metrics")
    assert (said.resumed, said.whole) == ([], True)
    who = (f"{os.getuid()}:g:n", os.getpid())
    assert hub.came == [who]
    assert hub.server.connected_now == 1
    assert hub.server.idle_s() == 0.0
    program.close()
    hub.until(lambda: hub.went == [who])
    hub.clock.advance(5.0)
    assert hub.server.idle_s() == 5.0


@pytest.mark.parametrize("version", [0, 2])
def test_another_version(hub, version):
    """Refused with a text that says what to do, and the connection ends."""
    program = hub.connect(version=version)
    assert program.welcome.code == "version"
    assert (
        f"version {wire.VERSION} of the wire and the program (melodi_otel 0.3) version {version}"
        in program.welcome.text
    )
    assert "bring both to the same release" in program.welcome.text
    assert program.ended()
    assert hub.server.refusals.counts == {"version": 1}


def test_another_version_whose_greeting_looks_different(hub):
    """Its greeting cannot be read, and the refusal is as clear."""
    program = hub.connect(greet=False)
    raw = msgspec.msgpack.encode((0, [[1, 9, {"a": 1}]]))
    program.sock.sendall(struct.pack(">I", len(raw)) + raw)
    refused = program.hear(wire.Refused)
    assert (refused.code, "and the program version 9: bring both" in refused.text) == ("version", True)
    assert program.ended()


def test_no_greeting(hub):
    """Whatever comes first and is none is refused, and nothing of it is used."""
    program = hub.connect(greet=False)
    program.say(opened(hub), closed(hub))
    assert program.hear(wire.Refused).text == "the first message must be a greeting"
    assert program.ended()
    assert hub.server.refusals.counts == {"greeting": 1}
    assert hub.server.connected_now == 0


def test_no_greeting_in_time(hub, monkeypatch):
    """Who connects and says nothing is asked to leave, and makes room for others."""
    monkeypatch.setattr(server_module, "GREETING_S", 0.05)
    program = hub.connect(greet=False)
    assert program.hear(wire.Refused) == wire.Refused("greeting", "no greeting came within 0.05 s")
    assert program.ended()
    hub.until(lambda: not hub.server.waiting)


def test_doctor_is_no_fault(hub, caplog):
    """Who connects and hangs up, as `doctor` does, leaves no line in the log and is counted nowhere."""
    with caplog.at_level(logging.DEBUG, logger="melodi_otel"):
        assert attempt(hub.place).state == "ok"
        hub.connect()  # whoever comes next is served after it
        hub.until(lambda: not hub.server.waiting)
    assert not caplog.records
    assert not hub.server.refusals.counts
    assert len(hub.came) == 1


def test_the_65th_of_a_user(hub, monkeypatch):
    """64 connections per user, greeted or not; the next is refused, another user's is not, and one that ends makes room."""
    uids = {}
    monkeypatch.setattr(hub.server, "_peer", lambda sock: (1, uids.get("now", 1)))
    programs = [hub.connect(name=str(number)) for number in range(CONNECTIONS - 1)]
    silent = hub.connect(greet=False)
    hub.until(lambda: len(hub.server.waiting) == 1)
    refused = hub.connect(greet=False)
    assert refused.hear(wire.Refused) == wire.Refused("too_many", "this hub takes 64 connections per user")
    assert refused.ended()
    uids["now"] = 2
    assert isinstance(hub.connect(name="other").welcome, wire.Welcome)
    uids["now"] = 1
    silent.close()
    hub.until(lambda: not hub.server.waiting)
    assert isinstance(hub.connect(name="room").welcome, wire.Welcome)
    assert len(programs) == 63
    assert hub.server.refusals.counts == {"too_many": 1}


def test_the_same_program_twice(hub):
    """A second connection under the same name is refused: ids would mean two things. Of a group that shares it may come."""
    hub.connect(name="n")
    second = hub.connect(name="n")
    assert (second.welcome.code, second.welcome.text) == ("replayed", "this program is connected already")
    assert isinstance(hub.connect(name="m", alone=False).welcome, wire.Welcome)
    assert isinstance(hub.connect(name="m", alone=False).welcome, wire.Welcome)


# --- what is broken hurts nobody else ---


@pytest.mark.parametrize(
    "raw",
    [
        b"\xff\xff\xff\xff",
        struct.pack(">I", 3) + b"abc",
        struct.pack(">I", 4) + b"\x92\x05\x90\xc0",
        struct.pack(">I", 3) + b"\x92\x63\x90",
        struct.pack(">I", 50_000) + b"\x91" * 50_000,
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["announced", "garbage", "too much", "number", "deep", "http"],
)
@pytest.mark.parametrize("greet", [True, False])
def test_a_malformed_frame_ends_its_connection_alone(hub, raw, greet):
    """The offender hears why and is gone; a second program goes on and gets its joules."""
    good, bad = hub.connect(name="good"), hub.connect(name="bad", greet=greet)
    good.say(opened(hub, "before"))
    if greet:
        bad.say(opened(hub, "mine", devices=[]))
    bad.sock.sendall(raw)
    refused = bad.hear(wire.Refused)
    assert refused.code == "malformed"
    assert bad.ended()
    assert metered(hub, good) == 50.0  # beside `before`
    assert hub.server.refusals.counts == {"malformed": 1}
    assert hub.ledger.refused == 0


def test_requests_of_a_program_that_dies(hub):
    """Killed in the middle: its request ends there, and the other one has the whole device from then on."""
    good, bad = hub.connect(name="good"), hub.connect(name="bad")
    for program in (good, bad):
        program.say(opened(hub), wire.StatusAsked(1))
        program.hear(wire.StatusAnswered)
    hub.read(1.0)
    bad.close()
    hub.until(lambda: hub.server.connected_now == 1)
    hub.read(1.0)
    good.say(closed(hub), wire.StatusAsked(2))
    good.hear(wire.StatusAnswered)
    hub.read(1.0)
    (share,) = good.settled()
    assert share.joules == pytest.approx(50.0 + 100.0)
    assert hub.books("attributed") == pytest.approx(200.0)


def test_a_program_that_does_not_read(hub, monkeypatch):
    """What waits for it grows too large: it is cut off, and others go on."""
    monkeypatch.setattr(server_module, "BACKLOG", 100_000)
    good, lazy = hub.connect(name="good"), hub.connect(name="lazy")
    lazy.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    monkeypatch.setattr(
        hub.server._host.__class__, "status", property(lambda _: lambda: {"x": "y" * 50_000}), raising=False
    )
    try:
        for number in range(200):
            lazy.say(wire.StatusAsked(number))
    except OSError:
        pass
    hub.until(lambda: hub.server.connected_now == 1)
    assert hub.server.refusals.counts == {"too_many": 1}
    assert good.sock.fileno() > 0


def test_a_fault_of_the_hub_is_not_the_programs(hub, monkeypatch, caplog):
    """Settling fails once: it is logged, and the next reading brings the joules."""
    program = hub.connect()
    real, failures = hub.ledger.settle, [RuntimeError("no")]

    def settle(now_ns):
        if failures:
            raise failures.pop()
        real(now_ns)

    monkeypatch.setattr(hub.ledger, "settle", settle)
    assert metered(hub, program) == 100.0
    assert not failures
    assert "settling failed" in caplog.text


# --- a round ---


def test_ask_and_answer(hub):
    """The sensor moves: who has probed requests is asked, what comes before the answer counts, then it settles and tells."""
    program, other = hub.connect(name="a"), hub.connect(name="b")
    program.say(opened(hub, probed=True), wire.StatusAsked(1))
    program.hear(wire.StatusAnswered)
    hub.read()
    ask = program.hear(wire.Ask)
    program.say(wire.Progressed("r", hub.clock.monotonic_ns(), 17), wire.Answered(ask.ask))
    hub.until(lambda: hub.books("in_flight") == 100.0)
    assert [present.output_tokens for present in hub.ledger.present()] == [17]
    other.say(wire.StatusAsked(1))
    other.hear(wire.StatusAnswered)
    assert hub.settled == [hub.joules]
    assert not [message for message in other.inbox if isinstance(message, wire.Ask)]


def test_who_never_answers_holds_up_nobody(hub, monkeypatch):
    """A stopped program is asked and says nothing: after the wait the others settle, and later rounds wait no longer."""
    waited = []
    real = hub.server._loop.call_later
    monkeypatch.setattr(hub.server._loop, "call_later", lambda s, *rest: (waited.append(s), real(s, *rest))[1])
    good, stopped = hub.connect(name="good"), hub.connect(name="stopped")
    stopped.say(opened(hub, probed=True, devices=[]), wire.StatusAsked(1))
    stopped.hear(wire.StatusAnswered)
    for request in ("a", "b"):
        start = time.monotonic()
        assert metered(hub, good, request) == 100.0
        assert time.monotonic() - start < 2.0
    assert stopped.hear(wire.Ask).ask == 1
    assert server_module.ANSWER_S in waited


def test_an_old_question_is_not_waited_for(hub):
    """Asked, and closed without an answer: the next round does not wait for it."""
    program = hub.connect()
    program.say(opened(hub, probed=True), wire.StatusAsked(1))
    program.hear(wire.StatusAnswered)
    hub.read()
    program.hear(wire.Ask)
    (session,) = hub.server._sessions
    hub.until(lambda: session.asked is None)  # the wait is over
    assert hub.server._round is None


def shared_engine(hub):
    """The two programs of one engine: who opens requests, and who tells steps; a request that has just ended there."""
    front, core = hub.connect(name="front", alone=False), hub.connect(name="core", alone=False)
    now_ns = hub.clock.monotonic_ns()
    core.say(wire.EngineTold(1, now_ns, "ready", "m", ["GPU-0"], None, [], (None,) * 7), wire.StatusAsked(1))
    core.hear(wire.StatusAnswered)
    front.say(msgspec.structs.replace(opened(hub), engine=1), wire.StatusAsked(1))
    front.hear(wire.StatusAnswered)
    hub.clock.advance(0.9)
    front.say(closed(hub), wire.StatusAsked(2))
    front.hear(wire.StatusAnswered)
    hub.clock.advance(-0.9)
    return front, core, now_ns


def test_steps_of_another_program_are_asked_for(hub):
    """A request ends: the program whose engine computes it is asked, and its steps come before its answer; then it settles."""
    front, core, now_ns = shared_engine(hub)
    hub.read()
    ask = core.hear(wire.Ask)
    step = wire.Stepped(1, 0, 1, now_ns, now_ns + S // 2, None, Decode(0, 0), [Prefill("r", 5, 0)], [], [], [])
    core.say(step, wire.Answered(ask.ask))
    (share,) = front.settled()
    assert (share.dynamic, share.static, share.method) == (80.0, 10.0, "exclusive")


def test_steps_that_come_after_the_round(hub):
    """An answer that comes after its round settles the requests whose steps it brought, without another reading."""
    front, core, now_ns = shared_engine(hub)
    hub.read()
    ask = core.hear(wire.Ask)
    hub.until(lambda: hub.settled and hub.server._round is None)
    assert not front.inbox
    step = wire.Stepped(1, 0, 1, now_ns, now_ns + S // 2, None, Decode(0, 0), [Prefill("r", 5, 0)], [], [], [])
    core.say(step, wire.Answered(ask.ask))
    assert front.settled()[0].dynamic == 80.0


def test_an_engine_that_says_nothing_is_waited_for_once(hub):
    """A program that has only steps to tell and does not answer holds up one round, not every one after it."""
    _, core, _ = shared_engine(hub)
    hub.read()
    core.hear(wire.Ask)
    hub.until(lambda: hub.settled and hub.server._round is None)
    session = next(session for session in hub.server._sessions if session.stepping)
    hub.read()
    core.hear(wire.Ask)
    assert session.asked is None


def test_the_journal_comes_before_the_news(hub, monkeypatch):
    """Joules are told only when they stand in a page: the final ones as a promise, until they are acknowledged."""
    program = hub.connect()
    (connection,) = hub.server._sessions.values()
    real = connection.send

    def send(messages):
        hub.diary.said += ["settled" for message in messages if isinstance(message, wire.Settled)]
        real(messages)

    monkeypatch.setattr(connection, "send", send)
    program.say(opened(hub))
    program.say(closed(hub), wire.StatusAsked(0))
    program.hear(wire.StatusAnswered)
    hub.read()
    told = program.hear(wire.Settled)
    at = hub.diary.said.index("settled")
    assert "journal" in hub.diary.said[:at]
    held = [[(p.group.rpartition(":")[2], p.request, p.final) for p in promises] for _, promises in hub.diary.pages]
    assert held[-1] == [("n", "r", True)]
    program.say(wire.Got(told.number), opened(hub, "next"), closed(hub, "next"))
    program.say(wire.StatusAsked(1))
    program.hear(wire.StatusAnswered)
    hub.read()
    assert program.settled("next")
    assert [p.request for p in hub.diary.pages[-1][1]] == ["next"]


def test_a_journal_that_fails_stops_nobody(hub, monkeypatch, caplog):
    """Even where the books cannot be written down the joules are told, and no older page is left to be gone on from."""
    program = hub.connect()

    def fails(now_ns):
        raise RuntimeError("no")

    hub.diary.save("h", hub.ledger.state(0), [])
    assert hub.diary._path.exists()
    monkeypatch.setattr(hub.ledger, "state", fails)
    assert metered(hub, program) == 100.0
    assert not hub.diary._path.exists()
    assert "the journal cannot be written" in caplog.text


def test_joules_so_far_are_told_on_a_busy_hub(hub, monkeypatch):
    """Others settle all the time: an open request still hears once a second what it has so far."""
    monkeypatch.setattr(server_module, "ALIVE_S", 0.02)
    program, busy = hub.connect(name="a"), hub.connect(name="b")
    program.say(opened(hub), wire.StatusAsked(1))
    program.hear(wire.StatusAnswered)
    told = []
    for number in range(20):
        busy.say(opened(hub, f"r{number}"))
        busy.say(closed(hub, f"r{number}"))
        hub.read(0.3)
        assert len(busy.settled(f"r{number}")) == 1
    while not told:
        told = program.hear(wire.Accrued).told
    assert told[0].request == "r"
    assert told[0].shares[0].joules > 0.0
    assert not told[0].final


def test_signs_of_life(hub, monkeypatch):
    """Twice a second something comes, also when nothing happens."""
    program = hub.connect()
    said = [program.hear(wire.Accrued) for _ in range(3)]
    assert [message.told for message in said] == [[], [], []]


# --- questions ---


def test_status_without_a_greeting(hub):
    """`top` asks without being a program; it may ask again, and is no program for it."""
    asker = hub.connect(greet=False)
    for number in (5, 6):
        asker.say(wire.StatusAsked(number))
        assert asker.hear(wire.StatusAnswered) == wire.StatusAnswered(number, '{"open": 3}')
    assert hub.server.connected_now == 0
    assert not hub.server.refusals.counts


def test_between(hub):
    """Joules of a whole device in a stretch of time; None where they are not known."""
    program = hub.connect()
    start = hub.clock.monotonic_ns()
    hub.read()
    program.say(opened(hub), wire.Between(1, "GPU-0", start, start + S // 2))
    hub.read()
    hub.until(lambda: "GPU-0" in hub.ledger.snapshot().books)
    program.say(wire.Between(2, "GPU-0", start, start + S // 2), wire.Between(3, "none", 0, 1))
    program.say(wire.Between(4, "GPU-0", start, start + 3600 * S))
    answers = {}
    while len(answers) < 4:
        answer = program.hear(wire.BetweenAnswered)
        answers[answer.question] = answer.joules
    assert (answers[2], answers[3], answers[4]) == (50.0, None, None)


def test_a_question_that_cannot_be_answered(hub, monkeypatch, caplog):
    """The status fails: the program stays connected."""
    program = hub.connect()

    def fails(*_):
        raise RuntimeError("no")

    monkeypatch.setattr(hub.ledger, "between", fails)
    program.say(wire.Between(1, "GPU-0", 0, 1), wire.StatusAsked(2))
    assert program.hear(wire.StatusAnswered).question == 2
    assert "could not be answered" in caplog.text


def test_observations_reach_the_host(hub):
    """What a program shows arrives with its group."""
    program = hub.connect()
    told = wire.Observed(
        "r", "chat", "p", "m", 1, 2, None, 3, 4, "stop", None, True, 5.0, "gpu", "measured", b"", b"", {}
    )
    program.say(told, wire.StatusAsked(1))
    program.hear(wire.StatusAnswered)
    assert [message for _, message in hub.observed] == [told]


# --- coming back ---


def known(uid, name="n"):
    group = f"{uid}:g:{name}"
    return {
        Key(group, "so far"): (False, [SHARE]),
        Key(group, "promised"): (True, [SHARE, SHARE]),
        Key(group, "other"): (True, []),
    }


@pytest.fixture
def heir(place, clock):
    import os

    made = Hub(place, clock, known(os.getuid()))
    yield made
    made.end()


def test_what_the_hub_before_knew(heir):
    """Provisional joules, promised ones, and nothing of what it never knew; each is told to its own program alone."""
    assert heir.connect(name="thief", resume=["so far", "promised"]).welcome.resumed == []
    program = heir.connect(resume=["so far", "promised", "unknown"])
    found = {told.request: (told.final, len(told.shares)) for told in program.welcome.resumed}
    assert found == {"so far": (False, 1), "promised": (True, 2)}
    assert program.welcome.whole


def test_it_is_told_once(heir):
    """A program that has read the answer and comes again finds nothing: no joule twice."""
    program = heir.connect(resume=["promised"])
    program.say(wire.StatusAsked(1), wire.Got(0))
    program.hear(wire.StatusAnswered)
    program.close()
    heir.until(lambda: heir.server.connected_now == 0)
    assert heir.connect(resume=["promised"]).welcome.resumed == []


def test_who_was_cut_off_at_the_greeting_may_ask_again(heir):
    """Nothing came from it since: it may not have heard, so what it was told is kept."""
    program = heir.connect(resume=["promised"])
    program.close()
    heir.until(lambda: heir.server.connected_now == 0)
    assert [told.request for told in heir.connect(resume=["promised"]).welcome.resumed] == ["promised"]


def test_promises_outlive_two_hubs(heir):
    """Killed again before its programs are back: what the first hub promised stands in the second one's journal."""
    program = heir.connect(name="m")
    assert metered(heir, program) == 100.0
    _, promises = heir.diary.pages[-1]
    held = {(promise.request, promise.final) for promise in promises}
    assert held == {("so far", False), ("promised", True), ("other", True), ("r", True)}


def test_a_long_list_comes_in_parts(place, clock):
    """More than a frame holds: the rest follows, and the last part says so."""
    import os

    group = f"{os.getuid()}:g:n"
    many = {Key(group, f"r{number}"): (True, [SHARE] * 4) for number in range(3000)}
    hub = Hub(place, clock, many)
    try:
        program = hub.connect(resume=[key.request for key in many])
        told, whole = list(program.welcome.resumed), program.welcome.whole
        assert not whole
        while not whole:
            part = program.hear(wire.Resumed)
            told, whole = told + part.resumed, part.whole
        assert {one.request for one in told} == {f"r{number}" for number in range(3000)}
    finally:
        hub.end()


# --- the end ---


def test_stopping_tells_and_writes(hub):
    """Final joules, those so far, and a journal with both; then everybody is hung up on."""
    program = hub.connect()
    program.say(opened(hub, "open"), opened(hub, "done"))
    hub.until(lambda: (hub.ledger.settle(0), len(hub.ledger.present()))[1] == 2)
    hub.clock.advance(1.0)
    program.say(closed(hub, "done"), wire.StatusAsked(1))
    program.hear(wire.StatusAnswered)
    hub.ledger.counter("GPU-0", hub.clock.monotonic_ns(), 100.0)
    hub.server.stop(5)
    settled = program.hear(wire.Settled)
    assert [(told.request, told.shares[0].joules) for told in settled.told] == [("done", 50.0)]
    accrued = program.hear(wire.Accrued)
    while not accrued.told:
        accrued = program.hear(wire.Accrued)
    assert [(told.request, told.shares[0].joules, told.final) for told in accrued.told] == [("open", 50.0, False)]
    assert program.ended()
    page = hub.diary.load()
    assert [promise.request for promise in page.promises] == ["done"]
    assert [one.key.request for one in page.state.accrued] == ["open"]
    assert not hub.server.serving


def test_stopping_twice(hub):
    """The second time there is nothing to do, and readings that come later wake nobody."""
    hub.server.stop(5)
    hub.server.moved()
