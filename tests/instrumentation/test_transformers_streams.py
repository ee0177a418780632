"""A streamer made in a request and a raw thread that generates: the streamer remembers where it was made."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
import transformers
from transformers import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer

from melodi_otel.instrumentation.transformers import TransformersInstrumentor

PROMPT = torch.tensor([[5, 6, 7, 8]])


def in_a_thread(model, **given):
    thread = threading.Thread(target=model.generate, args=(PROMPT,), kwargs={"max_new_tokens": 2, **given})
    thread.start()
    thread.join()


def test_handed_over(instrumented, llama, tokenizer):
    """What the streamer's maker stood in comes with the call, whichever thread makes it."""
    instrumented.here = "request 1"
    first = TextIteratorStreamer(tokenizer)
    instrumented.here = "request 2"
    second = TextStreamer(tokenizer)
    instrumented.here = None
    third = TextIteratorStreamer(tokenizer)
    for streamer in (second, first, third):
        in_a_thread(llama, streamer=streamer)
    in_a_thread(llama)
    assert [call.begin.origin for call in instrumented.made] == ["request 2", "request 1", None, None]


@pytest.mark.asyncio
async def test_async_streamer(instrumented, llama, tokenizer):
    """The same with the streamer for asyncio."""
    instrumented.here = "request"
    streamer = AsyncTextIteratorStreamer(tokenizer)
    thread = threading.Thread(target=llama.generate, args=(PROMPT,), kwargs={"max_new_tokens": 2, "streamer": streamer})
    thread.start()
    assert [piece async for piece in streamer]
    thread.join()
    assert instrumented.only.begin.origin == "request"


def test_subclass(instrumented, llama, tokenizer):
    """A streamer of one's own that calls super() is one of them; another object that streams changes nothing."""

    class Mine(TextIteratorStreamer):
        def __init__(self, tokenizer):
            super().__init__(tokenizer, skip_prompt=True)

    class Bare:
        __hash__ = None

        def put(self, value):
            pass

        def end(self):
            pass

    instrumented.here = "request"
    for streamer in (Mine(tokenizer), Bare()):
        in_a_thread(llama, streamer=streamer)
    assert [call.begin.origin for call in instrumented.made] == ["request", None]


def test_nothing_is_kept(instrumented, tokenizer):
    """A streamer and what it was made in live no longer because of us, and a streamer looks and copies as before."""

    class Where:
        pass

    instrumented.here = Where()
    streamer = TextStreamer(tokenizer)
    assert set(vars(streamer)) == set(vars(copy.copy(streamer)))
    assert not [name for name in vars(streamer) if "melodi" in name or "origin" in name]
    where, alive = weakref.ref(instrumented.here), weakref.ref(streamer)
    instrumented.here = None
    del streamer
    gc.collect()
    assert (alive(), where()) == (None, None)


def test_undone(calls, tokenizer):
    """uninstrument() puts the streamers' constructor back."""
    before = TextStreamer.__dict__["__init__"]
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    assert TextStreamer.__dict__["__init__"] is not before
    instrumentor.uninstrument()
    assert TextStreamer.__dict__["__init__"] is before
    assert transformers.TextStreamer(tokenizer).tokenizer is tokenizer


def test_failing(instrumented, llama, tokenizer, monkeypatch):
    """If where cannot be noted, the streamer is made and the call reported all the same."""

    def fail():
        raise RuntimeError("no")

    monkeypatch.setattr(instrumented, "origin", fail)
    in_a_thread(llama, streamer=TextIteratorStreamer(tokenizer))
    assert instrumented.only.begin.origin is None
