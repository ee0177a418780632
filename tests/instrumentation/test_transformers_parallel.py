"""One of several processes: its rank where that is certain, and over how many of them a model is spread."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from melodi_otel import semconv
from melodi_otel.instrumentation.transformers import TransformersInstrumentor
from melodi_otel.instrumentation.transformers.parallel import Place, Ranks, spread
from melodi_otel.testing import tiny_model

PROMPT = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture
def alone(monkeypatch):
    """No process group, whatever earlier tests loaded."""
    monkeypatch.setitem(sys.modules, "torch.distributed", None)


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "4"}, Place(1, 4)),
        ({"RANK": "0", "WORLD_SIZE": "1"}, None),
        ({"RANK": "4", "WORLD_SIZE": "4"}, None),
        ({"WORLD_SIZE": "4"}, None),
        ({"RANK": "one", "WORLD_SIZE": "4"}, None),
    ],
)
def test_launched(alone, environ, place):
    """A launcher's variables count if they make sense together."""
    assert Ranks(environ).place() == place


def test_torch_knows_better(monkeypatch):
    """An initialised process group wins over the launcher's variables, also where it has one process."""
    group = SimpleNamespace(
        is_available=lambda: True, is_initialized=lambda: True, get_rank=lambda: 2, get_world_size=lambda: 3
    )
    monkeypatch.setitem(sys.modules, "torch.distributed", group)
    ranks = Ranks({"RANK": "0", "WORLD_SIZE": "8"})
    assert ranks.place() == Place(2, 3)
    group.get_world_size = lambda: 1
    assert ranks.place() is None
    group.is_initialized = lambda: False
    assert ranks.place() == Place(0, 8)


def test_on_the_span(alone, calls, llama):
    """Rank and number of processes stand on the span; a whole copy of the model is spread over nobody."""
    instrumentor = TransformersInstrumentor(calls, {"RANK": "1", "WORLD_SIZE": "2"})
    instrumentor.instrument()
    llama.generate(PROMPT, max_new_tokens=1)
    instrumentor.uninstrument()
    attributes = calls.only.begin.attributes
    assert (attributes[semconv.RANK], attributes[semconv.WORLD_SIZE]) == (1, 2)
    assert "world" not in calls.meter.engines[0][1]


def test_alone(instrumented, alone, llama):
    """A process that stands alone says nothing of it."""
    llama.generate(PROMPT, max_new_tokens=1)
    assert semconv.RANK not in instrumented.only.begin.attributes


class Sharded:
    def __init__(self, sizes, shards):
        self.device_mesh = SimpleNamespace(size=lambda dimension: sizes[dimension])
        self.placements = [SimpleNamespace(is_shard=lambda cut=cut: cut) for cut in shards]


@pytest.mark.parametrize(
    ("parameter", "processes"),
    [
        (Sharded((4,), (True,)), 4),
        (Sharded((2, 4), (True, True)), 8),
        (Sharded((2, 4), (False, True)), 4),  # two copies, each over four
        (Sharded((2,), (False,)), None),
        (SimpleNamespace(), None),
    ],
)
def test_spread(parameter, processes):
    """Only dimensions along which parameters are cut count: along the others each process has a copy."""
    assert spread(SimpleNamespace(parameters=lambda: [SimpleNamespace(), parameter])) == processes


def test_partitioned(monkeypatch):
    """Parameters that DeepSpeed has partitioned are spread over all processes."""
    group = SimpleNamespace(is_initialized=lambda: True, get_world_size=lambda: 8)
    monkeypatch.setitem(sys.modules, "torch.distributed", group)
    assert spread(SimpleNamespace(parameters=lambda: [SimpleNamespace(ds_id=1)])) == 8


def test_whole():
    """A plain model is spread over nobody."""
    assert spread(tiny_model.llama()) is None
