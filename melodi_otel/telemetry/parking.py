"""Spans that have ended and wait for their joules: bounded in time and number, one thread, never lost, fork-safe.

Two kinds of end wait here: ended spans on their way to the next processor (:mod:`~melodi_otel.telemetry.spans`), and spans of
a provider that is not the SDK's, whose end is called late (:mod:`~melodi_otel.telemetry.late`)::

    park  ->  joules    -> deliver(item, entry, energy)
          ->  too late  -> deliver(item, entry, unavailable: late, overflow or shutdown)
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from melodi_otel.attribution.meter import Reason
from melodi_otel.attribution.summary import Energy, unavailable
from melodi_otel.forks import in_child, weakly
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.deferral import Deferral, Entry

log = logging.getLogger("melodi_otel")

Item = TypeVar("Item")
_OVERSLEPT_NS: Final = 50_000_000
"""A thread that wakes so much later than it meant to was kept from running, and so was the one that reads the meter."""
_REASONS: Final[dict[str, Reason]] = {"late": "late", "flush": "late", "overflow": "overflow", "shutdown": "shutdown"}


@dataclass(eq=False, slots=True)
class _Waiting:
    item: Any
    entry: Entry
    deadline_ns: int
    cause: str = "late"
    longer: bool = False


class Parking(Generic[Item]):
    """Holds items until the joules of their entries are there.

    Args:
        deferral: how long, how many, and what the joules of shares are.
        deliver: takes an item with its entry and energy, on the parking's own thread; must not raise.
        complain: where our own failures go.
        threaded: False leaves :meth:`pump` to the caller.
    """

    def __init__(
        self,
        deferral: Deferral,
        deliver: Callable[[Item, Entry, Energy], None],
        complain: Complaints,
        *,
        threaded: bool = True,
    ) -> None:
        self._deferral = deferral
        self._deliver = deliver
        self._complain = complain
        self._threaded = threaded
        self.closed = False
        self._start_over()
        self._at_exit = weakly(self._drain_at_exit)
        atexit.register(self._at_exit)
        in_child(self._forked)

    def _start_over(self) -> None:
        # Re-entrant on purpose: the collector may run here and finalise a stream, which ends a span on this very thread.
        self._lock = threading.RLock()
        self._forwarding = threading.RLock()
        self._parked: dict[_Waiting, None] = {}
        self._ready: deque[_Waiting] = deque()
        self._signal: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def _forked(self) -> None:
        self._start_over()
        self._deferral.forked()

    def park(self, item: Item, entry: Entry) -> bool:
        """Hold ``item`` until the joules of ``entry`` are there; False: it is not held, the caller goes on with it."""
        try:
            deferral = self._deferral
            deadline_ns = deferral.clock.monotonic_ns() + round(deferral.wait_s() * 1e9)
            waiting = _Waiting(item, entry, deadline_ns)
            with self._lock:
                if self.closed:
                    return False
                if self._threaded and (self._thread is None or not self._thread.is_alive()):
                    self._start()
                first = not self._parked
                self._parked[waiting] = None
                deferral.parked(+1)
                if len(self._parked) > deferral.limit:
                    self._make_ready(next(iter(self._parked)), "overflow")
        except Exception as error:
            self._complain("park", error)
            return False
        entry.future.add_done_callback(lambda _: self._make_ready(waiting, "settled"))
        if first:
            self._signal.put(None)  # the thread sleeps without an end; it needs this deadline
        return True

    def pump(self) -> float | None:
        """Deliver what is due; the seconds until something may be due next, None = nothing is parked."""
        with self._lock:
            now = self._deferral.clock.monotonic_ns()
            while self._parked:
                oldest = next(iter(self._parked))
                if oldest.deadline_ns > now:
                    break
                self._make_ready(oldest, "late")
        with self._forwarding:
            while self._ready:
                try:
                    waiting = self._ready.popleft()
                except IndexError:
                    break
                self._forward(waiting)
        with self._lock:
            if self._ready:
                return 0.0
            if not self._parked:
                return None
            due = next(iter(self._parked)).deadline_ns
        return max(0.0, (due - self._deferral.clock.monotonic_ns()) / 1e9)

    def overslept(self, due_ns: int) -> None:
        """Let what waits wait for half its bound more, once, where the whole program has stood still.

        A collection of a big heap, a stopped process or a suspended machine keeps everything from running, the reading of
        the meter too: whoever gave up on waking would do so a moment before the joules come.

        Args:
            due_ns: when :meth:`pump` was to be called, on the deferral's clock; long past is a sign of such a stop.
        """
        now_ns = self._deferral.clock.monotonic_ns()
        if now_ns - due_ns < _OVERSLEPT_NS:
            return
        until_ns = now_ns + round(self._deferral.wait_s() / 2 * 1e9)
        with self._lock:
            for waiting in self._parked:
                if not waiting.longer and waiting.deadline_ns < until_ns:
                    waiting.longer = True
                    waiting.deadline_ns = until_ns

    def drain(self, cause: str, end: float) -> bool:
        """Wait for what is parked, at most the bound of a span, and deliver it with or without joules.

        Args:
            cause: ``flush`` or ``shutdown``.
            end: ``time.monotonic()`` at which to give up.

        Returns:
            Whether everything was delivered in time.
        """
        with self._lock:
            parked = list(self._parked)
        bound = min(self._deferral.wait_s(), max(0.0, end - time.monotonic()))
        if parked and bound > 0:
            wait_for({waiting.entry.future for waiting in parked}, timeout=bound)
        for waiting in parked:
            self._make_ready(waiting, cause)
        if not self._forwarding.acquire(timeout=max(0.001, end - time.monotonic())):
            return False
        try:
            self.pump()
        finally:
            self._forwarding.release()
        return True

    def release(self) -> None:
        """Hold nothing any more: deliver what is parked and end the thread; a second call does nothing."""
        with self._lock:
            if self.closed:
                return
            self.closed = True
            thread = self._thread
        atexit.unregister(self._at_exit)
        try:
            self.drain("shutdown", time.monotonic() + self._deferral.wait_s() + 5.0)
        except Exception as error:
            self._complain("shutdown", error)
        self._signal.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5.0)

    # --- inside ---

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, args=(self._signal,), name="melodi-otel-spans", daemon=True)
        self._thread.start()

    def _run(self, signal: queue.SimpleQueue[None]) -> None:
        while signal is self._signal:
            try:
                wait_s = self.pump()
            except Exception as error:
                self._complain("pump", error)
                wait_s = 1.0
            due_ns = None if wait_s is None else self._deferral.clock.monotonic_ns() + round(wait_s * 1e9)
            if self.closed and wait_s is None:
                return
            try:
                signal.get(timeout=wait_s)
                while True:
                    signal.get_nowait()
            except queue.Empty:
                pass
            if due_ns is not None:
                self.overslept(due_ns)

    def _make_ready(self, waiting: _Waiting, cause: str) -> None:
        with self._lock:
            if waiting not in self._parked:
                return
            del self._parked[waiting]
            waiting.cause = cause
            dropped = self._ready.popleft() if len(self._ready) >= self._deferral.limit else None
            self._ready.append(waiting)
        self._deferral.parked(-1)
        if dropped is not None:
            # The next processor has been blocking for as long as it took to end `limit` spans: memory has a bound too.
            self._deferral.counted("dropped")
            if self._complain.first("dropped"):
                log.warning("spans are dropped: the exporter blocks and %d spans wait behind it", self._deferral.limit)
        self._signal.put(None)

    def _forward(self, waiting: _Waiting) -> None:
        outcome = waiting.cause
        try:
            if waiting.entry.future.done():
                energy = self._deferral.settled(waiting.entry)
                outcome = energy.quality
            else:
                energy = unavailable(_REASONS.get(outcome, "late"))
        except Exception as error:
            self._complain("settle", error)
            energy = unavailable(None)
            outcome = energy.quality
        self._deliver(waiting.item, waiting.entry, energy)
        self._deferral.counted(outcome)

    def _drain_at_exit(self) -> None:
        # Runs before the handlers that were there when we were made, so also before the provider's own shutdown.
        try:
            self.drain("shutdown", time.monotonic() + self._deferral.wait_s() + 5.0)
        except Exception as error:
            self._complain("exit", error)
