"""A model as an engine: declared once, named for people, sized from its own config."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from melodi_otel.attribution.meter import EngineId
from melodi_otel.instrumentation.transformers import engines
from melodi_otel.testing import tiny_model

PROMPT = torch.tensor([[5, 6, 7, 8]])


def test_declared_once(instrumented, llama):
    """One declaration per model object, with what the meter wants to know."""
    other = tiny_model.llama()
    for model in (llama, llama, other):
        model.generate(PROMPT, max_new_tokens=1)
    ids = [engine for engine, _ in instrumented.meter.engines]
    assert ids == [EngineId("g", 0), EngineId("g", 1)]
    assert [call.begin.engine for call in instrumented.made] == [ids[0], ids[0], ids[1]]
    parameters = float(sum(parameter.numel() for parameter in llama.parameters()))
    assert instrumented.meter.engines[0][1] == {
        "state": "ready",
        "model": "LlamaForCausalLM",
        "devices": (),
        "parameters": parameters,
        "active_parameters": parameters,
        "kv_bytes_per_token": 2 * 2 * 2 * 16 * 4.0,  # key and value, layers, heads, size of a head, four bytes
        "layers": 2,
        "hidden": 64,
    }


def test_another_meter(instrumented, llama):
    """A meter that is new to the process (after a fork, say) hears of the engine again, under the same id."""
    llama.generate(PROMPT, max_new_tokens=1)
    instrumented.meter = type(instrumented.meter)()
    llama.generate(PROMPT, max_new_tokens=1)
    assert [engine for engine, _ in instrumented.meter.engines] == [instrumented.made[0].begin.engine]


def test_half_precision(llama):
    """Two bytes a value halve the cache."""
    model = tiny_model.llama().to(torch.bfloat16)
    assert engines.size_of(model)["kv_bytes_per_token"] == engines.size_of(llama)["kv_bytes_per_token"] / 2


def test_mixture():
    """A mixture of experts: two of four experts and everything else are active."""
    model = tiny_model.mixture()
    size = engines.size_of(model)
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert experts > 0
    assert (size["experts"], size["experts_per_token"]) == (4, 2)
    assert size["active_parameters"] == size["parameters"] - experts / 2


def test_encoder_decoder(t5):
    """T5's own field names are understood."""
    size = engines.size_of(t5)
    assert (size["layers"], size["hidden"], size["kv_bytes_per_token"]) == (2, 64, 2 * 2 * 4 * 16 * 4)


def test_unknown_is_absent():
    """A model without a config tells nothing rather than zeros."""
    model = torch.nn.Linear(2, 2)
    assert engines.size_of(model) == {"parameters": 6.0, "active_parameters": 6.0}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
        ("gpt2", "gpt2"),
        ("/srv/models/llama-8b/", "llama-8b"),
        ("./llama-8b", "llama-8b"),
        ("~/models/llama-8b", "llama-8b"),
        ("C:\\models\\llama-8b", "llama-8b"),
        ("data/models/llama-8b", "llama-8b"),
        ("/c/hub/models--meta-llama--Llama-3.1-8B/snapshots/0e9e39f2/", "meta-llama/Llama-3.1-8B"),
        ("", "SimpleNamespace"),
        (None, "SimpleNamespace"),
    ],
)
def test_name(path, name):
    """Hub names stay, directories give their last component, nothing gives the class."""
    assert engines.model_name(SimpleNamespace(name_or_path=path)) == name


class Placed:
    """A model whose parameters lie where they are said to."""

    def __init__(self, *places):
        self.places = [torch.device(place) for place in places]

    def parameters(self):
        return iter([SimpleNamespace(device=place) for place in self.places])


@pytest.fixture
def two_gpus(monkeypatch):
    cuda = SimpleNamespace(
        current_device=lambda: 1,
        get_device_properties=lambda index: SimpleNamespace(uuid=f"0000000{index}-aaaa"),
    )
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))


@pytest.mark.parametrize(
    ("places", "devices"),
    [
        (("cpu",), ()),
        (("cuda:0",), ("GPU-00000000-aaaa",)),
        (("cuda:0", "cuda:1", "cuda:0"), ("GPU-00000000-aaaa", "GPU-00000001-aaaa")),
        (("cuda",), ("GPU-00000001-aaaa",)),
        (("cuda:0", "cpu", "meta"), ("GPU-00000000-aaaa",)),
        (("meta",), None),
        (("mps",), None),
        ((), None),
    ],
    ids=str,
)
def test_devices(two_gpus, places, devices):
    """CPU only is no accelerator, CUDA devices have their UUIDs, anything else is not known."""
    assert engines.devices_of(Placed(*places)) == devices
