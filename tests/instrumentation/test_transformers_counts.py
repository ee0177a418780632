"""Counting: the same figures from one row, many rows, masks, ids and shapes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from melodi_otel.instrumentation.transformers.arguments import Arguments
from melodi_otel.instrumentation.transformers.counts import cached_length, completion_of, prompt_of


def plainly(row, eos, pad, padded):
    """The rule in words: up to and including the first end; else all, without padding a batch put there."""
    for index, token in enumerate(row):
        if token in eos:
            return index + 1
    kept = list(row)
    while padded and eos and pad is not None and pad not in eos and kept and kept[-1] == pad:
        kept.pop()
    return len(kept)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 4).flatmap(
        lambda n: st.integers(0, 6).flatmap(
            lambda width: st.lists(st.lists(st.integers(0, 4), min_size=width, max_size=width), min_size=n, max_size=n)
        )
    ),
    width=st.integers(0, 2),
    eos=st.sampled_from([(), (2,), (2, 3), (0,)]),
    pad=st.sampled_from([None, 0, 2]),
    padded=st.booleans(),
)
def test_completion(rows, width, eos, pad, padded):
    """Vectorised or by one row, the count is the one the rule gives."""
    ids = torch.tensor([[9] * width + row for row in rows], dtype=torch.long).reshape(len(rows), -1)
    done = completion_of(ids, width, eos, pad, padded=padded)
    # a single row is never padded: its loop ends with it
    apart = padded and len(rows) > 1
    assert done.tokens == [plainly(row, eos, pad, apart) for row in rows]
    assert done.ended == [any(token in eos for token in row) for row in rows]


def counted(encoder_decoder=False, **kwargs):
    prompt = prompt_of(Arguments(None, (), kwargs), encoder_decoder=encoder_decoder)
    return prompt.rows, prompt.width, prompt.tokens, prompt.computed


IDS = torch.tensor([[0, 5, 6], [5, 6, 7]])


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ({"input_ids": IDS}, (2, 3, [3, 3], [3, 3])),
        ({"input_ids": IDS, "pad_token_id": 0}, (2, 3, [2, 3], [2, 3])),
        ({"input_ids": IDS, "pad_token_id": 0, "eos_token_id": [0, 2]}, (2, 3, [3, 3], [3, 3])),
        ({"inputs": IDS, "attention_mask": IDS > 5}, (2, 3, [1, 2], [1, 2])),
        ({"inputs": IDS, "attention_mask": (IDS > 5).float()}, (2, 3, [1, 2], [1, 2])),
        ({"inputs": IDS, "attention_mask": torch.ones(2, 1, 3, 3)}, (2, 3, [3, 3], [3, 3])),
        ({"inputs_embeds": torch.zeros(2, 5, 8)}, (2, 0, [5, 5], [5, 5])),
        (
            {"inputs_embeds": torch.zeros(2, 5, 8), "input_ids": torch.zeros(2, 0, dtype=torch.long)},
            (2, 0, [5, 5], [5, 5]),
        ),
        ({"input_features": torch.zeros(2, 80, 30), "encoder_decoder": True}, (2, 1, None, None)),
        ({"inputs": torch.zeros(1, 3, 8, 8), "encoder_decoder": True}, (1, 1, None, None)),
        ({"inputs": IDS, "encoder_decoder": True}, (2, 1, [3, 3], [3, 3])),
        ({}, (1, 1, [1], [1])),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_prompt(given_, expected):
    """Rows, columns in the result, tokens per row, computed ones: None where only the model could know."""
    assert counted(**given_) == expected


class Cache:
    """A cache that holds so many positions."""

    def __init__(self, held):
        self.held = held

    def get_seq_length(self):
        return self.held


def test_cached_padding():
    """Of a padded conversation, the padding in the cache is neither cached prompt nor computed."""
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = torch.full((2, 5), 5)
    assert counted(input_ids=ids, attention_mask=mask, past_key_values=Cache(3)) == (2, 5, [3, 5], [2, 2])


def test_only_the_new_ids():
    """New ids alone under a mask of the whole conversation: the mask tells."""
    mask = torch.ones(1, 9, dtype=torch.long)
    assert counted(input_ids=torch.tensor([[5, 6]]), attention_mask=mask, past_key_values=Cache(7)) == (1, 2, [9], [2])


def test_cache_forms():
    """No cache, a cache object, one that answers with a tensor, and pairs of tensors."""
    pairs = ((torch.zeros(1, 2, 7, 4), torch.zeros(1, 2, 7, 4)),)
    assert [cached_length(each) for each in (None, Cache(3), Cache(torch.tensor(4)), pairs, ())] == [0, 3, 4, 7, 0]


def test_settings_in_order():
    """The keyword wins over the caller's config, that over the model's own."""
    model = SimpleNamespace(generation_config=SimpleNamespace(num_beams=2, top_k=3, pad_token_id=0))
    mine = SimpleNamespace(num_beams=4, top_k=None)
    found = Arguments(model, (None, mine), {"pad_token_id": 7})
    assert [found.setting(name) for name in ("num_beams", "top_k", "pad_token_id", "nothing")] == [4, 3, 7, None]


def test_none_as_a_keyword():
    """A keyword that is None takes the setting away, as it does in transformers."""
    model = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=2))
    assert Arguments(model, (), {"eos_token_id": None}).token_ids("eos_token_id") == ()
    assert Arguments(model, (), {}).token_ids("eos_token_id") == (2,)


class Born:
    """A config that is born with values, as in 4.57."""

    def __init__(self, version="4.57.6", **values):
        self.transformers_version = version
        self.do_sample, self.num_beams, self.top_p, self.eos_token_id = False, 1, 1.0, None
        vars(self).update(values)


@pytest.mark.parametrize(
    ("version", "options", "beams"),
    [
        ("4.57.6", {}, 4),
        ("4.50.0.dev0", {}, 4),
        ("4.49.0", {}, None),
        ("4.49.0", {"use_model_defaults": True}, 4),
        ("4.57.6", {"use_model_defaults": False}, None),
        ("4.57.6", {"num_beams": 1}, 1),
    ],
    ids=str,
)
def test_values_a_config_is_born_with(version, options, beams):
    """They count as set by nobody: the model's config stands in, though an old model's for its end ids alone."""
    model = SimpleNamespace(generation_config=Born(version, num_beams=4, eos_token_id=2))
    found = Arguments(model, (None, Born()), options)
    assert [found.setting(name) for name in ("num_beams", "top_p", "eos_token_id")] == [beams, None, 2]


@pytest.mark.parametrize(
    ("value", "ids"), [(2, (2,)), ([2, 3], (2, 3)), (torch.tensor([2, 3]), (2, 3)), (torch.tensor(2), (2,))]
)
def test_end_ids(value, ids):
    """End-of-sequence ids come as a number, a list or a tensor."""
    assert Arguments(None, (), {"eos_token_id": value}).token_ids("eos_token_id") == ids


@pytest.mark.parametrize(
    ("options", "limit"),
    [
        ({}, None),
        ({"max_new_tokens": 5}, 5),
        ({"max_length": 10}, 7),
        ({"max_length": 2}, None),
        ({"max_new_tokens": 5, "max_length": 10}, 5),
    ],
    ids=str,
)
def test_limit(options, limit):
    """New tokens as asked for, else what the length leaves behind the prompt, else unknown."""
    assert Arguments(None, (), options).limit(3, 3) == limit


@pytest.mark.parametrize(
    ("places", "width", "positions", "limit"),
    [(None, 3, 3, 20), (1024, 3, 3, 20), (16, 3, 3, 13), (16, 16, 16, None), (1024, 0, 9, None)],
)
def test_limit_nobody_set(places, width, positions, limit):
    """Where nobody set a limit, transformers stops after 20 tokens, or where the model has no more positions."""
    model = SimpleNamespace(generation_config=Born(), config=SimpleNamespace(max_position_embeddings=places))
    assert Arguments(model, (), {}).limit(width, positions) == limit


def test_attributes():
    """Sampling parameters are told only where there is sampling."""
    asked = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "stop_strings": "x",
        "streamer": object(),
        "num_return_sequences": 1,
    }
    assert Arguments(None, (), asked).attributes() == {
        "gen_ai.request.stream": True,
        "gen_ai.request.stop_sequences": ("x",),
    }
    assert Arguments(None, (), asked | {"do_sample": True}).attributes()["gen_ai.request.temperature"] == 0.7
