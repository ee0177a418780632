"""Where telemetry goes, in words that name the variable that decides it."""

from __future__ import annotations

from collections.abc import Mapping

from opentelemetry import trace

from melodi_otel.telemetry.tracers import of_the_api


def otlp(signal: str, environ: Mapping[str, str]) -> str:
    """Where a signal (``TRACES``, ``METRICS``) goes whose provider the program does not set."""
    exporter = environ.get(f"OTEL_{signal}_EXPORTER", "")
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return "off (OTEL_SDK_DISABLED)"
    if exporter == "none":
        return f"off (OTEL_{signal}_EXPORTER=none)"
    if exporter and exporter != "otlp":
        return f"{exporter} (OTEL_{signal}_EXPORTER)"
    for name in (f"OTEL_EXPORTER_OTLP_{signal}_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        if environ.get(name):
            return f"{environ[name]} ({name})"
    return "nowhere; OTEL_EXPORTER_OTLP_ENDPOINT=http://HOST:4318 sends them, or the provider your program sets"


def spans(environ: Mapping[str, str]) -> str:
    """Where spans of this program go now."""
    if of_the_api(trace.get_tracer_provider()):
        return otlp("TRACES", environ)
    return "to the provider that the program has set"
