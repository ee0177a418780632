"""What a caller of ``generate()`` asked for, read without changing or keeping anything of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
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

_TOKENS: Final = frozenset({"bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"})
"""What 4.57 takes from the model's config even where it takes nothing else from there."""

_NEW_TOKENS: Final = 20
"""The most new tokens where no limit was set."""


class Arguments:
    """The arguments of one call, with transformers' rule for settings: the keyword, even if it is None, else the
    caller's ``generation_config``, else the model's own.

    A config of 4.57 is born with a value for everything, and one that still has it counts as not set there; in 5.x it is
    born empty.

    Args:
        model: the object ``generate`` was called on.
        args, kwargs: what it was called with.
        names: of the positional parameters after ``self``; those of transformers' own ``generate`` by default.
    """

    __slots__ = ("_configs", "_given", "_inherits", "_model")

    def __init__(
        self, model: Any, args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str] = POSITIONAL
    ) -> None:
        self._given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
        self._model = model
        own, models = self._given.get("generation_config"), getattr(model, "generation_config", None)
        self._configs = tuple((config, born_with(config.__class__)) for config in (own, models) if config is not None)
        self._inherits = own is None or models is None or self._takes_over(own, models)

    def _takes_over(self, own: Any, models: Any) -> bool:
        """Whether what the caller's config leaves open comes from the model's: in 4.57 not with an old model."""
        if "do_sample" not in born_with(own.__class__):
            return True
        asked = self._given.get("use_model_defaults")
        return _version(models) >= (4, 50) if asked is None else bool(asked)

    def get(self, name: str) -> Any:
        """An argument as given, or None."""
        return self._given.get(name)

    def setting(self, name: str) -> Any:
        """A generation setting, or None where nobody set it."""
        if name in self._given:
            return self._given[name]
        configs = self._configs if self._inherits or name in _TOKENS else self._configs[:1]
        for config, born in configs:
            value, before = getattr(config, name, None), born.get(name)
            if value is not None and (before is None or value != before):
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
    def features(self) -> Any:
        """What the model is given instead of tokens: sound, pictures, patches; None where that is nothing."""
        main = getattr(self._model, "main_input_name", None)
        names = ("inputs", "input_features", "input_values", "pixel_values")
        for name in (*names, main) if isinstance(main, str) else names:
            if hasattr(found := self._given.get(name), "dim"):
                return found
        return None

    @property
    def delegated(self) -> bool:
        """Whether a function of a repository takes the whole call, which may call the model in any way."""
        return isinstance(self.get("custom_generate"), str)

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
            return self._unlimited(width) if width == positions else None
        left = int(total) - max(width, positions or 0)
        return left if left > 0 else None

    def _unlimited(self, width: int) -> int | None:
        """The limit where none was set: transformers' own, within the model's positions."""
        if getattr(self._model, "generation_config", None) is None:
            return None
        places: object = getattr(getattr(self._model, "config", None), "max_position_embeddings", None)
        left = min(_NEW_TOKENS, places - width) if isinstance(places, int) else _NEW_TOKENS
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


@functools.lru_cache(maxsize=16)
def born_with(kind: Callable[[], Any]) -> Mapping[str, Any]:
    """The values that a config of this class has before anyone sets one; none where it is born empty."""
    try:
        fresh: dict[str, Any] = kind().__dict__
    except Exception:
        return {}
    return {name: value for name, value in fresh.items() if value is not None and name[0] != "_"}


def _version(config: Any) -> tuple[int, ...]:
    """Which transformers a config was made by: major and minor, or nothing where it does not say."""
    try:
        return tuple(int(part) for part in str(config.transformers_version).split(".")[:2])
    except Exception:
        return ()
