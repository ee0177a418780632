"""The books balance over any number of ledgers: each is killed at a random moment and the next continues from its state."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass, field

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from melodi_otel.attribution.finishing import accrued_in
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.merging import merge_shares
from melodi_otel.attribution.meter import Decode, EngineId, Joined, Key, Prefill, Share
from melodi_otel.attribution.state import State
from melodi_otel.devices import Device

S = 1_000_000_000
ENGINE = EngineId("g", 0)
DEVICES = (Device("GPU-0", "gpu", idle_watts=40.0), Device("GPU-1", "gpu"), Device("cpu-0", "cpu"))
WATTS = {"GPU-0": 90.0, "GPU-1": 200.0, "cpu-0": 65.0}
RANGE_J = 4e6
"""More than 5,000 W make of all the gaps together: no turn can be missed."""
START = {"GPU-0": 0.0, "GPU-1": 1e7, "cpu-0": RANGE_J - 40.0}
NAMES = ("GPU-0", "GPU-1", "cpu-0")


@dataclass
class Client:
    """One request as its process knows it: what earlier ledgers gave it, and what it told and waits for."""

    key: Key
    tokens: int = 0
    first_token_ns: int | None = None
    kept: list[Share] = field(default_factory=list)
    closed_ns: int | None = None
    future: Future[list[Share]] | None = None


class World:
    """A host, its requests, and whichever ledger lives now."""

    def __init__(self) -> None:
        self.now_ns = 1000 * S
        self.joules = dict.fromkeys(NAMES, 0.0)
        self.clients: list[Client] = []
        self.members: dict[str, int] = {}
        self.seq = 0
        self.last_step_ns = 0
        self.ledger = self.fresh()
        self.sample(0.0)
        self.ledger.settle(self.now_ns)

    def fresh(self) -> Ledger:
        made = Ledger(patience_s=None)
        for device in DEVICES:
            made.device(device)
        return made

    def pass_time(self, seconds: float) -> None:
        self.now_ns += round(seconds * S)
        for name, watts in WATTS.items():
            self.joules[name] += watts * seconds

    def sample(self, seconds: float, missed: int = -1) -> None:
        self.pass_time(seconds)
        for number, (name, start) in enumerate(START.items()):
            if number != missed:
                reading = (start + self.joules[name]) % RANGE_J if name == "cpu-0" else start + self.joules[name]
                self.ledger.counter(name, self.now_ns, reading, RANGE_J if name == "cpu-0" else None)

    def open_ones(self) -> list[Client]:
        return [client for client in self.clients if client.closed_ns is None]

    def open(self, tokens: int) -> None:
        client = Client(Key("g", f"r{len(self.clients)}"))
        self.clients.append(client)
        self.ledger.open(client.key, self.now_ns, engine=ENGINE, devices=NAMES, prompt_tokens=tokens)

    def progress(self, which: int, tokens: int) -> None:
        if listed := self.open_ones():
            client = listed[which % len(listed)]
            client.tokens += tokens
            client.first_token_ns = client.first_token_ns or self.now_ns
            self.ledger.progress(client.key, self.now_ns, client.tokens, first_token_ns=client.first_token_ns)

    def step(self, part: float) -> None:
        present = [client.key.request for client in self.open_ones()]
        left = [name for name in self.members if name not in present]
        for name in left:
            del self.members[name]
        new = [name for name in present if name not in self.members]
        joined = [Joined(name, 20) for name in new[1:]]
        self.members.update(joined)
        t0 = max(self.last_step_ns, self.now_ns - round(part * 0.3 * S))
        self.seq += 1
        self.ledger.step(
            ENGINE,
            0,
            self.seq,
            t0,
            self.now_ns,
            NAMES,
            decode=Decode(len(self.members), 0),
            prefill=[Prefill(name, 10, 0) for name in new[:1]],
            joined=joined,
            left=left,
        )
        self.last_step_ns = self.now_ns

    def close(self, which: int) -> None:
        if listed := self.open_ones():
            client = listed[which % len(listed)]
            client.closed_ns = self.now_ns
            client.future = self.ledger.close(client.key, self.now_ns, client.tokens, "stop")

    def take_over(self, seconds: float, back: bool) -> None:
        """Kill the ledger ``seconds`` before the next one's first reading; ``back``: clients return before that, not after."""
        state = msgspec.msgpack.decode(msgspec.msgpack.encode(self.ledger.state(self.now_ns)), type=State)
        kept = accrued_in(state)
        for client in self.clients:
            if client.future is None or not client.future.done():
                client.kept = merge_shares(client.kept, kept.get(client.key, []))
        self.ledger = self.fresh()
        self.ledger.restore(state)
        self.check()
        if back:
            self.come_back()
        self.sample(seconds)
        if not back:
            self.come_back()

    def come_back(self) -> None:
        self.members.clear()
        for client in self.clients:
            if client.future is not None and client.future.done():
                continue
            at = self.now_ns if client.closed_ns is None else client.closed_ns
            self.ledger.open(client.key, at, engine=ENGINE, devices=NAMES, prompt_tokens=40, cached_tokens=40)
            if client.tokens:
                self.ledger.progress(client.key, at, client.tokens, first_token_ns=client.first_token_ns)
            if client.closed_ns is not None:
                client.future = self.ledger.close(client.key, client.closed_ns, client.tokens, "stop")

    def check(self) -> None:
        for books in self.ledger.snapshot().books.values():
            assert abs(books.imbalance()) <= 1e-9, books


