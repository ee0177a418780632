"""The meter of a program that may move: from the ledger in the process to a shared hub, to the host's agent, to the next hub.

A move cuts every open request in two. The meter that is left settles what the request used until then, the next one what it
uses from then on, and the program gets their sum: each meter's books hold their own part, so nothing is counted twice and
nothing is lost. Of a hub that died, the first part is what its journal says to the next hub, or what it last acknowledged::

    request            |-----------------------------------------|
    first meter        |== settled there ==|
    second meter                           |== settled there ====|
    share              |== sum, coverage over the whole, gap seen|
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final, Protocol

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import (
    Decode,
    EngineId,
    EngineState,
    Joined,
    Key,
    Late,
    Outcome,
    Prefill,
    Probe,
    Share,
)
from melodi_otel.hub.client import HubClient
from melodi_otel.hub.lanes import LaneMirror
from melodi_otel.hub.parts import Kept, Orphan, Target, closed_part, give, settle_orphans, summed
from melodi_otel.hub.wire import Told, Welcome

log = logging.getLogger("melodi_otel")

LOOK_S: Final = 1.0
"""How often a program looks for a higher hub, at most."""


class Places(Protocol):
    """Where meters are. Called off the request's thread."""

    def above(self, client: HubClient | None) -> Callable[[], Any] | None:
        """How to connect to a hub above this one (None: above the ledger in the process), or None; quick."""
        ...

    def after(self, client: HubClient, why: str) -> Callable[[], Any] | None:
        """How to connect to what takes the place of a hub that is gone; None: the ledger in the process."""
        ...


