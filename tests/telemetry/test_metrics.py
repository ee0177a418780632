"""Instruments show the books, the requests and the meters, and nothing that is not known."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.resources import Resource

from melodi_otel import semconv_metrics as metrics
from melodi_otel.attribution.books import Books, Snapshot, Who
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.attribution.summary import unavailable
from melodi_otel.telemetry import sdk
from melodi_otel.telemetry.deferral import SpanCounts
from melodi_otel.telemetry.metrics import Configured, Hardware, Instruments, Views
from melodi_otel.testing.telemetry import points

WHO = Who("m", "transformers", "svc", None, (("tenant", "t1"),))
SNAPSHOT = Snapshot(
    t_ns=0,
    books={
        "GPU-1": Books("GPU-1", measured=100.0, attributed=50.0, in_flight=10.0, idle=38.0, residual=2.0),
        "psys": Books("psys", measured=400.0, idle=400.0),
    },
    attributed={("GPU-1", WHO, "decode", "measured"): 60.0},
    unattributed={("GPU-1", "idle", ("svc", "m")): 38.0, ("psys", "idle", None): 400.0},
    active={WHO: 2},
)


@pytest.fixture
def views(kit: Any) -> Views:
    return Views(
        snapshot=lambda: SNAPSHOT,
        devices=lambda: kit.devices,
        hardware=lambda: Hardware(
            watts={"GPU-1": 250.0, "psys": 480.0},
            utilization={"GPU-1": 0.5},
            memory_bytes={"GPU-1": 1 << 30},
            sample_age_s={"GPU-1": 0.1},
            up={("nvml", "GPU-1"): True, ("rapl", None): False},
            self_joules=1.5,
        ),
        spans=lambda: SpanCounts(3, {"measured": 7, "late": 1}),
        configured=lambda: Configured(pue=1.2, energy_budget=(("*", 500.0), ("big", 900.0))),
        metric_labels=("tenant",),
        identity={"service.name": "svc"},
    )


@pytest.fixture
def reader() -> Iterator[InMemoryMetricReader]:
    yield InMemoryMetricReader()


@pytest.fixture
def provider(reader: InMemoryMetricReader) -> Iterator[MeterProvider]:
    made = MeterProvider(metric_readers=[reader], shutdown_on_exit=False)
    yield made
    made.shutdown()


@pytest.fixture
def record(kit: Any) -> RequestRecord:
    return kit.record(labels={"tenant": "t1", "user": "u1"})


def one(reader: InMemoryMetricReader, name: str) -> tuple[float, dict[str, Any]]:
    (point,) = points(reader, name)
    return point.value, point.attributes


def test_books_are_shown(provider: MeterProvider, reader: InMemoryMetricReader, views: Views) -> None:
    """The books appear with device, model, phase and holder; a whole-host meter only as hw.host.energy."""
    Instruments(provider.get_meter("t"), views)
    gpu = {"hw.id": "GPU-1", "hw.type": "gpu"}
    assert one(reader, "hw.energy") == (100.0, {**gpu, "hw.name": "A card"})
    assert one(reader, "hw.host.energy") == (400.0, {"hw.id": "psys"})
    assert one(reader, "melodi.energy.attributed") == (
        60.0,
        {
            **gpu,
            "gen_ai.request.model": "m",
            "gen_ai.provider.name": "transformers",
            "service.name": "svc",
            "tenant": "t1",
            "melodi.energy.phase": "decode",
            "melodi.energy.quality": "measured",
        },
    )
    assert one(reader, "melodi.energy.unattributed") == (
        38.0,
        {
            **gpu,
            "melodi.energy.bucket": "idle",
            "melodi.energy.holder.service": "svc",
            "melodi.energy.holder.model": "m",
        },
    )
    assert one(reader, "melodi.energy.residual") == (2.0, {"hw.id": "GPU-1"})
    assert one(reader, "melodi.energy.in_flight") == (10.0, {"hw.id": "GPU-1"})
    assert one(reader, "melodi.requests.active")[0] == 2.0


def test_meters_are_shown(provider: MeterProvider, reader: InMemoryMetricReader, views: Views) -> None:
    """What the meters show appears; a source that is down is 0, a gauge that is not set is absent."""
    Instruments(provider.get_meter("t"), views)
    assert one(reader, "hw.power")[0] == 250.0
    assert one(reader, "hw.host.power")[0] == 480.0
    assert one(reader, "hw.gpu.utilization")[0] == 0.5
    assert one(reader, "hw.gpu.memory.usage")[0] == float(1 << 30)
    assert one(reader, "melodi.energy.sample.age") == (0.1, {"hw.id": "GPU-1"})
    assert one(reader, "melodi.self.energy") == (1.5, {})
    assert one(reader, "melodi.span.deferred") == (3.0, {})
    assert one(reader, "melodi.energy.pue") == (1.2, {})
    assert {p.attributes.get("gen_ai.request.model"): p.value for p in points(reader, "melodi.energy.budget")} == {
        None: 500.0,
        "big": 900.0,
    }
    assert {(p.attributes["melodi.source.name"], p.value) for p in points(reader, "melodi.source.up")} == {
        ("nvml", 1.0),
        ("rapl", 0.0),
    }
    assert {p.attributes["melodi.span.outcome"]: p.value for p in points(reader, "melodi.span.settled")} == {
        "measured": 7.0,
        "late": 1.0,
    }
    seen = {p.name for p in points(reader)}
    assert "melodi.carbon.intensity" not in seen
    assert "melodi.energy.price" not in seen


@pytest.mark.parametrize(
    ("model", "tokens", "over"), [("m", 10, 1.0), ("m", 100, 0.0), ("big", 60, 0.0), ("big", 50, 1.0)]
)
def test_requests_over_their_budget_are_counted(
    provider: MeterProvider, reader: InMemoryMetricReader, views: Views, kit: Any, model: str, tokens: int, over: float
) -> None:
    """A request of 50 J against 500 J per 1,000 tokens, or the 900 J of its own model; a first one within it shows as 0."""
    made = kit.record(model=model, output_tokens=tokens)
    made = replace(made, energy=replace(made.energy, total=50.0))
    Instruments(provider.get_meter("t"), views).finished(made)
    value, attributes = one(reader, "melodi.requests.over_budget")
    assert value == over
    assert attributes["gen_ai.request.model"] == model


@pytest.mark.parametrize("budget", [(), (("other", 1.0),)])
def test_without_a_budget_nobody_is_over_it(
    provider: MeterProvider,
    reader: InMemoryMetricReader,
    views: Views,
    record: RequestRecord,
    budget: tuple[tuple[str, float], ...],
) -> None:
    views = replace(views, configured=lambda: Configured(energy_budget=budget))
    Instruments(provider.get_meter("t"), views).finished(record)
    assert points(reader, "melodi.requests.over_budget") == []


def test_requests_are_recorded(
    provider: MeterProvider, reader: InMemoryMetricReader, views: Views, record: RequestRecord
) -> None:
    """A finished request is counted once everywhere, with the exemplar of its span where the SDK keeps exemplars."""
    Instruments(provider.get_meter("t"), views).finished(record)
    call = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "transformers", "gen_ai.request.model": "m"}
    (energy,) = points(reader, "melodi.request.energy")
    assert energy.value == 30.0
    assert energy.attributes == {**call, "melodi.energy.scope": "gpu", "melodi.energy.quality": "measured"}
    kept = sdk.keeps_exemplars(Histogram)
    found = [(exemplar.trace_id, exemplar.span_id, exemplar.value) for exemplar in sdk.exemplars(energy.data)]
    assert found == ([(0xABC, 0xDEF, 30.0)] if kept else [])


def test_bounds_on_the_applications_provider(
    provider: MeterProvider, reader: InMemoryMetricReader, views: Views, record: RequestRecord
) -> None:
    """The contract's buckets where the SDK takes advice; before that, the SDK's default ones."""
    meter = provider.get_meter("t")
    Instruments(meter, views).finished(record)
    meter.create_histogram("other").record(1.0)
    (energy,), (other,) = points(reader, "melodi.request.energy"), points(reader, "other")
    expected = metrics.REQUEST_ENERGY.bounds if sdk.takes_advice(meter) else other.data.explicit_bounds
    assert tuple(energy.data.explicit_bounds) == tuple(expected or ())


def test_bounds_on_our_own_provider(reader: InMemoryMetricReader, views: Views, record: RequestRecord) -> None:
    """A provider of ours has the contract's buckets for every histogram, whatever the SDK."""
    own = sdk.meter_provider([reader], Resource({}), shutdown_on_exit=False)
    instruments = Instruments(own.get_meter("t"), views)
    instruments.finished(record)
    instruments.sampled(0.001)
    found = {p.name: p.data.explicit_bounds for p in points(reader) if hasattr(p.data, "explicit_bounds")}
    assert {name: tuple(bounds) for name, bounds in found.items()} == {
        metric.name: metric.bounds for metric in metrics.METRICS.values() if metric.kind == "histogram"
    }
    own.shutdown()


