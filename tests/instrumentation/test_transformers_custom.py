"""A repository that ships its own ``generate``: as the model's attribute, as an argument, as a function."""

from __future__ import annotations

import pytest
import torch
import transformers

from melodi_otel.instrumentation.transformers import TransformersInstrumentor
from melodi_otel.testing import tiny_model

PROMPT = torch.tensor([[5, 6, 7, 8]])

OWN_LOOP = """
import torch

def generate(model, input_ids, times=3, **kwargs):
    for _ in range(times):
        new = model(input_ids).logits[:, -1:].argmax(-1)
        input_ids = torch.cat([input_ids, new], dim=-1)
    return {"ids": input_ids}
"""
HANDING_ON = """
def generate(model, input_ids, times=3, **kwargs):
    return type(model).generate(model, input_ids, max_new_tokens=times)
"""


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A function: a directory with the tiny model, its ``custom_generate/generate.py`` being the given text."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))

    def make(text):
        folder = tmp_path / "repository"
        tiny_model.llama().save_pretrained(folder)
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(text, encoding="utf-8")
        return str(folder)

    return make


def test_attribute(instrumented, repository):
    """A model loaded with its own generate() is seen as any other; what it returns is untouched and not counted."""
    model = transformers.AutoModelForCausalLM.from_pretrained(repository(OWN_LOOP), trust_remote_code=True)
    assert "generate" in model.__dict__
    out = model.generate(input_ids=PROMPT, times=2)
    assert out["ids"].shape == (1, 6)
    call = instrumented.only
    assert call.begin.model == "repository"
    assert (call.ended.output_tokens, call.ended.outcome, call.steps) == (None, "stop", [])


def test_attribute_that_hands_on(instrumented, repository):
    """Where it calls transformers' own in the end, that one's tokens and steps are the request's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(repository(HANDING_ON), trust_remote_code=True)
    model.generate(input_ids=PROMPT)
    call = instrumented.only
    assert (call.ended.prompt_tokens, call.ended.output_tokens) == (4, 3)
    assert call.work == (4, 2, 0)


def test_attribute_after_uninstrument(calls, repository):
    """Nothing is reported any more once everything is undone, though the model keeps what it was loaded with."""
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    model = transformers.AutoModelForCausalLM.from_pretrained(repository(OWN_LOOP), trust_remote_code=True)
    instrumentor.uninstrument()
    assert model.generate(input_ids=PROMPT)["ids"].shape == (1, 7)
    assert calls.made == []


def test_attribute_raises(instrumented, repository):
    """Its errors are the caller's, and the call has ended."""
    model = transformers.AutoModelForCausalLM.from_pretrained(repository(OWN_LOOP), trust_remote_code=True)
    with pytest.raises(TypeError):
        model.generate(input_ids=PROMPT, times="three")
    assert instrumented.only.ended.outcome == "error"


@pytest.mark.parametrize(("text", "tokens"), [(OWN_LOOP, None), (HANDING_ON, 3)], ids=["own loop", "handing on"])
def test_argument(instrumented, repository, text, tokens):
    """custom_generate= of a repository is one call, with tokens where transformers' own loop ran."""
    model = tiny_model.llama()
    model.generate(input_ids=PROMPT, custom_generate=repository(text), trust_remote_code=True)
    assert instrumented.only.ended.output_tokens == tokens


def test_function(instrumented, llama):
    """custom_generate= of a function is one call; what a loop of one's own returns is not counted."""

    def loop(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        return torch.cat([input_ids, input_ids], dim=-1)

    assert llama.generate(PROMPT, custom_generate=loop, max_new_tokens=4).shape == (1, 8)
    assert (instrumented.only.ended.prompt_tokens, instrumented.only.ended.output_tokens) == (4, None)
