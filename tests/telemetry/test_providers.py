"""The seams: the application's providers are used and left as they were; nothing global is set."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import opentelemetry.metrics._internal as metrics_internal
import pytest
from opentelemetry import metrics, trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ConcurrentMultiSpanProcessor, SpanProcessor, TracerProvider

from melodi_otel.attribution.books import Books, Snapshot
from melodi_otel.attribution.meter import Share
from melodi_otel.telemetry.deferral import Entry
from melodi_otel.telemetry.metrics import Views
from melodi_otel.telemetry.providers import MeterSeam
from melodi_otel.telemetry.spans import DeferringProcessor
from melodi_otel.telemetry.tracers import TracerSeam
from melodi_otel.testing.telemetry import CapturedSpans, points

RESOURCE = Resource({"host.id": "h1"})


@pytest.fixture
def application(set_global: Any) -> Iterator[TracerProvider]:
    """A provider that the application has set globally."""
    provider = TracerProvider(shutdown_on_exit=False)
    set_global(trace, "_TRACER_PROVIDER", provider)
    yield provider
    provider.shutdown()


@pytest.fixture
def seam(rig: Any) -> Iterator[TracerSeam]:
    rig.wait_s = 0.01
    made = TracerSeam(rig.deferral, {}, RESOURCE)
    yield made
    made.unwrap()


def processors(provider: TracerProvider) -> tuple[SpanProcessor, ...]:
    return provider._active_span_processor._span_processors


def end_one(rig: Any, seam: TracerSeam, kit: Any) -> None:
    span = seam.tracer().start_span("chat m")
    future: Future[list[Share]] = Future()
    future.set_result([kit.share()])
    rig.deferral.register(span.get_span_context().span_id, Entry(future))
    span.end()
    rig.deferral.forget(span.get_span_context().span_id)


def test_application_is_wrapped_once(rig: Any, kit: Any, seam: TracerSeam, application: TracerProvider) -> None:
    """The processors of the application's provider are wrapped, each once, however often one asks."""
    captured = CapturedSpans()
    application.add_span_processor(captured)
    for _ in range(3):
        seam.tracer()
        seam.wrap(application)
    (wrapped,) = processors(application)
    assert isinstance(wrapped, DeferringProcessor)
    assert wrapped.next is captured
    end_one(rig, seam, kit)
    (span,) = captured.wait_for(1)
    assert span.attributes["melodi.energy.total"] == 30.0


def test_late_processor_is_wrapped(rig: Any, kit: Any, seam: TracerSeam, application: TracerProvider) -> None:
    """A processor that the application adds later is wrapped too; one that never sees ended spans is not."""

    class StartsOnly(SpanProcessor):
        pass

    seam.tracer()
    captured, starts = CapturedSpans(), StartsOnly()
    application.add_span_processor(captured)
    application.add_span_processor(starts)
    first, second = processors(application)
    assert isinstance(first, DeferringProcessor)
    assert second is starts
    end_one(rig, seam, kit)
    assert captured.wait_for(1)[0].attributes["melodi.energy.total"] == 30.0


def test_each_exporter_gets_the_joules_once(rig: Any, kit: Any, seam: TracerSeam, application: TracerProvider) -> None:
    """Two exporters get the span once each, both with joules."""
    first, second = CapturedSpans(), CapturedSpans()
    application.add_span_processor(first)
    application.add_span_processor(second)
    end_one(rig, seam, kit)
    for captured in (first, second):
        (span,) = captured.wait_for(1)
        assert span.attributes["melodi.energy.total"] == 30.0
        assert len(captured.ended) == 1


def test_unwrap_restores(rig: Any, seam: TracerSeam, application: TracerProvider) -> None:
    """Unwrapping leaves the provider as it was found, forwards what waits, and shuts nothing of the application down."""
    early, late = CapturedSpans(), CapturedSpans()
    application.add_span_processor(early)
    seam.tracer()
    application.add_span_processor(late)
    span = seam.tracer().start_span("waiting")
    rig.deferral.register(span.get_span_context().span_id, Entry(Future()))
    span.end()
    seam.unwrap()
    assert processors(application) == (early, late)
    assert "add_span_processor" not in vars(application._active_span_processor)
    assert early.ended[0].attributes["melodi.energy.reason"] == "shutdown"
    assert early.shutdowns == 0
    application.get_tracer("app").start_span("after").end()
    assert [s.name for s in early.ended] == ["waiting", "after"]