actions = st.lists(
    st.tuples(
        st.sampled_from(
            [
                "time",
                "time",
                "time",
                "open",
                "open",
                "tokens",
                "step",
                "step",
                "close",
                "settle",
                "settle",
                "killed",
                "killed in the end of one",
            ]
        ),
        st.integers(0, 7),
        st.floats(0.0, 1.0),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(actions, st.booleans())
def test_no_joule_is_lost_or_counted_twice(listed: list[tuple[str, int, float]], back: bool) -> None:
    """At the end the shares of all requests, each joined over the ledgers it lived in, the buckets and the residual are
    what the counters advanced from their first reading to the last.
    """
    world = World()
    world.open(100)
    world.open(0)
    world.progress(0, 5)
    world.sample(0.5)
    world.ledger.settle(world.now_ns + S)
    for action, which, part in listed:
        if action == "time":
            world.sample(0.02 + part * 0.4, which)
        elif action == "open":
            world.open(int(part * 900))
        elif action == "tokens":
            world.progress(which, int(part * 40))
        elif action == "step":
            world.step(part)
        elif action == "close":
            world.close(which)
        elif action == "settle":
            world.ledger.settle(world.now_ns)
            world.check()
        else:
            if action == "killed in the end of one":
                world.sample(0.2, which)
                world.pass_time(0.05)
                world.close(which)
                world.ledger.settle(world.now_ns)
            world.take_over(0.1 + part * 8.0, back)
    while world.open_ones():
        world.close(0)
    world.sample(1.0)
    world.ledger.flush(world.now_ns)
    world.check()
    assert world.ledger.refused == 0
    got: dict[str, list[float]] = {name: [] for name in NAMES}
    for client in world.clients:
        assert client.future is not None
        for share in merge_shares(client.kept, client.future.result(0)):
            assert 0.0 <= share.coverage <= 1.0
            got[share.device].append(share.joules or 0.0)
    view = world.ledger.snapshot()
    for name in NAMES:
        books, used = view.books[name], world.joules[name]
        scale = 1e-9 * max(1.0, used) + 1e-12 * START[name]  # and what the digits of the reading cost
        assert abs(books.measured - used) <= scale
        assert abs(math.fsum(got[name]) - books.attributed) <= scale
        unattributed = math.fsum(j for (device, *_), j in view.unattributed.items() if device == name)
        assert abs(math.fsum(got[name]) + unattributed + books.residual - used) <= scale
        attributed = math.fsum(j for (device, *_), j in view.attributed.items() if device == name)
        assert abs(attributed - books.attributed) <= scale
