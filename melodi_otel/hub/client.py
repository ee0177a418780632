"""A program's end of the wire: a thread that sends what the outbox holds and hands out the joules that come back.

A hub that is silent for :data:`FROZEN_S` is called frozen: requests then settle ``unavailable`` once a span may not wait any
longer, and nothing else changes; what it says afterwards comes too late for them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import replace
from typing import Any, Final

from melodi_otel.attribution.meter import Share
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.hub import fitting, wire
from melodi_otel.hub.outbox import Outbox
from melodi_otel.hub.wire import Told

log = logging.getLogger("melodi_otel")

FROZEN_S: Final = 2.0
DOZE_S: Final = 0.02
"""Steps are sent at most so late, a fifth of the time between two readings of a meter."""
GREETING_S: Final = 10.0
"""A hub that has just been started listens before it answers, and a busy machine takes its time."""


class HubLost(Exception):
    """There is no hub at the other end, or no longer."""


class HubClient(Outbox):
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
        super().__init__(hello.group, now_ns)
        self.hub: wire.Welcome | None = None
        self.frozen = False
        self.known: Final = threading.Event()
        self._connect = connect
        self._hello = replace_resume(hello, resume)
        self.alone: Final = hello.alone
        self._welcomed = welcomed
        self._lost = lost
        self._wait_s = wait_s
        self._resumed: dict[str, Told] = {}
        self._questions: dict[int, Future[Any]] = {}
        self._asked = itertools.count(1)
        self._over = False
        self._socket: socket.socket | None = None
        self._heard_ns = now_ns()
        self._thread = threading.Thread(target=self._run, name="melodi-otel-client", daemon=True)
        self._pid = os.getpid()

    # --- life ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Connect and serve, on a thread of its own."""
        self._thread.start()

    def become(
        self, welcomed: Callable[[wire.Welcome, Mapping[str, Told]], None], lost: Callable[[HubClient, str], None]
    ) -> None:
        """From now on tell others of what happens to the connection."""
        self._welcomed, self._lost = welcomed, lost

    def hang_up(self, timeout: float) -> None:
        """Hang up; waits at most ``timeout`` seconds for the thread."""
        self._over = True
        self._wake()
        sock = self._socket
        if sock is not None and not self.known.is_set():
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)  # it waits for a hub that may never answer the greeting
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def forked(self) -> None:
        """In a child: let go of copies of descriptors; the connection is the parent's."""
        self._over = True
        self._summing = threading.Lock()
        for copy in (self._wakes, self._woken, self._socket):
            if copy is not None:
                with contextlib.suppress(OSError):
                    copy.close()

    def between(self, device: str, t0_ns: int, t1_ns: int, timeout: float = 1.0) -> float | None:
        """J that a whole device used; None where that is not known, or not in time. Waits: not for a request's path."""
        if self.frozen or not self._thread.is_alive() or not self._room(1):
            return None
        number = next(self._asked)
        question: Future[Any] = Future()
        self._questions[number] = question
        self._put(wire.Between(number, fitting.name(device), fitting.time(t0_ns), fitting.time(t1_ns)))
        try:
            return question.result(timeout)
        except TimeoutError:
            return None
        finally:
            self._questions.pop(number, None)

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        self._ident = threading.get_ident()
        why = "it hung up"
        sock: socket.socket | None = None
        try:
            sock = self._socket = self._connect()
            if self._over:
                raise HubLost("the program ends")
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
            if self._pid == os.getpid():
                for own in (sock, self._wakes, self._woken):
                    if own is not None:
                        own.close()
            for question in list(self._questions.values()):
                give(question, None)
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
        # Not the default one: a forked child could not close its descriptor.
        with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
            selector.register(sock, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._over or ((self._outbox or out) and not self.frozen):
                if not out:
                    self._urgent = False
                    out = memoryview(self.drain())
                    # Steps that come now travel together: an engine makes hundreds a second, and whoever sends each at once
                    # takes the processor from it twice.
                    self._dozing = bool(out)
                if out:
                    try:
                        out = out[sock.send(out) :]
                    except BlockingIOError:
                        pass
                selector.modify(sock, selectors.EVENT_READ | (selectors.EVENT_WRITE if out else 0))
                self._sleeping = True
                waiting = self._urgent or (self._outbox and not self._dozing) or self._newest
                timeout = 0.0 if not out and waiting else DOZE_S if self._dozing else 0.25
                events = selector.select(timeout)
                self._sleeping = self._dozing = False
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
                self.answer(message.ask)
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
                    self.devices = {device.id: device for device in self._greeted.devices}
                    resumed, self._resumed = self._resumed, {}
                    self._welcomed(self._greeted, resumed)
                    self.known.set()
            case wire.Refused():
                raise HubLost(f"it refused: {message.text}")
            case wire.BetweenAnswered() | wire.StatusAnswered():
                question = self._questions.pop(message.question, None)
                if question is not None:
                    give(question, message.joules if isinstance(message, wire.BetweenAnswered) else message.text)
            case _:
                pass

    def _resolve(self, request: str, shares: list[Share]) -> None:
        self.accrued.pop(request, None)
        pending = self.pending.pop(request, None)
        if pending is not None:
            give(pending.future, [replace(share, key=pending.key) for share in shares])

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
                if self.pending.pop(request, None) is None:
                    continue  # whoever took it resolves it
                self.accrued.pop(request, None)
                self._outbox.append(wire.Forgone(request))
                give(pending.future, self.unknown(pending.key, pending.opened, pending.close_ns, "late"))


class Onwards:
    """An ``Observer`` that tells the hub of finished requests: it counts them, and shows them on its page.

    Args:
        hub: the hub in use, or None.
    """

    def __init__(self, hub: Callable[[], HubClient | None]) -> None:
        self._hub = hub

    def finished(self, record: RequestRecord) -> None:
        """Tell it, where there is one; a measured block is nothing that metrics show."""
        hub = self._hub()
        if hub is not None and record.kind == "request":
            hub.observe(record)


def replace_resume(hello: wire.Hello, resume: Sequence[str]) -> wire.Hello:
    """The same greeting, within the wire's limits, that asks for these requests."""
    return wire.Hello(
        hello.version, hello.release, hello.name, fitting.name(hello.group), hello.alone, fitting.text(hello.service),
        fitting.text(hello.namespace), hello.renders, fitting.fits(resume),
    )  # fmt: skip


def give(future: Future[Any], result: Any) -> None:
    """Resolve it, once: whoever comes second, or after it was cancelled, changes nothing."""
    with contextlib.suppress(InvalidStateError):
        future.set_result(result)
