"""Spans that wait for their joules.

A span ends before its energy is known: the meter's next sample comes up to a second later. Attributes cannot be added to
an ended span, so :class:`DeferringProcessor` *wraps* the next processor (the one that exports) and hands it a rebuilt
span once the joules are there, or after a bounded wait without them::

    end()  ->  on_end: no future -> next.on_end(span)                        at once, untouched
                       future    -> parked -> joules   -> next.on_end(span + melodi.energy.*)
                                           -> too late -> next.on_end(span + quality=unavailable, reason)

The request's thread pays two dictionary entries; everything else happens on the processor's own daemon thread.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from melodi_otel import semconv as names
from melodi_otel.attribution.meter import Reason
from melodi_otel.attribution.summary import unavailable
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.deferral import AttributeValue, Deferral, Entry, SpanCounts, energy_attributes
from melodi_otel.telemetry.forks import in_child, weakly

__all__ = ["Deferral", "DeferringProcessor", "Entry", "SpanCounts", "energy_attributes", "enriched"]

log = logging.getLogger("melodi_otel")

_REASONS: Final[dict[str, Reason]] = {"late": "late", "flush": "late", "overflow": "overflow", "shutdown": "shutdown"}


class _Enriched(ReadableSpan):
    """A span rebuilt by the public constructor, with the counts of what its limits had dropped."""

    def __init__(self, span: ReadableSpan, more: Mapping[str, AttributeValue]) -> None:
        # A plain dict has no limit: nothing of the application's is evicted to make room for ours.
        super().__init__(
            name=span.name,
            context=span.get_span_context(),
            parent=span.parent,
            resource=span.resource,
            attributes={**(span.attributes or {}), **more},
            events=span.events,
            links=span.links,
            kind=span.kind,
            status=span.status,
            start_time=span.start_time,
            end_time=span.end_time,
            instrumentation_scope=span.instrumentation_scope,
        )
        # Exporters of older formats still read it; asking by its public name would warn.
        self._instrumentation_info = getattr(span, "_instrumentation_info", None)
        self._dropped = (span.dropped_attributes, span.dropped_events, span.dropped_links)

    @property
    def dropped_attributes(self) -> int:
        return self._dropped[0]

    @property
    def dropped_events(self) -> int:
        return self._dropped[1]

    @property
    def dropped_links(self) -> int:
        return self._dropped[2]


def enriched(span: ReadableSpan, more: Mapping[str, AttributeValue]) -> ReadableSpan:
    """A copy of the ended ``span`` with ``more`` attributes; the original is left as it is."""
    return _Enriched(span, more)


@dataclass(eq=False, slots=True)
class _Waiting:
    span: ReadableSpan
    entry: Entry
    deadline_ns: int
    cause: str = "late"


class DeferringProcessor(SpanProcessor):
    """Holds back the spans that wait for joules, bounded in time and number, and passes all others through.

    Args:
        following: the processor that gets the spans.
        deferral: which spans wait, how long, and how many.
        threaded: False leaves :meth:`pump` to the caller.
    """

    def __init__(self, following: SpanProcessor, deferral: Deferral, *, threaded: bool = True) -> None:
        self.next: Final = following
        self._deferral = deferral
        self._threaded = threaded
        self._closed = False
        self._complain = Complaints("span processor")
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

    # --- what the SDK calls, on the application's threads ---

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        try:
            self._deferral.started(span)
        except Exception as error:
            self._complain("started", error)
        try:
            self.next.on_start(span, parent_context=parent_context)
        except Exception as error:
            self._complain("on_start", error)

    def _on_ending(self, span: Span) -> None:
        try:
            hook = getattr(self.next, "_on_ending", None)  # SDK 1.40 and later
            if hook is not None:
                hook(span)
        except Exception as error:
            self._complain("_on_ending", error)

    def on_end(self, span: ReadableSpan) -> None:
        try:
            entry = None if self._closed else self._deferral.find(span)
        except Exception as error:
            self._complain("find", error)
            entry = None
        if entry is None or not self._park(span, entry):
            self._hand_on(span)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Wait for what is parked, at most the bound of a span, forward it with or without joules, flush the next."""
        end = time.monotonic() + timeout_millis / 1000
        try:
            flushed = self._drain("flush", end)
        except Exception as error:
            self._complain("force_flush", error)
            flushed = False
        try:
            return bool(self.next.force_flush(max(0, int((end - time.monotonic()) * 1000)))) and flushed
        except Exception as error:
            self._complain("force_flush", error)
            return False

    def shutdown(self) -> None:
        """Forward what is parked, after at most the bound of a span, and shut the next processor down."""
        self.release()
        try:
            self.next.shutdown()
        except Exception as error:
            self._complain("shutdown", error)

    # --- what the house calls ---

    def release(self) -> None:
        """Stop holding spans back: forward what is parked and become a mere passage. The next processor lives on."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
        atexit.unregister(self._at_exit)
        try:
            self._drain("shutdown", time.monotonic() + self._deferral.wait_s() + 5.0)
        except Exception as error:
            self._complain("shutdown", error)
        self._signal.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5.0)

    def pump(self) -> float | None:
        """Forward what is due; the seconds until something may be due next, None = nothing is parked."""
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

    # --- inside ---

    def _park(self, span: ReadableSpan, entry: Entry) -> bool:
        try:
            deferral = self._deferral
            deadline_ns = deferral.clock.monotonic_ns() + round(deferral.wait_s() * 1e9)
            waiting = _Waiting(span, entry, deadline_ns)
            with self._lock:
                if self._closed:
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
            if self._closed and wait_s is None:
                return
            try:
                signal.get(timeout=wait_s)
                while True:
                    signal.get_nowait()
            except queue.Empty:
                pass

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
        span = waiting.span
        try:
            entry = waiting.entry
            if entry.future.done():
                energy = self._deferral.settled(entry)
                outcome = energy.quality
            else:
                energy = unavailable(_REASONS.get(outcome, "late"))
            tokens = (span.attributes or {}).get(names.GEN_AI_OUTPUT_TOKENS, entry.output_tokens)
            more = energy_attributes(energy, tokens if isinstance(tokens, int) else None, entry.owner)
            span = enriched(span, more)
        except Exception as error:
            self._complain("enrich", error)
            outcome = "unavailable"
            span = enriched(span, energy_attributes(unavailable(None), None))
        self._hand_on(span)
        self._deferral.counted(outcome)

    def _hand_on(self, span: ReadableSpan) -> None:
        try:
            self.next.on_end(span)
        except Exception as error:
            self._complain("on_end", error)

    def _drain(self, cause: str, end: float) -> bool:
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

    def _drain_at_exit(self) -> None:
        # Runs before the handlers that were there when we were made, so also before the provider's own shutdown.
        try:
            self._drain("shutdown", time.monotonic() + self._deferral.wait_s() + 5.0)
        except Exception as error:
            self._complain("exit", error)
