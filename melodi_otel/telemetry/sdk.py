"""What the installed OpenTelemetry can do: all that differs between 1.27 and now is asked here, by capability."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, cast

from opentelemetry import metrics as api
from opentelemetry.sdk import metrics as sdk
from opentelemetry.sdk.metrics.export import MetricReader
from opentelemetry.sdk.metrics.view import ExplicitBucketHistogramAggregation, View
from opentelemetry.sdk.resources import Resource

from melodi_otel import semconv_metrics
from melodi_otel.semconv_metrics import Metric
from melodi_otel.telemetry.wrapping import inside

_KINDS: Final = (
    sdk.Counter,
    sdk.Histogram,
    sdk.ObservableCounter,
    sdk.ObservableGauge,
    sdk.ObservableUpDownCounter,
)


def _takes(function: Callable[..., Any], parameter: str) -> bool:
    return parameter in inspect.signature(function).parameters


def keeps_exemplars(histogram: api.Histogram | type[api.Histogram]) -> bool:
    """Whether a value may be recorded with the context of its span."""
    return _takes(histogram.record, "context")


def takes_advice(meter: api.Meter | type[api.Meter]) -> bool:
    """Whether histograms of ``meter`` may be made with the bounds that suit them."""
    return _takes(meter.create_histogram, "explicit_bucket_boundaries_advisory")


def histogram(meter: api.Meter, metric: Metric) -> api.Histogram:
    """The histogram ``metric``, with its bounds where ``meter`` takes advice."""
    advice: dict[str, Any] = {"explicit_bucket_boundaries_advisory": metric.bounds} if takes_advice(meter) else {}
    return meter.create_histogram(metric.name, metric.unit, metric.description, **advice)


def meter_provider(
    readers: Sequence[MetricReader], resource: Resource, *, exponential: bool = False, shutdown_on_exit: bool = True
) -> sdk.MeterProvider:
    """A provider of our own. Its histograms have the contract's bounds, by Views where there is no advice.

    Args:
        readers: who collects.
        resource: whose metrics.
        exponential: the readers prefer exponential histograms, which a View would overrule.
        shutdown_on_exit: send the last numbers when the process ends.
    """
    views = [] if exponential or takes_advice(sdk.Meter) else _bounds_by_views()
    return sdk.MeterProvider(readers, resource, shutdown_on_exit=shutdown_on_exit, views=views)


def _bounds_by_views() -> list[View]:
    return [
        View(instrument_name=metric.name, aggregation=ExplicitBucketHistogramAggregation(metric.bounds))
        for metric in semconv_metrics.METRICS.values()
        if metric.bounds is not None
    ]


def exemplars(point: Any) -> Sequence[Any]:
    """The exemplars of a data point; none where the SDK keeps none."""
    return getattr(point, "exemplars", ())


SERIES_LIMIT: Final = 20_000
"""Series per metric that our readers keep: the SDK's 2,000 are few for a hundred tenants, their models and devices."""


def series_limit(reader: Callable[..., MetricReader] = MetricReader) -> dict[str, Any]:
    """Arguments of a ``reader`` that keeps :data:`SERIES_LIMIT` series per metric; empty where the SDK has no limit."""
    limited = _takes(reader, "cardinality_limits")
    return {"cardinality_limits": dict.fromkeys(_KINDS, SERIES_LIMIT)} if limited else {}


def forget(provider: object, scope: str) -> None:
    """Drop what the instruments of ``scope`` have recorded on ``provider``: in a forked child, where it is the parent's.

    Observed values are read anew; recorded ones stay in private storages of the readers, the same from 1.27 until now. Where
    a version has none of that shape nothing is dropped.
    """
    consumer = inside(provider, lambda one: getattr(one, "_measurement_consumer", None), "get_meter")
    storages: Any = getattr(consumer, "_reader_storages", None)
    if not isinstance(storages, Mapping):
        return
    for storage in cast(Mapping[Any, Any], storages).values():
        kept: Any = getattr(storage, "_instrument_view_instrument_matches", None)
        if isinstance(kept, dict):
            # Without the storage's lock: a thread that is not here may hold it. The next value makes a new entry.
            for instrument in list(cast(dict[Any, Any], kept)):
                if getattr(getattr(instrument, "instrumentation_scope", None), "name", None) == scope:
                    del kept[instrument]
