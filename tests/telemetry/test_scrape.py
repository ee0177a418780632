"""What a scraper reads: names, labels, buckets, exemplars; one bad metric never costs the others."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.view import (
    ExplicitBucketHistogramAggregation,
    ExponentialBucketHistogramAggregation,
    View,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
from prometheus_client import REGISTRY, generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from melodi_otel.telemetry.scrape import ScrapeReader
from melodi_otel.telemetry.sdk import keeps_exemplars


@pytest.fixture
def reader() -> ScrapeReader:
    return ScrapeReader({"host.id": "h1"})


@pytest.fixture
def provider(reader: ScrapeReader) -> Iterator[MeterProvider]:
    made = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    yield made
    made.shutdown()


@pytest.fixture
def bounded(reader: ScrapeReader) -> Iterator[MeterProvider]:
    """A provider whose histograms all have whole-numbered bounds."""
    bounds = ExplicitBucketHistogramAggregation([1, 2, 100000])
    made = MeterProvider([reader], shutdown_on_exit=False, views=[View(instrument_type=Histogram, aggregation=bounds)])
    yield made
    made.shutdown()


def text(reader: ScrapeReader) -> list[str]:
    return generate_latest(reader.registry).decode().splitlines()


def traced(trace_id: int = 0xABC, span_id: int = 0xDEF) -> dict[str, Any]:
    """Arguments that record a value as that of a span, where the SDK takes them."""
    span = SpanContext(trace_id, span_id, is_remote=False, trace_flags=TraceFlags(1))
    return {"context": set_span_in_context(NonRecordingSpan(span), Context())}


def test_names_units_labels(provider: MeterProvider, reader: ScrapeReader) -> None:
    """Series wear their receiver's name and the host's id, and no scope labels."""
    meter = provider.get_meter("melodi_otel", "1")
    meter.create_counter("hw.energy", "J", "Energy.").add(2.5, {"hw.id": "GPU-1", "exclusive": True})
    meter.create_up_down_counter("hw.gpu.memory.usage", "By", "Memory.").add(5)
    meter.create_observable_gauge("hw.gpu.utilization", [lambda _: [Observation(0.5)]], unit="1", description="Busy.")
    lines = text(reader)
    assert 'hw_energy_joules_total{exclusive="true",host_id="h1",hw_id="GPU-1"} 2.5' in lines
    assert 'hw_gpu_memory_usage_bytes{host_id="h1"} 5.0' in lines
    assert 'hw_gpu_utilization_ratio{host_id="h1"} 0.5' in lines
    assert "# TYPE hw_energy_joules_total counter" in lines
    assert "# HELP hw_energy_joules_total Energy." in lines
    assert "# TYPE hw_gpu_memory_usage_bytes gauge" in lines
    assert not [line for line in lines if "scope" in line]


def test_absent_labels_stay_absent(provider: MeterProvider, reader: ScrapeReader) -> None:
    """A label that one series lacks is not invented for it."""
    counter = provider.get_meter("t").create_counter("melodi.requests", "{request}", "Requests.")
    counter.add(1, {"a": "x"})
    counter.add(2, {"a": "x", "b": "y"})
    lines = text(reader)
    assert 'melodi_requests_total{a="x",host_id="h1"} 1.0' in lines
    assert 'melodi_requests_total{a="x",b="y",host_id="h1"} 2.0' in lines


def test_buckets_are_floats(bounded: MeterProvider, reader: ScrapeReader) -> None:
    """Bounds are printed as floats, whole ones too, and buckets are cumulative."""
    histogram = bounded.get_meter("t").create_histogram("melodi.request.energy", "J", "Energy.")
    for value in (0.5, 1.0, 1.5, 3.0, 1e6):
        histogram.record(value)
    lines = text(reader)
    name = "melodi_request_energy_joules"
    assert [line for line in lines if line.startswith(name)] == [
        f'{name}_bucket{{host_id="h1",le="1.0"}} 2.0',
        f'{name}_bucket{{host_id="h1",le="2.0"}} 3.0',
        f'{name}_bucket{{host_id="h1",le="100000.0"}} 4.0',
        f'{name}_bucket{{host_id="h1",le="+Inf"}} 5.0',
        f'{name}_count{{host_id="h1"}} 5.0',
        f'{name}_sum{{host_id="h1"}} 1.000006e+06',
    ]


def test_exemplars(bounded: MeterProvider, reader: ScrapeReader) -> None:
    """A bucket shows the span of its newest value, to a second scraper too; counters show theirs.

    An SDK that keeps no exemplars shows the same series without them.
    """
    meter = bounded.get_meter("t")
    histogram = meter.create_histogram("e", "J", "E.")
    counter = meter.create_counter("n", "{request}", "N.")
    kept = keeps_exemplars(histogram)
    histogram.record(5.0, **(traced() if kept else {}))
    histogram.record(0.5)
    counter.add(1, **(traced(1, 2) if kept else {}))
    for _ in range(2):
        lines = generate_openmetrics(reader.registry).decode().splitlines()
        assert "# UNIT e_joules joules" in lines
        (bucket,) = [line for line in lines if line.startswith('e_joules_bucket{host_id="h1",le="100000.0"} 2.0')]
        (total,) = [line for line in lines if line.startswith('n_total{host_id="h1"} 1.0')]
        assert [line for line in lines if " # {" in line] == ([bucket, total] if kept else [])
        if kept:
            assert f' # {{span_id="{0xDEF:016x}",trace_id="{0xABC:032x}"}} 5.0 ' in bucket
            assert f' # {{span_id="{2:016x}",trace_id="{1:032x}"}} 1.0 ' in total


def test_openmetrics_parses(provider: MeterProvider, reader: ScrapeReader) -> None:
    """The OpenMetrics form is accepted by a strict parser."""
    meter = provider.get_meter("t")
    meter.create_counter("hw.energy", "J", "Energy.").add(1.0, {"hw.id": 'a"b\\c\nd'})
    histogram = meter.create_histogram("e", "J", "E.")
    histogram.record(3.0, **(traced() if keeps_exemplars(histogram) else {}))
    meter.create_observable_gauge("hw.gpu.utilization", [lambda _: [Observation(0.5)]], unit="1", description="B.")
    families = {f.name: f for f in text_string_to_metric_families(generate_openmetrics(reader.registry).decode())}
    assert families["hw_energy_joules"].unit == "joules"
    assert families["hw_energy_joules"].samples[0].labels["hw_id"] == 'a"b\\c\nd'
    assert families["hw_gpu_utilization_ratio"].unit == "ratio"
    assert families["e_joules"].type == "histogram"


def test_exponential_view(reader: ScrapeReader) -> None:
    """A View that chooses exponential buckets leaves the contract's bounds on the scrape, and everything else there."""
    provider = MeterProvider(
        metric_readers=[reader],
        views=[View(instrument_type=Histogram, aggregation=ExponentialBucketHistogramAggregation())],
        shutdown_on_exit=False,
    )
    meter = provider.get_meter("t")
    known = meter.create_histogram("melodi.request.energy", "J", "Energy.")
    for value in (0.0, 0.3, 3.0, 3.5, 1e7):
        known.record(value)
    meter.create_histogram("other", "s", "Other.").record(2.0)
    meter.create_counter("n", "{request}", "N.").add(1)
    samples = {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text(reader) if line[0] != "#"}
    bucket = 'melodi_request_energy_joules_bucket{host_id="h1",le="%s"}'
    assert samples[bucket % "0.1"] == 1.0
    assert samples[bucket % "0.5"] == 2.0
    assert samples[bucket % "2.0"] == 2.0
    assert samples[bucket % "5.0"] == 4.0
    assert samples[bucket % "100000.0"] == 4.0
    assert samples[bucket % "+Inf"] == 5.0
    assert samples['melodi_request_energy_joules_count{host_id="h1"}'] == 5.0
    assert samples['other_seconds_bucket{host_id="h1",le="+Inf"}'] == 1.0
    assert samples['n_total{host_id="h1"}'] == 1.0
    provider.shutdown()


