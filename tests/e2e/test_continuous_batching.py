"""Continuous batching in a whole program: 16 requests in one loop, a GPU's counter, spans with joules, balanced books."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider

from melodi_otel.config import Config
from melodi_otel.runtime import Runtime
from melodi_otel.testing.nvml import CompilerMissing, FakeGpu, FakeNvml
from melodi_otel.testing.telemetry import CapturedSpans

pytestmark = pytest.mark.e2e

GPU = "GPU-11111111-2222-3333-4444-555555555555"


def test_sixteen_requests(tmp_path: Path, capsys: pytest.CaptureFixture[str], need: Callable[..., None]) -> None:
    """Each request has its span under the caller's and its tokens; joules are divided by steps; books to 1e-9."""
    need("torch", "transformers")
    import torch
    import transformers

    if not hasattr(transformers, "ContinuousBatchingConfig"):
        pytest.skip("continuous batching of this transformers needs an accelerator")
    from melodi_otel.testing import tiny_model

    torch.set_num_threads(1)
    try:
        fake = FakeNvml(tmp_path / "nvml", [FakeGpu(GPU, watts=300.0)], monotonic=True)
    except CompilerMissing as error:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
    model = tiny_model.llama()
    sizes = transformers.ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64)
    provider, captured = TracerProvider(), CapturedSpans()
    provider.add_span_processor(captured)
    # A first step may take a second and more on a busy machine; it is waited for.
    config = Config(nvml_library=str(fake.library), sources=("nvml",), engine_devices=(GPU,), span_wait=20.0)
    runtime = Runtime(config, environ={}, tracer_provider=provider)
    runtime.start()
    runtime.instrument_libraries()
    try:
        asked = {}
        with model.continuous_batching_context_manager(continuous_batching_config=sizes) as manager:
            with provider.get_tracer("test").start_as_current_span("caller") as caller:
                for index in range(16):
                    asked[3 + index] = 150 + index
                    manager.add_request(list(range(5, 8 + index)), max_new_tokens=150 + index)
            for _ in range(16):
                assert manager.get_result(timeout=60) is not None
        assert runtime.wait_settled(20.0)
    finally:
        runtime.shutdown()
        fake.close()
    records = [record for record in runtime.store.recent() if record.kind == "request"]
    assert {record.prompt_tokens: record.output_tokens for record in records} == asked
    assert {record.energy.method for record in records} == {"step"}
    assert {record.energy.quality for record in records} <= {"measured", "interpolated"}
    book = runtime.snapshot().books[GPU]
    assert book.in_flight == 0.0
    assert abs(book.imbalance()) <= 1e-9
    joules = sum(share.joules or 0.0 for record in records for share in record.shares)
    assert joules == pytest.approx(book.attributed, rel=1e-9)
    spans = [span for span in captured.ended if span.name != "caller"]
    assert len(spans) == 16
    for span in spans:
        assert span.parent is not None
        assert span.parent.span_id == caller.get_span_context().span_id
        assert span.attributes is not None
        assert span.attributes.get("melodi.energy.method") == "step", dict(span.attributes)
        assert span.attributes["gen_ai.usage.output_tokens"] == asked[span.attributes["gen_ai.usage.input_tokens"]]
    with capsys.disabled():
        print(
            f"\n  16 requests {book.attributed:.2f} J of {book.measured:.2f} J; imbalance {book.imbalance():.0e}",
            end="",
        )
