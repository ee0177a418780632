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
from typing import Any, Final

from melodi_otel.attribution.engines import devices_given
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
    Reason,
    Share,
)
from melodi_otel.devices import Device
from melodi_otel.hub.client import HubClient, give
from melodi_otel.hub.lanes import Lanes
from melodi_otel.hub.parts import Kept, Orphan, Places, Target, closed_part, known, orphans_of, settle_orphans, summed
from melodi_otel.hub.wire import Told, Welcome

log = logging.getLogger("melodi_otel")

LOOK_S: Final = 1.0
"""How often a program looks for a higher hub, at most."""


class MovingMeter:
    """The meter interface over whichever meter is the right one now.

    Args:
        ledger: of this process; used where there is no hub.
        local: called when the ledger comes to be used, to start its sampler; and ``quit_local`` when it is not any more.
        client: makes a client from (connect, resume, welcomed, lost).
        places: where hubs are.
        changed: called after each move.
        engine_devices: accelerators of every engine of this program (``MELODI_ENGINE_DEVICES``), of which it may name its own.
        now_ns: monotonic ns.
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
        engine_devices: Sequence[str] | None = None,
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._ledger = ledger
        self._engine_devices = tuple(engine_devices) if engine_devices else None
        self._make = client
        self._places = places
        self._local = local
        self._quit_local = quit_local
        self._changed = changed
        self._now_ns = now_ns
        self._lock = threading.RLock()
        self._target: Target | None = None
        self.devices: Mapping[str, Device] = {}
        self._kept: dict[Key, Kept] = {}
        self._engines: dict[EngineId, dict[str, Any]] = {}
        self._lanes = Lanes()
        self._unseen = 0
        self._orphans: list[Orphan] = []
        self._leaving: list[HubClient] = []
        self._rising: HubClient | None = None
        self._looked_ns = 0
        self._looking = False
        self._ended = False
        self._first: Callable[[], Callable[[], Any] | None] | None = None

    # --- life ---------------------------------------------------------------------------------------------------------

    def begin(self, connect: Callable[[], Any] | None) -> None:
        """Choose: the hub that ``connect`` leads to, or None for the ledger in this process."""
        with self._lock:
            if self._target is None:
                if connect is None and self._first is not None:
                    self._chosen()  # forked before it began
                else:
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
        self._want_look(self._now_ns())

    def look(self) -> None:
        """Look for a higher hub, at most once in :data:`LOOK_S` seconds, where an open has asked for it.

        Called on a thread that may wait a little; never on a request's.
        """
        if not self._looking:
            return
        self._looking = False
        with self._lock:
            if self._rising is not None or self._target is None or self._ended:
                return
            below = self.hub
        connect = self._places.above(below)
        if connect is None:
            return
        with self._lock:
            if self._rising is None and not self._ended:
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
        """Hang up on every hub, for good; waits at most ``timeout`` seconds for each."""
        with self._lock:
            self._ended = True
            clients = [*self._leaving, *([self.hub] if self.hub else []), *([self._rising] if self._rising else [])]
            self._leaving, self._rising = [], None
            orphans, self._orphans = self._orphans, []
        for client in clients:
            client.hang_up(timeout)
            for pending, shares in client.give_up():
                unknown = client.unknown(pending.key, pending.opened, pending.close_ns, "shutdown")
                give(pending.future, closed_part(pending.key, shares, pending.close_ns) or unknown)
        settle_orphans(orphans, {})

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
        self._looking = self._ended = False
        self.devices = {}

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
        if self._engine_devices:
            told["devices"] = devices_given(self._engine_devices, told.get("devices"))
        with self._lock:
            if state == "gone":
                self._engines.pop(engine, None)
            else:
                facts = self._engines.setdefault(engine, {})
                facts.update({name: value for name, value in told.items() if value is not None}, state=state)
            # In a forked child it may be an engine that comes first: its process has no requests.
            target = self._target or (self._chosen() if self._first is not None and state != "gone" else None)
            if target is not None:
                target.engine(engine, t_ns, state, **told)

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
        reason: Reason | None = None,
    ) -> None:
        """See :meth:`melodi_otel.attribution.meter.Meter.open`."""
        if engine is not None:
            devices = devices_given(self._engine_devices, devices)
        told: dict[str, Any] = {
            "engine": engine, "devices": devices, "model": model, "prompt_tokens": prompt_tokens,
            "cached_tokens": cached_tokens, "labels": labels, "parent": parent,
            "thread": thread, "probe": probe, "late": late, "reason": reason,
        }  # fmt: skip
        with self._lock:
            target = self._ledger if self._ended else self._target or self._chosen()
            self._kept[key] = Kept(key, t_ns, told, target, key)
            here: dict[str, Any] = {**told, "parent": self._named(parent)}
            target.open(key, t_ns, **here)
        self._want_look(t_ns)

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
                kept.target.bind(kept.at, child_id)

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
                kept.at,
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
        if devices is not None:
            devices = devices_given(self._engine_devices, devices)
        with self._lock:
            target = self._target
            if target is None:
                return
            mirror = self._lanes.of(engine, lane)
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
                return known([])
            if self._ended and isinstance(kept.target, HubClient):
                shares = kept.target.unknown(key, kept.since, t_ns, "shutdown")
                return summed(key, [*kept.parts, known(shares)])
            last = kept.target.close(
                kept.at,
                t_ns,
                output_tokens,
                outcome,
                first_token_ns=first_token_ns,
                prompt_tokens=prompt_tokens,
                cached_tokens=cached_tokens,
            )
        return last if not kept.parts else summed(key, [*kept.parts, last])

    def _want_look(self, t_ns: int) -> None:
        if t_ns - self._looked_ns > LOOK_S * 1e9:
            self._looked_ns = t_ns
            self._looking = True

    # --- moving -------------------------------------------------------------------------------------------------------

    def _chosen(self) -> Target:
        first, self._first = self._first, None
        try:
            return self._use(None if first is None else first())
        except Exception:
            # On a request's thread: whatever a place for the meter lacks, the request goes on.
            log.exception("melodi_otel: no meter can be started here")
            return self._target or self._ledger

    def _use(self, connect: Callable[[], Any] | None, resume: Sequence[str] = ()) -> Target:
        if connect is None:
            self._target = self._ledger
            self._local()
        else:
            client = self._make(connect, resume, welcomed=self._came_back, lost=self._lost)
            client.devices = self.devices
            self._target = client
            client.start()
        return self._target

    def _tell_again(self, target: Target, t_ns: int, whose: Target) -> None:
        """Everything that is open on ``whose``, to ``target`` from ``t_ns`` on; the lock is held."""
        for engine, facts in self._engines.items():
            target.engine(engine, t_ns, **facts)
        if self._unseen:
            target.unseen(t_ns, self._unseen)
        for kept in self._kept.values():
            if kept.target is whose:
                kept.move(target, t_ns, self._named(kept.told["parent"]))

    def _named(self, parent: Key | None) -> Key | None:
        """What the meter in use calls that request."""
        kept = None if parent is None else self._kept.get(parent)
        return parent if kept is None else kept.at

    def _risen(self, welcome: Welcome, _: Mapping[str, Told]) -> None:
        """A higher hub has answered: from now on it is the meter."""
        self._read_probes()
        with self._lock:
            new, self._rising = self._rising, None
            old = self._target
            if new is None or old is None or self._ended:
                return
            new.become(self._came_back, self._lost)
            self.devices = new.devices
            t_ns = self._now_ns()
            for kept in self._kept.values():
                if kept.target is old:
                    part = old.close(
                        kept.at, max(t_ns, kept.t_ns), kept.tokens, "stop", first_token_ns=kept.first_token_ns
                    )
                    kept.parts.append(part)
            if self._unseen:
                old.unseen(t_ns, -self._unseen)
            self._target = new
            self._tell_again(new, t_ns, old)
            if isinstance(old, HubClient):
                self._leaving.append(old)
        log.info("melodi_otel: the %s hub meters from now on", welcome.tier)
        if not isinstance(old, HubClient):
            self._quit_local()
        self._changed()

    def _read_probes(self) -> None:
        # Without the lock: a probe hands over steps, and another thread may be at it.
        with self._lock:
            open_now = list(self._kept.values())
        for kept in open_now:
            kept.ask()

    def _not_risen(self, client: HubClient, why: str) -> None:
        with self._lock:
            if self._rising is client:
                self._rising = None
        log.debug("melodi_otel: a higher hub was there and did not take this program: %s", why)

    def _lost(self, client: HubClient, why: str) -> None:
        """A hub is gone. On its client's thread."""
        connect = self._places.after(client, why)
        self._read_probes()
        over: list[Orphan] = []
        with self._lock:
            t_ns = self._now_ns()
            mine = orphans_of(client, self._kept.values(), t_ns)
            if self._target is not client or self._ended:
                if client in self._leaving:
                    self._leaving.remove(client)
                over = mine
            else:
                self.devices = client.devices or self.devices
                self._orphans += mine
                self._target = None
                try:
                    target = self._use(connect, [orphan.key.request for orphan in self._orphans])
                except Exception:
                    log.exception("melodi_otel: this process's own meter cannot be started")
                    connect, target = None, self._target or self._ledger
                self._target = target
                self._tell_again(target, t_ns, client)
                if connect is None:
                    over, self._orphans = self._orphans, []
        settle_orphans(over, {})  # not under the lock: whoever waits is called at once
        self._changed()

    def _came_back(self, welcome: Welcome, resumed: Mapping[str, Told]) -> None:
        with self._lock:
            hub = self.hub
            self.devices = (hub.devices if hub is not None else None) or self.devices
            orphans, self._orphans = self._orphans, []
        settle_orphans(orphans, resumed)
        self._changed()

    def _clients(self) -> list[HubClient]:
        found = [*self._leaving]
        if (client := self.hub) is not None:
            found.append(client)
        return found

    def retire(self) -> None:
        """Hang up on hubs that were left and owe nothing any more. Off the request's thread."""
        with self._lock:
            over = [client for client in self._leaving if not client.waiting()]
            self._leaving = [client for client in self._leaving if client not in over]
        for client in over:
            client.hang_up(0.0)