class MovingMeter:
    """The meter interface over whichever meter is the right one now.

    Args:
        ledger: of this process; used where there is no hub.
        local: called when the ledger comes to be used, to start its sampler; and ``quit_local`` when it is not any more.
        client: makes a client from (connect, resume, welcomed, lost).
        places: where hubs are.
        now_ns: monotonic ns.
        changed: called after each move.
    """

    def __init__(
        self,
        ledger: Ledger,
        client: Callable[..., HubClient],
        places: Places,
        *,
        local: Callable[[], None],
        quit_local: Callable[[], None],
        changed: Callable[[], None],
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._ledger = ledger
        self._make = client
        self._places = places
        self._local = local
        self._quit_local = quit_local
        self._changed = changed
        self._now_ns = now_ns
        self._lock = threading.RLock()
        self._target: Target | None = None
        self._kept: dict[Key, Kept] = {}
        self._engines: dict[EngineId, dict[str, Any]] = {}
        self._lanes: dict[tuple[EngineId, int], LaneMirror] = {}
        self._unseen = 0
        self._orphans: list[Orphan] = []
        self._leaving: list[HubClient] = []
        self._rising: HubClient | None = None
        self._looked_ns = 0
        self._looking = False
        self._first: Callable[[], Callable[[], Any] | None] | None = None

    # --- life ---------------------------------------------------------------------------------------------------------

    def begin(self, connect: Callable[[], Any] | None) -> None:
        """Choose: the hub that ``connect`` leads to, or None for the ledger in this process."""
        with self._lock:
            if self._target is None:
                self._use(connect)

    @property
    def hub(self) -> HubClient | None:
        """The hub in use, or None."""
        target = self._target
        return target if isinstance(target, HubClient) else None

    @property
    def is_local(self) -> bool:
        """Whether this process's own ledger is used now."""
        return self._target is self._ledger

    def seek(self) -> None:
        """Look for a higher hub as if a request had opened: for a process whose children have them and it has none."""
        t_ns = self._now_ns()
        if t_ns - self._looked_ns > LOOK_S * 1e9:
            self._looked_ns = t_ns
            self._looking = True

    def look(self) -> None:
        """Look for a higher hub, at most once in :data:`LOOK_S` seconds, where an open has asked for it.

        Called on a thread that may wait a little; never on a request's.
        """
        if not self._looking:
            return
        self._looking = False
        with self._lock:
            if self._rising is not None or self._target is None:
                return
            below = self.hub
        connect = self._places.above(below)
        if connect is None:
            return
        with self._lock:
            if self._rising is None:
                self._rising = self._make(connect, [], welcomed=self._risen, lost=self._not_risen)
                self._rising.start()

    def wait_known(self, timeout: float) -> bool:
        """Wait until the hub has answered or this process's own ledger is used instead; whether that was so in time."""
        end = time.monotonic() + timeout
        while (client := self.hub) is not None and time.monotonic() < end:
            if client.hub is not None:
                return True
            client.known.wait(max(0.0, end - time.monotonic()))
            time.sleep(0.001)  # the next one may take its place just now
        with self._lock:  # a move that goes on just now is waited for
            return self.is_local or (client is not None and client.hub is not None)

    def end(self, timeout: float) -> None:
        """Hang up on every hub; waits at most ``timeout`` seconds for each."""
        with self._lock:
            clients = [*self._leaving, *([self.hub] if self.hub else []), *([self._rising] if self._rising else [])]
            self._leaving, self._rising = [], None
            orphans, self._orphans = self._orphans, []
        for client in clients:
            client.hang_up(timeout)
            for request, pending in list(client.pending.items()):
                client.pending.pop(request, None)
                key = Key(client.group, request)
                shares = client.accrued.pop(request, [])
                unknown = client.unknown(key, pending.open_ns, pending.close_ns, "shutdown")
                give(pending.future, closed_part(key, shares, pending.close_ns) or unknown)
        for orphan in orphans:
            give(orphan.part, orphan.acknowledged)

    def forked(self, places: Places, choose: Callable[[], Callable[[], Any] | None]) -> None:
        """In a child: nothing of the parent's; the next open chooses anew, with ``choose``."""
        self._places = places
        self._first = choose
        for client in (self.hub, self._rising, *self._leaving):
            if client is not None:
                client.forked()
        self._lock = threading.RLock()
        self._target = None
        self._kept.clear()
        self._engines.clear()
        self._lanes.clear()
        self._unseen = 0
        self._orphans, self._leaving, self._rising = [], [], None
        self._looking = False

    def waiting(self) -> int:
        """Closed requests that are not settled yet, wherever."""
        return self._ledger.waiting() + sum(client.waiting() for client in self._clients()) + len(self._orphans)

    @property
    def open_count(self) -> int:
        """Requests that are open now."""
        return len(self._kept)

    # --- the meter interface ------------------------------------------------------------------------------------------

    def engine(self, engine: EngineId, t_ns: int, state: EngineState = "ready", **told: Any) -> None:
        """See :meth:`melodi_otel.attribution.meter.Meter.engine`."""
        with self._lock:
            known = self._engines.setdefault(engine, {})
            known.update({name: value for name, value in told.items() if value is not None}, state=state)
            if self._target is not None:
                self._target.engine(engine, t_ns, state, **told)

    def open(
        self,
        key: Key,
        t_ns: int,
        *,
        engine: EngineId | None = None,
        devices: Sequence[str] | None = None,
        model: str | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
        labels: Mapping[str, str] | None = None,
        parent: Key | None = None,
        thread: int | None = None,
        probe: Probe | None = None,
        late: Late | None = None,
    ) -> None:
        """See :meth:`melodi_otel.attribution.meter.Meter.open`."""
        told: dict[str, Any] = {
            "engine": engine,
            "devices": devices,
            "model": model,
            "prompt_tokens": prompt_tokens,
            "cached_tokens": cached_tokens,
            "labels": labels,
            "parent": parent,
            "thread": thread,
            "probe": probe,
            "late": late,
        }
        with self._lock:
            target = self._target or self._chosen()
            self._kept[key] = Kept(key, t_ns, told, target)
            target.open(key, t_ns, **told)
        if t_ns - self._looked_ns > LOOK_S * 1e9:
            self._looked_ns = t_ns
            self._looking = True

    def unseen(self, t_ns: int, change: int) -> None:
        """See :meth:`melodi_otel.attribution.ledger.Ledger.unseen`."""
        with self._lock:
            self._unseen += change
            (self._target or self._chosen()).unseen(t_ns, change)

    def bind(self, key: Key, child_id: str) -> None:
        """See :meth:`melodi_otel.attribution.meter.Meter.bind`."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is not None:
                kept.children.append(child_id)
                kept.target.bind(key, child_id)

    def progress(
        self,
        key: Key,
        t_ns: int,
        output_tokens: int,
        *,
        first_token_ns: int | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
    ) -> None:
        """See :meth:`melodi_otel.attribution.meter.Meter.progress`."""
        with self._lock:
            kept = self._kept.get(key)
            if kept is None:
                return
            kept.tokens = output_tokens
            kept.first_token_ns = kept.first_token_ns or first_token_ns
            if prompt_tokens is not None:
                kept.told["prompt_tokens"] = prompt_tokens
            if cached_tokens is not None:
                kept.told["cached_tokens"] = cached_tokens
            kept.target.progress(
                key,
                t_ns,
                output_tokens,
                first_token_ns=first_token_ns,
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
            )

    def step(
        self,
        engine: EngineId,
        lane: int,
        seq: int,
        t0_ns: int,
        t1_ns: int,
        devices: Sequence[str] | None = None,
        *,
        decode: Decode = Decode(0, 0),
        prefill: Sequence[Prefill] = (),
        computed: Sequence[Prefill] = (),
        joined: Sequence[Joined] = (),
        left: Sequence[str] = (),
    ) -> None:
        """See :meth:`melodi_otel.attribution.meter.Meter.step`."""
        with self._lock:
            target = self._target
            if target is None:
                return
            mirror = self._lanes.get((engine, lane))
            if mirror is None:
                mirror = self._lanes[engine, lane] = LaneMirror()
            whole = mirror.take(seq, decode, computed, joined, left, fresh=mirror.told is not target)
            mirror.told = target
            if whole is not None:
                joined, left = whole, ()
            kept = target.step(
                engine,
                lane,
                mirror.number,
                t0_ns,
                t1_ns,
                devices,
                decode=decode,
                prefill=prefill,
                computed=computed,
                joined=joined,
                left=left,
            )
            if kept is False:
                mirror.told = None  # it is lost: the next one tells the whole set
            if not mirror.members and not decode.n:
                self._trim()

    def close(
        self,
        key: Key,
        t_ns: int,
        output_tokens: int | None,
        outcome: Outcome,
        *,
        first_token_ns: int | None = None,
        prompt_tokens: int | None = None,
        cached_tokens: int | None = None,
    ) -> Future[list[Share]]:
        """See :meth:`melodi_otel.attribution.meter.Meter.close`."""
        with self._lock:
            kept = self._kept.pop(key, None)
            if kept is None:
                nothing: Future[list[Share]] = Future()
                nothing.set_result([])
                return nothing
            last = kept.target.close(
                key,
                t_ns,
                output_tokens,
                outcome,
                first_token_ns=first_token_ns,
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
            )
        return last if not kept.parts else summed([*kept.parts, last])

    # --- moving -------------------------------------------------------------------------------------------------------

    def _chosen(self) -> Target:
        first, self._first = self._first, None
        self._use(None if first is None else first())
        assert self._target is not None
        return self._target

    def _use(self, connect: Callable[[], Any] | None, resume: Sequence[str] = ()) -> Target:
        if connect is None:
            self._target = self._ledger
            self._local()
        else:
            client = self._make(connect, resume, welcomed=self._came_back, lost=self._lost)
            self._target = client
            client.start()
        return self._target

    def _tell_again(self, target: Target, t_ns: int, whose: Target) -> None:
        """Everything that is open on ``whose``, to ``target`` from ``t_ns`` on; the lock is held."""
        for engine, known in self._engines.items():
            target.engine(engine, t_ns, **known)
        if self._unseen:
            target.unseen(t_ns, self._unseen)
        for kept in self._kept.values():
            if kept.target is not whose:
                continue
            told = dict(kept.told)
            if told["prompt_tokens"] is not None and (kept.tokens or kept.first_token_ns):
                told["cached_tokens"] = told["prompt_tokens"]  # it has been computed, and charged, before
            kept.target = target
            target.open(kept.key, max(t_ns, kept.t_ns), **told)
            for child in kept.children:
                target.bind(kept.key, child)
            if kept.tokens is not None:
                target.progress(kept.key, max(t_ns, kept.t_ns), kept.tokens, first_token_ns=max(t_ns, kept.t_ns))

    def _risen(self, welcome: Welcome, _: Mapping[str, Told]) -> None:
        """A higher hub has answered: from now on it is the meter."""
        with self._lock:
            new, self._rising = self._rising, None
            old = self._target
            if new is None or old is None:
                return
            new.become(self._came_back, self._lost)
            t_ns = self._now_ns()
            parts: list[tuple[Kept, Future[list[Share]]]] = []
            for kept in self._kept.values():
                if kept.target is old:
                    part = old.close(kept.key, max(t_ns, kept.t_ns), kept.tokens, "stop")
                    parts.append((kept, part))
            if self._unseen:
                old.unseen(t_ns, -self._unseen)
            self._target = new
            self._tell_again(new, t_ns, old)
            for kept, part in parts:
                kept.parts.append(part)
            if isinstance(old, HubClient):
                self._leaving.append(old)
        log.info("melodi_otel: the %s hub meters from now on", welcome.tier)
        if not isinstance(old, HubClient):
            self._quit_local()
        self._changed()

    def _not_risen(self, client: HubClient, why: str) -> None:
        with self._lock:
            if self._rising is client:
                self._rising = None
        log.debug("melodi_otel: a higher hub was there and did not take this program: %s", why)

    def _lost(self, client: HubClient, why: str) -> None:
        """A hub is gone. On its client's thread."""
        connect = self._places.after(client, why)
        with self._lock:
            t_ns = self._now_ns()
            if client in self._leaving:
                self._leaving.remove(client)
                self._orphan(client, t_ns, self._target)
                self._settle_orphans({})
                return
            if self._target is not client:
                return
            self._orphan(client, t_ns, client)
            self._target = None
            target = self._use(connect, [orphan.key.request for orphan in self._orphans])
            self._tell_again(target, t_ns, client)
            if connect is None:
                self._settle_orphans({})
        self._changed()

    def _orphan(self, client: HubClient, t_ns: int, lost: Target | None) -> None:
        for request, pending in list(client.pending.items()):
            client.pending.pop(request, None)
            key = Key(client.group, request)
            shares = client.accrued.get(request, [])
            self._orphans.append(Orphan(key, pending.future, pending.open_ns, pending.close_ns, shares))
        for kept in self._kept.values():
            if kept.target is lost and client is lost:
                part: Future[list[Share]] = Future()
                kept.parts.append(part)
                since = client.opened.get(kept.key.request, kept.t_ns)
                self._orphans.append(Orphan(kept.key, part, since, t_ns, client.accrued.get(kept.key.request, [])))

    def _came_back(self, welcome: Welcome, resumed: Mapping[str, Told]) -> None:
        with self._lock:
            self._settle_orphans(resumed)
        self._changed()

    def _settle_orphans(self, resumed: Mapping[str, Told]) -> None:
        orphans, self._orphans = self._orphans, []
        settle_orphans(orphans, resumed)

    def _clients(self) -> list[HubClient]:
        found = [*self._leaving]
        if (client := self.hub) is not None:
            found.append(client)
        return found

    def retire(self) -> None:
        """Hang up on hubs that were left and owe nothing any more. Off the request's thread."""
        with self._lock:
            over = [client for client in self._leaving if not client.waiting()]
            self._leaving = [client for client in self._leaving if client.waiting()]
        for client in over:
            client.hang_up(0.0)

    def _trim(self) -> None:
        if len(self._lanes) > 1000:
            for at in [at for at, mirror in self._lanes.items() if not mirror.members][:500]:
                del self._lanes[at]
