"""The hub's end of the wire: connections on one event loop, and the settling of the one ledger behind them.

A reading that moves a meter sets off a round::

    sampler's thread   reading ─► moved()
    loop               stir the ledger ─► Ask every program with probed requests or engines ─► (answers, ≤ 30 ms)
                       settle ─► write the journal ─► Settled to whoever waits, Accrued once a second

The journal comes before the news: what a program has been told is in it (see :mod:`melodi_otel.hub.journal`).
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from melodi_otel.attribution.finishing import accrued_in
from melodi_otel.attribution.meter import Key, Share
from melodi_otel.attribution.state import State
from melodi_otel.devices import Device
from melodi_otel.hub import wire
from melodi_otel.hub.journal import FRESH_S, Journal, Promise
from melodi_otel.hub.limits import Names, Refusals
from melodi_otel.hub.session import Books, Session, chunks

log = logging.getLogger("melodi_otel")

CONNECTIONS: Final = 64
"""Connections per user."""
ANSWER_S: Final = 0.03
"""How long a round waits for the programs' newest progress."""
LATE_S: Final = 0.01
"""A close that comes after the reading that covers it is settled so soon, with what else has come by then."""
ALIVE_S: Final = 0.5
JOURNAL_S: Final = 1.0
GREETING_S: Final = 5.0
BACKLOG: Final = 16 << 20
"""Bytes that may wait for a program that does not read; then its connection ends."""


class SettlingBooks(Books, Protocol):
    """The ledger, as the server drives it."""

    def stir(self, now_ns: int) -> bool: ...
    def settle(self, now_ns: int) -> None: ...
    def state(self, now_ns: int) -> State: ...
    def between(self, device: str, t0_ns: int, t1_ns: int) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Host:
    """What the server tells of the machine.

    Attributes:
        tier: ``agent`` or ``shared``.
        release: of melodi_otel.
        hub: random name of these books.
        devices: what is measured; asked at every greeting.
        denied: whether a meter is there that may not be read.
        wait_s: how long a span should wait, in seconds.
        url: of the metrics page, or None.
        status: the status page's data.
        observed: called with (session, observation or promise).
        joined: called with (group, pid) of a program that greeted, and ``left`` with the same when it is gone.
        settled: called after each settling, on the loop; must be quick.
    """

    tier: str
    release: str
    hub: str
    devices: Callable[[], Sequence[Device]]
    denied: Callable[[], bool]
    wait_s: Callable[[], float]
    url: Callable[[], str | None]
    status: Callable[[], dict[str, Any]]
    observed: Callable[[Session, wire.Observed | wire.Promised], None]
    joined: Callable[[str, int], None]
    left: Callable[[str, int], None]
    settled: Callable[[], None]


