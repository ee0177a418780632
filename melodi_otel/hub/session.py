"""One connection as the hub sees it: who it is, what it may say, and what is owed to it.

Who it is comes from the kernel (``SO_PEERCRED``), never from the message. Ids of one program mean nothing in another: inside
the books every request and engine stands under a group of its own, ``UID:TOKEN:NAME`` (``UID:TOKEN`` where the processes of a
group share engines), so nobody can open, close or claim what is not his. What breaks a rule is refused, counted and logged
once; it ends the connection only where the stream itself cannot be trusted any more.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Final, Literal, Protocol

from melodi_otel.attribution.meter import EngineId, Key, Meter, Share
from melodi_otel.hub import wire
from melodi_otel.hub.wire import Told

log = logging.getLogger("melodi_otel")

OPEN_LIMIT: Final = 10_000
"""Open requests per connection."""
ENGINE_LIMIT: Final = 256
"""Engines per connection."""

Refusal = Literal["malformed", "version", "greeting", "replayed", "foreign", "too_many"]


class Books(Meter, Protocol):
    """What a session needs of the ledger beside the meter interface."""

    def unseen(self, t_ns: int, change: int) -> None: ...
    def forgo(self, key: Key) -> None: ...


class Refusals:
    """Counts of what was refused, and one line in the log for each kind and user."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._said: set[tuple[str, int | None]] = set()

    def __call__(self, kind: Refusal, uid: int | None, text: str) -> None:
        self.counts[kind] += 1
        if (kind, uid) not in self._said and len(self._said) < 1000:
            self._said.add((kind, uid))
            log.warning("hub: refused from user %s: %s (%s; said once)", "?" if uid is None else uid, text, kind)


