"""OTLP exporters of our own providers, only where ``OTEL_*`` names a destination.

The variables keep OpenTelemetry's meaning. Whether, where and by which protocol is read from the given environment;
headers, certificates, compression and timeouts are read by the exporters themselves, from the process's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any, Literal

from opentelemetry.sdk.metrics.export import MetricReader, PeriodicExportingMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from melodi_otel.forks import in_child
from melodi_otel.telemetry import sdk

log = logging.getLogger("melodi_otel")

Signal = Literal["TRACES", "METRICS"]


class Counted(SpanExporter):
    """An exporter that tells what became of the spans.

    Args:
        exporter: it is handed everything as it comes.
        told: called with a number of spans and one of ``semconv.SPAN_EXPORTS``.
    """

    def __init__(self, exporter: SpanExporter, told: Callable[[int, str], None]) -> None:
        self._exporter = exporter
        self._told = told
        told(0, "sent")
        told(0, "failed")

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Export, and tell how it went; what the exporter raises goes on."""
        outcome = "failed"
        try:
            result = self._exporter.export(spans)
            if result is SpanExportResult.SUCCESS:
                outcome = "sent"
            return result
        finally:
            self._told(len(spans), outcome)

    def shutdown(self) -> None:
        """Shut the exporter down."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Flush the exporter."""
        return self._exporter.force_flush(timeout_millis)


def span_processors(environ: Mapping[str, str], told: Callable[[int, str], None]) -> list[SpanProcessor]:
    """One batching processor per exporter that ``environ`` asks for; empty where it asks for none. ``told``: see Counted."""
    found: list[SpanProcessor] = []
    for name in _asked(environ, "TRACES"):
        try:
            exporter: Any = _otlp_spans(environ) if name == "otlp" else _named("opentelemetry_traces_exporter", name)
            if isinstance(exporter, SpanExporter):
                found.append(BatchSpanProcessor(Counted(exporter, told)))
        except Exception as error:
            log.warning("OTEL_TRACES_EXPORTER: %s cannot be used: %s", name, error)
    return found


def metric_readers(environ: Mapping[str, str]) -> list[MetricReader]:
    """One reader per exporter that ``environ`` asks for; empty where it asks for none.

    ``prometheus`` is left out: the scrape endpoint of ours shows the same metrics, with exemplars.
    """
    found: list[MetricReader] = []
    for name in _asked(environ, "METRICS"):
        if name == "prometheus":
            continue
        try:
            made: Any = _otlp_metrics(environ) if name == "otlp" else _named("opentelemetry_metrics_exporter", name)
            found.append(made if isinstance(made, MetricReader) else _periodic(made))
        except Exception as error:
            log.warning("OTEL_METRICS_EXPORTER: %s cannot be used: %s", name, error)
    return found


def exponential_histograms(environ: Mapping[str, str]) -> bool:
    """Whether ``environ`` prefers exponential histograms to bounds."""
    preferred = _value(environ, "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION")
    return preferred.lower() == "base2_exponential_bucket_histogram"


def _asked(environ: Mapping[str, str], signal: Signal) -> list[str]:
    if _value(environ, "OTEL_SDK_DISABLED").lower() == "true":
        return []
    listed = _value(environ, f"OTEL_{signal}_EXPORTER")
    if listed:
        return [name.strip() for name in listed.split(",") if name.strip() not in {"", "none"}]
    return ["otlp"] if _endpoint(environ, signal) else []


def _value(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name, "").strip()


def _endpoint(environ: Mapping[str, str], signal: Signal) -> str:
    return _value(environ, f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT") or _value(environ, "OTEL_EXPORTER_OTLP_ENDPOINT")


def _protocol(environ: Mapping[str, str], signal: Signal) -> str:
    asked = _value(environ, f"OTEL_EXPORTER_OTLP_{signal}_PROTOCOL") or _value(environ, "OTEL_EXPORTER_OTLP_PROTOCOL")
    protocol = asked or "grpc"
    if protocol not in {"grpc", "http/protobuf"}:
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol!r}: allowed is grpc or http/protobuf")
    return protocol


def _http_endpoint(environ: Mapping[str, str], signal: Signal) -> str | None:
    """The URL to post to: a signal's own variable as it stands, else the common one with the signal's path."""
    own = _value(environ, f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT")
    if own:
        return own
    common = _value(environ, "OTEL_EXPORTER_OTLP_ENDPOINT")
    return f"{common.rstrip('/')}/v1/{signal.lower()}" if common else None


def _compression(environ: Mapping[str, str], signal: Signal) -> Any:
    """For gRPC: the standard value ``none``, which its exporter refuses to read; else None, and it reads the rest."""
    asked = environ.get(f"OTEL_EXPORTER_OTLP_{signal}_COMPRESSION") or environ.get("OTEL_EXPORTER_OTLP_COMPRESSION", "")
    if asked.strip().lower() != "none":
        return None
    from opentelemetry.exporter.otlp.proto.grpc.exporter import Compression  # pyright: ignore[reportPrivateImportUsage]

    return Compression.NoCompression


def _otlp_spans(environ: Mapping[str, str]) -> Any:
    if _protocol(environ, "TRACES") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as Grpc

        return Grpc(endpoint=_endpoint(environ, "TRACES") or None, compression=_compression(environ, "TRACES"))
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as Http

    return _apart(Http, endpoint=_http_endpoint(environ, "TRACES"))


def _otlp_metrics(environ: Mapping[str, str]) -> Any:
    if _protocol(environ, "METRICS") == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter as Grpc

        return Grpc(endpoint=_endpoint(environ, "METRICS") or None, compression=_compression(environ, "METRICS"))
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter as Http

    return _apart(Http, endpoint=_http_endpoint(environ, "METRICS"))


class _Anew:
    """Makes an HTTP exporter anew in a forked child.

    The SDK starts its thread again there and leaves it the parent's open connection: both would write into one stream, and
    what arrives is neither's.
    """

    def __init__(self, exporter: Any, arguments: dict[str, Any]) -> None:
        self._exporter: Any = exporter
        self._arguments = arguments
        self._parents: list[dict[str, Any]] = []
        in_child(self._forked)

    def _forked(self) -> None:
        # The parent's is kept, not closed: closing takes locks that a thread of the parent may have held.
        parent: dict[str, Any] = self._exporter.__dict__.copy()
        self._parents.append(parent)
        type(self._exporter).__init__(self._exporter, **self._arguments)
        self._exporter.melodi_anew = self


def _apart(kind: Any, **arguments: Any) -> Any:
    exporter = kind(**arguments)
    exporter.melodi_anew = _Anew(exporter, arguments)
    return exporter


def _periodic(exporter: Any) -> MetricReader:
    return PeriodicExportingMetricReader(exporter, **sdk.series_limit(PeriodicExportingMetricReader))


def _named(group: str, name: str) -> Any:
    for point in entry_points(group=group, name=name):
        return point.load()()
    raise LookupError("no installed package provides it")
