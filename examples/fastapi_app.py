"""A chat server of three endpoints: plain user code, with no word about telemetry or energy in it.

    MELODI_SOURCES=estimate opentelemetry-instrument uvicorn --app-dir examples fastapi_app:app
    curl 'http://127.0.0.1:8000/generate?prompt=hello&tokens=32'
    curl -N 'http://127.0.0.1:8000/stream?prompt=hello&tokens=32'

The model is tiny, made on the spot and says nothing of sense; any other one of transformers takes its place. Run as it is
(``python examples/fastapi_app.py``), it answers one request by itself and ends.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from transformers import TextIteratorStreamer

from melodi_otel.testing import tiny_model  # in your program: AutoModelForCausalLM and AutoTokenizer

app = FastAPI()
model, tokenizer = tiny_model.llama(), tiny_model.tokenizer()


@app.get("/health")
def health() -> str:
    return "ok"


@app.get("/generate")
def generate(prompt: str, tokens: int = 32) -> dict[str, Any]:
    inputs = tokenizer(prompt, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return {"text": tokenizer.decode(output[0], skip_special_tokens=True)}


@app.get("/stream")
def stream(prompt: str, tokens: int = 32) -> StreamingResponse:
    inputs = tokenizer(prompt, return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, timeout=60)
    options = {**inputs, "max_new_tokens": tokens, "do_sample": False, "streamer": streamer}
    threading.Thread(target=model.generate, kwargs=options, daemon=True).start()

    def words() -> Iterator[str]:
        yield from streamer

    return StreamingResponse(words(), media_type="text/plain")


if __name__ == "__main__":
    import melodi_otel

    melodi_otel.instrument()
    print(generate("hello", 8)["text"])
    print(melodi_otel.recent())
