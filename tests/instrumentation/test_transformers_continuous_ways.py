"""Other ways into continuous batching: generate() with a paged cache, and the manager of ``transformers serve``."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
import torch
import transformers
from transformers.generation.continuous_batching import continuous_api

from melodi_otel.instrumentation.transformers import TransformersInstrumentor
from melodi_otel.testing import tiny_model

SIZED = getattr(transformers, "ContinuousBatchingConfig", None)
pytestmark = pytest.mark.skipif(
    SIZED is None, reason="4.57 has none of these; that generate() refuses is test_paged_where_there_is_none"
)
PROMPTS = torch.tensor([[5, 6, 7, 8], [8, 7, 6, 5]])


@pytest.fixture
def options():
    return {
        "cache_implementation": "paged",
        "max_new_tokens": 4,
        "continuous_batching_config": SIZED(num_blocks=8, max_batch_tokens=64),
    }


@pytest.fixture
def model():
    return tiny_model.llama()


def test_paged(instrumented, model, options):
    """Paged generation is a call per row with steps of the loop; generate() itself is none."""
    result = model.generate(PROMPTS, **options)
    assert result.shape == (1, 2, 8)
    assert len(instrumented.made) == 2
    for call in instrumented.made:
        assert (call.begin.prompt_tokens, call.ended.output_tokens, call.ended.outcome) == (4, 4, "length")
        assert call.begin.start_ns < call.ended.first_token_ns < call.ended.end_ns
        assert call.begin.attributes["gen_ai.request.max_tokens"] == 4
    assert sum(row.tokens for step in instrumented.meter.steps for row in step.prefill) == 8
    assert sum(step.decode.n for step in instrumented.meter.steps) == 6


def test_paged_in_a_chat(instrumented, tokenizer, options):
    """A pipeline that is given a chat says so of its paged requests."""
    model = tiny_model.llama()
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    with contextlib.suppress(Exception):  # what the pipeline makes of the result is not the point
        pipe([{"role": "user", "content": "hello"}], **options)
    assert [call.begin.operation for call in instrumented.made] == ["chat"]


def test_paged_refused(calls, model, options, without_and_with):
    """What paged generation refuses comes to no request, so the refusal is the call."""
    without, error = without_and_with(lambda: model.generate(PROMPTS, streamer=object(), **options))
    assert isinstance(error, NotImplementedError)
    assert (type(error), str(error).split(" at ")[0]) == (type(without), str(without).split(" at ")[0])
    end = calls.only.ended
    assert (calls.only.begin.prompt_tokens, end.outcome, end.error) == (8, "error", error)
    assert calls.meter.steps == []


def test_paged_interrupted(instrumented, model, options, monkeypatch):
    """An interrupted generate() ends the requests that it had added, each once."""

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(continuous_api.ContinuousBatchingManager, "get_result", interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPTS, **{**options, "max_new_tokens": 20})
    # transformers lets its loop run on for a while, so either comes first
    assert [call.ended.outcome for call in instrumented.made] in (["abort"] * 2, ["length"] * 2, ["error"] * 2)


def test_paged_without_the_loop(calls, model, options, monkeypatch):
    """Where the loop cannot be followed, a paged generate() is one call with exact counts and no steps."""
    monkeypatch.delattr(continuous_api.OutputRouter, "fail_and_deliver")
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    try:
        model.generate(PROMPTS, **options)
    finally:
        instrumentor.uninstrument()
    call = calls.only
    assert (call.begin.prompt_tokens, call.ended.output_tokens) == (8, 8)
    assert (call.begin.probe, call.ended.first_token_ns, calls.meter.steps) == (None, None, [])


def test_served(instrumented, model, tokenizer):
    """The manager of ``transformers serve --continuous-batching``: two at a time, one of them streamed, one cancelled."""
    from transformers.cli.serving.utils import CBGenerateManager

    settings = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1)
    endless = transformers.GenerationConfig(max_new_tokens=900, do_sample=False, eos_token_id=-1)

    async def ask():
        generator = CBGenerateManager(SIZED(num_blocks=16, max_batch_tokens=64))
        generator.init_cb(model, settings)
        try:
            whole = generator.generate_non_streaming(model, tokenizer, {"input_ids": [5, 6, 7]}, settings, "whole")
            queue, _ = generator.generate_streaming(model, tokenizer, {"input_ids": [5, 6, 7, 8]}, settings, "parts")
            _, gone = generator.generate_streaming(model, tokenizer, {"input_ids": [9, 9]}, endless, "gone")
            result = await asyncio.wait_for(whole, 30)
            while await asyncio.wait_for(queue.get(), 30) is not None:
                pass
            gone.cancel()  # what the server does when a client is gone
            return result
        finally:
            await asyncio.to_thread(generator.stop)

    _, prompt, tokens = asyncio.run(ask())
    assert (prompt, len(tokens)) == (3, 6)
    found = {call.begin.prompt_tokens: call for call in instrumented.made}
    assert {
        size: (call.ended.outcome, call.begin.attributes.get("gen_ai.request.stream")) for size, call in found.items()
    } == {
        3: ("length", None),
        4: ("length", True),
        2: ("abort", True),
    }
    assert [found[size].ended.output_tokens for size in (3, 4)] == [6, 6]
    assert 0 < found[2].ended.output_tokens < 900
