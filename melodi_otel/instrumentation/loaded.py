"""When a module is loaded, without loading it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import ModuleType

import wrapt

log = logging.getLogger("melodi_otel")


def when_loaded(module: str, act: Callable[[], object]) -> None:
    """Call ``act`` once ``module`` is loaded: now if it is, else when the program loads it. What it raises is logged."""

    def hook(_: ModuleType) -> None:
        try:
            act()
        except Exception:
            log.warning("melodi_otel: %s cannot be instrumented", module, exc_info=True)

    wrapt.register_post_import_hook(hook, module)