def test_requests_are_recorded_elsewhere(
    provider: MeterProvider, reader: InMemoryMetricReader, views: Views, record: RequestRecord
) -> None:
    """Tokens, durations and the request counter follow the record; only configured labels are carried."""
    Instruments(provider.get_meter("t"), views).finished(record)
    found = {(p.name, p.attributes.get("gen_ai.token.type")): p for p in points(reader)}
    assert found["gen_ai.client.token.usage", "input"].value == 12.0
    assert found["gen_ai.client.token.usage", "output"].value == 11.0
    assert found["gen_ai.client.operation.duration", None].value == 3.0
    assert found["gen_ai.server.time_to_first_token", None].value == 1.0
    assert found["gen_ai.server.time_per_output_token", None].value == 0.2
    requests = found["melodi.requests", None]
    assert requests.value == 1.0
    assert requests.attributes["melodi.request.outcome"] == "stop"
    assert requests.attributes["tenant"] == "t1"
    assert requests.attributes["service.name"] == "svc"
    assert "user" not in requests.attributes


def test_unknown_is_not_observed(
    provider: MeterProvider, reader: InMemoryMetricReader, views: Views, record: RequestRecord
) -> None:
    """A request without joules or counts is counted, and appears in no histogram of what is not known."""
    unknown = replace(
        record,
        energy=unavailable("no_source"),
        prompt_tokens=None,
        output_tokens=None,
        first_token_ns=None,
        outcome="abort",
    )
    Instruments(provider.get_meter("t"), views).finished(unknown)
    seen = {p.name for p in points(reader)}
    assert "melodi.requests" in seen
    assert not seen & {
        "melodi.request.energy",
        "gen_ai.client.token.usage",
        "gen_ai.server.time_to_first_token",
        "gen_ai.server.time_per_output_token",
    }


