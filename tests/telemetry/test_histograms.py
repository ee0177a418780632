"""Exponential histograms and delta temporality by the standard variables: the page and OTLP agree, and sums stay sums."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.metrics.view import ExponentialBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from melodi_otel.attribution.books import Books, Snapshot, Who
from melodi_otel.attribution.summary import summarize
from melodi_otel.semconv_metrics import METRICS, prometheus_name
from melodi_otel.telemetry.metrics import Views
from melodi_otel.telemetry.providers import MeterSeam, ScrapePipeline
from melodi_otel.telemetry.sdk import keeps_exemplars
from melodi_otel.testing.telemetry import OtlpReceiver, points

RESOURCE = Resource({"host.id": "h1"})
AGGREGATION = "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION"
TEMPORALITY = "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE"
JOULES = (0.0, 0.004, 0.1, 0.3, 5.0, 5.0, 17.0, 2_000_000.0)
HISTOGRAMS = {metric.name: metric for metric in METRICS.values() if metric.kind == "histogram"}


class Growing:
    """Books that grow, with a correction downwards on the way."""

    def __init__(self) -> None:
        self.rounds = 0

    def __call__(self) -> Snapshot:
        n = float(self.rounds)
        who = Who("m", "transformers", labels=(("tenant", "t1"),))
        corrected = 5.0 * n - (6.0 if self.rounds == 2 else 0.0)
        attributed = {("GPU-1", who, "decode", "measured"): 30.0 * n, ("GPU-1", who, "static", "measured"): corrected}
        books = Books("GPU-1", 50.0 * n, math.fsum(attributed.values()), idle=50.0 * n - 30.0 * n - corrected)
        return Snapshot(0, {"GPU-1": books}, attributed, {("GPU-1", "idle", None): books.idle}, {})  # type: ignore[arg-type]


@pytest.fixture
def growing() -> Growing:
    return Growing()


@pytest.fixture
def views(kit: Any, growing: Growing) -> Views:
    return Views(growing, lambda: kit.devices)


@pytest.fixture
def pipeline(views: Views) -> Iterator[ScrapePipeline]:
    made = ScrapePipeline(views, RESOURCE)
    yield made
    made.close()


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as made:
        yield made


@pytest.fixture
def requests(kit: Any) -> list[Any]:
    return [
        kit.record(energy=summarize([kit.share(joules)], kit.devices), trace_id=n + 1)
        for n, joules in enumerate(JOULES)
    ]


def page(pipeline: ScrapePipeline) -> dict[str, dict[str, float]]:
    """By metric of the contract, the count and sum over all its series on the page, which a strict parser reads."""
    families = {f.name: f for f in text_string_to_metric_families(generate_openmetrics(pipeline.registry).decode())}
    found: dict[str, dict[str, float]] = {}
    for name, metric in HISTOGRAMS.items():
        family = families.get(prometheus_name(metric).removesuffix("_bucket"))
        if family is not None:
            bounds = {float(s.labels["le"]) for s in family.samples if s.name.endswith("_bucket")}
            assert bounds == {*(metric.bounds or ()), math.inf}, name
            found[name] = {
                end: math.fsum(s.value for s in family.samples if s.name.endswith(f"_{end}"))
                for end in ("count", "sum")
            }
    return found


def by_environment(views: Views, receiver: OtlpReceiver) -> tuple[MeterSeam, Callable[[], None]]:
    """A provider of our own, as OTEL_* asks for."""
    environ = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.http_endpoint,
        "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        AGGREGATION: "base2_exponential_bucket_histogram",
    }
    seam = MeterSeam(views, environ, RESOURCE)
    return seam, seam.close


def by_application(views: Views, receiver: OtlpReceiver) -> tuple[MeterSeam, Callable[[], None]]:
    """The application's provider with its own OTLP exporter, which reads the variables itself."""
    exporter = OTLPMetricExporter(endpoint=f"{receiver.http_endpoint}/v1/metrics")
    provider = MeterProvider([PeriodicExportingMetricReader(exporter)], shutdown_on_exit=False)
    seam = MeterSeam(views, {}, RESOURCE, provider)

    def close() -> None:
        provider.shutdown()
        seam.close()

    return seam, close


