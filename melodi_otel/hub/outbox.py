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
from melodi_otel.hub import wire

log = logging.getLogger("melodi_otel")

CAPACITY: Final = 20_000
"""Messages that wait at most before progress, steps and observations are dropped; opens and closes may be four times as many."""
_NAME: Final = 1024
_BATCH: Final = 4096


@dataclass(slots=True)
class Pending:
    """A closed request whose joules are awaited: since when it was open, and when it ended (monotonic ns)."""

    future: Future[list[Share]]
    open_ns: int
    close_ns: int


@dataclass(frozen=True, slots=True)
class Counts:
    """What the outbox lost: ``requests`` opens and closes, ``dropped`` of everything that may be dropped."""

    requests: int = 0
    dropped: int = 0


class Outbox:
    """Messages on their way to a hub, and what is remembered of the requests they are about.

    Args:
        group: the group token of this program's requests.
        now_ns: monotonic ns.

    Attributes:
        pending: closed requests whose joules are awaited.
        opened: open requests and since when (monotonic ns).
        accrued: what the hub last acknowledged of them.
        counts: what was lost for want of room.
    """

    def __init__(self, group: str, now_ns: Callable[[], int]) -> None:
        self.group: Final = group
        self.pending: dict[str, Pending] = {}
        self.accrued: dict[str, list[Share]] = {}
        self.opened: dict[str, int] = {}
        self.counts = Counts()
        self.devices: Mapping[str, Device] = {}
        self._now_ns = now_ns
        self._probes: dict[str, Probe] = {}
        self._outbox: deque[wire.Message | _Closing] = deque()
        self._newest: dict[str, wire.Progressed] = {}
        self._number = 0
        self._batch: list[wire.Message] | None = None
        self._ident = 0
        self._sleeping = False
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
        facts = (parameters, active_parameters, kv_bytes_per_token, layers, hidden, experts, experts_per_token)
        named = None if devices is None else list(devices)
        self._put(wire.EngineTold(engine.number, t_ns, state, _cut(model), named, world, list(pids), facts))

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
        if not self._room(4):
            self.counts = replace(self.counts, requests=self.counts.requests + 1)
            return
        request = key.request
        if probe is not None:
            self._probes[request] = probe
        self.opened[request] = t_ns
        self._put(
            wire.Opened(
                request,
                t_ns,
                None if engine is None else engine.number,
                None if devices is None else list(devices),
                _cut(model),
                prompt_tokens,
                cached_tokens,
                {name[:_NAME]: value[:_NAME] for name, value in (labels or {}).items()},
                None if parent is None else parent.request,
                thread is not None,
                probe is not None,
                late,
            )
        )

    def unseen(self, t_ns: int, change: int) -> None:
        """See :meth:`melodi_otel.attribution.ledger.Ledger.unseen`."""
        self._put(wire.Unseen(t_ns, change))

    def bind(self, key: Key, child_id: str) -> None:
        if key.request in self.opened:
            self._put(wire.Bound(key.request, child_id))

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
        if key.request not in self.opened:
            return
        told = wire.Progressed(key.request, t_ns, output_tokens, first_token_ns, prompt_tokens, cached_tokens)
        if self._batch is not None and threading.get_ident() == self._ident:
            self._batch.append(told)
        elif self._room(1):
            self._put(told)
        else:
            before = self._newest.get(key.request)
            self._newest[key.request] = told if before is None else _newer(before, told)

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
        told = wire.Stepped(
            engine.number,
            lane,
            seq,
            t0_ns,
            t1_ns,
            None if devices is None else list(devices),
            decode,
            list(prefill),
            list(computed),
            list(joined),
            list(left),
        )
        if self._batch is not None and threading.get_ident() == self._ident:
            self._batch.append(told)  # a probe hands it over: it comes before whatever follows the probe
        elif self._room(1):
            self._put(told)
        else:
            self.counts = replace(self.counts, dropped=self.counts.dropped + 1)
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
        request = key.request
        open_ns = self.opened.pop(request, None)
        if open_ns is None or not self._room(4):
            if open_ns is not None:
                self.counts = replace(self.counts, requests=self.counts.requests + 1)
                self._probes.pop(request, None)
                self._put(wire.Forgone(request))
            future.set_result(self.unknown(key, t_ns if open_ns is None else open_ns, t_ns, "overflow"))
            return future
        self.pending[request] = Pending(future, open_ns, t_ns)
        closed = wire.Closed(request, t_ns, output_tokens, outcome, first_token_ns, prompt_tokens, cached_tokens)
        self._put(_Closing(closed))
        return future

    def observe(self, record: RequestRecord) -> None:
        """Let the hub show this finished request."""
        if not self._room(1):
            self.counts = replace(self.counts, dropped=self.counts.dropped + 1)
            return
        energy = record.energy
        sampled = record.sampled and record.trace_id and record.span_id
        self._put(
            wire.Observed(
                record.key.request,
                _cut(record.operation),
                _cut(record.provider),
                _cut(record.model),
                record.start_ns,
                max(record.end_ns, record.start_ns),
                record.first_token_ns,
                record.prompt_tokens,
                record.output_tokens,
                record.outcome,
                _cut(record.error_type),
                record.instrumented,
                energy.total,
                energy.scope,
                energy.quality,
                record.trace_id.to_bytes(16, "big") if sampled else b"",
                record.span_id.to_bytes(8, "big") if sampled else b"",
                {name[:_NAME]: value[:_NAME] for name, value in record.labels.items()},
            )
        )

    def unknown(self, key: Key, t0_ns: int, t1_ns: int, reason: Reason) -> list[Share]:
        """Shares that say why nothing is known, one per device."""
        return [
            Share(key, device, t0_ns, t1_ns, *([None] * 6), method="equal", quality="unavailable", coverage=0.0,
                  concurrency=1.0, final_ns=self._now_ns(), reason=reason)
            for device, known in self.devices.items() if known.type != "host"
        ]  # fmt: skip

    # --- for the thread that sends ---

    def answer(self, ask: int) -> None:
        """Queue the progress of every request that has a probe, and the answer."""
        # Steps that a probe hands over go into the same batch, before the count that it answers.
        batch = self._batch = []
        now_ns = self._now_ns()
        try:
            for request, probe in list(self._probes.items()):
                tokens = self._probe(request, probe)
                if tokens is not None and request in self.opened:
                    batch.append(wire.Progressed(request, now_ns, tokens))
        finally:
            self._batch = None
        # What was said before the meter moved must not come after it.
        self._outbox.extend(batch)
        self._outbox.append(wire.Answered(ask))

    def _probe(self, request: str, probe: Probe) -> int | None:
        try:
            return probe()
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
                batch += [told for request, told in newest.items() if request in self.opened]
        finally:
            self._batch = None
        frames = list(wire.encode_all(self._number, batch))
        self._number += len(frames)
        return b"".join(frames)

    def _room(self, times: int) -> bool:
        return len(self._outbox) < times * CAPACITY

    def _put(self, message: wire.Message | _Closing) -> None:
        self._outbox.append(message)
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


def _cut(text: str | None) -> str | None:
    return None if text is None else text[:_NAME]
