"""How big a model is and what people call it, out of its configuration as Hugging Face writes it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Final

_SNAPSHOT: Final = re.compile(r"models--(?P<name>[^/\\]+)[/\\]snapshots[/\\]")
_EXPERTS: Final = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
_EXPERTS_PER_TOKEN: Final = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")


def known_name(name: str) -> str | None:
    """A hub name as it is, a directory by its last component; None where there is no name."""
    name = name.strip()
    if snapshot := _SNAPSHOT.search(name):
        return snapshot["name"].replace("--", "/")
    parts = [part for part in re.split(r"[/\\]", name) if part]
    if not parts:
        return None
    is_path = name[0] in "./\\~" or "\\" in name or len(parts) > 2 or ":" in parts[0]
    return parts[-1] if is_path else name


def size(config: Any, itemsize: int | None, parameters: int = 0, expert_parameters: int = 0) -> dict[str, Any]:
    """What ``Meter.engine`` may be told about a model's size; unknown parts are left out.

    Args:
        config: the model's configuration; of a model of several kinds the one of its text decoder counts.
        itemsize: bytes of a number in its cache.
        parameters: all of them, and of these those of routed experts; 0 = not known.
    """
    config = _text_config(config)
    layers = _first(config, ("decoder_layers", "num_decoder_layers", "num_hidden_layers"))
    experts, per_token = _first(config, _EXPERTS), _first(config, _EXPERTS_PER_TOKEN)
    found: dict[str, Any] = {
        "parameters": float(parameters) if parameters else None,
        "layers": layers,
        "hidden": _first(config, ("hidden_size",)),
        "kv_bytes_per_token": _kv_bytes(config, itemsize, layers),
    }
    if parameters and not expert_parameters:
        found["active_parameters"] = float(parameters)
    if experts and experts > 1:
        found |= {"experts": experts, "experts_per_token": per_token}
        if parameters and expert_parameters and per_token:
            found["active_parameters"] = parameters - expert_parameters * (1 - min(per_token / experts, 1))
    return {name: value for name, value in found.items() if value is not None}


def _kv_bytes(config: Any, itemsize: int | None, layers: int | None) -> float | None:
    heads = _first(config, ("num_attention_heads", "decoder_attention_heads"))
    hidden = _first(config, ("hidden_size",))
    if not (itemsize and layers and heads and hidden):
        return None
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    if kinds:
        layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
    per_head = _first(config, ("head_dim", "d_kv")) or hidden // heads
    if (value := _first(config, ("v_head_dim",))) and (key := _first(config, ("qk_head_dim",))):
        return float(layers * heads * (key + value) * itemsize)  # latent attention is cached expanded
    kv_heads = _first(config, ("num_key_value_heads", "num_kv_heads")) or heads
    return float(2 * layers * kv_heads * per_head * itemsize)


def _text_config(config: Any) -> Any:
    try:
        return config.get_text_config(decoder=True)
    except Exception:
        return config


def _first(config: Any, names: Sequence[str]) -> int | None:
    for name in names:
        value: object = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
