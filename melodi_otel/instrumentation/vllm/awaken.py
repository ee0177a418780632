"""The first engine that a program makes: until then nothing of ours runs in a process that has vLLM.

vLLM starts many processes, and most of its plug-in's users are processes that will never hold a request or an engine. So
only what makes an engine is watched, and whoever is made first wakes the meter.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, Final

import wrapt

from melodi_otel.instrumentation.patches import Patches
from melodi_otel.instrumentation.vllm.facts import number_engine
from melodi_otel.instrumentation.vllm.instrumentor import ASYNC, CORE, EXECUTOR, SYNC, VllmInstrumentor

log = logging.getLogger("melodi_otel")


def when_made(awaken: Callable[[], object]) -> None:
    """Call ``awaken`` once, when the program makes its first engine: before an engine core, after an engine's front end.

    A front end starts its cores as processes of their own, perhaps by a fork: they find nothing of ours running.

    Args:
        awaken: starts the meter; what it returns is the instrumentation, or None.
    """
    _Waiting(awaken).begin()


class _Waiting:
    def __init__(self, awaken: Callable[[], object]) -> None:
        self._awaken = awaken
        self._patches = Patches()
        self._over = False
        self._library: VllmInstrumentor | None = None
        self._places: Final = {
            ASYNC: [("AsyncLLM", "__init__", self._wrap_front)],
            SYNC: [("LLMEngine", "__init__", self._wrap_front)],
            CORE: [
                ("EngineCore", "__init__", self._wrap_core),
                ("EngineCoreProc", "run_busy_loop", self._wrap_loop),
                ("DPEngineCoreProc", "run_busy_loop", self._wrap_loop),
            ],
            EXECUTOR: [("Executor", "__init__", self._wrap_executor)],
        }

    def begin(self) -> None:
        for module in self._places:
            wrapt.register_post_import_hook(self._patch, module)

    def _patch(self, module: ModuleType) -> None:
        if self._over:
            return
        for owner, name, wrap in self._places[module.__name__]:
            try:
                self._patches.replace(getattr(module, owner), name, wrap)
            except Exception:
                log.warning("melodi_otel: vLLM's %s.%s cannot be waited for", owner, name, exc_info=True)

    def _wrap_front(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def __init__(engine: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - its name
            first = not self._over
            if first and not kwargs.get("client_addresses"):
                number_engine()
            original(engine, *args, **kwargs)
            # A core in this very process has been made meanwhile, and has woken it.
            library = (self._wake() or self._library) if first else None
            if library is not None:
                library.front_made(engine)

        return __init__

    def _wrap_core(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def __init__(core: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - its name
            first = not self._over
            original(core, *args, **kwargs)
            library = (self._wake() or self._library) if first else None  # what it is made of may have woken it
            if library is not None:
                library.core_ready(core)

        return __init__

    def _wrap_loop(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def run_busy_loop(core: Any, *args: Any, **kwargs: Any) -> Any:
            library = self._wake()
            if library is not None:
                library.core_ready(core)
            return original(core, *args, **kwargs)

        return run_busy_loop

    def _wrap_executor(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def __init__(executor: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - its name
            library = self._wake()
            if library is not None:
                library.core_loading(kwargs.get("vllm_config", args[0] if args else None))
            original(executor, *args, **kwargs)

        return __init__

    def _wake(self) -> VllmInstrumentor | None:
        """The instrumentation, the first time; whoever is made later is seen by its own patches."""
        if self._over:
            return None
        self._over = True
        try:
            self._patches.undo()
            library = self._awaken()
            if isinstance(library, VllmInstrumentor):
                self._library = library
            return self._library
        except Exception:
            log.warning("melodi_otel: vLLM is not metered", exc_info=True)
            return None
