from __future__ import annotations

from collections import Counter

import pytest

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Decode, EngineId, Joined, Key, Late, Prefill, Share
from melodi_otel.devices import Device
from melodi_otel.hub import limits, wire
from melodi_otel.hub.limits import Names, Refusals
from melodi_otel.hub.session import Session

S = 1_000_000_000
START = 100 * S


class Hub:
    """One ledger with one GPU at 100 W, 20 of them idle, and whoever connects; time is moved by hand."""

    def __init__(self):
        self.ledger = Ledger(patience_s=None)
        self.ledger.device(Device("GPU-0", "gpu", idle_watts=20.0))
        self.refuse = Refusals()
        self.told = {}
        self.observed = []
        self.seconds = 0.0
        self.read(0.0)

    def connect(self, uid=1, group="g", name="n", alone=True, **more):
        session = Session(
            self.ledger, uid, 7, self._finished, lambda _, told: self.observed.append(told), self.refuse, **more
        )
        assert session.greet(hello(group=group, name=name, alone=alone)) is None
        return session

    @property
    def now_ns(self):
        return START + round(self.seconds * S)

    def read(self, seconds):
        self.seconds += seconds
        self.ledger.counter("GPU-0", self.now_ns, 100.0 * self.seconds)
        self.ledger.settle(self.now_ns + 10 * S)

    def say(self, session, *messages):
        for message in messages:
            session.take(message, self.now_ns)

    def joules(self, session, request):
        (share,) = self.told[session, request]
        return share.joules

    def _finished(self, session, request, shares):
        assert (session, request) not in self.told, "told twice"
        self.told[session, request] = shares


@pytest.fixture
def hub():
    return Hub()


def hello(version=wire.VERSION, group="g", name="n", alone=True):
    return wire.Hello(version, "0.3.0", name, group, alone, "s", None, False, [])


def opened(request="r", t_ns=START, engine=None, devices=("GPU-0",), **more):
    told = {"model": "m", "prompt_tokens": None, "cached_tokens": None, "labels": {}, "parent": None, "threaded": False}
    told |= {"probed": False, "late": None} | more
    return wire.Opened(request, t_ns, engine, None if devices is None else list(devices), **told)


def closed(request="r", t_ns=1 << 61, tokens=5, outcome="stop"):
    return wire.Closed(request, t_ns, tokens, outcome, None, None, None)


def stepped(seq, t0_s, t1_s, *, engine=1, n=0, joined=(), prefill=(), lane=0, left=(), computed=()):
    t0, t1 = (START + round(t * S) for t in (t0_s, t1_s))
    return wire.Stepped(
        engine, lane, seq, t0, t1, ["GPU-0"], Decode(n, 0), list(prefill), list(computed), list(joined), list(left)
    )


# --- who it is ---


def test_an_older_program_is_told_what_to_do(hub):
    """A greeting in another version is refused and counted, and the text names both versions and the release."""
    session = Session(hub.ledger, 1, 7, hub._finished, lambda *_: None, hub.refuse)
    said = session.greet(hello(version=0))
    assert said == (
        "this hub speaks version 1 of the wire and the program (melodi_otel 0.3.0) version 0: bring both to the same release"
    )
    assert hub.refuse.counts == {"version": 1}
    assert session.hello is None


@pytest.mark.parametrize(
    ("other", "group"),
    [
        ({"uid": 2}, "2:g:n"),
        ({"uid": None}, "?:g:n"),
        ({"group": "h"}, "1:h:n"),
        ({"name": "o"}, "1:g:o"),
        ({"alone": False}, "1:g"),
    ],
)
def test_equal_ids_of_others_are_other_requests(hub, other, group):
    """Two users, two groups, two programs of one group: each has its own request ``r``, with its own joules."""
    mine, theirs = hub.connect(), hub.connect(**other)
    assert (mine.group, theirs.group) == ("1:g:n", group)
    hub.say(mine, opened())
    hub.read(1.0)
    hub.say(theirs, opened(t_ns=hub.now_ns))
    hub.read(2.0)
    hub.say(mine, closed())
    hub.read(1.0)
    hub.say(theirs, closed())
    hub.read(1.0)
    assert hub.joules(mine, "r") == pytest.approx(100.0 + 100.0)
    assert hub.joules(theirs, "r") == pytest.approx(100.0 + 100.0)
    assert not hub.refuse.counts