@pytest.mark.parametrize("way", [by_environment, by_application])
def test_exponential_by_otlp_and_the_page_at_once(
    views: Views,
    pipeline: ScrapePipeline,
    receiver: OtlpReceiver,
    requests: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    way: Any,
) -> None:
    """With the standard variable every histogram is exponential by OTLP, whatever bounds were advised, while the page has
    the contract's bounds; both tell the same counts and sums of the same requests. Exemplars lead to the spans.
    """
    monkeypatch.setenv(AGGREGATION, "base2_exponential_bucket_histogram")
    seam, close = way(views, receiver)
    seam.instruments()
    for record in requests:
        pipeline.instruments.finished(record)
        seam.finished(record)
    pipeline.instruments.sampled(0.001)
    seam.sampled(0.001)
    shown = page(pipeline)
    close()
    received = {metric.name: metric for metric in receiver.metrics(1) if metric.name in HISTOGRAMS}
    assert set(received) == set(HISTOGRAMS) == set(shown)
    for name, metric in received.items():
        assert metric.WhichOneof("data") == "exponential_histogram", name
        told = metric.exponential_histogram.data_points
        assert sum(point.count for point in told) == shown[name]["count"], name
        assert math.fsum(point.sum for point in told) == pytest.approx(shown[name]["sum"], rel=1e-9), name
    energy = received["melodi.request.energy"].exponential_histogram.data_points
    assert sum(point.count for point in energy) == len(JOULES)
    traces = {int.from_bytes(exemplar.trace_id, "big") for point in energy for exemplar in point.exemplars}
    assert traces <= {record.trace_id for record in requests}
    assert bool(traces) is keeps_exemplars(Histogram)


def test_exponential_by_a_view_of_the_application(views: Views, pipeline: ScrapePipeline, requests: list[Any]) -> None:
    """A View that an application sets for our instruments holds on its provider and changes nothing on our page."""
    reader = InMemoryMetricReader()
    view = View(instrument_name="melodi.request.energy", aggregation=ExponentialBucketHistogramAggregation(max_size=20))
    provider = MeterProvider([reader], views=[view], shutdown_on_exit=False)
    seam = MeterSeam(views, {}, RESOURCE, provider)
    seam.instruments()
    for record in requests:
        pipeline.instruments.finished(record)
        seam.finished(record)
    found = points(reader)
    (energy,) = [point for point in found if point.name == "melodi.request.energy"]
    assert not hasattr(energy.data, "explicit_bounds")
    assert len(energy.data.positive.bucket_counts) <= 20
    assert (energy.data.count, energy.value) == (len(JOULES), math.fsum(JOULES))
    assert any(hasattr(point.data, "explicit_bounds") for point in found if point.name == "gen_ai.client.token.usage")
    assert page(pipeline)["melodi.request.energy"] == {"count": len(JOULES), "sum": math.fsum(JOULES)}
    provider.shutdown()
    seam.close()


def test_the_text_form_of_the_page(
    pipeline: ScrapePipeline, requests: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page is scraped in Prometheus's older form as well while the variable is set."""
    monkeypatch.setenv(AGGREGATION, "base2_exponential_bucket_histogram")
    for record in requests:
        pipeline.instruments.finished(record)
    lines = generate_latest(pipeline.registry).decode().splitlines()
    (count,) = [line for line in lines if line.startswith("melodi_request_energy_joules_count{")]
    assert float(count.rpartition(" ")[2]) == len(JOULES)


def test_delta_sums_are_the_books(
    growing: Growing,
    views: Views,
    pipeline: ScrapePipeline,
    receiver: OtlpReceiver,
    requests: list[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With delta temporality, what was sent so far adds up to the page after every export, and the books close there;
    nothing negative is ever sent for a counter.
    """
    monkeypatch.setenv(TEMPORALITY, "delta")
    seam, close = by_environment(views, receiver)
    seam.instruments()
    # The exporter's thread would export in a minute: here every export is asked for.
    for growing.rounds in range(5):
        for record in requests:
            pipeline.instruments.finished(record)
            seam.finished(record)
        seam.force_flush(20.0)
        sent: dict[str, list[float]] = defaultdict(list)
        for metric in receiver.metrics(1):
            kind = metric.WhichOneof("data")
            if kind == "sum" and metric.sum.is_monotonic:
                assert metric.sum.aggregation_temporality == 1, metric.name  # delta
                values = [point.as_double or float(point.as_int) for point in metric.sum.data_points]
                assert min(values, default=0.0) >= 0.0, metric.name
                sent[metric.name] += values
            elif kind == "sum":
                assert metric.sum.aggregation_temporality == 2, metric.name  # up and down: cumulative, also here
                sent[metric.name] = [point.as_double or float(point.as_int) for point in metric.sum.data_points]
            elif kind == "histogram":
                assert metric.histogram.aggregation_temporality == 1
                sent[metric.name] += [point.sum for point in metric.histogram.data_points]
        total = {name: math.fsum(values) for name, values in sent.items()}
        booked = (
            total["melodi.energy.attributed"] + total["melodi.energy.unattributed"] + total["melodi.energy.residual"]
        )
        assert booked == pytest.approx(total["hw.energy"], rel=1e-9)
        assert total["hw.energy"] == 50.0 * growing.rounds
        assert total["melodi.requests"] == len(JOULES) * (growing.rounds + 1)
        shown = page(pipeline)
        assert total["melodi.request.energy"] == pytest.approx(shown["melodi.request.energy"]["sum"], rel=1e-9)
    close()
