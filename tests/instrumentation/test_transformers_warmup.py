"""A call during which torch compiled something says so; the next one does not."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from melodi_otel import semconv
from melodi_otel.instrumentation.transformers.compiling import compiled_frames
from melodi_otel.testing import tiny_model

PROMPT = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def compiled():
    """A tiny model whose forward is compiled, and torch as it was before."""
    import torch._dynamo

    torch._dynamo.reset()
    model = tiny_model.llama()
    model.forward = torch.compile(model.forward, backend="eager")
    yield model
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, inside its compiler
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_warmup(instrumented, compiled):
    """The first call compiles and is flagged; the same call again is not."""
    for _ in range(3):
        compiled.generate(PROMPT, max_new_tokens=3, do_sample=False)
    flags = [call.ended.attributes.get(semconv.COMPILE_WARMUP) for call in instrumented.made]
    assert flags[0] is True
    assert flags[-1] is None


def test_plain(instrumented, llama):
    """Without a compiler there is nothing to say."""
    llama.generate(PROMPT, max_new_tokens=2)
    assert semconv.COMPILE_WARMUP not in instrumented.only.ended.attributes


def test_without_torch(monkeypatch):
    """Where the compiler is not loaded, or counts otherwise, nothing is read."""
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", None)
    assert compiled_frames() == 0
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", SimpleNamespace(counters={}))
    assert compiled_frames() == 0
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", SimpleNamespace())
    assert compiled_frames() == 0
    monkeypatch.setitem(sys.modules, "torch._dynamo.utils", SimpleNamespace(counters={"frames": {"total": 7}}))
    assert compiled_frames() == 7


def test_reading_costs_little(capsys):
    """What a reading costs, for people; it decides nothing."""
    start = time.perf_counter_ns()
    for _ in range(10_000):
        compiled_frames()
    with capsys.disabled():
        print(f"\n  reading the compiler's counters: {(time.perf_counter_ns() - start) / 1e7:.2f} µs")
