"""A user's program: sets up nothing of OpenTelemetry, generates with the tiny model, streams, fails, is interrupted."""

from __future__ import annotations

import os
import sys
import threading
import urllib.request

import torch
from transformers import LogitsProcessor, LogitsProcessorList, TextIteratorStreamer

import melodi_otel
from melodi_otel.testing import tiny_model

torch.set_num_threads(1)


class Failing(LogitsProcessor):
    """Raises at the fourth token."""

    def __init__(self, error: BaseException) -> None:
        self.calls = 0
        self.error = error

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 4:
            raise self.error
        return scores


runtime = melodi_otel.instrument()
assert melodi_otel.instrument() is runtime
model, tokenizer = tiny_model.llama(), tiny_model.tokenizer()
inputs = tokenizer("the quick brown fox", return_tensors="pt")
with melodi_otel.measure("all") as m:
    model.generate(**inputs, max_new_tokens=64)
    streamer = TextIteratorStreamer(tokenizer)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 32, "streamer": streamer})
    thread.start()
    list(streamer)
    thread.join()
    for error in (ValueError("no"), KeyboardInterrupt()):
        try:
            model.generate(**inputs, max_new_tokens=16, logits_processor=LogitsProcessorList([Failing(error)]))
        except (ValueError, KeyboardInterrupt) as raised:
            assert raised is error
        else:
            raise AssertionError("the user's error was lost")
print("measured", m.wait(10.0), m.joules is not None)
print("recent", len(melodi_otel.recent()))
if runtime is not None and runtime.endpoint_url:
    with urllib.request.urlopen(runtime.endpoint_url, timeout=10) as answer:
        print(answer.read().decode())
if "--exit" in sys.argv:
    os._exit(0)