def test_one_bad_metric(
    provider: MeterProvider, reader: ScrapeReader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A metric that cannot be rendered is left out and said once; the scrape goes on."""
    meter = provider.get_meter("t")
    meter.create_counter("bad", "J", "Bad.").add(1)
    meter.create_counter("good", "J", "Good.").add(1)
    render = reader._family

    def fail(metric: Any) -> Any:
        if metric.name == "bad":
            raise RuntimeError("cannot")
        return render(metric)

    monkeypatch.setattr(reader, "_family", fail)
    for _ in range(2):
        assert 'good_joules_total{host_id="h1"} 1.0' in text(reader)
    assert len([r for r in caplog.records if "bad failed" in r.message]) == 1


def test_failing_callback(provider: MeterProvider, reader: ScrapeReader) -> None:
    """A callback of somebody else that raises does not break the scrape."""

    def broken(_: CallbackOptions) -> list[Observation]:
        raise RuntimeError("broken")

    meter = provider.get_meter("t")
    meter.create_observable_gauge("broken", [broken], unit="J", description="B.")
    meter.create_counter("good", "J", "Good.").add(1)
    assert any("good_joules_total" in line for line in text(reader))


def test_own_registry(provider: MeterProvider) -> None:
    """Nothing of ours is on prometheus_client's default registry."""
    provider.get_meter("t").create_counter("hw.energy", "J", "Energy.").add(1)
    assert b"hw_energy" not in generate_latest(REGISTRY)


def test_shut_down(reader: ScrapeReader) -> None:
    """After the provider's shutdown a scrape is empty and no error."""
    provider = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    provider.get_meter("t").create_counter("n", "J", "N.").add(1)
    provider.shutdown()
    text(reader)


@pytest.mark.parametrize("render", [generate_latest, generate_openmetrics], ids=["text", "OpenMetrics"])
def test_target_info(reader: ScrapeReader, render: Any) -> None:
    """The resource is the labels of target_info, an info metric where the format knows them."""
    resource = Resource({"service.name": "s", "host.id": "h1", "slurm.task.rank": 3, "melodi.gpu.model": ("A", "B")})
    provider = MeterProvider([reader], resource=resource, shutdown_on_exit=False)
    provider.get_meter("t").create_counter("n").add(1)
    rendered = render(reader.registry).decode()
    labels = 'host_id="h1",melodi_gpu_model="[\\"A\\", \\"B\\"]",service_name="s",slurm_task_rank="3"'
    assert f"target_info{{{labels}}} 1.0" in rendered.splitlines()
    assert ("# TYPE target info" in rendered) == (render is generate_openmetrics)
    if render is generate_openmetrics:
        assert {family.name for family in text_string_to_metric_families(rendered)} == {"target", "n"}
    provider.shutdown()


def test_no_target_without_a_resource() -> None:
    """A resource that says nothing makes no series but for the labels that every series has."""
    bare = ScrapeReader()
    provider = MeterProvider([bare], resource=Resource({}), shutdown_on_exit=False)
    provider.get_meter("t").create_counter("n").add(1)
    assert not [line for line in text(bare) if "target" in line]
    provider.shutdown()
