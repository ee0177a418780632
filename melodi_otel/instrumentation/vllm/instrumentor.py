"""What is patched in vLLM, and when: each module as the program loads it, nothing before.

Everything hangs on few names that have not changed since 0.11.2 (see ``docs/vllm.md``); one that is missing is left out with
a warning, and what it would have told is absent or comes from a lower tier of evidence, which spans say.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, Final

import wrapt

from melodi_otel.instrumentation.patches import Patches
from melodi_otel.instrumentation.seam import Calls, Origin
from melodi_otel.instrumentation.vllm.answers import Answers
from melodi_otel.instrumentation.vllm.complaints import Complaints
from melodi_otel.instrumentation.vllm.cores import Cores, can_be_watched
from melodi_otel.instrumentation.vllm.facts import number_engine
from melodi_otel.instrumentation.vllm.front import FrontEnd
from melodi_otel.instrumentation.vllm.offline import Offline

log = logging.getLogger("vllm.melodi_otel")
"""A child of vLLM's own logger: what a server's log should say once goes where the server's lines go."""

ASYNC: Final = "vllm.v1.engine.async_llm"
SYNC: Final = "vllm.v1.engine.llm_engine"
CORE: Final = "vllm.v1.engine.core"
EXECUTOR: Final = "vllm.v1.executor.abstract"
USAGE: Final = (
    "vllm.entrypoints.serve.engine.protocol",  # 0.32
    "vllm.entrypoints.openai.engine.protocol",
    "vllm.entrypoints.openai.protocol",
)
"""Where the tokens of an answer have been described: the class is defined in one of them."""

Wrap = Callable[[Any], Any]