def test_provider_set_later(
    rig: Any, kit: Any, seam: TracerSeam, set_global: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a provider spans are no-ops and one line says which variable sends them; one that comes later is used."""
    caplog.set_level(logging.INFO, "melodi_otel")
    assert not seam.tracer().start_span("x").is_recording()
    assert not seam.tracer().start_span("x").is_recording()
    assert len([r for r in caplog.records if "OTEL_EXPORTER_OTLP_ENDPOINT" in r.message]) == 1
    provider = TracerProvider(shutdown_on_exit=False)
    captured = CapturedSpans()
    provider.add_span_processor(captured)
    set_global(trace, "_TRACER_PROVIDER", provider)
    end_one(rig, seam, kit)
    assert captured.wait_for(1)[0].attributes["melodi.energy.total"] == 30.0
    provider.shutdown()


def test_concurrent_processor(rig: Any, kit: Any, seam: TracerSeam, set_global: Any) -> None:
    """The SDK's other way of calling processors, from threads of its own, is wrapped as well."""
    provider = TracerProvider(active_span_processor=ConcurrentMultiSpanProcessor(2), shutdown_on_exit=False)
    captured = CapturedSpans()
    provider.add_span_processor(captured)
    set_global(trace, "_TRACER_PROVIDER", provider)
    end_one(rig, seam, kit)
    assert captured.wait_for(1)[0].attributes["melodi.energy.total"] == 30.0
    provider.shutdown()


def test_foreign_provider(rig: Any, seam: TracerSeam, set_global: Any) -> None:
    """A provider that is not the SDK's is used unwrapped."""

    class Foreign(trace.TracerProvider):
        def get_tracer(self, *args: Any, **kwargs: Any) -> trace.Tracer:
            return trace.NoOpTracer()

    set_global(trace, "_TRACER_PROVIDER", Foreign())
    assert not seam.tracer().start_span("x").is_recording()


def test_nothing_global(rig: Any) -> None:
    """A provider of our own is never set globally."""
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    seam = TracerSeam(rig.deferral, environ, RESOURCE)
    assert seam.tracer().start_span("x").is_recording()
    assert trace._TRACER_PROVIDER is None
    seam.unwrap()


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
        {"OTEL_SDK_DISABLED": "true", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:9", "OTEL_EXPORTER_OTLP_PROTOCOL": "smoke"},
        {"OTEL_TRACES_EXPORTER": "no_such_exporter"},
    ],
)
def test_no_destination(rig: Any, environ: dict[str, str]) -> None:
    """Where OTEL_* names no destination that can be used, spans are no-ops."""
    seam = TracerSeam(rig.deferral, environ, RESOURCE)
    assert not seam.tracer().start_span("x").is_recording()
    seam.unwrap()


# --- metrics ---


@pytest.fixture
def views(kit: Any) -> Views:
    books = Books("GPU-1", measured=5.0, idle=5.0)
    return Views(lambda: Snapshot(0, {"GPU-1": books}, {}, {("GPU-1", "idle", None): 5.0}, {}), lambda: kit.devices)


def application_meters(set_global: Any, **resource: str) -> tuple[MeterProvider, InMemoryMetricReader]:
    reader = InMemoryMetricReader()
    provider = MeterProvider(metric_readers=[reader], resource=Resource(resource), shutdown_on_exit=False)
    set_global(metrics_internal, "_METER_PROVIDER", provider)
    return provider, reader


def test_metrics_without_reader(views: Views) -> None:
    """Without provider and destination no instrument is made, and nothing global is set."""
    seam = MeterSeam(views, {}, RESOURCE)
    assert seam.instruments() is None
    assert metrics_internal._METER_PROVIDER is None
    seam.close()


def test_application_meters(views: Views, set_global: Any) -> None:
    """The application's provider shows our metrics, also when it is set later, with host.id where its resource lacks it."""
    seam = MeterSeam(views, {}, RESOURCE)
    assert seam.instruments() is None
    provider, reader = application_meters(set_global)
    assert seam.instruments() is not None
    (point,) = points(reader, "hw.energy")
    assert point.value == 5.0
    assert point.attributes["host.id"] == "h1"
    seam.close()
    assert not points(reader)
    provider.shutdown()


def test_host_is_said_once(views: Views, set_global: Any) -> None:
    """Where the resource names the host, series do not repeat it."""
    provider, reader = application_meters(set_global, **{"host.id": "other"})
    seam = MeterSeam(views, {}, RESOURCE)
    seam.instruments()
    (point,) = points(reader, "hw.energy")
    assert "host.id" not in point.attributes
    seam.close()
    provider.shutdown()


def test_twice_is_once(views: Views, set_global: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A second seam on the same provider, after the first was closed, uses the same instruments."""
    provider, reader = application_meters(set_global)
    for _ in range(2):
        seam = MeterSeam(views, {}, RESOURCE)
        seam.instruments()
        assert len(points(reader, "hw.energy")) == 1
        seam.close()
    assert not [r for r in caplog.records if "already" in r.message]
    provider.shutdown()


def test_api_unchanged() -> None:
    """Importing the seams leaves the API's globals alone."""
    assert trace._TRACER_PROVIDER is None
    assert isinstance(metrics.get_meter_provider(), metrics_internal._ProxyMeterProvider)
