"""The seam of spans: whose TracerProvider is used, and how it is left as it was.

Nothing global is ever set. What is done with the provider that the application has, or has later::

    the SDK's, or one that holds the SDK's   its span processors are wrapped, those added later too
    somebody else's                          our own spans are ended late, with their joules; others' spans carry none
    none                                     one of our own, if OTEL_* names a destination; else no-op spans and one log line

The choice is looked at again on every use and whenever a provider is set, so a later one is used from then on.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Final

from opentelemetry import trace as trace_api
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NoOpTracer, Tracer

from melodi_otel import __version__
from melodi_otel.forks import in_child
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.deferral import Deferral
from melodi_otel.telemetry.late import LateEnds
from melodi_otel.telemetry.spans import DeferringProcessor
from melodi_otel.telemetry.wrapping import Wrapped, processors_of

log = logging.getLogger("melodi_otel")

SCOPE: Final = "melodi_otel"


class TracerSeam:
    """Whose spans. Made once; :meth:`tracer` is asked for every request.

    Args:
        deferral: what wrapped processors ask.
        environ: where ``OTEL_*`` is looked up.
        resource: of our own provider, where one is needed.
        given: use this provider instead of the global one.

    Attributes:
        deferral: the same.
        resource, given: the same; may be set until the first :meth:`tracer`.
    """

    def __init__(
        self,
        deferral: Deferral,
        environ: Mapping[str, str],
        resource: Resource | None = None,
        given: object = None,
    ) -> None:
        self.deferral: Final = deferral
        self.resource = resource
        self.given = given
        self._environ = environ
        self._seen: object = None
        self._inside: object = None
        self._tracer: Tracer = NoOpTracer()
        self._wrapped: list[Wrapped] = []
        self._late: LateEnds | None = None
        self._lates: list[LateEnds] = []
        self._own: TracerProvider | None = None
        self._own_asked = False
        self._closed = False
        self._complain = Complaints("tracer provider")
        self._watch = _Watch(self.look)
        self._start_over()
        in_child(self._start_over)

    def _start_over(self) -> None:
        self._lock = threading.RLock()

    def tracer(self) -> Tracer:
        """The tracer to use now; a look at the global provider and nothing more while that has not changed."""
        provider = self.given or trace_api.get_tracer_provider()
        if provider is not self._seen or processors_of(provider) is not self._inside:
            self._adopt(provider)
        return self._tracer

    def late(self) -> LateEnds | None:
        """Who ends spans of :meth:`tracer` when their joules are there; None: their processors wait for them."""
        return self._late

    def watch(self) -> None:
        """Wrap the provider that is there, and every one that is set from now on, at once; undone by :meth:`unwrap`."""
        self._watch.start()
        self.look()

    def look(self) -> None:
        """Wrap the provider that is set now, if that has not been done; cheap, and makes no provider of our own."""
        try:
            # Not by the getter: where none is set that one may load and set the provider of a variable.
            provider = self.given or getattr(trace_api, "_TRACER_PROVIDER", None)
            if provider is None or of_the_api(provider):
                return
            if provider is not self._seen or processors_of(provider) is not self._inside:
                self._adopt(provider)
        except Exception as error:
            self._complain("looking", error)

    def wrap(self, provider: object) -> bool:
        """Wrap the processors of ``provider``, once; False where it has none of the SDK's kind."""
        with self._lock:
            multi = processors_of(provider)
            if multi is None:
                return False
            if not any(wrapped.multi is multi for wrapped in self._wrapped):
                self._wrapped.append(Wrapped(multi, self.deferral))
            return True

    def unwrap(self) -> None:
        """Leave every provider as it was found; spans that wait are forwarded first, our own provider is shut down."""
        self._watch.stop()
        with self._lock:
            self._closed = True
            wrapped, self._wrapped = self._wrapped, []
            lates, self._lates = self._lates, []
            own, self._own = self._own, None
            self._tracer = NoOpTracer()
            self._seen = self._inside = self._late = None
        for undo in (*(one.undo for one in wrapped), *(one.release for one in lates)):
            try:
                undo()
            except Exception as error:
                self._complain("unwrapping", error)
        if own is not None:
            own.shutdown()

    def force_flush(self, timeout_s: float) -> bool:
        """Send what waits, at most ``timeout_s`` seconds; True where everything went out."""
        with self._lock:
            own, seen, late = self._own, self._seen, self._late
        flushed = late is None or late.flush(timeout_s)
        for provider in (own, seen):
            flush = getattr(provider, "force_flush", None)
            if flush is not None:
                flushed = bool(flush(round(timeout_s * 1000))) and flushed
        return flushed

    def _adopt(self, provider: Any) -> None:
        with self._lock:
            if self._closed:
                return
            try:
                self._tracer = self._choose(provider)
            except Exception as error:
                self._complain("choosing one", error)
                self._tracer = NoOpTracer()
            self._seen = provider
            self._inside = processors_of(provider)

    def _choose(self, provider: Any) -> Tracer:
        self._late = None
        if not of_the_api(provider):
            if not self.wrap(provider):
                if provider is not self._seen:
                    log.info(
                        "the tracer provider %s is not the SDK's: our own spans end when their joules are there, spans of "
                        "others carry none",
                        type(provider).__qualname__,
                    )
                self._late = LateEnds(self.deferral)
                self._lates.append(self._late)
            return provider.get_tracer(SCOPE, __version__)
        if not self._own_asked:
            self._own_asked = True
            self._own = self._private()
        return NoOpTracer() if self._own is None else self._own.get_tracer(SCOPE, __version__)

    def _private(self) -> TracerProvider | None:
        # Here, because a program whose provider is there already never needs an exporter of ours.
        from melodi_otel.telemetry import exporters

        processors = exporters.span_processors(self._environ, self.deferral.exported)
        if not processors:
            log.info("spans are not sent: set OTEL_EXPORTER_OTLP_ENDPOINT (e.g. http://localhost:4317) to send them")
            return None
        own = TracerProvider(resource=self.resource)
        for processor in processors:
            own.add_span_processor(DeferringProcessor(processor, self.deferral))
        return own


class _Watch:
    """Tells when somebody sets the global tracer provider.

    All ways to do so, also a reference to ``set_tracer_provider`` that was taken before, go through one module-private
    function of the API since 1.27. Where a version has no such function nobody is told, and whoever looks now and then sees
    the provider a little later.
    """

    def __init__(self, then: Callable[[], None]) -> None:
        self._then: Callable[[], None] | None = then
        self._original: Callable[..., Any] | None = None
        self._ours: Callable[..., Any] | None = None

    def start(self) -> None:
        original: Callable[..., Any] | None = getattr(trace_api, "_set_tracer_provider", None)
        if self._ours is not None or original is None:
            return

        @functools.wraps(original)
        def set_tracer_provider(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self._then is not None:
                self._then()
            return result

        self._original, self._ours = original, set_tracer_provider
        trace_api._set_tracer_provider = set_tracer_provider

    def stop(self) -> None:
        self._then = None  # if somebody has hooked in after us, ours stays and only passes on
        if self._ours is not None and getattr(trace_api, "_set_tracer_provider", None) is self._ours:
            trace_api._set_tracer_provider = self._original  # pyright: ignore[reportAttributeAccessIssue]


def of_the_api(provider: object) -> bool:
    """Whether it is the API's stand-in (proxy, no-op) and not a provider that somebody chose."""
    module = type(provider).__module__
    return module.startswith(("opentelemetry.trace", "opentelemetry.metrics"))
