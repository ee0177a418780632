"""The seams: whose TracerProvider and MeterProvider are used, and how they are left as they were.

Nothing global is ever set. Where the application has a real provider, its registered span processors are wrapped, and those
added later too; where it has none, a provider of our own exports if ``OTEL_*`` names a destination; else spans are no-ops,
everything else works, and one log line says which variable would send them. The choice is looked at again on every use, so
a provider that the application sets later is used from then on.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Final

from opentelemetry import metrics as metrics_api
from opentelemetry import trace as trace_api
from opentelemetry.metrics import Meter
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import NoOpTracer, Tracer

from melodi_otel import __version__
from melodi_otel import semconv as names
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.telemetry import exporters, sdk
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.deferral import Deferral
from melodi_otel.telemetry.metrics import Instruments, Views
from melodi_otel.telemetry.scrape import ScrapeReader
from melodi_otel.telemetry.spans import DeferringProcessor

log = logging.getLogger("melodi_otel")

SCOPE: Final = "melodi_otel"


class TracerSeam:
    """Whose spans. Made once; :meth:`tracer` is asked for every request.

    Args:
        deferral: what wrapped processors ask.
        environ: where ``OTEL_*`` is looked up.
        resource: of our own provider, where one is needed.
        given: use this provider instead of the global one.
    """

    def __init__(
        self, deferral: Deferral, environ: Mapping[str, str], resource: Resource, given: object = None
    ) -> None:
        self._given = given
        self._deferral = deferral
        self._environ = environ
        self._resource = resource
        self._lock = threading.RLock()
        self._seen: object = None
        self._tracer: Tracer = NoOpTracer()
        self._wrapped: list[_Wrapped] = []
        self._own: TracerProvider | None = None
        self._own_asked = False
        self._closed = False
        self._complain = Complaints("tracer provider")

    def tracer(self) -> Tracer:
        """The tracer to use now; a look at the global provider and nothing more while that has not changed."""
        provider = self._given or trace_api.get_tracer_provider()
        if provider is not self._seen:
            self._adopt(provider)
        return self._tracer

    def wrap(self, provider: object) -> bool:
        """Wrap the processors of ``provider``, once; False where that is not the SDK's kind of provider."""
        with self._lock:
            multi = getattr(provider, "_active_span_processor", None)
            if any(wrapped.multi is multi for wrapped in self._wrapped):
                return True
            if not isinstance(getattr(multi, "_span_processors", None), tuple):
                return False
            self._wrapped.append(_Wrapped(multi, self._deferral))
            return True

    def unwrap(self) -> None:
        """Leave every provider as it was found; spans that wait are forwarded first, our own provider is shut down."""
        with self._lock:
            self._closed = True
            wrapped, self._wrapped = self._wrapped, []
            own, self._own = self._own, None
            self._tracer = NoOpTracer()
            self._seen = None
        for one in wrapped:
            try:
                one.undo()
            except Exception as error:
                self._complain("unwrapping", error)
        if own is not None:
            own.shutdown()

    def force_flush(self, timeout_s: float) -> bool:
        """Send what waits, at most ``timeout_s`` seconds; True where everything went out."""
        with self._lock:
            own, seen = self._own, self._seen
        flushed = True
        for provider in (own, seen):
            flush = getattr(provider, "force_flush", None)
            if flush is not None:
                flushed = bool(flush(round(timeout_s * 1000))) and flushed
        return flushed

    def _adopt(self, provider: Any) -> None:
        with self._lock:
            if self._closed or provider is self._seen:
                return
            try:
                self._tracer = self._choose(provider)
            except Exception as error:
                self._complain("choosing one", error)
                self._tracer = NoOpTracer()
            self._seen = provider

    def _choose(self, provider: Any) -> Tracer:
        if not _of_the_api(provider):
            if not self.wrap(provider):
                log.info(
                    "the tracer provider %s is not the SDK's: its spans carry no joules", type(provider).__qualname__
                )
            return provider.get_tracer(SCOPE, __version__)
        if not self._own_asked:
            self._own_asked = True
            self._own = self._private()
        return NoOpTracer() if self._own is None else self._own.get_tracer(SCOPE, __version__)

    def _private(self) -> TracerProvider | None:
        processors = exporters.span_processors(self._environ)
        if not processors:
            log.info("spans are not sent: set OTEL_EXPORTER_OTLP_ENDPOINT (e.g. http://localhost:4317) to send them")
            return None
        own = TracerProvider(resource=self._resource)
        for processor in processors:
            own.add_span_processor(DeferringProcessor(processor, self._deferral))
        return own


class _Wrapped:
    """The processors of one provider, wrapped; kept with what is needed to take it all back."""

    def __init__(self, multi: Any, deferral: Deferral) -> None:
        self.multi: Final = multi
        self._deferral = deferral
        self._ours: list[DeferringProcessor] = []
        self._add = multi.add_span_processor
        with multi._lock:
            multi._span_processors = tuple(self._wrap(processor) for processor in multi._span_processors)
        # On the instance: the class, and with it every other provider, stays as it is.
        multi.add_span_processor = self._late

    def _wrap(self, processor: SpanProcessor) -> SpanProcessor:
        if isinstance(processor, DeferringProcessor) or type(processor).on_end is SpanProcessor.on_end:
            return processor  # ours already, or one that never looks at ended spans
        ours = DeferringProcessor(processor, self._deferral)
        self._ours.append(ours)
        return ours

    def _late(self, processor: SpanProcessor) -> None:
        self._add(self._wrap(processor))

    def undo(self) -> None:
        if self.multi.add_span_processor == self._late:  # else somebody has hooked in after us, and calls us
            del self.multi.add_span_processor
        for ours in self._ours:
            ours.release()
        with self.multi._lock:
            self.multi._span_processors = tuple(
                processor.next if processor in self._ours else processor  # type: ignore[union-attr]
                for processor in self.multi._span_processors
            )


class MeterSeam:
    """Whose metrics; an ``Observer`` that passes finished requests to the instruments there.

    Args:
        views: where the instruments read.
        environ: where ``OTEL_*`` is looked up.
        resource: of our own provider, where one is needed; its ``host.id`` goes on the series of others that lack it.
        given: use this provider instead of the global one.
    """

    # Instruments cannot be removed from a provider: a second `instrument()` must find and rebind those of the first.
    _made: ClassVar[weakref.WeakKeyDictionary[Any, Instruments]] = weakref.WeakKeyDictionary()

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
        return bool(flush(round(timeout_s * 1000))) if flush is not None else True

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
        if not _of_the_api(provider):
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
        made = self._made.get(provider)
        if made is None:
            made = self._made[provider] = Instruments(provider.get_meter(SCOPE, __version__), views)
        else:
            made.rebind(views)
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

    def close(self) -> None:
        """Show nothing any more."""
        self._provider.shutdown()


def scrape_instruments(views: Views, provider: MeterProvider) -> Instruments:
    """The instruments on our own ``provider`` behind the scrape endpoint."""
    meter: Meter = provider.get_meter(SCOPE, __version__)
    return Instruments(meter, views)


def _of_the_api(provider: object) -> bool:
    """Whether it is the API's stand-in (proxy, no-op) and not a provider that somebody chose."""
    module = type(provider).__module__
    return module.startswith(("opentelemetry.trace", "opentelemetry.metrics"))


def _says_host(provider: Any) -> bool:
    resource = getattr(getattr(provider, "_sdk_config", None), "resource", None)
    return isinstance(resource, Resource) and names.HOST_ID in resource.attributes


def _with_host(views: Views, host: str) -> Views:
    return replace(views, constant={**views.constant, names.HOST_ID: host})
