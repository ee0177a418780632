"""The active adapter of a model, told by its layers."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from melodi_otel.instrumentation.transformers.adapters import Adapter
from melodi_otel.testing import tiny_model


class Adapted(torch.nn.Module):
    """A layer that says what PEFT's layers say."""

    def __init__(self, active: list[str]) -> None:
        super().__init__()
        self.active = active
        self.off = False

    @property
    def active_adapters(self) -> list[str]:
        return self.active

    @property
    def disable_adapters(self) -> bool:
        return self.off

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


@pytest.fixture
def model() -> Any:
    made = tiny_model.llama()
    made.model.norm = torch.nn.Sequential(made.model.norm, Adapted(["fr"]))
    made.peft_config = {"fr": object(), "de": object()}
    return made


def test_the_active_one(model: Any) -> None:
    """The name is read anew at each call: switched, several at once, all off, on again."""
    adapter, layer = Adapter(model), model.model.norm[1]
    assert adapter() == "fr"
    layer.active = ["de", "fr"]
    assert adapter() == "de+fr"
    layer.off = True
    assert adapter() is None
    layer.off, layer.active = False, ["de"]
    assert adapter() == "de"


def test_models_without_one() -> None:
    """A model without adapters has none, though transformers gives each a method of that name."""
    assert Adapter(tiny_model.llama())() is None


def test_merged_into_the_weights(model: Any) -> None:
    """Where the layers are gone, nothing computes apart any more."""
    adapter = Adapter(model)
    assert adapter() == "fr"
    model.model.norm = model.model.norm[0]
    gc.collect()
    assert adapter() is None


def test_what_cannot_be_told(model: Any) -> None:
    """A layer that fails to answer gives None and raises nothing."""
    model.model.norm[1].active = None
    assert Adapter(model)() is None


def test_the_call_is_told(instrumented: Any, model: Any) -> None:
    """generate() reports the adapter that is active when it begins."""
    inputs = tiny_model.tokenizer()("the quick", return_tensors="pt")
    model.generate(**inputs, max_new_tokens=2)
    model.model.norm[1].off = True
    model.generate(**inputs, max_new_tokens=2)
    assert [call.begin.adapter for call in instrumented.made] == ["fr", None]
