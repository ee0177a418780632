"""Two requests at once that stream from raw threads: each generation is its own request's, in trace and in block."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider

from melodi_otel.config import Config
from melodi_otel.runtime import Runtime
from melodi_otel.testing.powercap import FakePowercap
from melodi_otel.testing.telemetry import CapturedSpans

pytestmark = pytest.mark.e2e


def test_streams_in_raw_threads(tmp_path: Path, need: Callable[..., None]) -> None:
    """With several blocks open nobody could guess which one a bare thread works for; its streamer knows."""
    need("torch", "transformers")
    import torch
    from transformers import TextIteratorStreamer

    from melodi_otel.testing import tiny_model

    torch.set_num_threads(1)
    model, tokenizer = tiny_model.llama(), tiny_model.tokenizer()
    inputs = tokenizer("the quick brown fox", return_tensors="pt")
    tree = FakePowercap(tmp_path / "sys")
    tree.package(0, watts=60.0)
    captured, provider = CapturedSpans(), TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(captured)
    tracer = provider.get_tracer("application")
    runtime = Runtime(Config(sysfs_root=str(tree.root), sources=("rapl",)), environ={}, tracer_provider=provider)
    runtime.start()
    runtime.instrument_libraries()
    both = threading.Barrier(2)
    blocks: dict[int, Any] = {}
    traces: dict[int, int] = {}

    def handle(tokens: int) -> None:
        with tracer.start_as_current_span("POST /ask") as span, runtime.measure(f"ask {tokens}") as block:
            both.wait()
            streamer = TextIteratorStreamer(tokenizer)
            given = {**inputs, "streamer": streamer, "max_new_tokens": tokens, "do_sample": False}
            worker = threading.Thread(target=model.generate, kwargs=given)
            worker.start()
            assert "".join(streamer)
            worker.join()
            both.wait()
        blocks[tokens], traces[span.get_span_context().trace_id] = block, tokens

    with tree.live():
        try:
            clients = [threading.Thread(target=handle, args=(tokens,)) for tokens in (40, 60)]
            for client in clients:
                client.start()
            for client in clients:
                client.join()
            assert runtime.wait_settled(20.0)
            for tokens, block in blocks.items():
                (inner,) = [record for record in block.results() if record.kind == "request"]
                assert inner.output_tokens == tokens
                assert traces[inner.trace_id] == tokens
                assert block.joules >= inner.energy.total > 0
        finally:
            runtime.shutdown()
            provider.shutdown()
