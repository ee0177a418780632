"""A program's end of the wire: the meter interface, spoken to a hub, without ever waiting for it.

Whatever a request's thread says is put into a bounded outbox and sent by a thread of our own; joules come back on the same
thread and resolve the future that ``close`` gave. Of progress the newest wins; steps that find no room are dropped, and the
lane tells its whole set again; opens and closes are never dropped silently: they are counted, and the request says
``overflow``. A hub that is silent for :data:`FROZEN_S` is called frozen: requests then settle ``unavailable`` once a span may
not wait any longer, and nothing else changes; what it says afterwards comes too late for them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, Final

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
from melodi_otel.hub.wire import Told

log = logging.getLogger("melodi_otel")

CAPACITY: Final = 20_000
"""Messages that wait at most before progress, steps and observations are dropped; opens and closes may be four times as many."""
FROZEN_S: Final = 2.0
GREETING_S: Final = 10.0
"""A hub that has just been started listens before it answers, and a busy machine takes its time."""
_NAME: Final = 1024


class HubLost(Exception):
    """There is no hub at the other end, or no longer."""


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


class HubClient:
    """One connection to one hub; made anew when that is gone.

    Args:
        connect: gives the connected socket, and may take its time (it may start the hub); raises :class:`HubLost`.
        hello: the greeting, without ``resume``.
        resume: ids of requests that the hub before this one knew.
        welcomed: called once with what the hub said and what it knows of ``resume``, on this client's thread.
        lost: called once with the reason when the connection is gone or never came, on this client's thread.
        wait_s: how long a span waits for its joules at most, in seconds.
        now_ns: monotonic ns.
    """

    def __init__(
        self,
        connect: Callable[[], socket.socket],
        hello: wire.Hello,
        *,
        resume: Sequence[str] = (),
        welcomed: Callable[[wire.Welcome, Mapping[str, Told]], None],
        lost: Callable[[HubClient, str], None],
        wait_s: Callable[[], float],
        now_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.group = hello.group
        self.hub: wire.Welcome | None = None
        self.pending: dict[str, Pending] = {}
        self.accrued: dict[str, list[Share]] = {}
        self.opened: dict[str, int] = {}
        self.counts = Counts()
        self.frozen = False
        self.known: Final = threading.Event()
        self._connect = connect
        self._hello = replace_resume(hello, resume)
        self._welcomed = welcomed
        self._lost = lost
        self._wait_s = wait_s
        self._now_ns = now_ns
        self._probes: dict[str, Probe] = {}
        self._resumed: dict[str, Told] = {}
        self._outbox: deque[wire.Message | _Closing] = deque()
        self._newest: dict[str, wire.Progressed] = {}
        self._questions: dict[int, Future[Any]] = {}
        self._asked = 0
        self._number = 0
        self._batch: list[wire.Message] | None = None
        self._ident = 0
        self._sleeping = False
        self._over = False
        self._heard_ns = now_ns()
        self._wakes, self._woken = socket.socketpair()
        self._wakes.setblocking(False)
        self._woken.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="melodi-otel-client", daemon=True)
        self._pid = os.getpid()

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect and serve, on a thread of its own."""
        self._thread.start()

    @property
    def devices(self) -> Mapping[str, Device]:
        """What the hub measures, by ``hw.id``; empty before it has answered."""
        return {} if self.hub is None else {device.id: device for device in self.hub.devices}

    def become(
        self, welcomed: Callable[[wire.Welcome, Mapping[str, Told]], None], lost: Callable[[HubClient, str], None]
    ) -> None:
        """From now on tell others of what happens to the connection."""
        self._welcomed, self._lost = welcomed, lost

    def hang_up(self, timeout: float) -> None:
        """Hang up; waits at most ``timeout`` seconds for the thread."""
        self._over = True
        self._wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def forked(self) -> None:
        """In a child: let go of copies of descriptors; the connection is the parent's."""
        self._over = True
        for copy in (self._wakes, self._woken, getattr(self, "_socket", None)):
            if copy is not None:
                with contextlib.suppress(OSError):
                    copy.close()

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

    def between(self, device: str, t0_ns: int, t1_ns: int, timeout: float = 1.0) -> float | None:
        """J that a whole device used; None where that is not known, or not in time. Waits: not for a request's path."""
        self._asked += 1
        question: Future[Any] = Future()
        self._questions[self._asked] = question
        self._put(wire.Between(self._asked, device, t0_ns, t1_ns))
        try:
            return question.result(timeout)
        except TimeoutError:
            return None

    def unknown(self, key: Key, t0_ns: int, t1_ns: int, reason: Reason) -> list[Share]:
        """Shares that say why nothing is known, one per device."""
        return [
            Share(key, device, t0_ns, t1_ns, *([None] * 6), method="equal", quality="unavailable", coverage=0.0,
                  concurrency=1.0, final_ns=self._now_ns(), reason=reason)
            for device, known in self.devices.items() if known.type != "host"
        ]  # fmt: skip

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._ident = threading.get_ident()
        why = "it hung up"
        sock: socket.socket | None = None
        try:
            sock = self._socket = self._connect()
            self._greet(sock)
            self._serve(sock)
        except HubLost as error:
            why = str(error)
        except OSError as error:
            why = error.strerror or str(error)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            log.warning("melodi_otel: the connection to the hub failed", exc_info=True)
        finally:
            if sock is not None and self._pid == os.getpid():
                sock.close()
            for question in self._questions.values():
                if not question.done():
                    question.set_result(None)
            self.known.set()
        if not self._over and self._pid == os.getpid():
            try:
                self._lost(self, why)
            except Exception:
                log.exception("melodi_otel: a lost hub could not be replaced")

    def _greet(self, sock: socket.socket) -> None:
        sock.settimeout(GREETING_S)
        for frame in wire.encode_all(self._number, [self._hello]):
            sock.sendall(frame)
            self._number += 1
        if self._number == 0:
            raise HubLost("the greeting is too long")
        frames = self._frames = wire.Frames(wire.ToProgram)
        while not self.known.is_set():
            data = sock.recv(1 << 18)
            if not data:
                raise HubLost("it hung up at the greeting")
            self._feed(frames, data)
        self._heard_ns = self._now_ns()
        sock.setblocking(False)

    def _serve(self, sock: socket.socket) -> None:
        out = memoryview(b"")
        with selectors.DefaultSelector() as selector:
            selector.register(sock, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._over or (self._outbox and not self.frozen):
                if not out:
                    out = memoryview(self._drain())
                if out:
                    try:
                        out = out[sock.send(out) :]
                    except BlockingIOError:
                        pass
                selector.modify(sock, selectors.EVENT_READ | (selectors.EVENT_WRITE if out else 0))
                self._sleeping = True
                timeout = 0.0 if not out and (self._outbox or self._newest) else 0.25
                events = selector.select(timeout)
                self._sleeping = False
                for chosen, mask in events:
                    if chosen.fileobj is self._woken:
                        with contextlib.suppress(BlockingIOError):
                            self._woken.recv(4096)
                    elif mask & selectors.EVENT_READ:
                        data = sock.recv(1 << 18)
                        if not data:
                            raise HubLost("it hung up")
                        self._feed(self._frames, data)
                self._look_at_time()

    def _feed(self, frames: wire.Frames, data: bytes) -> None:
        try:
            messages = frames.feed(data)
        except wire.WireError as error:
            raise HubLost(f"it cannot be understood: {error}") from None
        self._heard_ns = self._now_ns()
        for message in messages:
            self._take(message)

    def _take(self, message: Any) -> None:
        match message:
            case wire.Settled():
                for told in message.told:
                    self._resolve(told.request, told.shares)
                self._put(wire.Got(message.number))
            case wire.Ask():
                self._answer(message.ask)
            case wire.Accrued():
                self.accrued.update((told.request, told.shares) for told in message.told if told.request in self.opened)
            case wire.Welcome() | wire.Resumed():
                if isinstance(message, wire.Welcome):
                    if message.version != wire.VERSION:
                        raise HubLost(f"it speaks version {message.version} of the wire, this program {wire.VERSION}")
                    self._greeted = message
                self._resumed.update((told.request, told) for told in message.resumed)
                if message.whole:
                    self.hub = self._greeted
                    self._welcomed(self._greeted, self._resumed)
                    self.known.set()
            case wire.Refused():
                raise HubLost(f"it refused: {message.text}")
            case wire.BetweenAnswered() | wire.StatusAnswered():
                question = self._questions.pop(message.question, None)
                if question is not None and not question.done():
                    question.set_result(message.joules if isinstance(message, wire.BetweenAnswered) else message.text)
            case _:
                pass

    def _resolve(self, request: str, shares: list[Share]) -> None:
        self.accrued.pop(request, None)
        pending = self.pending.pop(request, None)
        if pending is not None:
            key = Key(self.group, request)
            pending.future.set_result([replace(share, key=key) for share in shares])

    def _answer(self, ask: int) -> None:
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

    def _drain(self) -> bytes:
        outbox = self._outbox
        batch = self._batch = []
        try:
            while outbox and len(batch) < 4096:
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

    def _look_at_time(self) -> None:
        now_ns = self._now_ns()
        silent = now_ns - self._heard_ns > FROZEN_S * 1e9
        if silent != self.frozen:
            self.frozen = silent
            if silent:
                log.warning("melodi_otel: the hub does not answer; requests say `unavailable` until it does")
            else:
                log.warning("melodi_otel: the hub answers again")
        if not silent:
            return
        wait_ns = self._wait_s() * 1e9
        for request, pending in list(self.pending.items()):
            if now_ns - pending.close_ns > wait_ns:
                self.pending.pop(request, None)
                self.accrued.pop(request, None)
                self._outbox.append(wire.Forgone(request))
                key = Key(self.group, request)
                pending.future.set_result(self.unknown(key, pending.open_ns, pending.close_ns, "late"))

    # --- the outbox ---------------------------------------------------------------------------------------------------

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


def replace_resume(hello: wire.Hello, resume: Sequence[str]) -> wire.Hello:
    """The same greeting that asks for these requests."""
    return wire.Hello(
        hello.version, hello.release, hello.name, hello.group, hello.alone, hello.service, hello.namespace,
        hello.renders, list(resume),
    )  # fmt: skip


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