class Server:
    """Serves a listening Unix socket on a thread of its own.

    Args:
        listener: bound and listening.
        books: the ledger.
        host: what to tell of this machine.
        journal: where to write before anybody is told.
        known: provisional and promised joules of requests that the hub before this one had, by key.
        peer: (pid, uid) at the other end of a connection.
        now_ns: monotonic ns.
    """

    def __init__(
        self,
        listener: socket.socket,
        books: SettlingBooks,
        host: Host,
        journal: Journal,
        known: dict[Key, tuple[bool, list[Share]]] | None = None,
        *,
        peer: Callable[[socket.socket], tuple[int, int | None]],
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._listener = listener
        self._books = books
        self._host = host
        self._journal = journal
        self._known = known or {}
        self._peer = peer
        self._now_ns = now_ns
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="melodi-otel-hub", daemon=True)
        self._sessions: dict[Session, Connection] = {}
        self._finished: dict[Session, list[wire.Told]] = {}
        self._round: asyncio.TimerHandle | None = None
        self._late: asyncio.TimerHandle | None = None
        self._moved_ns = 0
        self._asks = 0
        self._accrued_ns = self._started_ns = now_ns()
        self._names: dict[int | None, Names] = {}
        self._queued = False
        self._serving: asyncio.AbstractServer | None = None
        self.refusals: Final = Refusals()
        self.waiting: set[Connection] = set()
        self.connections = 0
        self.left_ns = now_ns()

    # --- from other threads -------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Serve from now on."""
        self._thread.start()

    def moved(self) -> None:
        """A round of readings is in the ledger's inbox. Any thread; quick."""
        if not self._queued:
            self._queued = True
            try:
                self._loop.call_soon_threadsafe(self._stir)
            except RuntimeError:
                pass  # it has ended

    def stop(self, timeout: float) -> None:
        """Serve nobody any more: settle once, tell what is known, write the journal, close; waits at most ``timeout`` s."""
        if self._thread.is_alive():
            try:
                self._loop.call_soon_threadsafe(self._leave)
            except RuntimeError:
                pass  # it has just ended
            self._thread.join(timeout)

    @property
    def serving(self) -> bool:
        """Whether its loop runs."""
        return self._thread.is_alive()

    @property
    def connected_now(self) -> int:
        """Programs that are connected."""
        return len(self._sessions)

    def idle_s(self) -> float:
        """Seconds since the last program left; 0 while one is connected."""
        return 0.0 if self._sessions else (self._now_ns() - self.left_ns) / 1e9

    # --- on the loop --------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._serving = self._loop.run_until_complete(
                self._loop.create_unix_server(lambda: Connection(self), sock=self._listener)
            )
            self._loop.call_later(ALIVE_S, self._alive)
            self._loop.run_forever()
            for connection in [*self._sessions.values(), *self.waiting]:
                connection.transport.abort()
            self._loop.run_until_complete(asyncio.sleep(0))
        except Exception:
            log.exception("the hub's server ended")
        finally:
            self._loop.close()

    def _leave(self) -> None:
        if self._serving is not None:
            self._serving.close()  # whoever comes now belongs to the next hub
        self._settle()
        self._deliver(accrued=True)  # whoever comes back to the next hub finds what it had here
        for connection in list(self._sessions.values()):
            connection.transport.close()
        self._loop.call_later(0.05, self._loop.stop)

    def _stir(self) -> None:
        if self._queued:
            self._queued = False
            self._moved_ns = self._now_ns()
        if self._round is not None:
            return  # a round waits for answers; what has come meanwhile is settled with it
        try:
            moved = self._books.stir(self._now_ns())
        except Exception:
            log.exception("the hub could not take in readings")
            return
        asked = False
        if moved:
            self._asks += 1
            for session, connection in self._sessions.items():
                if session.probed or session.stepping:
                    connection.send([session.ask(self._asks, self._now_ns())])
                    asked = asked or session.asked is not None
        if asked:
            self._round = self._loop.call_later(ANSWER_S, self._settle)
        else:
            self._settle()

    def closed(self, t_ns: int) -> None:
        """A request has ended at ``t_ns``: where that is covered already, no reading is waited for."""
        if t_ns < self._moved_ns and self._late is None and self._round is None:
            self._late = self._loop.call_later(LATE_S, self._settle_late)

    def _settle_late(self) -> None:
        self._late = None
        self._stir()

    def answered(self) -> None:
        """A program has answered: settle where it was the last one."""
        if self._round is not None and not any(session.asked is not None for session in self._sessions):
            self._settle()

    def _settle(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
        if self._round is not None:
            self._round.cancel()
            self._round = None
            for session in self._sessions:
                session.asked = None  # an answer that comes later is none
        try:
            self._books.settle(self._now_ns())
            self._host.settled()
        except Exception:
            log.exception("settling failed; it goes on with the next reading")
        self._deliver(accrued=False)

    def _deliver(self, *, accrued: bool) -> None:
        """Tell final joules, and with ``accrued`` those of open requests so far; into the journal first. Never raises."""
        finished, self._finished = self._finished, {}
        news: list[tuple[Session, int, list[wire.Told]]] = []
        for session, told in finished.items():
            if session in self._sessions:
                news += [(session, *session.owe(part)) for part in chunks(told)]
        if not news and not accrued:
            return
        now_ns = self._now_ns()
        try:
            state = self._books.state(now_ns)
            self._journal.save(self._host.hub, state, self._promises(now_ns))
        except Exception:
            log.exception("the journal cannot be written; without one the books start anew after this hub")
            self._journal.remove()  # an older one would give joules twice that are told now
            state = None
        for session, number, told in news:
            self._sessions[session].send([wire.Settled(number, told)])
        if accrued and state is not None:
            self._accrued_ns = now_ns
            so_far: dict[str, list[wire.Told]] = {}
            for key, known in accrued_in(state).items():
                so_far.setdefault(key.group, []).append(wire.Told(key.request, False, known))
            for session, connection in self._sessions.items():
                mine = [told for told in so_far.get(session.group, ()) if told.request in session.open]
                connection.send([wire.Accrued(now_ns, part) for part in chunks(mine) or [[]]])

    def _promises(self, now_ns: int) -> list[Promise]:
        """All joules that are some request's and of which it is not certain that its program knows them."""
        owed = [
            Promise(session.group, told.request, told.shares)
            for session in self._sessions
            for _, batch in session.undelivered
            for told in batch
        ]
        if self._known and now_ns - self._started_ns > FRESH_S * 1e9:
            self._known.clear()  # nobody comes for them any more
        waiting = [self._known, *(session.resumed for session in self._sessions)]
        owed += [
            Promise(key.group, key.request, shares, final) for one in waiting for key, (final, shares) in one.items()
        ]
        return owed

    def _alive(self) -> None:
        self._loop.call_later(ALIVE_S, self._alive)
        try:
            if not self._round:
                self._stir()  # what waits for patience alone is not woken by any reading
            now_ns = self._now_ns()
            if now_ns - self._accrued_ns >= JOURNAL_S * 1e9:
                self._deliver(accrued=True)
            else:
                for connection in self._sessions.values():
                    connection.send([wire.Accrued(now_ns, [])])
        except Exception:
            log.exception("the hub's heartbeat failed")

    # --- what connections report --------------------------------------------------------------------------------------

    def connected(self, connection: Connection, sock: socket.socket) -> Session | None:
        """A new connection; None: it may not come in."""
        pid, uid = self._peer(sock)
        names = self._names.setdefault(uid, Names())
        session = Session(self._books, uid, pid, self._done, self._host.observed, self.refusals, names)
        same = sum(1 for other in self._sessions if other.uid == uid) + sum(
            1 for other in self.waiting if other.uid == uid
        )
        if same >= CONNECTIONS:
            self.refusals("too_many", uid, f"more than {CONNECTIONS} connections")
            connection.refuse("too_many", f"this hub takes {CONNECTIONS} connections per user")
            return None
        connection.uid = uid
        return session

    def greeted(self, session: Session, connection: Connection, hello: wire.Hello) -> bool:
        """The first message of a connection; whether it may stay."""
        why = session.greet(hello)
        if why is None and hello.alone and any(other.group == session.group for other in self._sessions):
            self.refusals("replayed", session.uid, "a program is connected already under this name")
            why = "this program is connected already"
        if why is not None:
            connection.refuse("version" if hello.version != wire.VERSION else "replayed", why)
            return False
        self._sessions[session] = connection
        self.connections += 1
        host = self._host
        try:
            host.joined(session.group, session.pid)
        except Exception:
            log.exception("a program's CPU time cannot be read")
        resumed: list[wire.Told] = []
        for request in hello.resume:
            key = Key(session.group, request)
            found = self._known.pop(key, None)
            if found is not None:
                session.resumed[key] = found
                resumed.append(wire.Told(request, found[0], found[1]))
        parts = chunks(resumed) or [[]]
        welcome = wire.Welcome(
            wire.VERSION,
            host.release,
            host.hub,
            host.tier,
            list(host.devices()),
            host.denied(),
            host.wait_s(),
            host.url(),
            parts[0],
            len(parts) == 1,
        )
        more = [wire.Resumed(part, at == len(parts) - 1) for at, part in enumerate(parts) if at]
        connection.send([welcome, *more])
        return True

    def gone(self, session: Session) -> None:
        """A connection has ended."""
        if self._sessions.pop(session, None) is None:
            return
        now_ns = self._now_ns()
        self._known.update(session.resumed)  # it may have gone before it heard of them
        session.leave(now_ns)
        self._finished.pop(session, None)
        if not any(other.group == session.group for other in self._sessions):
            session.depart(now_ns)
        try:
            self._host.left(session.group, session.pid)
        except Exception:
            log.exception("a program's CPU time cannot be given back")
        if not self._sessions:
            self.left_ns = now_ns
        self.answered()

    def answer(self, connection: Connection, message: wire.Between | wire.StatusAsked) -> None:
        """A question that needs no rights beyond the connection."""
        try:
            if isinstance(message, wire.Between):
                joules = self._books.between(message.device, message.t0_ns, message.t1_ns)
                connection.send([wire.BetweenAnswered(message.question, joules)])
            else:
                connection.send([wire.StatusAnswered(message.question, json.dumps(self._host.status()))])
        except Exception:
            log.exception("a question of a program could not be answered")

    def now_ns(self) -> int:
        """Monotonic ns."""
        return self._now_ns()

    def _done(self, session: Session, request: str, shares: list[Share]) -> None:
        self._finished.setdefault(session, []).append(wire.Told(request, True, shares))


class Connection(asyncio.Protocol):
    """Bytes of one connection."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.uid: int | None = None
        self._frames = wire.Frames(wire.ToHub)
        self._number = 0
        self._session: Session | None = None
        self._greeted = False
        self._patience: asyncio.TimerHandle | None = None
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._session = self.server.connected(self, transport.get_extra_info("socket"))
        if self._session is not None:
            self.server.waiting.add(self)
            self._patience = asyncio.get_running_loop().call_later(GREETING_S, self._no_greeting)

    def connection_lost(self, exc: Exception | None) -> None:
        self._settled_in()
        session, self._session = self._session, None
        if session is not None and self._greeted:
            self.server.gone(session)

    def data_received(self, data: bytes) -> None:
        session = self._session
        if session is None:
            return
        try:
            messages = self._frames.feed(data)
        except wire.WireError as error:
            if error.version is not None:
                self.refuse("version", session.refuse_version(error.version, None))
                return
            self.server.refusals("malformed", session.uid, str(error))
            self.refuse("malformed", str(error))
            return
        now_ns = self.server.now_ns()
        if self._greeted and messages:
            session.resumed.clear()  # a program says nothing more before it has read the whole answer to its greeting
        for message in messages:
            if not self._greeted:
                if isinstance(message, wire.StatusAsked):  # a look at the page needs no greeting
                    self.server.answer(self, message)
                elif isinstance(message, wire.Hello) and self.server.greeted(session, self, message):
                    self._greeted = True
                    self._settled_in()
                else:
                    if not isinstance(message, wire.Hello):
                        self.server.refusals("greeting", session.uid, "its first message is no greeting")
                        self.refuse("greeting", "the first message must be a greeting")
                    return
            elif isinstance(message, (wire.Between, wire.StatusAsked)):
                self.server.answer(self, message)
            else:
                session.take(message, now_ns)
        if session.closed_ns is not None:
            self.server.closed(session.closed_ns)
            session.closed_ns = None
        if session.caught_up:
            session.caught_up = False
            self.server.closed(0)  # what waits for its steps does so no more
        if self._greeted and session.asked is None:
            self.server.answered()

    def send(self, messages: Sequence[wire.Message]) -> None:
        """Queue messages; a program that does not read loses its connection."""
        if self.transport.is_closing():
            return
        for frame in wire.encode_all(self._number, messages):
            self.transport.write(frame)
            self._number += 1
        if self.transport.get_write_buffer_size() > BACKLOG:
            session = self._session
            self.server.refusals("too_many", None if session is None else session.uid, "a program does not read")
            self.transport.abort()

    def refuse(self, code: str, text: str) -> None:
        """Say why and end the connection."""
        self.send([wire.Refused(code, text)])
        self.transport.close()

    def _no_greeting(self) -> None:
        self._patience = None
        self.refuse("greeting", f"no greeting came within {GREETING_S:g} s")

    def _settled_in(self) -> None:
        self.server.waiting.discard(self)
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None