class Session:
    """The rules of one connection. Called on the hub's loop only.

    Args:
        books: where accepted messages go.
        uid: the user at the other end; None where the system does not tell.
        pid: its process, 0 where it cannot be seen from here.
        finished: called with (this, request id, shares) when joules are final, while the ledger settles.
        observed: called with what metrics shall show.
        refuse: counts.
    """

    def __init__(
        self,
        books: Books,
        uid: int | None,
        pid: int,
        finished: Callable[[Session, str, list[Share]], None],
        observed: Callable[[Session, wire.Observed], None],
        refuse: Refusals,
    ) -> None:
        self.uid = uid
        self.pid = pid
        self.hello: wire.Hello | None = None
        self.group = ""
        self.open: dict[str, bool] = {}  # request -> whether it answers Ask
        self.awaited: set[str] = set()
        self.probed = 0
        self.asked: int | None = None
        self.undelivered: deque[tuple[int, list[Told]]] = deque()
        self.messages = 0
        self.unseen = 0
        self._engines: set[int] = set()
        self._books = books
        self._finished = finished
        self._observed = observed
        self._refuse = refuse
        self._number = 0

    def greet(self, hello: wire.Hello) -> str | None:
        """Take the first message; why it is refused, or None."""
        if hello.version != wire.VERSION:
            self._refuse("version", self.uid, f"it speaks version {hello.version} of the wire, this hub {wire.VERSION}")
            return (
                f"this hub speaks version {wire.VERSION} of the wire and the program (melodi_otel {hello.release}) "
                f"version {hello.version}: bring both to the same release"
            )
        self.hello = hello
        who = "?" if self.uid is None else str(self.uid)
        self.group = f"{who}:{hello.group}:{hello.name}" if hello.alone else f"{who}:{hello.group}"
        return None

    def take(self, message: Any, now_ns: int) -> None:
        """Any message but the first; one that breaks a rule is left out."""
        self.messages += 1
        match message:
            case wire.Opened():
                self._open(message)
            case wire.Progressed():
                if self._mine(message.request, "progress"):
                    self._books.progress(
                        self._key(message.request),
                        message.t_ns,
                        message.output_tokens,
                        first_token_ns=message.first_token_ns,
                        prompt_tokens=message.prompt_tokens,
                        cached_tokens=message.cached_tokens,
                    )
            case wire.Stepped():
                self._step(message)
            case wire.Closed():
                self._close(message)
            case wire.Bound():
                if self._mine(message.request, "a bind"):
                    self._books.bind(self._key(message.request), message.child)
            case wire.EngineTold():
                self._engine(message)
            case wire.Forgone():
                if message.request in self.awaited or message.request in self.open:
                    self._books.forgo(self._key(message.request))
            case wire.Unseen():
                self.unseen = max(0, self.unseen + message.change)
                self._books.unseen(message.t_ns, message.change)
            case wire.Observed():
                self._observed(self, message)
            case wire.Got():
                while self.undelivered and self.undelivered[0][0] <= message.settled:
                    self.undelivered.popleft()
            case wire.Answered():
                if message.ask == self.asked:
                    self.asked = None
            case wire.Hello():
                self._refuse("replayed", self.uid, "it greeted twice")
            case _:
                self._refuse("malformed", self.uid, f"{type(message).__name__} is for others than a hub")

    def owe(self, told: list[Told]) -> tuple[int, list[Told]]:
        """Final joules on their way to the program, kept until it has acknowledged them."""
        self._number += 1
        self.undelivered.append((self._number, told))
        return self.undelivered[-1]

    def leave(self, now_ns: int) -> None:
        """The connection is gone: what was open used what it used until now."""
        for request in list(self.open):
            self._books.close(self._key(request), now_ns, None, "abort")
        self.open.clear()
        self.awaited.clear()
        self.undelivered.clear()
        self.probed = 0
        if self.unseen:
            self._books.unseen(now_ns, -self.unseen)

    def depart(self, now_ns: int) -> None:
        """The last of its group is gone: so are its engines."""
        for number in self._engines:
            self._books.engine(EngineId(self.group, number), now_ns, "gone")

    # --- inside -------------------------------------------------------------------------------------------------------

    def _key(self, request: str) -> Key:
        return Key(self.group, request)

    def _mine(self, request: str, what: str) -> bool:
        if request in self.open:
            return True
        self._refuse("foreign", self.uid, f"{what} for a request that this connection has not opened")
        return False

    def _known(self, engine: int) -> bool:
        if engine in self._engines:
            return True
        if len(self._engines) >= ENGINE_LIMIT:
            self._refuse("too_many", self.uid, f"more than {ENGINE_LIMIT} engines on one connection")
            return False
        self._engines.add(engine)
        return True

    def _open(self, message: wire.Opened) -> None:
        request = message.request
        if request in self.open or request in self.awaited:
            self._refuse("replayed", self.uid, "a request was opened twice")
            return
        if len(self.open) >= OPEN_LIMIT:
            self._refuse("too_many", self.uid, f"more than {OPEN_LIMIT} open requests on one connection")
            return
        if message.engine is not None and not self._known(message.engine):
            return
        self.open[request] = message.probed
        self.probed += message.probed
        self._books.open(
            self._key(request),
            message.t_ns,
            engine=None if message.engine is None else EngineId(self.group, message.engine),
            devices=message.devices,
            model=message.model,
            prompt_tokens=message.prompt_tokens,
            cached_tokens=message.cached_tokens,
            labels=message.labels,
            parent=None if message.parent is None else self._key(message.parent),
            # Native thread ids of other processes mean nothing here; that there is one does.
            thread=0 if message.threaded else None,
            late=message.late,
        )

    def _close(self, message: wire.Closed) -> None:
        request = message.request
        if request not in self.open:
            self._refuse("foreign", self.uid, "a close for a request that this connection has not opened")
            if request not in self.awaited:
                self._finished(self, request, [])  # nobody shall wait for what will never come
            return
        self.probed -= self.open.pop(request)
        self.awaited.add(request)
        future = self._books.close(
            self._key(request),
            message.t_ns,
            message.output_tokens,
            message.outcome,
            first_token_ns=message.first_token_ns,
            prompt_tokens=message.prompt_tokens,
            cached_tokens=message.cached_tokens,
        )
        future.add_done_callback(lambda done: self._settled(request, done))

    def _settled(self, request: str, done: Future[list[Share]]) -> None:
        self.awaited.discard(request)
        self._finished(self, request, done.result())

    def _step(self, message: wire.Stepped) -> None:
        if not self._known(message.engine):
            return
        self._books.step(
            EngineId(self.group, message.engine),
            message.lane,
            message.seq,
            message.t0_ns,
            message.t1_ns,
            message.devices,
            decode=message.decode,
            prefill=message.prefill,
            computed=message.computed,
            joined=message.joined,
            left=message.left,
        )

    def _engine(self, message: wire.EngineTold) -> None:
        if not self._known(message.number):
            return
        parameters, active, kv, layers, hidden, experts, per_token = message.facts
        told: dict[str, Any] = {
            "model": message.model,
            "devices": message.devices,
            "world": message.world,
            "pids": message.pids,
            "parameters": parameters,
            "active_parameters": active,
            "kv_bytes_per_token": kv,
            "layers": layers,
            "hidden": hidden,
            "experts": experts,
            "experts_per_token": per_token,
        }
        self._books.engine(EngineId(self.group, message.number), message.t_ns, message.state, **told)


def chunks(told: Sequence[Told], size: int = 500) -> list[list[Told]]:
    """Pieces small enough for a frame."""
    return [list(told[at : at + size]) for at in range(0, len(told), size)]
