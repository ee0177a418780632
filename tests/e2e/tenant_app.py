"""A user's server: FastAPI, the tiny model, OpenTelemetry's own instrumentation; nothing in it knows of labels."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from typing import Any

import torch
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from transformers import TextIteratorStreamer

import melodi_otel
from melodi_otel.testing import tiny_model

torch.set_num_threads(1)
provider = TracerProvider()
provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
trace.set_tracer_provider(provider)

app = FastAPI()
model, tokenizer = tiny_model.llama(), tiny_model.tokenizer()


def answer(tokens: int, **more: Any) -> int:
    inputs = tokenizer("the quick brown fox", return_tensors="pt")
    return int(model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **more).shape[1])


@app.get("/thread")
def in_the_thread_pool(tokens: int = 8) -> int:
    return answer(tokens)


@app.get("/loop")
async def on_the_loop(tokens: int = 8) -> int:
    return await asyncio.to_thread(answer, tokens)


@app.post("/v1/chat/completions")
def chat(body: dict[str, Any]) -> int:
    return answer(int(body["max_tokens"]))


@app.get("/stream")
def stream(tokens: int = 8) -> StreamingResponse:
    streamer = TextIteratorStreamer(tokenizer)
    here = contextvars.copy_context()
    thread = threading.Thread(target=here.run, args=(answer, tokens), kwargs={"streamer": streamer})

    def words() -> Iterator[str]:
        thread.start()
        yield from streamer
        thread.join()

    return StreamingResponse(words(), media_type="text/plain")


FastAPIInstrumentor.instrument_app(app)
melodi_otel.instrument()