def test_measured_blocks_are_no_requests(
    provider: MeterProvider, reader: InMemoryMetricReader, views: Views, record: RequestRecord
) -> None:
    """A measured block of code, which contains requests, is not counted as one."""
    Instruments(provider.get_meter("t"), views).finished(replace(record, kind="measure"))
    assert not points(reader, "melodi.requests")


def test_not_the_publisher(provider: MeterProvider, reader: InMemoryMetricReader, views: Views) -> None:
    """Who does not publish for the host emits no hw.*, no unattributed and no residual."""
    instruments = Instruments(provider.get_meter("t"), replace(views, publisher=lambda: False))
    instruments.sampled(0.001)
    seen = {p.name for p in points(reader)}
    assert seen
    assert not seen & {m.name for m in metrics.METRICS.values() if m.publisher}


def test_everything_fits_the_contract(
    provider: MeterProvider, reader: InMemoryMetricReader, views: Views, record: RequestRecord
) -> None:
    """Every series that is shown has a name, unit and attributes of the contract, the required ones always."""
    instruments = Instruments(provider.get_meter("t"), views)
    instruments.finished(record)
    instruments.sampled(0.002)
    found = points(reader)
    assert len({p.name for p in found}) >= 20
    for point in found:
        metric = metrics.METRICS[point.name]
        allowed = {*metric.required, *metric.optional, *(("tenant",) if metric.labelled else ())}
        assert set(metric.required) <= set(point.attributes) <= allowed, point.name


