"""Which adapter (LoRA and its kin) computes with a model, told from the model alone.

Adapter layers say which of their adapters are active and whether they are all switched off, as those of PEFT do, whether
they were put in by PEFT itself or by ``load_adapter`` of transformers. Layers are found by what they say, so nothing of
PEFT is imported, and one is looked for only in a model that says it has adapters.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final
from weakref import ref

log = logging.getLogger("melodi_otel")

JOINED_BY: Final = "+"
"""Between the names where several adapters compute together."""


class Adapter:
    """The active adapter of one model; call it when a request begins.

    Args:
        model: kept weakly.
    """

    __slots__ = ("_layer", "_model")

    def __init__(self, model: Any) -> None:
        self._model: Callable[[], Any] = ref(model)
        self._layer: Callable[[], Any] = _nothing

    def __call__(self) -> str | None:
        """Its name, several joined by ``+``, or None: there is none, it is switched off, or that cannot be told."""
        try:
            model = self._model()
            if model is None or not getattr(model, "peft_config", None):
                return None
            layer = self._layer()
            if layer is None:
                layer = next((module for module in model.modules() if _is_adapted(module)), None)
                if layer is None:
                    return None
                self._layer = ref(layer)
            if layer.disable_adapters:
                return None
            active: Any = layer.active_adapters
            return JOINED_BY.join([active] if isinstance(active, str) else map(str, active)) or None
        except Exception:
            log.debug("the adapter of a model cannot be told", exc_info=True)
            return None


def _is_adapted(module: object) -> bool:
    # Both as properties: a whole model may have a method ``active_adapters``.
    kind = type(module)
    return isinstance(getattr(kind, "active_adapters", None), property) and hasattr(kind, "disable_adapters")


def _nothing() -> None:
    return None