def test_equal_engines_of_others_are_other_engines(hub):
    """A step of one program names nobody of another, though engine and ids are equal."""
    mine, theirs = hub.connect(uid=1), hub.connect(uid=2)
    for session in (mine, theirs):
        hub.say(session, opened("r", engine=1))
    hub.seconds += 1.0
    hub.say(mine, stepped(1, 0.0, 1.0, n=1, joined=[Joined("r", 5)]))
    hub.say(theirs, stepped(1, 0.0, 1.0, prefill=[Prefill("elsewhere", 5, 0)]))
    hub.read(0.0)
    hub.say(mine, closed())
    hub.read(1.0)
    assert hub.told[mine, "r"][0].method == "step"
    assert hub.joules(mine, "r") < 100.0  # the other program's step ran beside it
    assert (theirs, "r") not in hub.told


def test_processes_of_a_group_share_their_engines(hub):
    """Requests opened by one process, steps told by another of the same group: who stands in the step has its joules."""
    front, engine = hub.connect(name="front", alone=False), hub.connect(name="engine", alone=False)
    hub.say(front, opened(engine=1), opened("queued", engine=1))
    hub.seconds += 1.0
    hub.say(engine, stepped(1, 0.0, 1.0, n=1, joined=[Joined("r", 5)]))
    hub.read(0.0)
    hub.say(front, closed(), closed("queued"))
    hub.read(1.0)
    assert (hub.joules(front, "r"), hub.joules(front, "queued")) == (100.0, 0.0)


def test_the_user_decides_before_the_group(hub):
    """Another user who knows the group's token opens and steps for himself alone."""
    mine, thief = hub.connect(uid=1, alone=False), hub.connect(uid=2, alone=False)
    hub.say(mine, opened(engine=1))
    hub.seconds += 1.0
    hub.say(thief, stepped(1, 0.0, 1.0, n=1, joined=[Joined("r", 5)]))
    hub.read(0.0)
    hub.say(thief, closed())
    hub.say(mine, closed())
    hub.read(1.0)
    assert hub.told[thief, "r"] == []
    assert hub.told[mine, "r"][0].method != "step"


