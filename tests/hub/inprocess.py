"""A host by hand: ledgers, hubs and a program that moves between them, on one thread and a clock that moves when told.

A hub here is a real ledger behind real sessions; what it and the program say to each other goes through real frames. Only the
socket and the threads are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from melodi_otel.attribution.finishing import accrued_in
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Key, Share
from melodi_otel.attribution.state import State
from melodi_otel.devices import Device
from melodi_otel.hub import wire
from melodi_otel.hub.client import HubClient
from melodi_otel.hub.journal import Promise
from melodi_otel.hub.limits import Refusals
from melodi_otel.hub.moving import MovingMeter
from melodi_otel.hub.session import Session, chunks
from melodi_otel.hub.wire import Told, Welcome
from melodi_otel.testing.clock import ManualClock

GPU = Device("GPU-0", "gpu", idle_watts=20.0)
TWIN = Device("GPU-1", "gpu", idle_watts=10.0)
DEVICES = (GPU, TWIN)
WATTS = {"GPU-0": 100.0, "GPU-1": 50.0}

Page = tuple[State, list[Promise]]


class Hub:
    """A hub: its books, its sessions, its journal."""

    def __init__(self, clock: ManualClock, tier: str, page: Page | None = None) -> None:
        self.clock = clock
        self.tier = tier
        self.ledger = Ledger(patience_s=None)
        for device in DEVICES:
            self.ledger.device(device)
        self.known: dict[Key, tuple[bool, list[Share]]] = {}
        if page is not None:
            state, promises = page
            self.ledger.restore(state)
            self.known.update((key, (False, shares)) for key, shares in accrued_in(state).items())
            for promise in promises:
                self.known[Key(promise.group, promise.request)] = (True, promise.shares)
        self.page: Page | None = None
        self.refusals = Refusals()
        self.alive = True
        self.client: Client | None = None
        self._session: Session | None = None
        self._finished: list[Told] = []
        self._frames = wire.Frames(wire.ToHub)
        self._number = 0
        self._asks = 0

    def hear(self, client: Client, data: bytes) -> None:
        """Bytes of its one program."""
        for message in self._frames.feed(data):
            if isinstance(message, wire.Hello):
                self._session = Session(
                    self.ledger,
                    1000,
                    7,
                    lambda _, request, shares: self._done(request, shares),
                    self._ignore,
                    self.refusals,
                )
                assert self._session.greet(message) is None
                self.client = client
                resumed: list[Told] = []
                for request in message.resume:
                    found = self.known.pop(Key(self._session.group, request), None)
                    if found is not None:
                        resumed.append(Told(request, *found))
                self._say(wire.Welcome(wire.VERSION, "0", "h", self.tier, [*DEVICES], False, 1.0, None, resumed, True))
            else:
                assert self._session is not None
                self._session.take(message, self.clock.monotonic_ns())

    def settle(self, *, tell: bool = True, accrued: bool = True) -> None:
        """One round, as the server does it: ask, settle, write the journal, tell (unless it dies first)."""
        if self.client is not None:
            self.client.pump()
        if self.ledger.stir(self.clock.monotonic_ns()) and self._session is not None and self._session.probed:
            self._asks += 1
            self._say(wire.Ask(self._asks))
            if self.client is not None:
                self.client.pump()
        self.ledger.settle(self.clock.monotonic_ns())
        session = self._session
        news = [] if session is None else [session.owe(part) for part in chunks(self._finished)]
        self._finished = []
        state = self.ledger.state(self.clock.monotonic_ns())
        promises = (
            []
            if session is None
            else [
                Promise(session.group, told.request, told.shares) for _, batch in session.undelivered for told in batch
            ]
        )
        self.page = (state, promises)
        if session is None or not tell:
            return
        for number, told in news:
            self._say(wire.Settled(number, told))
        if accrued:
            so_far: dict[str, list[Share]] = {}
            for key, shares in accrued_in(state).items():
                so_far[key.request] = shares
            self._say(wire.Accrued(0, [Told(request, False, shares) for request, shares in so_far.items()]))
        if self.client is not None:
            self.client.pump()

    def left(self) -> None:
        """The program has hung up."""
        if self._session is not None:
            self._session.leave(self.clock.monotonic_ns())
            self._session.depart(self.clock.monotonic_ns())
        self._session, self.client = None, None

    def _done(self, request: str, shares: list[Share]) -> None:
        self._finished.append(Told(request, True, shares))

    def _ignore(self, *_: object) -> None: ...

    def _say(self, message: wire.Message) -> None:
        assert self.client is not None
        data = wire.encode(self._number, [message])
        self._number += 1
        self.client.hear(data)


class Client(HubClient):
    """A client without thread and socket."""

    def __init__(self, connect: Callable[[], Any], hello: wire.Hello, **given: Any) -> None:
        super().__init__(connect, hello, wait_s=lambda: 1.0, **given)
        self._wakes.close()
        self._woken.close()
        self._from_hub = wire.Frames(wire.ToProgram)
        self.to: Hub | None = None
        self.over = False

    def start(self) -> None:
        """Nothing runs; :meth:`greet` connects."""

    def greet(self) -> None:
        """Connect and be welcomed."""
        self.to = self._connect()
        data = b"".join(wire.encode_all(self._number, [self._hello]))
        self._number += 1
        self.to.hear(self, data)

    def hear(self, data: bytes) -> None:
        """Bytes of the hub."""
        import threading

        self._ident = threading.get_ident()
        self._feed(self._from_hub, data)

    def pump(self) -> None:
        """Send what waits."""
        import threading

        self._ident = threading.get_ident()
        if self.to is not None and self.to.alive and not self.over:
            while data := self.drain():
                self.to.hear(self, data)

    def lose(self, why: str = "it hung up") -> None:
        """The hub is gone."""
        self.over = True
        self._lost(self, why)

    def hang_up(self, timeout: float) -> None:
        """Hang up in good order."""
        self.pump()
        if not self.over and self.to is not None and self.to.alive:
            self.over = True
            self.to.left()
        self.over = True


class Host:
    """The machine, its meters, and one program.

    Attributes:
        next: what takes the place of a hub that is gone; None: the program's own ledger.
        higher: a hub above the one in use.
    """

    def __init__(self, first: Hub | None = None, **options: Any) -> None:
        self.clock = ManualClock() if first is None else first.clock
        self.ledger = Ledger(patience_s=None)
        for device in DEVICES:
            self.ledger.device(device)
        self.joules = dict.fromkeys(WATTS, 0.0)
        self.hubs: list[Hub] = []
        self.next: Hub | None = None
        self.higher: Hub | None = None
        self.clients: list[Client] = []
        self.moved: list[str] = []
        self.meter = MovingMeter(
            self.ledger,
            self._client,
            self,
            local=lambda: self.moved.append("local"),
            quit_local=lambda: self.moved.append("not local"),
            changed=lambda: None,
            now_ns=self.clock.monotonic_ns,
            **options,
        )
        if first is not None:
            self.hubs.append(first)
        self.read()
        self.meter.begin(None if first is None else lambda: first)
        self.greet()

    # --- Places ---

    def above(self, client: HubClient | None) -> Callable[[], Any] | None:
        higher, self.higher = self.higher, None
        return None if higher is None else lambda: higher

    def after(self, client: HubClient, why: str) -> Callable[[], Any] | None:
        following = self.next
        return None if following is None else lambda: following

    def _client(self, connect: Any, resume: Sequence[str], *, welcomed: Any, lost: Any) -> Client:
        hello = wire.Hello(wire.VERSION, "0", "program", "g", True, None, None, False, [])
        made = Client(connect, hello, resume=resume, welcomed=welcomed, lost=lost, now_ns=self.clock.monotonic_ns)
        self.clients.append(made)
        return made

    # --- what happens ---

    def hub(self, tier: str = "shared", page: Page | None = None) -> Hub:
        """A hub that is there from now on."""
        made = Hub(self.clock, tier, page)
        self.hubs.append(made)
        self._read(made.ledger)
        return made

    def greet(self) -> None:
        """Whoever connects is welcomed."""
        for client in self.clients:
            if client.to is None and not client.over:
                client.greet()

    def run(self, seconds: float = 1.0, *, settle: bool = True) -> None:
        """Time passes at constant power; every living meter is read at its end."""
        self.clock.advance(seconds)
        for device, watts in WATTS.items():
            self.joules[device] += watts * seconds
        self.read()
        if settle:
            self.settle()

    def read(self) -> None:
        """Every living meter is read."""
        for ledger in (self.ledger, *(hub.ledger for hub in self.hubs if hub.alive)):
            self._read(ledger)

    def _read(self, ledger: Ledger) -> None:
        for device, joules in self.joules.items():
            ledger.counter(device, self.clock.monotonic_ns(), joules)

    def settle(self) -> None:
        """A round everywhere."""
        self.ledger.settle(self.clock.monotonic_ns())
        for hub in self.hubs:
            if hub.alive:
                hub.settle()
        self.meter.retire()

    def rise(self, tier: str = "agent") -> Hub:
        """A higher hub appears and is found."""
        self.higher = self.hub(tier)
        self.meter._looking = True
        self.meter.look()
        self.greet()
        return self.hubs[-1]

    def kill(self, hub: Hub, then: Hub | None = None) -> None:
        """The hub dies as it is; ``then`` takes its place."""
        hub.alive = False
        self.next = then
        for client in list(self.clients):
            if client.to is hub and not client.over:
                client.lose()
        self.greet()

    @property
    def now(self) -> int:
        """Monotonic ns."""
        return self.clock.monotonic_ns()

    def open(self, name: str, **told: Any) -> Key:
        """A request begins now."""
        key = Key("g", name)
        self.meter.open(key, self.now, devices=told.pop("devices", ("GPU-0",)), **told)
        return key

    def close(self, key: Key, tokens: int | None = 5, **told: Any) -> Future[list[Share]]:
        """It ends now."""
        return self.meter.close(key, self.now, tokens, "stop", **told)

    def books(self, device: str = "GPU-0") -> float:
        """J that requests got or have accrued on a device, over all living books."""
        found = [self.ledger.snapshot().books.get(device)]
        found += [hub.ledger.snapshot().books.get(device) for hub in self.hubs if hub.alive]
        return sum(book.attributed + book.in_flight for book in found if book is not None)


def joules(future: Future[list[Share]]) -> dict[str, float | None]:
    """J per device of a request that is settled."""
    return {share.device: share.joules for share in future.result(0)}


__all__ = ["DEVICES", "GPU", "TWIN", "WATTS", "Client", "Host", "Hub", "Mapping", "Page", "Welcome", "joules"]
