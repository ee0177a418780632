"""Our metrics as Prometheus scrapes them.

A reader of OpenTelemetry's SDK that turns its data into prometheus_client families on a registry of our own. Compared with
the stock exporter: names are those an OTLP receiver makes of the same metrics, exemplars are kept, bucket bounds are
floats, no scope labels, ``host_id`` on every series, labels that are not known are absent, and a metric that cannot be
rendered is left out instead of failing the whole scrape. The resource is ``target_info``.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from opentelemetry.sdk.metrics.export import (
    Gauge,
    HistogramDataPoint,
    Metric,
    MetricReader,
    MetricsData,
    NumberDataPoint,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from prometheus_client import CollectorRegistry
from prometheus_client import Metric as Family
from prometheus_client.registry import Collector
from prometheus_client.samples import Exemplar, Sample
from prometheus_client.utils import floatToGoString  # pyright: ignore[reportUnknownVariableType]

from melodi_otel import semconv_metrics
from melodi_otel.telemetry import sdk
from melodi_otel.telemetry.complaints import Complaints

Labels = tuple[tuple[str, str], ...]


class ScrapeReader(MetricReader):
    """Register it on a MeterProvider, serve :attr:`registry`.

    Args:
        constant: labels on every series, by attribute name (``host.id``).
    """

    def __init__(self, constant: Mapping[str, str] | None = None) -> None:
        super().__init__(**sdk.series_limit())
        self._constant = {semconv_metrics.label_name(name): value for name, value in (constant or {}).items()}
        self._scraping = threading.Lock()
        self._data: MetricsData | None = None
        self._exemplars: dict[tuple[str, Labels, str], Exemplar] = {}
        self._complain = Complaints("scrape")
        self.registry: Final = CollectorRegistry(auto_describe=False)
        self.registry.register(_Scraped(self))

    def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> None:
        self._data = metrics_data

    def shutdown(self, timeout_millis: float = 30_000, **kwargs: Any) -> None:
        """Nothing to send; a later scrape shows nothing."""
        self._data = None

    def families(self) -> list[Family]:
        """Collect now; one family per metric, empty where collecting failed."""
        with self._scraping:
            self._data = None
            try:
                self.collect()
            except Exception as error:
                self._complain("collect", error)
            data, self._data = self._data, None
            found: dict[str, Family] = {}
            try:
                if (target := self._target(data)) is not None:
                    found[target.name] = target
            except Exception as error:
                self._complain("target_info", error)
            for metric in _metrics(data):
                try:
                    family = self._family(metric)
                except Exception as error:
                    self._complain(metric.name, error)
                    continue
                if family is not None and family.samples:
                    found.setdefault(family.name, family)
            return list(found.values())

    def _target(self, data: MetricsData | None) -> Family | None:
        """``target_info``: the resource as labels of one series, for queries to join with."""
        family = Family("target", "Whose metrics these are.", "info")
        for one in data.resource_metrics if data else ():
            labels = self._labels(one.resource.attributes)
            if labels:
                family.samples.append(Sample("target_info", dict(labels), 1.0))
        return family if family.samples else None

    def _family(self, metric: Metric) -> Family | None:
        data = metric.data
        if isinstance(data, Sum):
            kind = "counter" if data.is_monotonic else "gauge"
        else:
            kind = "gauge" if isinstance(data, Gauge) else "histogram"
        name, unit = semconv_metrics.scraped(
            metric.name, metric.unit or "", monotonic=kind == "counter", gauge=isinstance(data, Gauge)
        )
        family = Family(name, metric.description or metric.name, kind, unit)
        for point in data.data_points:
            labels = self._labels(point.attributes)
            if isinstance(point, NumberDataPoint):
                self._number(family, point, labels)
                continue
            if isinstance(data, HistogramData) and isinstance(point, HistogramDataPoint):
                bounds, counts = point.explicit_bounds, point.bucket_counts
            else:
                bounds, counts = _explicit(point, semconv_metrics.METRICS.get(metric.name))
            self._histogram(family, labels, bounds, counts, point.sum, sdk.exemplars(point))
        return family

    def _labels(self, attributes: Mapping[str, Any] | None) -> Labels:
        found = {semconv_metrics.label_name(name): _text(value) for name, value in (attributes or {}).items()}
        return tuple(sorted({**self._constant, **found}.items()))

    def _number(self, family: Family, point: NumberDataPoint, labels: Labels) -> None:
        if family.type == "counter":
            exemplar = self._exemplar((family.name, labels, ""), sdk.exemplars(point))
            family.samples.append(Sample(f"{family.name}_total", dict(labels), point.value, exemplar=exemplar))
        else:
            family.samples.append(Sample(family.name, dict(labels), point.value))

    def _histogram(
        self,
        family: Family,
        labels: Labels,
        bounds: Sequence[float],
        counts: Sequence[int],
        total: float,
        exemplars: Sequence[Any],
    ) -> None:
        uppers = [*(float(bound) for bound in bounds), math.inf]
        below, running = -math.inf, 0
        for upper, count in zip(uppers, counts, strict=True):
            running += count
            le = floatToGoString(upper)
            inside = [e for e in exemplars if below < e.value <= upper]
            exemplar = self._exemplar((family.name, labels, le), inside)
            family.samples.append(
                Sample(f"{family.name}_bucket", {**dict(labels), "le": le}, running, exemplar=exemplar)
            )
            below = upper
        family.samples.append(Sample(f"{family.name}_count", dict(labels), running))
        family.samples.append(Sample(f"{family.name}_sum", dict(labels), total))

    def _exemplar(self, series: tuple[str, Labels, str], candidates: Sequence[Any]) -> Exemplar | None:
        """The newest exemplar of a series. The SDK hands each one out once; a scraper that comes second wants it too."""
        traced = [e for e in candidates if e.trace_id and e.span_id]
        if traced:
            newest = max(traced, key=lambda e: e.time_unix_nano)
            ids = {"trace_id": f"{newest.trace_id:032x}", "span_id": f"{newest.span_id:016x}"}
            if len(self._exemplars) < sdk.SERIES_LIMIT or series in self._exemplars:
                self._exemplars[series] = Exemplar(ids, float(newest.value), newest.time_unix_nano / 1e9)
        return self._exemplars.get(series)


class _Scraped(Collector):
    def __init__(self, reader: ScrapeReader) -> None:
        self._reader = reader

    def collect(self) -> Iterator[Family]:
        yield from self._reader.families()

    def describe(self) -> list[Family]:
        return []


def _metrics(data: MetricsData | None) -> Iterator[Metric]:
    for resource in data.resource_metrics if data else ():
        for scope in resource.scope_metrics:
            yield from scope.metrics


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool | int | float):
        return json.dumps(value)
    return json.dumps(list(value))


def _explicit(point: Any, metric: semconv_metrics.Metric | None) -> tuple[Sequence[float], Sequence[int]]:
    """An exponential histogram in the contract's buckets: each of its buckets goes where its upper end belongs.

    A View may choose exponential buckets for all readers. Their own bounds move with the data, which a scraped series must
    not; without bounds in the contract only the count and the sum are left.
    """
    bounds = metric.bounds if metric is not None and metric.bounds is not None else ()
    counts = [0] * (len(bounds) + 1)
    base = 2.0 ** (2.0**-point.scale)
    ends = [(0.0, point.zero_count + sum(point.negative.bucket_counts))]
    for index, count in enumerate(point.positive.bucket_counts):
        if count:
            ends.append((_power(base, point.positive.offset + index + 1), count))
    for end, count in ends:
        counts[next((i for i, bound in enumerate(bounds) if end <= bound * (1 + 1e-12)), len(bounds))] += count
    return bounds, counts


def _power(base: float, exponent: int) -> float:
    try:
        return base**exponent
    except OverflowError:
        return math.inf