def test_failing_view(
    provider: MeterProvider, reader: InMemoryMetricReader, views: Views, caplog: pytest.LogCaptureFixture
) -> None:
    """A view that fails leaves its metrics out, says so once, and disturbs no other."""

    def broken() -> Hardware:
        raise RuntimeError("broken")

    Instruments(provider.get_meter("t"), replace(views, hardware=broken))
    assert points(reader, "hw.energy")
    assert not points(reader, "hw.power")
    assert len([r for r in caplog.records if "hw.power" in r.message]) == 1


def test_rebind(provider: MeterProvider, reader: InMemoryMetricReader, views: Views, record: RequestRecord) -> None:
    """Instruments that were unbound show and count nothing; bound again, they are the same series."""
    instruments = Instruments(provider.get_meter("t"), views)
    instruments.rebind(None)
    instruments.finished(record)
    assert not points(reader)
    instruments.rebind(views)
    instruments.finished(record)
    assert one(reader, "melodi.requests")[0] == 1.0
    assert one(reader, "hw.energy")[0] == 100.0


def test_constant_attributes(
    provider: MeterProvider, reader: InMemoryMetricReader, views: Views, record: RequestRecord
) -> None:
    """Constant attributes such as host.id stand on every series."""
    instruments = Instruments(provider.get_meter("t"), replace(views, constant={"host.id": "h"}))
    instruments.finished(record)
    instruments.sampled(0.001)
    assert {p.attributes.get("host.id") for p in points(reader)} == {"h"}


def test_label_limit(
    provider: MeterProvider, reader: InMemoryMetricReader, views: Views, record: RequestRecord
) -> None:
    """Labels of the request counter pass through the limit, where there is one."""
    clipped = replace(views, clip=lambda labels: (("tenant", "other"),))
    Instruments(provider.get_meter("t"), clipped).finished(record)
    assert one(reader, "melodi.requests")[1]["tenant"] == "other"


@pytest.mark.parametrize("publisher", [True, False])
def test_emissions_where_the_intensity_is_live(
    views: Views, provider: MeterProvider, reader: InMemoryMetricReader, publisher: bool
) -> None:
    """The gauge is what is told live, not what is configured; grams are told by the host's publisher alone."""
    live = replace(
        views,
        hardware=lambda: Hardware(intensity=120.0, emissions=3.5),
        configured=lambda: Configured(carbon_intensity=400.0),
        publisher=lambda: publisher,
    )
    Instruments(provider.get_meter("t"), live)
    assert one(reader, "melodi.carbon.intensity")[0] == 120.0
    assert [point.value for point in points(reader, "melodi.carbon.emissions")] == ([3.5] if publisher else [])


def test_exported_spans_are_counted_by_outcome(
    views: Views, provider: MeterProvider, reader: InMemoryMetricReader
) -> None:
    """Both outcomes of an exporter of ours; nothing where there is none."""
    counts = [SpanCounts(0, {}, {"sent": 5, "failed": 0})]
    Instruments(provider.get_meter("t"), replace(views, spans=lambda: counts[0]))
    found = points(reader, "melodi.span.exported")
    assert {point.attributes["melodi.span.export.outcome"]: point.value for point in found} == {"sent": 5, "failed": 0}
    counts[0] = SpanCounts(0, {})
    assert points(reader, "melodi.span.exported") == []
