"""The seam of spans, beyond one provider that is there: set later, held by a vendor's, not the SDK's, chains around ours."""

from __future__ import annotations

import io
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from opentelemetry.trace import set_tracer_provider
from opentelemetry.util._once import Once

from melodi_otel.attribution.meter import Share
from melodi_otel.telemetry.deferral import Entry
from melodi_otel.telemetry.spans import DeferringProcessor
from melodi_otel.telemetry.tracers import TracerSeam
from melodi_otel.testing.telemetry import CapturedSpans


@pytest.fixture(autouse=True)
def no_provider(set_global: Any) -> None:
    """A program in which nobody has set a provider; what is set is forgotten afterwards."""
    set_global(trace, "_TRACER_PROVIDER", None)
    set_global(trace, "_TRACER_PROVIDER_SET_ONCE", Once())


@pytest.fixture
def seam(rig: Any) -> Iterator[TracerSeam]:
    rig.wait_s = 0.01
    made = TracerSeam(rig.deferral, {}, Resource({}))
    yield made
    made.unwrap()


@pytest.fixture
def provider() -> Iterator[TracerProvider]:
    made = TracerProvider(shutdown_on_exit=False)
    yield made
    made.shutdown()


def processors(provider: TracerProvider) -> tuple[SpanProcessor, ...]:
    return provider._active_span_processor._span_processors


def settled(kit: Any) -> Entry:
    future: Future[list[Share]] = Future()
    future.set_result([kit.share()])
    return Entry(future)


def end_one(rig: Any, tracer: trace.Tracer, entry: Entry) -> None:
    span = tracer.start_span("chat m")
    rig.deferral.register(span.get_span_context().span_id, entry)
    span.end()
    rig.deferral.forget(span.get_span_context().span_id)


def test_set_later_is_wrapped_at_once(rig: Any, kit: Any, seam: TracerSeam, provider: TracerProvider) -> None:
    """A provider that is set after us is wrapped when it is set, also by a reference that was taken before."""
    captured = CapturedSpans()
    provider.add_span_processor(captured)
    seam.watch()
    set_tracer_provider(provider)
    assert isinstance(processors(provider)[0], DeferringProcessor)
    end_one(rig, provider.get_tracer("somebody else"), settled(kit))
    assert captured.wait_for(1)[0].attributes["melodi.energy.total"] == 30.0


def test_watching_is_undone(seam: TracerSeam, provider: TracerProvider) -> None:
    """After unwrapping, setting a provider is the API's own again, and wraps nothing."""
    before = trace._set_tracer_provider
    seam.watch()
    assert trace._set_tracer_provider is not before
    seam.unwrap()
    assert trace._set_tracer_provider is before
    provider.add_span_processor(CapturedSpans())
    set_tracer_provider(provider)
    assert not isinstance(processors(provider)[0], DeferringProcessor)


def test_somebody_hooked_in_after_us(seam: TracerSeam, provider: TracerProvider) -> None:
    """A hook that was put around ours stays when we go, and still sets the provider."""
    before = trace._set_tracer_provider
    seam.watch()
    ours = trace._set_tracer_provider
    try:
        trace._set_tracer_provider = lambda *args, **kwargs: ours(*args, **kwargs)
        seam.unwrap()
        set_tracer_provider(provider)
        assert trace.get_tracer_provider() is provider
    finally:
        trace._set_tracer_provider = before


