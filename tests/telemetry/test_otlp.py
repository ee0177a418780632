"""What arrives by OTLP, asserted at the receiver."""

from __future__ import annotations

import gzip
import http.client
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.sdk.metrics import Histogram
from opentelemetry.sdk.resources import Resource

from melodi_otel.attribution.books import Books, Snapshot, Who
from melodi_otel.instrumentation.seam import Begin, End
from melodi_otel.semconv_metrics import REQUEST_ENERGY
from melodi_otel.telemetry.metrics import Views
from melodi_otel.telemetry.providers import MeterSeam
from melodi_otel.telemetry.requests import RequestCalls
from melodi_otel.telemetry.sdk import keeps_exemplars
from melodi_otel.telemetry.tracers import TracerSeam
from melodi_otel.testing.telemetry import OtlpReceiver, plain

RESOURCE = Resource({"host.id": "h1", "service.name": "svc"})


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as made:
        yield made


@pytest.fixture
def views(kit: Any) -> Views:
    books = Books("GPU-1", measured=50.0, attributed=30.0, idle=20.0)
    key = ("GPU-1", Who("m", "transformers"), "unsplit", "measured")
    snapshot = Snapshot(0, {"GPU-1": books}, {key: 30.0}, {("GPU-1", "idle", None): 20.0}, {})
    return Views(lambda: snapshot, lambda: kit.devices)


def environ_of(receiver: OtlpReceiver, protocol: str) -> dict[str, str]:
    endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
    return {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol}


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
@pytest.mark.parametrize("compression", ["none", "gzip"])
def test_request_arrives(
    rig: Any,
    kit: Any,
    views: Views,
    receiver: OtlpReceiver,
    protocol: str,
    compression: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A request's span and metrics arrive with the same joules, in the contract's buckets.

    The histogram's exemplar names the span where the SDK keeps exemplars.
    """
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", compression)
    environ = {**environ_of(receiver, protocol), "OTEL_EXPORTER_OTLP_COMPRESSION": compression}
    tracers, meters = TracerSeam(rig.deferral, environ, RESOURCE), MeterSeam(views, environ, RESOURCE)
    meters.instruments()
    calls = RequestCalls(rig.meter, "g", rig.clock, tracers.tracer, rig.deferral, [meters])
    call = calls.begin(Begin("chat", "transformers", "m", rig.clock.monotonic_ns()))
    rig.clock.advance(2.0)
    call.end(End(rig.clock.monotonic_ns(), output_tokens=10))
    rig.meter.futures[call.key].set_result([kit.share(30.0)])
    assert tracers.force_flush(20)
    meters.force_flush(20)
    (span,) = receiver.spans(1)
    found = plain(span.attributes)
    assert span.name == "chat m"
    assert found["melodi.energy.total"] == 30.0
    assert found["melodi.energy.source"] == ["nvml.energy_counter"]
    assert found["melodi.energy.schema"] == 1
    assert span.end_time_unix_nano - span.start_time_unix_nano == 2_000_000_000
    metrics = {metric.name: metric for metric in receiver.metrics(1)}
    (point,) = metrics["melodi.request.energy"].histogram.data_points
    assert point.sum == 30.0
    assert tuple(point.explicit_bounds) == REQUEST_ENERGY.bounds
    kept = keeps_exemplars(Histogram)
    found = [(exemplar.trace_id, exemplar.span_id) for exemplar in point.exemplars]
    assert found == ([(span.trace_id, span.span_id)] if kept else [])
    (energy,) = metrics["hw.energy"].sum.data_points
    assert metrics["hw.energy"].sum.is_monotonic
    assert metrics["hw.energy"].unit == "J"
    assert energy.as_double == 50.0
    assert all(r["host.id"] == "h1" and r["service.name"] == "svc" for r in receiver.resources())
    tracers.unwrap()
    meters.close()


def test_exponential_histograms(
    kit: Any, views: Views, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where OTEL_* prefers exponential histograms, ours are, bounds or not."""
    name = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
    environ = {**environ_of(receiver, "http/protobuf"), name: "base2_exponential_bucket_histogram"}
    monkeypatch.setenv(name, environ[name])  # read by the exporter itself
    meters = MeterSeam(views, environ, RESOURCE)
    meters.finished(kit.record())
    meters.close()
    metrics = {metric.name: metric for metric in receiver.metrics(1)}
    (point,) = metrics["melodi.request.energy"].exponential_histogram.data_points
    assert point.sum == 30.0


def test_shutdown_sends(rig: Any, receiver: OtlpReceiver) -> None:
    """A span that still waits when everything ends is sent, and says why it has no joules."""
    rig.wait_s = 0.01
    seam = TracerSeam(rig.deferral, environ_of(receiver, "http/protobuf"), RESOURCE)
    calls = RequestCalls(rig.meter, "g", rig.clock, seam.tracer, rig.deferral)
    calls.begin(Begin("chat", "transformers", "m", rig.clock.monotonic_ns())).end(End(rig.clock.monotonic_ns()))
    seam.unwrap()
    (span,) = receiver.spans(1)
    assert plain(span.attributes)["melodi.energy.reason"] == "shutdown"


def test_signal_endpoint(rig: Any, receiver: OtlpReceiver) -> None:
    """A signal's own endpoint is used as it stands, and alone is enough."""
    environ = {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{receiver.http_endpoint}/v1/traces",
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
    }
    seam = TracerSeam(rig.deferral, environ, RESOURCE)
    seam.tracer().start_span("plain").end()
    seam.unwrap()
    assert receiver.spans(1)[0].name == "plain"


def test_receiver_reads_chunks(receiver: OtlpReceiver) -> None:
    """The receiver itself takes chunked and gzipped bodies, as collectors send them."""
    request = trace_service_pb2.ExportTraceServiceRequest()
    request.resource_spans.add().scope_spans.add().spans.add(name="hop")
    body = gzip.compress(request.SerializeToString())
    host, port = receiver.http_endpoint.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    connection.request(
        "POST", "/v1/traces", iter([body[:7], body[7:]]), {"Content-Encoding": "gzip"}, encode_chunked=True
    )
    assert connection.getresponse().status == 200
    connection.close()
    assert receiver.spans(1)[0].name == "hop"
