"""How big a model is, by its configuration; what is not known is left out."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from melodi_otel.instrumentation.sizes import known_name, size


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B"),
        ("/models/tiny/", "tiny"),
        ("./tiny", "tiny"),
        ("C:\\models\\tiny", "tiny"),
        ("/cache/models--org--name/snapshots/abc", "org/name"),
        ("  ", None),
    ],
)
def test_names(path: str, name: str | None) -> None:
    """A name of the hub stays, a directory is its last part, a snapshot what it is a snapshot of."""
    assert known_name(path) == name


def config(**more: Any) -> Any:
    return SimpleNamespace(**{"num_hidden_layers": 2, "hidden_size": 128, "num_attention_heads": 4, **more})


def test_a_dense_model() -> None:
    """Parameters, layers, hidden size and the bytes of cache per token: 2 x layers x heads x size of a head x 2 bytes."""
    assert size(config(num_key_value_heads=2), 2, 1000) == {
        "parameters": 1000.0,
        "active_parameters": 1000.0,
        "layers": 2,
        "hidden": 128,
        "kv_bytes_per_token": 2 * 2 * 2 * 32 * 2,
    }


def test_a_mixture_of_experts() -> None:
    """Of the experts' parameters those of the chosen ones are active."""
    found = size(config(num_local_experts=8, num_experts_per_tok=2), 2, 1000, 800)
    assert (found["experts"], found["experts_per_token"], found["active_parameters"]) == (8, 2, 400.0)


def test_experts_that_nobody_counted() -> None:
    """Where it is not known which parameters are experts', the active ones are not known."""
    found = size(config(num_local_experts=8, num_experts_per_tok=2), 2, 0)
    assert "active_parameters" not in found
    assert "parameters" not in found


def test_layers_without_a_cache() -> None:
    """Layers of linear attention keep none."""
    found = size(config(layer_types=["linear_attention", "full_attention"]), 2)
    assert found["kv_bytes_per_token"] == 2 * 1 * 4 * 32 * 2


def test_latent_attention() -> None:
    """Keys and values of different sizes are both counted."""
    found = size(config(v_head_dim=16, qk_head_dim=24), 2)
    assert found["kv_bytes_per_token"] == 2 * 4 * (16 + 24) * 2


def test_a_text_decoder_among_several_models() -> None:
    """Of a model of several kinds the text decoder counts."""
    inner = config(num_hidden_layers=3)
    outer = SimpleNamespace(get_text_config=lambda decoder: inner, num_hidden_layers=99)
    assert size(outer, 2)["layers"] == 3


def test_nothing_known() -> None:
    """Of a configuration that says nothing nothing is said."""
    assert size(SimpleNamespace(), None) == {}
