"""Names agree with the types they name, and with what a scraper sees."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from melodi_otel import semconv
from melodi_otel import semconv_metrics as metrics
from melodi_otel.attribution import books, meter, summary
from melodi_otel.semconv_metrics import prometheus_name, scraped


@pytest.mark.parametrize(
    ("listed", "typed"),
    [
        (semconv.METHODS, get_args(meter.Tier)),
        (semconv.QUALITIES, get_args(meter.Quality)),
        (semconv.REASONS, get_args(meter.Reason)),
        (semconv.OUTCOMES, get_args(meter.Outcome)),
        (semconv.BUCKETS, books.BUCKETS),
        (semconv.PHASES, get_args(books.Phase)),
    ],
)
def test_lists_agree(listed: tuple[str, ...], typed: tuple[str, ...]) -> None:
    """A closed list of values holds exactly the values of its type."""
    assert set(listed) == set(typed)
    assert len(listed) == len(set(listed))


def test_orders_agree() -> None:
    """Methods and qualities stand in the order by which summaries choose the worst."""
    assert semconv.METHODS == summary.TIERS
    assert semconv.QUALITIES == summary.QUALITIES


def test_span_attributes_complete() -> None:
    """Every span attribute of the contract is described, once."""
    contract = (
        "total gpu cpu memory dynamic static prefill decode per_output_token method source scope quality uncertainty "
        "coverage concurrency exclusive devices reason rollup schema"
    )
    assert [a.name for a in semconv.SPAN_ATTRIBUTES] == [
        a.name for a in semconv.SPAN_ATTRIBUTES if a.name.startswith("melodi.energy.")
    ]
    assert {a.name for a in semconv.SPAN_ATTRIBUTES} == {f"melodi.energy.{name}" for name in contract.split()}
    assert len(semconv.SPAN_ATTRIBUTES) == 21


def test_metrics_are_well_formed() -> None:
    """Units are those that read the same on every road, and histograms alone have bounds, which are rising floats."""
    for metric in metrics.METRICS.values():
        assert metric.unit in {"J", "W", "s", "By", "g", "1"} or re.fullmatch(r"\{\w+\}", metric.unit), metric.name
        assert metric.description.strip(), metric.name
        assert (metric.bounds is not None) == (metric.kind == "histogram"), metric.name
        for low, high in zip(metric.bounds or (), (metric.bounds or ())[1:], strict=False):
            assert isinstance(low, float)
            assert low < high


def test_metric_attributes_are_described() -> None:
    """Every attribute that a metric carries is described somewhere."""
    described = {
        a.name
        for group in (semconv.SPAN_ATTRIBUTES, semconv.GEN_AI_ATTRIBUTES, semconv.METRIC_ATTRIBUTES)
        for a in group
    }
    for metric in metrics.METRICS.values():
        assert {*metric.required, *metric.optional} <= described, metric.name


def test_request_energy_bounds() -> None:
    """A request's joules fall into 1-2-5 buckets from 0.1 J to 100,000 J."""
    bounds = metrics.REQUEST_ENERGY.bounds
    assert bounds is not None
    assert bounds[:5] == (0.1, 0.2, 0.5, 1.0, 2.0)
    assert bounds[-2:] == (50_000.0, 100_000.0)
    assert len(bounds) == 19


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hw.energy", "hw_energy_joules_total"),
        ("hw.power", "hw_power_watts"),
        ("hw.gpu.utilization", "hw_gpu_utilization_ratio"),
        ("hw.gpu.memory.usage", "hw_gpu_memory_usage_bytes"),
        ("melodi.request.energy", "melodi_request_energy_joules_bucket"),
        ("melodi.energy.attributed", "melodi_energy_attributed_joules_total"),
        ("melodi.energy.residual", "melodi_energy_residual_joules"),
        ("melodi.requests", "melodi_requests_total"),
        ("melodi.requests.active", "melodi_requests_active"),
        ("melodi.energy.sample.age", "melodi_energy_sample_age_seconds"),
        ("melodi.source.up", "melodi_source_up_ratio"),
        ("melodi.carbon.intensity", "melodi_carbon_intensity"),
        ("melodi.carbon.emissions", "melodi_carbon_emissions_grams_total"),
        ("gen_ai.client.token.usage", "gen_ai_client_token_usage_bucket"),
        ("gen_ai.server.time_to_first_token", "gen_ai_server_time_to_first_token_seconds_bucket"),
    ],
)
def test_prometheus_names(name: str, expected: str) -> None:
    """A metric is scraped under the name that an OTLP receiver gives it."""
    assert prometheus_name(metrics.METRICS[name]) == expected


def test_foreign_names() -> None:
    """Names that hold their unit or `total` already get neither twice."""
    assert scraped("n.energy.joules", "J", monotonic=True) == ("n_energy_joules", "joules")
    assert scraped("n.requests.total", "{request}", monotonic=True) == ("n_requests", "")
    assert scraped("n.speed", "m/s") == ("n_speed_meters_per_second", "meters_per_second")
    assert scraped("2n", "1") == ("_2n", "")
