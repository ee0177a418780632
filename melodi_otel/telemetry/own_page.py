"""Single requests on the page that a server has already: its own ``/metrics``, where somebody scrapes it.

Only the families of single requests (joules, tokens, times) are shown there; everything else is on the page of the hub,
which leaves these out. So both may be scraped, and no series is in both.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry
from prometheus_client import Metric as Family
from prometheus_client.registry import Collector

from melodi_otel import semconv_metrics
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.forks import in_child
from melodi_otel.telemetry.metrics import Views
from melodi_otel.telemetry.providers import ScrapePipeline

log = logging.getLogger("melodi_otel")

_SHOWN: Final = frozenset(
    semconv_metrics.scraped(metric.name, metric.unit, monotonic=False, gauge=False)[0]
    for metric in (
        semconv_metrics.REQUEST_ENERGY,
        semconv_metrics.TOKEN_USAGE,
        semconv_metrics.OPERATION_DURATION,
        semconv_metrics.TIME_TO_FIRST_TOKEN,
        semconv_metrics.TIME_PER_OUTPUT_TOKEN,
    )
)


class OwnPage:
    """An ``Observer`` that shows finished requests on a registry of the program's, once it has been told of one.

    Args:
        views: of this program's instruments.
        resource: its ``host.id`` becomes a label of every series.
    """

    def __init__(self, views: Views, resource: Resource) -> None:
        # Books, devices and counts are the hub's to show, or of this program's page of ours.
        self._views = replace(views, publisher=lambda: False, counting=lambda: False, page=False)
        self._resource = resource
        self._lock = threading.Lock()
        self._pipeline: ScrapePipeline | None = None
        self._at: tuple[CollectorRegistry, _Requests] | None = None
        in_child(self._forked)

    def _forked(self) -> None:
        self._lock = threading.Lock()

    @property
    def on(self) -> bool:
        """Whether requests that finish now are shown there."""
        return self._at is not None

    def show_on(self, registry: CollectorRegistry) -> bool:
        """Show them on ``registry`` from now on; False: they are shown on one already.

        Raises:
            ValueError: it has families of these names.
        """
        with self._lock:
            if self._at is not None:
                return False
            pipeline = self._pipeline or ScrapePipeline(self._views, self._resource)
            requests = _Requests(pipeline.registry)
            registry.register(requests)
            self._pipeline, self._at = pipeline, (registry, requests)
            return True

    def finished(self, record: RequestRecord) -> None:
        """Record it, where there is a page."""
        pipeline = self._pipeline
        if pipeline is not None and self.on:
            pipeline.instruments.finished(record)

    def close(self) -> None:
        """Take everything off that page."""
        with self._lock:
            at, self._at = self._at, None
            pipeline, self._pipeline = self._pipeline, None
        if at is not None:
            registry, requests = at
            try:
                registry.unregister(requests)
            except KeyError:
                log.debug("melodi_otel: the program has cleared its registry")
        if pipeline is not None:
            pipeline.close()


class _Requests(Collector):
    def __init__(self, source: CollectorRegistry) -> None:
        self._source = source

    def collect(self) -> Iterator[Family]:
        for family in self._source.collect():
            if family.name in _SHOWN:
                yield family

    def describe(self) -> list[Family]:
        return [Family(name, name, "histogram") for name in sorted(_SHOWN)]
