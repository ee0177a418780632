"""From a bucket of joules to the trace: whose span an exemplar names, on the page and on the application's provider."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, Tracer, use_span
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from melodi_otel.attribution.books import Snapshot
from melodi_otel.instrumentation.seam import Begin, End
from melodi_otel.telemetry.metrics import Views
from melodi_otel.telemetry.providers import MeterSeam, ScrapePipeline
from melodi_otel.telemetry.requests import RequestCalls
from melodi_otel.telemetry.sdk import keeps_exemplars
from melodi_otel.testing.telemetry import points

pytestmark = pytest.mark.skipif(not keeps_exemplars(Histogram), reason="this SDK keeps no exemplars")


class Foreign:
    """A tracer provider of another make: its spans have ids and nothing that can be read."""

    def get_tracer(self, *_: Any, **__: Any) -> Any:
        return self

    def start_span(self, *_: Any, **__: Any) -> Any:
        return NonRecordingSpan(SpanContext(0xF00, 0xBA5, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED)))


class Roads:
    """The page and an application's meter provider, both told of the same requests."""

    def __init__(self, rig: Any, kit: Any) -> None:
        views = Views(lambda: Snapshot(0, {}, {}, {}, {}), lambda: kit.devices)
        self._rig, self._kit = rig, kit
        self.pipeline = ScrapePipeline(views, Resource({"host.id": "h1"}))
        self.reader = InMemoryMetricReader()
        self.provider = MeterProvider([self.reader], shutdown_on_exit=False)
        self.seam = MeterSeam(views, {}, Resource({}), self.provider)
        self.seam.instruments()

    def request(self, tracer: Tracer, joules: float, *, settle: bool = True) -> Any:
        """One request, made on this thread; its future where it is not settled."""
        rig = self._rig
        calls = RequestCalls(
            rig.meter, "g", rig.clock, lambda: tracer, rig.deferral, [self.pipeline.instruments, self.seam]
        )
        call = calls.begin(Begin("chat", "transformers", "m", rig.clock.monotonic_ns()))
        rig.clock.advance(2.0)
        call.end(End(rig.clock.monotonic_ns(), output_tokens=10))
        future = rig.meter.futures[call.key]
        if settle:
            future.set_result([self._kit.share(joules)])
        return future

    def told(self) -> list[set[tuple[int, float]]]:
        """(trace id, joules) of every exemplar of the joule histogram: on the page, and on the application's provider."""
        families = {f.name: f for f in text_string_to_metric_families(generate_latest(self.pipeline.registry).decode())}
        page = {
            (int(sample.exemplar.labels["trace_id"], 16), sample.exemplar.value)
            for sample in families["melodi_request_energy_joules"].samples
            if sample.exemplar is not None
        }
        otlp = {
            (exemplar.trace_id or 0, exemplar.value)
            for point in points(self.reader, "melodi.request.energy")
            for exemplar in point.data.exemplars
        }
        return [page, otlp]


@pytest.fixture
def make(rig: Any, kit: Any) -> Iterator[Callable[[], Roads]]:
    made: list[Roads] = []

    def roads() -> Roads:
        made.append(Roads(rig, kit))
        return made[-1]

    yield roads
    for one in made:
        one.seam.close()
        one.pipeline.close()
        one.provider.shutdown()


def test_the_requests_own_span(make: Callable[[], Roads], rig: Any) -> None:
    """The exemplar is the request's span and no other, whatever span is current where its joules arrive."""
    roads = make()
    future = roads.request(rig.tracer, 3.0, settle=False)
    with rig.tracer.start_as_current_span("somebody else's"):
        future.set_result([roads._kit.share(3.0)])
    rig.processor.pump()
    (span,) = [span for span in rig.captured.ended if span.name == "chat m"]
    assert roads.told() == [{(span.context.trace_id, 3.0)}] * 2


def test_later_than_the_span(make: Callable[[], Roads], rig: Any) -> None:
    """A span that was sent without its joules is still what the exemplar names when they come."""
    roads = make()
    future = roads.request(rig.tracer, 3.0, settle=False)
    rig.clock.advance(rig.wait_s + 1.0)
    rig.processor.pump()
    (span,) = rig.captured.wait_for(1)
    assert span.attributes["melodi.energy.reason"] == "late"
    future.set_result([roads._kit.share(3.0)])
    assert roads.told() == [{(span.context.trace_id, 3.0)}] * 2


def test_left_out_by_head_sampling(make: Callable[[], Roads], rig: Any) -> None:
    """A request whose span was not sampled is counted and has no exemplar, also inside a sampled span of others."""
    roads = make()
    unsampled = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    with use_span(rig.tracer.start_span("server")):
        roads.request(unsampled.get_tracer("t"), 3.0)
    unsampled.shutdown()
    assert roads.told() == [set(), set()]
    (point,) = points(roads.reader, "melodi.request.energy")
    assert point.data.count == 1


def test_a_provider_of_another_make(make: Callable[[], Roads]) -> None:
    """Spans of a tracer that is not the SDK's are named as well: their ids are all that an exemplar needs."""
    roads = make()
    roads.request(Foreign().get_tracer(), 3.0)
    assert roads.told() == [{(0xF00, 3.0)}] * 2


def test_always_off(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Roads], rig: Any) -> None:
    """OTEL_METRICS_EXEMPLAR_FILTER=always_off: no exemplar anywhere."""
    monkeypatch.setenv("OTEL_METRICS_EXEMPLAR_FILTER", "always_off")
    roads = make()
    roads.request(rig.tracer, 3.0)
    assert roads.told() == [set(), set()]


def test_always_on(monkeypatch: pytest.MonkeyPatch, make: Callable[[], Roads], rig: Any) -> None:
    """OTEL_METRICS_EXEMPLAR_FILTER=always_on: a request without a span has one by OTLP, and none that leads nowhere on the
    page.
    """
    monkeypatch.setenv("OTEL_METRICS_EXEMPLAR_FILTER", "always_on")
    roads = make()
    unsampled = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    roads.request(unsampled.get_tracer("t"), 3.0)
    unsampled.shutdown()
    assert roads.told() == [set(), {(0, 3.0)}]


def test_openmetrics_limit(make: Callable[[], Roads], rig: Any) -> None:
    """The labels of an exemplar have at most 128 characters together, names included."""
    roads = make()
    roads.request(rig.tracer, 3.0)
    lines = generate_latest(roads.pipeline.registry).decode().splitlines()
    (line,) = [line for line in lines if line.startswith("melodi_request_energy") and " # {" in line]
    labels = line.partition(" # {")[2].partition("}")[0]
    assert len(labels.replace('"', "").replace("=", "").replace(",", "")) <= 128
    assert "trace_id" in labels