# --- what breaks a rule ---


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        (wire.Progressed("r", START, 5), "foreign"),
        (wire.Bound("r", "c"), "foreign"),
        (closed("r"), "foreign"),
        (hello(), "replayed"),
        (wire.Ask(1), "malformed"),
        (wire.Welcome(1, "0", "h", "shared", [], False, 1.0, None, [], True), "malformed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_is_not_for_it_to_say(hub, message, kind):
    """Progress, a bind or a close for a request that it has not opened, a second greeting, a hub's own messages."""
    other = hub.connect(uid=1, name="other")
    hub.say(other, opened("r"))
    session = hub.connect()
    hub.say(session, message)
    assert hub.refuse.counts == {kind: 1}
    hub.read(1.0)
    hub.say(other, closed("r"))
    hub.read(1.0)
    assert hub.joules(other, "r") == 100.0
    assert hub.told[other, "r"][0].method == "exclusive"


def test_who_closes_what_is_not_his_is_answered_at_once(hub):
    """The answer has no joules: nobody shall wait for what never comes."""
    session = hub.connect()
    hub.say(session, closed("r"))
    assert hub.told == {(session, "r"): []}


def test_opened_twice(hub):
    """The second time changes nothing, neither while it is open nor while its joules are awaited."""
    session = hub.connect()
    hub.say(session, opened())
    hub.read(1.0)
    hub.say(session, opened(t_ns=hub.now_ns), closed())
    hub.say(session, opened(t_ns=hub.now_ns))
    assert (hub.refuse.counts, session.open, session.awaited) == ({"replayed": 2}, {}, {"r"})
    hub.read(1.0)
    assert hub.joules(session, "r") == 100.0


def test_closed_twice(hub):
    """The second close is refused, and its joules are told once."""
    session = hub.connect()
    hub.say(session, opened())
    hub.read(1.0)
    hub.say(session, closed(), closed())
    hub.read(1.0)
    assert hub.refuse.counts == {"foreign": 1}
    assert hub.joules(session, "r") == 100.0


def test_an_id_may_be_used_again_when_it_is_settled(hub):
    """The next request of that name is a new one."""
    session = hub.connect()
    hub.say(session, opened(), closed(t_ns=hub.now_ns))
    hub.read(1.0)
    assert hub.told.pop((session, "r")) != []
    hub.say(session, opened(t_ns=hub.now_ns))
    hub.read(1.0)
    hub.say(session, closed())
    hub.read(1.0)
    assert hub.joules(session, "r") == 100.0
    assert not hub.refuse.counts


def test_ten_thousand_are_open_at_most(hub):
    """One more is refused; when one is closed there is room again."""
    session = hub.connect()
    hub.say(session, *(opened(f"r{number}") for number in range(limits.OPEN_LIMIT)))
    assert not hub.refuse.counts
    hub.say(session, opened("more"))
    assert hub.refuse.counts == {"too_many": 1}
    assert len(session.open) == limits.OPEN_LIMIT
    hub.say(session, closed("r0"), opened("more"))
    assert hub.refuse.counts == {"too_many": 1}


def test_engines_of_a_connection_are_limited(hub):
    """256 engines, however they are named: told, opened on, in a step."""
    session = hub.connect()
    facts = (None,) * 7
    hub.say(
        session, *(wire.EngineTold(n, START, "ready", "m", None, None, [], facts) for n in range(limits.ENGINE_LIMIT))
    )
    assert not hub.refuse.counts
    hub.say(session, opened(engine=1000), stepped(1, 0.0, 0.0, engine=1000))
    hub.say(session, wire.EngineTold(1000, START, "ready", "m", None, None, [], facts))
    assert hub.refuse.counts == {"too_many": 3}
    assert "r" not in session.open
    hub.say(session, opened(engine=255))
    assert "r" in session.open


def test_ids_that_stand_for_requests_are_limited(hub):
    """10,000 at a time; those of a request that ends make room."""
    session = hub.connect()
    hub.say(session, opened("a"), opened("b"))
    hub.say(session, *(wire.Bound("a", f"c{number}") for number in range(limits.BIND_LIMIT)))
    hub.say(session, wire.Bound("b", "one more"))
    assert hub.refuse.counts == {"too_many": 1}
    hub.say(session, closed("a"), wire.Bound("b", "one more"))
    assert hub.refuse.counts == {"too_many": 1}


def test_sequences_of_a_lane_are_limited(hub):
    """A set that grows without end is refused; whoever leaves makes room."""
    session = hub.connect()
    first = [Joined(f"s{number}", 1) for number in range(limits.MEMBER_LIMIT)]
    hub.say(session, stepped(1, 0.0, 0.0, joined=first))
    hub.say(session, stepped(2, 0.0, 0.0, joined=[Joined("more", 1)], left=["s0"]))
    hub.say(session, stepped(3, 0.0, 0.0, joined=[Joined("again", 1)], computed=[Prefill("s1", 2, 1)]))
    assert not hub.refuse.counts
    hub.say(session, stepped(4, 0.0, 0.0, joined=[Joined("too many", 1)]))
    assert hub.refuse.counts == {"too_many": 1}


def test_names_of_a_user_are_limited(hub):
    """A model per request fills no books: from the thousandth on they are ``other``, for this user alone."""
    names = Names(limit=3)
    session, other = hub.connect(names=names), hub.connect(uid=2)
    for number in range(5):
        hub.say(session, opened(f"r{number}", model=f"m{number}"))
    hub.say(other, opened("r", model="m4"))
    hub.ledger.settle(hub.now_ns)
    assert Counter(present.model for present in hub.ledger.present()) == {
        "m0": 1,
        "m1": 1,
        "m2": 1,
        "other": 2,
        "m4": 1,
    }
    assert hub.refuse.counts == {"too_many": 2}


def test_names_in_observations_are_limited(hub):
    """What metrics show is bounded in the same way."""
    session = hub.connect(names=Names(limit=1))
    for model in ("a", "b", "a"):
        hub.say(session, observed(model))
    assert [told.model for told in hub.observed] == ["a", "other", "a"]
    assert [told.provider for told in hub.observed] == ["p", None, "p"]


def observed(model):
    return wire.Observed(
        "r", "chat", "p", model, 1, 2, None, 3, 4, "stop", None, True, 5.0, "gpu", "measured", b"", b"", {}
    )


def test_it_is_said_once(hub, caplog):
    """A thousand refusals of one kind and user are one line in the log, and counted all."""
    session, other = hub.connect(uid=1), hub.connect(uid=2)
    hub.say(session, *[wire.Progressed("r", START, 5)] * 1000)
    hub.say(other, wire.Progressed("r", START, 5))
    assert hub.refuse.counts == {"foreign": 1001}
    assert len(caplog.records) == 2


# --- what would spoil the books of others ---


def test_a_device_named_twice_is_charged_once(hub):
    """The request has its joules once, and the books balance."""
    session = hub.connect()
    hub.say(session, opened(devices=["GPU-0"] * 5))
    hub.read(1.0)
    hub.say(session, closed())
    hub.read(1.0)
    assert hub.joules(session, "r") == 100.0
    assert hub.ledger.snapshot().books["GPU-0"].attributed == 100.0


def test_the_future_is_now(hub):
    """An end in an hour is an end now: the joules come, and nothing is waited for."""
    session = hub.connect()
    hub.say(session, opened(t_ns=hub.now_ns + 3600 * S))
    hub.read(1.0)
    hub.say(session, closed(t_ns=hub.now_ns + 3600 * S))
    hub.read(1.0)
    (share,) = hub.told[session, "r"]
    assert (share.t0_ns, share.t1_ns, share.joules) == (START, START + S, 100.0)


def test_nobody_is_inside_himself(hub):
    """A request that names itself as its parent settles as any other."""
    session = hub.connect()
    hub.say(session, opened(parent="r"))
    hub.read(1.0)
    hub.say(session, closed())
    hub.read(1.0)
    (share,) = hub.told[session, "r"]
    assert (share.joules, share.rollup) == (100.0, 100.0)


def test_the_hubs_own_name(hub):
    """A request cannot take the name under which the hub keeps work after a close."""
    session = hub.connect()
    hub.say(session, opened("anonymous"), closed("anonymous"))
    assert hub.told == {(session, "anonymous"): []}
    assert hub.ledger.waiting() == 0


def test_work_not_seen_is_given_back_and_never_taken(hub):
    """Of the number of unseen work everybody takes only what he put there; what is left he takes with him."""
    said = []
    hub.ledger.unseen = lambda t_ns, change: said.append(change)
    first, second = hub.connect(name="a"), hub.connect(name="b")
    hub.say(first, wire.Unseen(START, 2))
    hub.say(second, wire.Unseen(START, -5), wire.Unseen(START, 1), wire.Unseen(START, -3))
    first.leave(hub.now_ns)
    second.leave(hub.now_ns)
    assert said == [2, 1, -1, -2]


def test_late_work_beside_many(hub):
    """Of those beside late work only the newest thousand are looked at."""
    given = {}
    hub.ledger.open = lambda key, t_ns, **more: given.update(more)
    session = hub.connect()
    hub.say(session, opened(late=Late(tuple(range(5000)), True)))
    assert given["late"] == Late(tuple(range(4000, 5000)), True)


# --- the way of a request ---


def test_what_is_said_reaches_the_ledger(hub):
    """Progress, counts, labels, engine and steps arrive as they were told."""
    session = hub.connect()
    facts = (8e9, None, None, None, None, None, None)
    hub.say(
        session,
        wire.EngineTold(1, START, "ready", "big", ["GPU-0"], None, [7], facts),
        opened(engine=1, devices=None, model="big", prompt_tokens=12),
        wire.Bound("r", "r-0"),
        wire.Progressed("r", START, 3, START, 12, 0),
    )
    hub.ledger.settle(hub.now_ns)
    (present,) = hub.ledger.present()
    assert (present.key, present.model, present.open_ns) == (Key("1:g:n", "r"), "big", START)
    assert present.output_tokens == 3
    core = hub.ledger._core
    activity = core.roster.activities[Key("1:g:n", "r")]
    assert (activity.engine, activity.devices, activity.children) == (EngineId("1:g:n", 1), ("GPU-0",), ["r-0"])
    assert core.roster.engines[EngineId("1:g:n", 1)].facts.parameters == 8e9


def test_who_leaves_has_used_what_he_used(hub):
    """The connection is gone after 2 s: what was open ends there, as aborted; idle power is the machine's own again."""
    session = hub.connect()
    hub.say(session, opened(), opened("waits"), closed("waits"))
    hub.read(2.0)
    session.leave(hub.now_ns)
    hub.read(1.0)
    books = hub.ledger.snapshot().books["GPU-0"]
    assert (books.attributed, books.in_flight, books.measured) == (200.0, 0.0, 300.0)
    assert (session, "r") not in hub.told  # nobody is there to hear it
    assert (session.open, session.awaited, session.probed) == ({}, set(), 0)
    hub.say(session, closed("r"))
    assert hub.ledger.waiting() == 0


def test_the_last_of_a_group_takes_its_engines_along(hub):
    """An engine that is gone holds the idle power no longer."""
    session = hub.connect()
    hub.say(session, wire.EngineTold(1, START, "ready", "m", ["GPU-0"], None, [], (None,) * 7))
    hub.read(1.0)
    session.depart(hub.now_ns)
    hub.read(1.0)
    idle = {
        holder: joules for (_, bucket, holder), joules in hub.ledger.snapshot().unattributed.items() if bucket == "idle"
    }
    assert idle == {("", "m"): pytest.approx(100.0), None: pytest.approx(100.0)}


def test_joules_that_nobody_waits_for(hub):
    """A span that has gone out without them: they count as ``unavailable``; for a request of nobody's it means nothing."""
    session = hub.connect()
    hub.say(session, opened(), wire.Forgone("r"), wire.Forgone("never seen"))
    hub.read(1.0)
    hub.say(session, closed(), wire.Forgone("r"))
    hub.read(1.0)
    found = Counter()
    for (_, _, _, quality), joules in hub.ledger.snapshot().attributed.items():
        found[quality] += joules
    assert +found == {"unavailable": pytest.approx(100.0)}
    assert not hub.refuse.counts


def test_probed_requests_are_counted(hub):
    """How many answer when the hub asks: opened as such, and not closed."""
    session = hub.connect()
    hub.say(session, opened("a", probed=True), opened("b", probed=True), opened("c"))
    assert session.probed == 2
    hub.say(session, closed("a"), closed("c"))
    assert session.probed == 1


def test_an_answer_to_another_question_is_none(hub):
    """Only the answer to the newest question ends the waiting."""
    session = hub.connect()
    session.asked = 5
    hub.say(session, wire.Answered(4))
    assert session.asked == 5
    hub.say(session, wire.Answered(5))
    assert session.asked is None


def test_what_is_owed_is_kept_until_it_is_acknowledged(hub):
    """Batches are numbered; what the program has got is kept no longer, whatever it says it has got."""
    session = hub.connect()
    told = [wire.Told("r", True, [])]
    assert [session.owe(told)[0] for _ in range(3)] == [1, 2, 3]
    hub.say(session, wire.Got(2))
    assert [number for number, _ in session.undelivered] == [3]
    hub.say(session, wire.Got(1), wire.Got(1 << 60))
    assert not session.undelivered


def test_shares_name_the_request_by_the_hubs_own_key(hub):
    """Inside the books the group stands before the id, so that nobody's ids meet."""
    session = hub.connect()
    hub.say(session, opened())
    hub.read(1.0)
    hub.say(session, closed())
    hub.read(1.0)
    assert isinstance(hub.told[session, "r"][0], Share)
    assert hub.told[session, "r"][0].key == Key("1:g:n", "r")


# --- engines of processes that come and go ---


def told_of(number, state="ready"):
    return wire.EngineTold(number, START, state, "m", ["GPU-0"], None, [], (None,) * 7)


def test_an_engine_goes_with_who_declared_it(hub, monkeypatch):
    """A core that dies with its connection is gone, though others of its group are there still, and live on."""
    gone = []
    engine = hub.ledger.engine
    monkeypatch.setattr(
        hub.ledger,
        "engine",
        lambda of, t, state="ready", **more: (gone.append((of.number, state)), engine(of, t, state, **more)),
    )
    front, core = hub.connect(alone=False), hub.connect(alone=False, name="core")
    hub.say(core, told_of(1000))
    hub.say(front, opened(engine=1000))
    front.leave(hub.now_ns)
    assert gone == [(1000, "ready")]
    core.leave(hub.now_ns)
    assert gone == [(1000, "ready"), (1000, "gone")]


def test_an_engine_that_said_it_is_gone_goes_once(hub, monkeypatch):
    """A core that was shut down is not told as gone a second time by its connection's end."""
    states = []
    monkeypatch.setattr(hub.ledger, "engine", lambda of, t, state="ready", **more: states.append(state))
    core = hub.connect(alone=False)
    hub.say(core, told_of(1000), told_of(1000, "gone"))
    core.leave(hub.now_ns)
    assert states == ["ready", "gone"]


# --- answers ---


def test_a_promise_and_who_keeps_it(hub):
    """What an answer promises, and the figure that keeps it, are handed on as they are."""
    session = hub.connect()
    hub.say(session, wire.Promised("a1"))
    assert hub.observed == [wire.Promised("a1")]
