"""A user's server for ``gunicorn --preload``: the model is loaded and metered before the workers are forked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

import melodi_otel
from melodi_otel.testing import tiny_model

torch.set_num_threads(1)
melodi_otel.instrument()
model, tokenizer = tiny_model.llama(), tiny_model.tokenizer()


def app(environ: dict[str, Any], start_response: Callable[..., object]) -> Iterable[bytes]:
    """Generate as many tokens as the path says; ``/0`` only says who serves."""
    tokens = int(environ["PATH_INFO"].strip("/") or 0)
    if tokens:
        inputs = tokenizer("the quick brown fox", return_tensors="pt")
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    start_response("200 OK", [("Content-Type", "application/json")])
    return [json.dumps({"pid": os.getpid()}).encode()]
