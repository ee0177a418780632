"""What goes wrong: in the program's call, which is told as it was, and in ours, which nobody notices."""

from __future__ import annotations

import asyncio
import logging

import pytest
import torch
import transformers

from melodi_otel.attribution.meter import current
from melodi_otel.instrumentation.transformers import TransformersInstrumentor
from melodi_otel.testing import tiny_model

PROMPT = torch.tensor([[5, 6, 7, 8]])


def raising(error, at):
    """A stopping criterion that raises ``error`` in step ``at``."""

    class Raise(transformers.StoppingCriteria):
        calls = 0

        def __call__(self, input_ids, scores, **kwargs):
            self.calls += 1
            if self.calls == at:
                raise error
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    return transformers.StoppingCriteriaList([Raise()])


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (ValueError("no"), "error"),
        (torch.cuda.OutOfMemoryError("full"), "error"),
        (KeyboardInterrupt(), "abort"),
        (GeneratorExit(), "abort"),
        (SystemExit(3), "abort"),
        (asyncio.CancelledError(), "abort"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else value,
)
def test_raises(instrumented, llama, error, outcome):
    """What the call raises comes out as the same object; the call ends once, with the tokens whose steps were done."""
    with pytest.raises(type(error)) as raised:
        llama.generate(PROMPT, max_new_tokens=9, stopping_criteria=raising(error, at=4))
    assert raised.value is error
    assert error.__context__ is None
    call = instrumented.only
    end = call.ended
    assert (end.outcome, end.error, end.output_tokens, end.finish_reasons) == (outcome, error, 3, ())
    assert call.left_with == [error]
    assert call.steps_at_end == len(call.steps) == 3
    assert end.first_token_ns == call.steps[0].t1_ns
    assert current.get() is None


def test_before_the_first_token(instrumented, llama):
    """An interruption in the first step: no token, no first token, no step."""
    with pytest.raises(KeyboardInterrupt):
        llama.generate(PROMPT, max_new_tokens=9, stopping_criteria=raising(KeyboardInterrupt(), at=1))
    end = instrumented.only.ended
    assert (end.output_tokens, end.first_token_ns, instrumented.meter.steps) == (0, None, [])


def test_refused_arguments(instrumented, llama):
    """Arguments that transformers refuses are an error of the call, without tokens."""
    with pytest.raises(ValueError, match="model_kwargs"):
        llama.generate(PROMPT, no_such_argument=1)
    end = instrumented.only.ended
    assert (end.outcome, end.output_tokens, type(end.error)) == ("error", 0, ValueError)


def test_empty_tensor(calls, llama, without_and_with):
    """An empty prompt tensor breaks in transformers as it does without us, and is told."""
    nothing = torch.zeros((1, 0), dtype=torch.long)
    without, error = without_and_with(lambda: llama.generate(nothing, max_new_tokens=3))
    assert isinstance(error, Exception)
    assert (type(error), str(error)) == (type(without), str(without))
    end = calls.only.ended
    assert (calls.only.begin.prompt_tokens, end.outcome, end.output_tokens, end.error) == (0, "error", 0, error)


