"""The seam of metrics: whose MeterProvider is used, and our own behind the scrape endpoint.

Nothing global is ever set. Where the application has a real provider, our instruments are on it; where it has none, a
provider of our own exports if ``OTEL_*`` names a destination. The choice is looked at again on every use, so a provider that
the application sets later is used from then on. The seam of spans is :mod:`melodi_otel.telemetry.tracers`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Final

from opentelemetry import metrics as metrics_api
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource

from melodi_otel import __version__
from melodi_otel import semconv as names
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.forks import in_child
from melodi_otel.telemetry import exporters, sdk
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.metrics import Instruments, Views
from melodi_otel.telemetry.scrape import ScrapeReader
from melodi_otel.telemetry.tracers import SCOPE, of_the_api


class MeterSeam:
    """Whose metrics; an ``Observer`` that passes finished requests to the instruments there.

    Args:
        views: where the instruments read.
        environ: where ``OTEL_*`` is looked up.
        resource: of our own provider, where one is needed; its ``host.id`` goes on the series of others that lack it.
        given: use this provider instead of the global one.
    """

    # Instruments cannot be removed from a provider: a second `instrument()` must find and rebind those of the first. By
    # identity: a vendor's provider may have no hash.
    _made: ClassVar[list[tuple[weakref.ref[Any], Instruments]]] = []

    def __init__(self, views: Views, environ: Mapping[str, str], resource: Resource, given: object = None) -> None:
        self._given = given
        self._views = views
        self._environ = environ
        self._resource = resource
        self._lock = threading.RLock()
        self._seen: object = None
        self._instruments: Instruments | None = None
        self._own: MeterProvider | None = None
        self._own_asked = False
        self._closed = False
        self._complain = Complaints("meter provider")
        in_child(self._forked)

    def _forked(self) -> None:
        self._lock = threading.RLock()
        for provider in (self._own, self._seen):
            sdk.forget(provider, SCOPE)

    def instruments(self) -> Instruments | None:
        """The instruments to record on now; None where nobody reads metrics by OTLP."""
        provider = self._given or metrics_api.get_meter_provider()
        if provider is not self._seen:
            self._adopt(provider)
        return self._instruments

    def finished(self, record: RequestRecord) -> None:
        """Record a request."""
        if (instruments := self.instruments()) is not None:
            instruments.finished(record)

    def sampled(self, duration_s: float) -> None:
        """Record one round of readings, in seconds."""
        if (instruments := self.instruments()) is not None:
            instruments.sampled(duration_s)

    def close(self) -> None:
        """Observe nothing any more; our own provider sends its last numbers and is shut down."""
        with self._lock:
            self._closed = True
            own, self._own = self._own, None
            instruments, self._instruments = self._instruments, None
        if own is not None:
            own.shutdown()
        if instruments is not None:
            instruments.rebind(None)

    def force_flush(self, timeout_s: float) -> bool:
        """Send the current numbers, at most ``timeout_s`` seconds. True says nothing about their arrival."""
        with self._lock:
            provider = self._own or self._seen
        flush = getattr(provider, "force_flush", None)
        # A vendor's provider may answer nothing at all.
        return flush is None or flush(round(timeout_s * 1000)) is not False

    def _adopt(self, provider: Any) -> None:
        with self._lock:
            if self._closed or provider is self._seen:
                return
            self._seen = provider
            try:
                self._choose(provider)
            except Exception as error:
                self._complain("choosing one", error)

    def _choose(self, provider: Any) -> None:
        if not of_the_api(provider):
            own, self._own = self._own, None
            if self._instruments is not None:
                self._instruments.rebind(None)
            if own is not None:
                own.shutdown()  # the application's takes over: two would show everything twice
            self._instruments = self._on(provider)
            return
        if not self._own_asked:
            self._own_asked = True
            readers = exporters.metric_readers(self._environ)
            if readers:
                exponential = exporters.exponential_histograms(self._environ)
                self._own = sdk.meter_provider(readers, self._resource, exponential=exponential)
                self._instruments = self._on(self._own)

    def _on(self, provider: Any) -> Instruments:
        views = self._views
        host = self._resource.attributes.get(names.HOST_ID)
        if host is not None and not _says_host(provider):
            views = _with_host(views, str(host))
        self._made[:] = [kept for kept in self._made if kept[0]() is not None]
        for known, made in self._made:
            if known() is provider:
                made.rebind(views)
                return made
        made = Instruments(provider.get_meter(SCOPE, __version__), views)
        self._made.append((weakref.ref(provider), made))
        return made


class ScrapePipeline:
    """Our own provider behind the scrape endpoint; ``registry`` is what to serve, ``instruments`` the observer.

    Args:
        views: where the instruments read.
        resource: its ``host.id`` becomes a label of every series.
    """

    def __init__(self, views: Views, resource: Resource) -> None:
        host = resource.attributes.get(names.HOST_ID)
        reader = ScrapeReader({} if host is None else {names.HOST_ID: str(host)})
        # Nothing is sent at the end, so there is nothing to do at exit.
        self._provider = sdk.meter_provider([reader], resource, shutdown_on_exit=False)
        self.registry: Final = reader.registry
        self.instruments: Final = scrape_instruments(views, self._provider)
        in_child(self._forked)

    def _forked(self) -> None:
        sdk.forget(self._provider, SCOPE)

    def close(self) -> None:
        """Show nothing any more."""
        self._provider.shutdown()


def scrape_instruments(views: Views, provider: MeterProvider) -> Instruments:
    """The instruments on our own ``provider`` behind the scrape endpoint."""
    meter: Meter = provider.get_meter(SCOPE, __version__)
    return Instruments(meter, views)


def _says_host(provider: Any) -> bool:
    resource = getattr(getattr(provider, "_sdk_config", None), "resource", None)
    return isinstance(resource, Resource) and names.HOST_ID in resource.attributes


def _with_host(views: Views, host: str) -> Views:
    return replace(views, constant={**views.constant, names.HOST_ID: host})
