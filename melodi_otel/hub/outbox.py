"""What a program says to its hub, before it is sent: the meter interface as messages in a bounded outbox.

Nothing here waits. Of progress the newest wins; steps that find no room are dropped, and the lane tells its whole set again;
opens and closes are never dropped silently: they are counted, and the request says ``overflow``.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Final

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
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.devices import Device
from melodi_otel.hub import fitting, wire
from melodi_otel.hub.pending import Counts, Pending, Since

log = logging.getLogger("melodi_otel")

CAPACITY: Final = 20_000
"""Messages that wait at most before progress, steps and observations are dropped; opens and closes may be four times as many."""
_BATCH: Final = 4096


class Outbox:
    """Messages on their way to a hub, and what is remembered of the requests they are about.

    Requests stand under the names that the wire takes, see :func:`melodi_otel.hub.fitting.name`.

    Args:
        group: the group token of this program's requests.
        now_ns: monotonic ns.

    Attributes:
        pending: closed requests whose joules are awaited.
        opened: open requests.
        accrued: what the hub last acknowledged of them.
        counts: what was lost for want of room.
    """

    def __init__(self, group: str, now_ns: Callable[[], int]) -> None:
        self.group: Final = group
        self.pending: dict[str, Pending] = {}
        self.accrued: dict[str, list[Share]] = {}
        self.opened: dict[str, Since] = {}
        self.counts = Counts()
        self.devices: Mapping[str, Device] = {}
        self._now_ns = now_ns
        self._probes: dict[str, Probe] = {}
        self._outbox: deque[wire.Message | _Closing] = deque()
        self._newest: dict[str, wire.Progressed] = {}
        self._unseen = 0
        self._summing = threading.Lock()
        self._number = 0
        self._batch: list[wire.Message] | None = None
        self._ident = 0
        self._sleeping = False
        self._dozing = False
        self._urgent = False
        self._wakes, self._woken = socket.socketpair()
        self._wakes.setblocking(False)
        self._woken.setblocking(False)

    def waiting(self) -> int:
        """Closed requests whose joules have not come yet."""
        return len(self.pending)

    # --- the meter interface ------------------------------------------------------------------------------------------

    def engine(
        self,
        engine: EngineId,
        t_ns: int,
        state: EngineState = "ready",
        *,
        model: str | None = None,
        devices: Sequence[str] | None = None,
        world: int | None = None,
        pids: Sequence[int] = (),
        parameters: float | None = None,
        active_parameters: float | None = None,
        kv_bytes_per_token: float | None = None,
        layers: int | None = None,
        hidden: int | None = None,
        experts: int | None = None,
        experts_per_token: int | None = None,
    ) -> None:
        number = fitting.count(engine.number)
        if number is None or not self._room(4):
            self._dropped()
            return
        facts = (
            fitting.number(parameters),
            fitting.number(active_parameters),
            fitting.number(kv_bytes_per_token),
            fitting.count(layers),
            fitting.count(hidden),
            fitting.count(experts),
            fitting.count(experts_per_token),
        )
        seen = [pid for pid in map(fitting.count, pids) if pid is not None]
        named = fitting.names(devices)
        told = wire.EngineTold(
            number, fitting.time(t_ns), state, fitting.text(model), named, fitting.count(world), seen, facts
        )
        self._put(told)

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
        if not self._room(4):
            self.counts = replace(self.counts, requests=self.counts.requests + 1)
            return
        request = fitting.name(key.request)
        if probe is not None:
            self._probes[request] = probe
        self.opened[request] = Since(t_ns, devices)
        self._put(
            wire.Opened(
                request,
                fitting.time(t_ns),
                None if engine is None else fitting.count(engine.number),
                fitting.names(devices),
                fitting.text(model),
                fitting.count(prompt_tokens),
                fitting.count(cached_tokens),
                fitting.labels(labels),
                None if parent is None else fitting.name(parent.request),
                thread is not None,
                probe is not None,
                late,
                "phase_elsewhere" if reason == "phase_elsewhere" else None,
            )
        )

    def unseen(self, t_ns: int, change: int) -> None:
        """See :meth:`melodi_otel.attribution.ledger.Ledger.unseen`; without room the changes wait as their sum."""
        if self._room(1):
            self._put(wire.Unseen(fitting.time(t_ns), change))
        else:
            with self._summing:
                self._unseen += change

    def bind(self, key: Key, child_id: str) -> None:
        request = fitting.name(key.request)
        if request in self.opened:
            if self._room(4):
                self._put(wire.Bound(request, fitting.name(child_id)))
            else:
                self._dropped()

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
        request, tokens = fitting.name(key.request), fitting.count(output_tokens)
        if request not in self.opened or tokens is None:
            return
        told = wire.Progressed(
            request,
            fitting.time(t_ns),
            tokens,
            fitting.time_if(first_token_ns),
            fitting.count(prompt_tokens),
            fitting.count(cached_tokens),
        )
        if self._batch is not None and threading.get_ident() == self._ident:
            self._batch.append(told)
            return
        # Older counts must not come after newer ones.
        before = self._newest.pop(request, None) if self._newest else None
        if before is not None:
            told = _newer(before, told)
        if self._room(1):
            self._put(told)
        else:
            self._newest[request] = told

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
    ) -> bool:
        """See :meth:`melodi_otel.attribution.meter.Meter.step`; False: there was no room, and it is lost."""
        of, on, number = fitting.count(engine.number), fitting.count(lane), fitting.count(seq)
        rows, total = fitting.count(decode[0]), fitting.count(decode[1])
        if of is None or on is None or number is None or rows is None or total is None:
            self._dropped()
            return False
        told = wire.Stepped(
            of,
            on,
            number,
            fitting.time(t0_ns),
            fitting.time(t1_ns),
            fitting.names(devices),
            Decode(rows, total),
            fitting.prefills(prefill),
            fitting.prefills(computed),
            fitting.joins(joined),
            [fitting.name(gone) for gone in left],
        )
        if not fitting.frame(told):
            self._dropped()
            return False
        if self._batch is not None and threading.get_ident() == self._ident:
            self._batch.append(told)  # a probe hands it over: it comes before whatever follows the probe
        elif self._room(1):
            self._outbox.append(told)
            if self._sleeping and not self._dozing:
                self._wake()
        else:
            self._dropped()
            return False
        return True

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
        future: Future[list[Share]] = Future()
        request = fitting.name(key.request)
        opened = self.opened.pop(request, None)
        last = self._newest.pop(request, None)
        if opened is None:
            future.set_result(self.unknown(key, Since(t_ns, None), t_ns, "overflow"))
            return future
        closed = wire.Closed(
            request,
            fitting.time(t_ns),
            fitting.count(output_tokens),
            outcome,
            fitting.time_if(first_token_ns) or (last and last.first_token_ns),
            fitting.count(prompt_tokens) if prompt_tokens is not None else last and last.prompt_tokens,
            fitting.count(cached_tokens) if cached_tokens is not None else last and last.cached_tokens,
        )
        if not self._room(4):
            # The hub has to hear that it is over all the same, or it would go on paying: at most as many as were opened.
            self.counts = replace(self.counts, requests=self.counts.requests + 1)
            self.accrued.pop(request, None)
            self._put(wire.Forgone(request))
            self._put(_Closing(closed))
            future.set_result(self.unknown(key, opened, t_ns, "overflow"))
            return future
        self.pending[request] = Pending(key, future, opened, t_ns)
        self._put(_Closing(closed))
        return future

    def observe(self, record: RequestRecord) -> None:
        """Let the hub show this finished request."""
        if not self._room(1):
            self._dropped()
            return
        energy = record.energy
        sampled = record.sampled and record.trace_id and record.span_id
        start_ns = fitting.time(record.start_ns)
        self._put(
            wire.Observed(
                fitting.name(record.key.request),
                fitting.text(record.operation),
                fitting.text(record.provider),
                fitting.text(record.model),
                start_ns,
                max(fitting.time(record.end_ns), start_ns),
                fitting.time_if(record.first_token_ns),
                fitting.count(record.prompt_tokens),
                fitting.count(record.output_tokens),
                record.outcome,
                fitting.text(record.error_type),
                record.instrumented,
                energy.total,
                energy.scope,
                energy.quality,
                record.trace_id.to_bytes(16, "big") if sampled else b"",
                record.span_id.to_bytes(8, "big") if sampled else b"",
                fitting.labels(record.labels),
                record.rendered,
                None if record.answer is None else fitting.text(record.answer),
                energy.uncertainty,
            )
        )

    def promise(self, answer: str) -> None:
        """Let the hub know that an answer promises the joules of one more request."""
        if self._room(1):
            self._put(wire.Promised(answer))
        else:
            self._dropped()

    def unknown(self, key: Key, opened: Since, t1_ns: int, reason: Reason) -> list[Share]:
        """Shares that say why nothing is known, one per device that the request may have used."""
        named = opened.devices
        return [
            Share(key, device, opened.t_ns, t1_ns, *([None] * 6), method="equal", quality="unavailable", coverage=0.0,
                  concurrency=1.0, final_ns=self._now_ns(), reason=reason)
            for device, known in self.devices.items()
            if known.type in ("cpu", "memory") or (known.type != "host" and (named is None or device in named))
        ]  # fmt: skip

    # --- when the hub is gone or left ---

    def give_up(self) -> list[tuple[Pending, list[Share]]]:
        """Every closed request that waits, with what the hub acknowledged of it; nobody else resolves them any more."""
        found: list[tuple[Pending, list[Share]]] = []
        for request in list(self.pending):
            pending = self.pending.pop(request, None)
            if pending is not None:
                found.append((pending, self.accrued.pop(request, [])))
        return found

    def so_far(self, key: Key) -> list[Share]:
        """What the hub last acknowledged of an open request."""
        return self.accrued.get(fitting.name(key.request), [])

    def since(self, key: Key, otherwise: Since) -> Since:
        """Since when an open request is known here."""
        return self.opened.get(fitting.name(key.request), otherwise)

    # --- for the thread that sends ---

    def answer(self, ask: int) -> None:
        """Queue the progress of every request that has a probe, and the answer."""
        # Steps that a probe hands over go into the same batch, before the count that it answers.
        batch = self._batch = []
        now_ns = fitting.time(self._now_ns())
        try:
            for request, probe in list(self._probes.items()):
                if request not in self.opened:
                    continue  # its close waits in the outbox, and its last steps come before that
                tokens = self._probe(request, probe)
                if tokens is not None:
                    batch.append(wire.Progressed(request, now_ns, tokens))
        finally:
            self._batch = None
        # What was said before the meter moved must not come after it.
        self._outbox.extend(batch)
        self._outbox.append(wire.Answered(ask))

    def _probe(self, request: str, probe: Probe) -> int | None:
        try:
            return fitting.count(probe())
        except Exception:
            log.debug("melodi_otel: a probe failed and is not asked again", exc_info=True)
            self._probes.pop(request, None)
            return None

    def drain(self) -> bytes:
        """The next frames, empty where nothing waits."""
        outbox = self._outbox
        batch = self._batch = []
        try:
            while outbox and len(batch) < _BATCH:
                item = outbox.popleft()
                if isinstance(item, _Closing):
                    request = item.closed.request
                    probe = self._probes.pop(request, None)
                    if probe is not None:
                        self._probe(request, probe)  # the last steps are handed over, and then the close takes effect
                    batch.append(item.closed)
                else:
                    batch.append(item)
            if not outbox and self._newest:
                newest, self._newest = self._newest, {}
                # A list: a thread that held the old one may put something into it just now.
                batch += [told for request, told in list(newest.items()) if request in self.opened]
            if not outbox and self._unseen:
                with self._summing:
                    change, self._unseen = self._unseen, 0
                batch.append(wire.Unseen(fitting.time(self._now_ns()), change))
        finally:
            self._batch = None
        frames = self._frames_of(batch)
        self._number += len(frames)
        return b"".join(frames)

    def _frames_of(self, batch: list[wire.Message]) -> list[bytes]:
        try:
            return list(wire.encode_all(self._number, batch))
        except Exception:
            log.debug("melodi_otel: a message cannot be told to the hub", exc_info=True)
        # One that no encoder takes must not cost all others their hub.
        sound: list[wire.Message] = []
        for message in batch:
            try:
                wire.encode(0, [message])
            except Exception:
                self._dropped()
            else:
                sound.append(message)
        return list(wire.encode_all(self._number, sound))

    def _room(self, times: int) -> bool:
        return len(self._outbox) < times * CAPACITY

    def _dropped(self) -> None:
        self.counts = replace(self.counts, dropped=self.counts.dropped + 1)

    def _put(self, message: wire.Message | _Closing) -> None:
        self._outbox.append(message)
        self._urgent = True
        if self._sleeping:
            self._wake()

    def _wake(self) -> None:
        self._sleeping = False
        with contextlib.suppress(OSError):
            self._wakes.send(b"\0")


@dataclass(frozen=True, slots=True)
class _Closing:
    """A close that waits for the request's last probe."""

    closed: wire.Closed


def _newer(before: wire.Progressed, told: wire.Progressed) -> wire.Progressed:
    """The newest counts; what only the older one knew stays."""
    if told.output_tokens < before.output_tokens:
        before, told = told, before
    return wire.Progressed(
        told.request,
        told.t_ns,
        told.output_tokens,
        before.first_token_ns if told.first_token_ns is None else told.first_token_ns,
        before.prompt_tokens if told.prompt_tokens is None else told.prompt_tokens,
        before.cached_tokens if told.cached_tokens is None else told.cached_tokens,
    )