def test_lookup_without_an_end_id(calls, llama, without_and_with):
    """Prompt lookup on a model without an end id is refused by 4.57 and served by 5.x: with us as without."""
    known = []

    class Look(transformers.StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            known.append(input_ids.shape[1] - 4)
            return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    options = {"prompt_lookup_num_tokens": 3, "max_new_tokens": 8, "do_sample": False}
    criteria = transformers.StoppingCriteriaList([Look()])
    without, found = without_and_with(lambda: llama.generate(PROMPT, stopping_criteria=criteria, **options))
    end = calls.only.ended
    if isinstance(found, Exception):
        assert (type(found), str(found)) == (type(without), str(without))
        assert (end.outcome, end.output_tokens, end.error) == ("error", known[-1], found)
    else:
        assert torch.equal(found, without)
        assert (end.outcome, end.output_tokens, end.error) == ("length", 8, None)


def test_paged_where_there_is_none(calls, llama, without_and_with):
    """4.57 knows no paged cache, and no version a cache by no known name: refused with us as without."""
    known = hasattr(transformers, "ContinuousBatchingConfig")
    name = "no such cache" if known else "paged"
    refused = lambda: llama.generate(PROMPT, cache_implementation=name, max_new_tokens=3)
    without, error = without_and_with(refused)
    assert isinstance(error, ValueError)
    assert (type(error), str(error)) == (type(without), str(without))
    assert (calls.only.begin.prompt_tokens, calls.only.ended.outcome) == (4, "error")
    assert calls.meter.steps == []


def test_interrupted_batch(instrumented):
    """In an interrupted batch whose rows may have ended apart, the count is not known, so it is not given."""
    model = tiny_model.llama(eos=2)
    with pytest.raises(KeyboardInterrupt):
        model.generate(PROMPT.repeat(2, 1), max_new_tokens=9, stopping_criteria=raising(KeyboardInterrupt(), at=4))
    assert instrumented.only.ended.output_tokens is None


def test_interrupted_draft(instrumented, llama):
    """An assisted call interrupted in a draft of its assistant: what was accepted before counts."""

    class Stop(transformers.LogitsProcessor):
        calls = 0

        def __call__(self, input_ids, scores):
            self.calls += 1
            if self.calls == 12:
                raise KeyboardInterrupt
            return scores

    with pytest.raises(KeyboardInterrupt):
        llama.generate(
            PROMPT,
            assistant_model=tiny_model.assistant(),
            max_new_tokens=30,
            do_sample=False,
            logits_processor=transformers.LogitsProcessorList([Stop()]),
        )
    call = instrumented.only
    drafts = call.begin.probe.__self__._loops[0].steps.drafts
    assert len(drafts) == len(call.steps) + 1
    assert call.ended.output_tokens == drafts[-1][0] - 4


def test_streamer_that_disconnects(instrumented, llama):
    """A client that goes away raises inside a streamer; the tokens until then are told."""

    class Gone(transformers.generation.BaseStreamer):
        puts = 0

        def put(self, value):
            self.puts += 1
            if self.puts == 4:  # the prompt, then three tokens
                raise ConnectionError

        def end(self):
            pass

    with pytest.raises(ConnectionError):
        llama.generate(PROMPT, max_new_tokens=9, streamer=Gone())
    assert instrumented.only.ended.output_tokens == 2


def test_the_next_call_after_a_failure(instrumented, llama):
    """After a failure the next call is an outermost one again."""
    with pytest.raises(ValueError):
        llama.generate(PROMPT, max_new_tokens=9, stopping_criteria=raising(ValueError(), at=2))
    llama.generate(PROMPT, max_new_tokens=2)
    assert [call.ended.outcome for call in instrumented.made] == ["error", "length"]


def broken(*args, **kwargs):
    raise RuntimeError("ours")


@pytest.mark.parametrize("where", ["begin", "engine", "step", "end", "bind", "active", "exit", "now_ns"])
def test_our_own_failures(calls, llama, monkeypatch, caplog, where):
    """Whatever of ours fails, the program has its result; one warning, the rest at debug."""

    class Broken:
        def __enter__(self):
            return None

        def __exit__(self, *args):
            raise RuntimeError("ours")

    recorded = type(calls.begin(None))
    calls.made.clear()
    if where in ("begin", "now_ns"):
        monkeypatch.setattr(calls, where, broken)
    elif where in ("engine", "step"):
        monkeypatch.setattr(calls.meter, where, broken)
    elif where == "exit":
        monkeypatch.setattr(recorded, "active", lambda self: Broken())
    else:
        monkeypatch.setattr(recorded, where, broken)
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    try:
        with caplog.at_level(logging.DEBUG, logger="melodi_otel"):
            for _ in range(2):
                assert llama.generate(PROMPT, max_new_tokens=3).shape == (1, 7)
    finally:
        instrumentor.uninstrument()
    levels = [record.levelno for record in caplog.records if "transformers instrumentation" in record.message]
    assert levels[0] == logging.WARNING
    assert set(levels[1:]) == {logging.DEBUG}


def test_the_error_survives_our_failure(calls, llama, monkeypatch):
    """If ours fails while the program's own error passes, the program still gets its own error."""
    monkeypatch.setattr(calls, "begin", broken)
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    error = ValueError("theirs")
    try:
        with pytest.raises(ValueError, match="theirs") as raised:
            llama.generate(PROMPT, max_new_tokens=3, stopping_criteria=raising(error, at=2))
    finally:
        instrumentor.uninstrument()
    assert raised.value is error


def test_a_span_cannot_swallow(calls, llama, monkeypatch):
    """A context manager that would suppress the error suppresses nothing."""

    class Swallow:
        def __enter__(self):
            return None

        def __exit__(self, *args):
            return True

    recorded = type(calls.begin(None))
    calls.made.clear()
    monkeypatch.setattr(recorded, "active", lambda self: Swallow())
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    try:
        with pytest.raises(ValueError):
            llama.generate(PROMPT, max_new_tokens=3, stopping_criteria=raising(ValueError(), at=2))
    finally:
        instrumentor.uninstrument()


def test_strange_results_are_passed_through(calls, llama):
    """What comes back is the very object, whatever it is."""
    answer = object()
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    try:
        assert (
            llama.generate(PROMPT, custom_generate=lambda model, input_ids, **kwargs: answer, max_new_tokens=2)
            is answer
        )
    finally:
        instrumentor.uninstrument()
    assert calls.only.ended.output_tokens is None
