"""Other people's instrumentations beside the meter: ``others.py pipeline`` or ``others.py clients WHICH URL``."""

from __future__ import annotations

import os
import sys
import threading
from typing import Any

os.environ["TRACELOOP_TELEMETRY"] = "false"

from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

import melodi_otel

MESSAGES = [{"role": "user", "content": "the quick brown fox"}]


def provider() -> TracerProvider:
    """The application's own provider, as its documentation told it to make it."""
    made = TracerProvider()
    made.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(made)
    return made


def logfires_provider() -> Any:
    """Logfire's own provider, which exports to where the variables say, and instruments OpenAI's clients too."""
    import logfire

    logfire.configure(send_to_logfire=False, console=False)
    logfire.instrument_openai()
    return trace.get_tracer_provider()


def pipeline() -> None:
    """OpenLLMetry and OpenLIT around one pipeline of transformers, which the meter instruments too."""
    import openlit
    import torch
    from opentelemetry.instrumentation.transformers import TransformersInstrumentor
    from transformers import pipeline as make

    from melodi_otel.testing import tiny_model

    torch.set_num_threads(1)
    made = provider()
    TransformersInstrumentor().instrument()
    melodi_otel.instrument()
    openlit.init(disable_metrics=True, disable_events=True)
    generate = make("text-generation", model=tiny_model.llama(), tokenizer=tiny_model.tokenizer())
    tracer = trace.get_tracer("application")
    for number in range(2):
        with tracer.start_as_current_span(f"work {number}"):
            generate("the quick brown fox", max_new_tokens=48, do_sample=False)
    made.force_flush()
    print("told", sum(row["joules"] for row in melodi_otel.recent().to_dicts()))


def clients(which: str, url: str) -> None:
    """Clients of model servers on this host, three at a time, seen by one other instrumentation (or two)."""
    made: Any = logfires_provider() if which == "logfire" else provider()
    runtime = melodi_otel.instrument()
    assert runtime is not None
    if which in ("openllmetry", "both"):
        from opentelemetry.instrumentation.ollama import OllamaInstrumentor
        from opentelemetry.instrumentation.openai import OpenAIInstrumentor

        OllamaInstrumentor().instrument()
        OpenAIInstrumentor().instrument()
    if which in ("openlit", "both"):
        import openlit

        openlit.init(disable_metrics=True, disable_events=True)
    if which == "openinference":
        from openinference.instrumentation.ollama import OllamaInstrumentor
        from openinference.instrumentation.openai import OpenAIInstrumentor

        OllamaInstrumentor().instrument()
        OpenAIInstrumentor().instrument()
    if which == "opentelemetry":
        from opentelemetry.instrumentation.genai.openai import OpenAIInstrumentor

        OpenAIInstrumentor().instrument()
    import ollama
    import openai

    chat = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    local = ollama.Client(host=url)

    def ask() -> None:
        if which in ("opentelemetry", "logfire"):
            chat.chat.completions.create(model="m", messages=MESSAGES)  # type: ignore[arg-type]
        else:
            local.chat(model="m", messages=MESSAGES)

    chat.chat.completions.create(model="m", messages=MESSAGES)  # type: ignore[arg-type]
    ask()  # by now the meter knows what spans of this kind are
    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    made.force_flush()
    runtime.wait_settled()
    for device, books in runtime.snapshot().books.items():
        print("books", device, books.attributed, books.imbalance())
    print("told", sum(row["joules"] or 0.0 for row in melodi_otel.recent().to_dicts()))


if __name__ == "__main__":
    {"pipeline": pipeline, "clients": clients}[sys.argv[1]](*sys.argv[2:])
