"""Spans that wait for their joules.

A span ends before its energy is known: the meter's next sample comes up to a second later. Attributes cannot be added to
an ended span, so :class:`DeferringProcessor` *wraps* the next processor (the one that exports) and hands it a rebuilt
span once the joules are there, or after a bounded wait without them::

    end()  ->  on_end: no future -> next.on_end(span)                        at once, untouched
                       future    -> parked -> joules   -> next.on_end(span + melodi.energy.*)
                                           -> too late -> next.on_end(span + quality=unavailable, reason)

The request's thread pays two dictionary entries; everything else happens on the thread of the :mod:`parking
<melodi_otel.telemetry.parking>`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextvars import Context as Variables
from contextvars import copy_context
from typing import Final

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor

from melodi_otel import semconv as names
from melodi_otel.attribution.summary import Energy, unavailable
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.deferral import AttributeValue, Deferral, Entry, SpanCounts, energy_attributes
from melodi_otel.telemetry.parking import Parking

__all__ = ["Deferral", "DeferringProcessor", "Entry", "SpanCounts", "energy_attributes", "enriched"]


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


_Ended = tuple[ReadableSpan, Variables]


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
        self._complain = Complaints("span processor")
        self._parking: Parking[_Ended] = Parking(deferral, self._forward, self._complain, threaded=threaded)

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
            entry = None if self._parking.closed or self._deferral.has_waited(span) else self._deferral.find(span)
        except Exception as error:
            self._complain("find", error)
            entry = None
        # What the next processor asks of its context (suppression, baggage) is asked of the one in which the span ended.
        if entry is None or not self._parking.park((span, copy_context()), entry):
            self._hand_on(span)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Wait for what is parked, at most the bound of a span, forward it with or without joules, flush the next."""
        end = time.monotonic() + timeout_millis / 1000
        try:
            flushed = self._parking.drain("flush", end)
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
        self._parking.release()

    def pump(self) -> float | None:
        """Forward what is due; the seconds until something may be due next, None = nothing is parked."""
        return self._parking.pump()

    # --- inside ---

    def _forward(self, ended: _Ended, entry: Entry, energy: Energy) -> None:
        span, context = ended
        try:
            tokens = (span.attributes or {}).get(names.GEN_AI_OUTPUT_TOKENS, entry.output_tokens)
            more = energy_attributes(energy, tokens if isinstance(tokens, int) else None, entry.owner)
            span = enriched(span, more)
        except Exception as error:
            self._complain("enrich", error)
            span = enriched(span, energy_attributes(unavailable(None), None))
        self._deferral.told(span)
        context.run(self._hand_on, span)

    def _hand_on(self, span: ReadableSpan) -> None:
        try:
            self.next.on_end(span)
        except Exception as error:
            self._complain("on_end", error)
