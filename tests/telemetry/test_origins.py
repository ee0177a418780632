"""Where a request came from reaches a thread that does not know it, and never overrules one that does."""

from __future__ import annotations

import threading
from typing import Any

from opentelemetry import baggage, trace
from opentelemetry import context as otel_context

from melodi_otel.attribution.meter import Key, current
from melodi_otel.instrumentation.seam import Begin, End
from melodi_otel.telemetry.requests import RequestCalls

BLOCK = Key("g", "block")


def calls_of(rig: Any, **more: Any) -> RequestCalls:
    return RequestCalls(rig.meter, "g", rig.clock, lambda: rig.tracer, rig.deferral, **more)


def noted(calls: RequestCalls, rig: Any, *, key: Key | None = BLOCK) -> tuple[object, Any]:
    """An origin inside a span with baggage and a block, and that span."""
    token = current.set(key)
    try:
        with rig.tracer.start_as_current_span("POST /ask") as span:
            inner = otel_context.attach(baggage.set_baggage("tenant", "blue"))
            try:
                return calls.origin(), span
            finally:
                otel_context.detach(inner)
    finally:
        current.reset(token)


def in_a_thread(act: Any) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(act()))
    thread.start()
    thread.join()
    return found[0]


def span_of(rig: Any) -> Any:
    for future in rig.meter.futures.values():
        future.set_result([])
    rig.processor.pump()
    return next(span for span in rig.captured.ended if span.name == "chat m")


def test_nowhere(rig: Any) -> None:
    """Outside of any span, baggage and block there is nothing to note."""
    assert calls_of(rig).origin() is None


def test_a_raw_thread(rig: Any) -> None:
    """The span is a child of the noted one, the activity nested in the noted block, and the baggage is there."""
    seen: dict[str, Any] = {}

    def labels(attributes: Any, *more: Any) -> dict[str, str]:
        seen["while beginning"] = baggage.get_baggage("tenant")
        return {}

    calls = calls_of(rig, labels=labels)
    origin, outer = noted(calls, rig)

    def work() -> None:
        call = calls.begin(Begin("chat", "transformers", "m", rig.clock.monotonic_ns(), origin=origin))
        seen["after"] = current.get(), trace.get_current_span().get_span_context().is_valid
        with call.active():
            seen["inside"] = baggage.get_baggage("tenant")
        call.end(End(rig.clock.monotonic_ns(), 1))

    in_a_thread(work)
    assert seen == {"while beginning": "blue", "inside": "blue", "after": (None, False)}
    assert span_of(rig).parent.span_id == outer.get_span_context().span_id
    ((_, opened),) = rig.meter.said("open")
    assert opened["parent"] == BLOCK


def test_an_own_span_wins(rig: Any) -> None:
    """A thread with a current span of its own stays in it."""
    calls = calls_of(rig)
    origin, _ = noted(calls, rig)

    def work() -> Any:
        with rig.tracer.start_as_current_span("own") as own:
            call = calls.begin(Begin("chat", "transformers", "m", rig.clock.monotonic_ns(), origin=origin))
            call.end(End(rig.clock.monotonic_ns(), 1))
            return own

    own = in_a_thread(work)
    assert span_of(rig).parent.span_id == own.get_span_context().span_id


def test_an_own_block_wins(rig: Any) -> None:
    """A thread with an open activity of its own is nested in that."""
    calls = calls_of(rig)
    origin, _ = noted(calls, rig)

    def work() -> None:
        current.set(Key("g", "own"))
        calls.begin(Begin("chat", "transformers", "m", rig.clock.monotonic_ns(), origin=origin)).end(
            End(rig.clock.monotonic_ns(), 1)
        )

    in_a_thread(work)
    ((_, opened),) = rig.meter.said("open")
    assert opened["parent"] == Key("g", "own")