def test_looking_sets_nothing(seam: TracerSeam, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look does not load the provider of OTEL_PYTHON_TRACER_PROVIDER, which the application may want to set itself."""
    monkeypatch.setenv("OTEL_PYTHON_TRACER_PROVIDER", "sdk_tracer_provider")
    seam.watch()
    seam.look()
    assert trace._TRACER_PROVIDER is None


class Holder(trace.TracerProvider):
    """A vendor's provider around the SDK's, which it may exchange; equal to others and so without a hash."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, held: trace.TracerProvider) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return True

    def get_tracer(self, *args: Any, **kwargs: Any) -> trace.Tracer:
        return self.held.get_tracer(*args, **kwargs)


def test_a_held_provider_is_found(rig: Any, kit: Any, seam: TracerSeam, provider: TracerProvider) -> None:
    """The processors of an SDK provider inside a vendor's are wrapped, also when the vendor exchanges it."""
    holder = Holder(trace.NoOpTracerProvider())
    seam.watch()
    set_tracer_provider(holder)
    captured = CapturedSpans()
    provider.add_span_processor(captured)
    holder.held = provider
    assert seam.late() is not None
    tracer = seam.tracer()
    assert isinstance(processors(provider)[0], DeferringProcessor)
    assert seam.late() is None
    end_one(rig, tracer, settled(kit))
    assert captured.wait_for(1)[0].attributes["melodi.energy.total"] == 30.0


class Around(SpanProcessor):
    """Somebody's chain: edits spans by rebuilding them, as vendors do."""

    def __init__(self, following: SpanProcessor) -> None:
        self.following = following

    def on_end(self, span: ReadableSpan) -> None:
        self.following.on_end(
            ReadableSpan(span.name, span.get_span_context(), attributes={**(span.attributes or {}), "edited": True})
        )


def test_a_chain_around_ours_waits_once(rig: Any, kit: Any, seam: TracerSeam, provider: TracerProvider) -> None:
    """A span that has its joules passes a second processor of ours, deeper in somebody's chain, at once and unchanged."""
    captured = CapturedSpans()
    entry = settled(kit)
    rig.deferral.watch(kit.Knowing(entry))
    inner = DeferringProcessor(captured, rig.deferral, threaded=False)
    provider.add_span_processor(Around(inner))
    set_tracer_provider(provider)
    tracer = seam.tracer()
    tracer.start_span("chat m").end()
    (span,) = captured.wait_for(1)
    assert span.attributes["edited"] is True
    assert span.attributes["melodi.energy.total"] == 30.0
    inner.release()


def test_processors_that_export_at_once(rig: Any, kit: Any, seam: TracerSeam, provider: TracerProvider) -> None:
    """In front of a simple processor with a console exporter the span is written once, with its joules."""
    out = io.StringIO()
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter(out=out)))
    set_tracer_provider(provider)
    end_one(rig, seam.tracer(), settled(kit))
    assert provider.force_flush(5000)
    assert out.getvalue().count('"name": "chat m"') == 1
    assert '"melodi.energy.total": 30.0' in out.getvalue()


def test_on_end_set_on_an_object(rig: Any, kit: Any, seam: TracerSeam, provider: TracerProvider) -> None:
    """A processor whose on_end was put on the object, as some tools do, is wrapped although its class has none."""
    captured, plain = CapturedSpans(), SpanProcessor()
    plain.on_end = captured.on_end  # type: ignore[method-assign]
    provider.add_span_processor(plain)
    set_tracer_provider(provider)
    end_one(rig, seam.tracer(), settled(kit))
    assert captured.wait_for(1)[0].attributes["melodi.energy.total"] == 30.0


def test_context_of_the_end(rig: Any, kit: Any, seam: TracerSeam, provider: TracerProvider) -> None:
    """The next processor sees the context in which the span ended, though another thread calls it."""
    from opentelemetry import baggage, context

    class Asking(CapturedSpans):
        def on_end(self, span: ReadableSpan) -> None:
            self.seen = baggage.get_baggage("tenant")
            super().on_end(span)

    asking = Asking()
    provider.add_span_processor(asking)
    set_tracer_provider(provider)
    tracer = seam.tracer()
    token = context.attach(baggage.set_baggage("tenant", "a"))
    end_one(rig, tracer, settled(kit))
    context.detach(token)
    asking.wait_for(1)
    assert asking.seen == "a"


def test_added_through_our_hook_after_we_left(seam: TracerSeam, provider: TracerProvider) -> None:
    """Whoever kept our way of adding processors adds them unwrapped once we are gone."""
    set_tracer_provider(provider)
    seam.tracer()
    kept = provider._active_span_processor.add_span_processor
    seam.unwrap()
    captured = CapturedSpans()
    kept(captured)
    assert processors(provider) == (captured,)
