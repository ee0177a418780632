"""A program that sets up somebody else's tracing and the meter: ``beside_others.py logfire|traceloop|openlit before|after``.

Prints, for every span that was exported, its name, joules, and whether it has a parent.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

import melodi_otel
from melodi_otel.testing import tiny_model


class Kept(SpanExporter):
    """Keeps what it gets, also after a shutdown."""

    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.spans += spans
        return SpanExportResult.SUCCESS

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        return True


def configure(tool: str, kept: Kept) -> None:
    if tool == "logfire":
        import logfire

        processors: list[Any] = [SimpleSpanProcessor(kept)]
        logfire.configure(send_to_logfire=False, console=False, additional_span_processors=processors)
    elif tool == "traceloop":
        from traceloop.sdk import Traceloop

        Traceloop.init(app_name="t", exporter=kept, disable_batch=True, instruments=set(), telemetry_enabled=False)
    else:
        import openlit
        from opentelemetry.sdk.trace import TracerProvider

        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(kept))
        trace.set_tracer_provider(provider)
        openlit.init(disable_metrics=True, disabled_instrumentors=["transformers"], application_name="t")


tool, when = sys.argv[1:]
kept = Kept()
if when == "before":
    configure(tool, kept)
melodi_otel.instrument()
if when == "after":
    configure(tool, kept)
model, tokenizer = tiny_model.llama(), tiny_model.tokenizer()


def generate(name: str) -> None:
    with trace.get_tracer("app").start_as_current_span(name):
        model.generate(**tokenizer("hello", return_tensors="pt"), max_new_tokens=8, do_sample=False)


generate("first")
if tool == "logfire":
    configure(tool, kept)  # exchanges the provider that it holds
    generate("second")
melodi_otel.uninstrument()
generate("unmetered")
for span in kept.spans:
    joules = (span.attributes or {}).get("melodi.energy.total")
    if span.name in ("first", "second", "unmetered") or span.name.startswith("text_completion"):
        print("span", span.name.split()[0], joules is not None, span.parent is not None)