class VllmInstrumentor:
    """Reports every request of vLLM, and every step of its engines, to ``calls``.

    Args:
        calls: where they are reported.
        origin: what the headers that a request was given say about where it came from.
        devices: accelerators of all engine cores of this host, where the user names them.
        show_on: shows finished requests on a registry of prometheus_client; False: they are shown already. None: nowhere.
        answer_energy: whether answers tell the joules known so far.
        where: where joules and spans go, in words; may take its time. None: that is not said.
    """

    def __init__(
        self,
        calls: Calls,
        origin: Callable[[Mapping[str, str]], Origin | None] | None = None,
        devices: Sequence[str] = (),
        show_on: Callable[[Any], bool] | None = None,
        answer_energy: bool = False,
        where: Callable[[], str] | None = None,
    ) -> None:
        self._complaints = Complaints()
        answers = Answers(calls, self._complaints, energy=answer_energy, show_on=show_on)
        self._front = FrontEnd(calls, self._complaints, origin, answers)
        self._cores = Cores(calls, self._complaints, devices)
        self._where = where
        self._patches = Patches()
        self._on = False
        self._hooked = False
        self._cores_patched = False
        front, offline = self._front, Offline(self._front)
        # module -> (class, attribute, what goes around it, whether a version without it is fine)
        self._places: dict[str, list[tuple[str, str, Wrap, bool]]] = {
            ASYNC: [
                ("AsyncLLM", "__init__", self._wrap_front, False),
                ("AsyncLLM", "generate", front.stream, False),
                ("AsyncLLM", "encode", functools.partial(front.stream, pooling=True), True),
            ],
            SYNC: [
                ("LLMEngine", "__init__", self._wrap_front, False),
                ("LLMEngine", "add_request", offline.add, False),
                ("LLMEngine", "step", offline.step, False),
                ("LLMEngine", "abort_request", offline.abort, True),
            ],
            "vllm.v1.engine.output_processor": [("OutputProcessor", "add_request", front.note, False)],
            CORE: [
                # A core's own process loads its plug-ins while it makes the core: what it makes it of, and the loop
                # that it runs then, come early enough.
                ("EngineCore", "__init__", self._wrap_core, False),
                ("EngineCore", "shutdown", self._wrap_shutdown, True),
                ("EngineCoreProc", "run_busy_loop", self._wrap_loop, False),
                ("DPEngineCoreProc", "run_busy_loop", self._wrap_loop, False),
            ],
            EXECUTOR: [("Executor", "__init__", self._wrap_executor, True)],
            "vllm.entrypoints.llm": [
                ("LLM", "chat", offline.chat, True),
                ("LLM", "enqueue_chat", offline.chat, True),
                ("LLM", "beam_search", offline.beam_search, True),
            ],
            "vllm.entrypoints.generate.beam_search.online": [
                ("BeamSearchOnlineMixin", "beam_search", front.beams, True)
            ],
            "vllm.entrypoints.serve.instrumentator.metrics": [("", "attach_router", answers.page, True)],
        }
        if answer_energy:
            self._places |= {name: [("UsageInfo", "__init__", answers.usage, True)] for name in USAGE}

    def instrument(self) -> None:
        """Patch what is loaded and what will be; a second time changes nothing."""
        self._on = True
        for name in self._places:
            module = sys.modules.get(name)
            if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
                self._patch(module)
            elif not self._hooked:
                wrapt.register_post_import_hook(self._patch, name)
        self._hooked = True

    def uninstrument(self) -> None:
        """Put everything back; requests in flight still end, engines go on without being watched."""
        self._on = False
        self._patches.undo()
        self._cores.stop()

    def front_made(self, engine: Any) -> None:
        """An ``AsyncLLM`` or ``LLMEngine`` has been made."""
        try:
            stepping = self._cores_patched and _watchable(engine.vllm_config)
            place = self._front.made(engine, stepping=stepping)
            how = (
                "by engine steps" if not place.probing else "by their tokens, because its steps are not seen from here"
            )
            log.info("melodi_otel meters the requests of %s; joules are divided %s", place.model, how)
        except Exception:
            self._complaints.about("an engine cannot be described")
        if self._where is not None:
            # On a thread: a hub that starts now takes a second to say where its page is.
            threading.Thread(target=self._say_where, name="melodi-otel-where", daemon=True).start()

    def _say_where(self) -> None:
        where, self._where = self._where, None
        if where is not None:
            self._safely(lambda: log.info("melodi_otel: %s", where()), "it cannot be said where joules go")

    def core_loading(self, config: Any) -> None:
        """An engine core of this ``VllmConfig`` is being made in this process, which may take minutes."""
        self._safely(lambda: self._cores.loading(config), "an engine core cannot be described")

    def core_ready(self, core: Any) -> None:
        """This engine core can serve from now on; a second time changes nothing."""
        self._safely(lambda: self._cores.ready(core), "an engine core cannot be watched")

    # --- inside -------------------------------------------------------------------------------------------------------

    def _patch(self, module: ModuleType) -> None:
        if not self._on:
            return
        for owner, name, wrap, optional in self._places[module.__name__]:
            try:
                self._patches.replace(getattr(module, owner) if owner else module, name, wrap)
                self._cores_patched = self._cores_patched or module.__name__ == CORE
            except AttributeError:
                level = logging.DEBUG if optional else logging.WARNING
                log.log(level, "melodi_otel: this vLLM has no %s.%s.%s", module.__name__, owner, name)
            except Exception:
                self._complaints.about(f"{module.__name__}.{owner}.{name} cannot be patched")

    def _wrap_front(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def __init__(engine: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - its name
            if self._on and not kwargs.get("client_addresses"):
                number_engine()
            original(engine, *args, **kwargs)
            if self._on:
                self.front_made(engine)

        return __init__

    def _wrap_core(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def __init__(core: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - its name
            original(core, *args, **kwargs)
            if self._on:
                self.core_ready(core)

        return __init__

    def _wrap_loop(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def run_busy_loop(core: Any, *args: Any, **kwargs: Any) -> Any:
            if self._on:
                self.core_ready(core)
            return original(core, *args, **kwargs)

        return run_busy_loop

    def _wrap_executor(self, original: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(original)
        def __init__(executor: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - its name
            if self._on:
                self.core_loading(kwargs.get("vllm_config", args[0] if args else None))
            original(executor, *args, **kwargs)

        return __init__

    def _wrap_shutdown(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def shutdown(core: Any, *args: Any, **kwargs: Any) -> Any:
            self._safely(lambda: self._cores.ended(core), "an engine's end cannot be told")
            return original(core, *args, **kwargs)

        return shutdown

    def _safely(self, act: Callable[[], Any], what: str) -> None:
        try:
            act()
        except Exception:
            self._complaints.about(what)


def _watchable(config: Any) -> bool:
    """Whether the engine's scheduler, of whatever class, has what its cores are watched by."""
    return can_be_watched(config.scheduler_config.get_scheduler_cls())
