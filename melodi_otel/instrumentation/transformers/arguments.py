"""What a caller of ``generate()`` asked for, read without changing or keeping anything of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from melodi_otel.instrumentation.seam import AttributeValue

POSITIONAL: Final = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
)
"""Parameters of ``generate`` after ``self``, as far as anything here reads them; the same in 4.57 and 5.x."""


class Arguments:
    """The arguments of one call, with transformers' rule for settings: the keyword, else the caller's
    ``generation_config``, else the model's own.

    Args:
        model: the object ``generate`` was called on.
        args, kwargs: what it was called with.
    """

    __slots__ = ("_configs", "_given")

    def __init__(self, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._given: dict[str, Any] = {**dict(zip(POSITIONAL, args, strict=False)), **kwargs}
        configs = (self._given.get("generation_config"), getattr(model, "generation_config", None))
        self._configs = tuple(config for config in configs if config is not None)

    def get(self, name: str) -> Any:
        """An argument as given, or None."""
        return self._given.get(name)

    def setting(self, name: str) -> Any:
        """A generation setting, or None where nobody set it."""
        value = self._given.get(name)
        if value is not None:
            return value
        for config in self._configs:
            value = getattr(config, name, None)
            if value is not None:
                return value
        return None

    def whole(self, name: str, default: int) -> int:
        """A setting that counts something."""
        value = self.setting(name)
        return default if value is None else int(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """A setting that is a token id, a list of them or a tensor; empty where nobody set it."""
        value = self.setting(name)
        if value is None:
            return ()
        found: Any = value.tolist() if hasattr(value, "tolist") else value
        try:
            return tuple(int(token) for token in found)
        except TypeError:
            return (int(found),)

    @property
    def paged(self) -> bool:
        """Whether transformers hands this call to continuous batching, which has no step clock."""
        return self.get("cache_implementation") == "paged"

    @property
    def custom(self) -> bool:
        """Whether somebody else's loop generates, whose result may be anything."""
        return self.get("custom_generate") is not None

    def limit(self, width: int, positions: int | None) -> int | None:
        """The most tokens a sequence may get, or None where that cannot be told.

        Args:
            width: columns of the returned ids that belong to the prompt.
            positions: positions of the prompt in the decoder.
        """
        new = self.setting("max_new_tokens")
        if new is not None:
            return int(new)
        total = self.setting("max_length")
        if total is None:
            return None
        left = int(total) - max(width, positions or 0)
        return left if left > 0 else None

    def attributes(self) -> dict[str, AttributeValue]:
        """``gen_ai.request.*``: only what was set, and sampling parameters only where they are used."""
        found: dict[str, AttributeValue] = {}
        if (most := self.setting("max_new_tokens")) is not None:
            found["gen_ai.request.max_tokens"] = int(most)
        if self.setting("do_sample"):
            for name in ("temperature", "top_p", "top_k"):
                if (value := self.setting(name)) is not None:
                    found[f"gen_ai.request.{name}"] = float(value)
        if (choices := self.whole("num_return_sequences", 1)) != 1:
            found["gen_ai.request.choice.count"] = choices
        if self.get("streamer") is not None:
            found["gen_ai.request.stream"] = True
        if (stops := self.setting("stop_strings")) is not None:
            found["gen_ai.request.stop_sequences"] = (stops,) if isinstance(stops, str) else tuple(map(str, stops))
        return found
