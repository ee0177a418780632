"""What is patched in transformers, and what the patched functions do.

``GenerationMixin.generate`` is a call, ``GenerationMixin._has_unfinished_sequences`` its step clock,
``GenerationMixin._get_candidate_generator`` tells how many drafts an assisted step verifies, and ``_forward`` of the text
pipelines tells a chat from a completion. All exist alike in 4.57 and 5.x; one that does not is left out with a warning.
Continuous batching has patches of its own, in ``continuous``.
"""

from __future__ import annotations

import functools
import logging
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Final
from weakref import ref

import wrapt

from melodi_otel.instrumentation.seam import Calls
from melodi_otel.instrumentation.transformers.call import Complaints, GenerateCall
from melodi_otel.instrumentation.transformers.continuous import ContinuousBatching
from melodi_otel.instrumentation.transformers.engines import Engines
from melodi_otel.instrumentation.transformers.patches import Patches

log = logging.getLogger("melodi_otel")

GENERATION: Final = "transformers.generation.utils"
PIPELINES: Final = {
    "transformers.pipelines.text_generation": ("TextGenerationPipeline", "prompt_text"),
    "transformers.pipelines.image_text_to_text": ("ImageTextToTextPipeline", "text"),
    "transformers.pipelines.any_to_any": ("AnyToAnyPipeline", "text"),
}
"""Pipelines that take chats: their class, and the key under which ``_forward`` is given the prompt."""

_CHAT: Final = "Chat"
"""The class that pipelines put messages into; it has moved between modules, its name has not."""
_get_ident = threading.get_ident


class TransformersInstrumentor:
    """Reports every ``generate()`` to ``calls``.

    Nothing is imported: a module that is loaded is patched now, another one when the program loads it.

    Args:
        calls: where calls are reported.
    """

    def __init__(self, calls: Calls) -> None:
        self._calls = calls
        self._complaints = Complaints()
        self._engines = Engines(calls)
        self._patches = Patches()
        self._on = False
        self._hooked = False
        self._clocked = False
        # per instance: two instrumentations side by side must each see their own outermost call
        self._call: ContextVar[GenerateCall | None] = ContextVar("melodi_otel_generate", default=None)
        self._operation: ContextVar[str] = ContextVar("melodi_otel_operation", default="text_completion")
        self._batches = ContinuousBatching(calls, self._complaints, self._engines, self._operation)

    def instrument(self) -> None:
        """Patch what is loaded and what will be; a second time changes nothing."""
        self._on = True
        for name in (GENERATION, *PIPELINES):
            module = sys.modules.get(name)
            if module is not None:
                self._patch(module)
            elif not self._hooked:
                wrapt.register_post_import_hook(self._patch, name)
        self._hooked = True
        self._batches.instrument()

    def uninstrument(self) -> None:
        """Put everything back; calls in flight still end. Modules loaded later stay as they are."""
        self._on = False
        self._patches.undo()
        self._batches.uninstrument()

    def _patch(self, module: ModuleType) -> None:
        if not self._on:
            return
        if module.__name__ in PIPELINES:
            owner, key = PIPELINES[module.__name__]
            self._replace(module, owner, "_forward", functools.partial(self._wrap_forward, key=key))
            return
        self._clocked = self._replace(module, "GenerationMixin", "_has_unfinished_sequences", self._wrap_clock)
        self._replace(module, "GenerationMixin", "_get_candidate_generator", self._wrap_candidates)
        self._replace(module, "GenerationMixin", "generate", self._wrap_generate)

    def _replace(self, module: ModuleType, owner: str, name: str, wrap: Callable[[Any], Any]) -> bool:
        try:
            self._patches.replace(getattr(module, owner), name, wrap)
        except Exception:
            log.warning("%s.%s.%s cannot be instrumented", module.__name__, owner, name, exc_info=True)
            return False
        return True

    def _wrap_generate(self, original: Any) -> Any:
        current = self._call

        def generate(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
            if not self._on:
                return wrapped(*args, **kwargs)
            outer = current.get()
            if outer is not None and not outer.over and outer.thread == _get_ident():
                # an assistant's draft, a healed token, a deprecated mode delegating: part of the call it runs in
                outer.depth += 1
                try:
                    return wrapped(*args, **kwargs)
                finally:
                    outer.depth -= 1
            call = GenerateCall(self._calls, self._complaints, instance)
            if self._batches.takes(kwargs):

                def refused(error: BaseException) -> None:
                    call.begin(self._engines, self._operation.get(), instance, args, kwargs, clock=False)
                    call.leave(error)
                    call.fail(error)

                return self._batches.generate(lambda: wrapped(*args, **kwargs), refused)
            token = current.set(call)
            try:
                call.begin(self._engines, self._operation.get(), instance, args, kwargs, clock=self._clocked)
                result = wrapped(*args, **kwargs)
                call.leave(None)
                call.finish(result)
                return result
            except BaseException as error:
                call.leave(error)
                call.fail(error)
                raise
            finally:
                current.reset(token)

        return wrapt.FunctionWrapper(original, generate)

    def _wrap_clock(self, original: Any) -> Any:
        current, now_ns, complaints = self._call, self._calls.now_ns, self._complaints

        # a plain function: this runs once per token, and a wrapt proxy would double its cost
        @functools.wraps(original)
        def has_unfinished_sequences(model: Any, *args: Any, **kwargs: Any) -> Any:
            call = current.get()
            if call is not None and call.depth == 0 and call.model_id == id(model):
                try:
                    call.ticks.append(now_ns())
                except Exception:
                    complaints.about("reading the clock")
            return original(model, *args, **kwargs)

        return has_unfinished_sequences

    def _wrap_candidates(self, original: Any) -> Any:
        current, complaints = self._call, self._complaints

        @functools.wraps(original)
        def get_candidate_generator(model: Any, *args: Any, **kwargs: Any) -> Any:
            generator = original(model, *args, **kwargs)
            call = current.get()
            if call is not None and call.depth == 0 and call.model_id == id(model):
                try:
                    _watch(generator, call, complaints)
                except Exception:
                    complaints.about("following the drafts")
            return generator

        return get_candidate_generator

    def _wrap_forward(self, original: Any, *, key: str) -> Any:
        operation = self._operation

        @functools.wraps(original)
        def forward(pipeline: Any, model_inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if not self._on or not _is_chat(model_inputs, key):
                return original(pipeline, model_inputs, *args, **kwargs)
            token = operation.set("chat")
            try:
                return original(pipeline, model_inputs, *args, **kwargs)
            finally:
                operation.reset(token)

        return forward


def _watch(generator: Any, call: GenerateCall, complaints: Complaints) -> None:
    """Note what each round of ``generator`` proposes. It lives for one call, so this needs no undo."""
    inner = generator.__class__.get_candidates
    # weakly: a cycle would keep the assistant's cache in the accelerator's memory until the next collection
    behind = ref(generator)

    def get_candidates(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        before = 0
        try:
            before = int(input_ids.shape[1])
            call.drafting(before)
        except Exception:
            complaints.about("counting drafts")
        found = inner(behind(), input_ids, *args, **kwargs)
        try:
            call.drafted(before, int(found[0].shape[1]) - before)
        except Exception:
            complaints.about("counting drafts")
        return found

    generator.get_candidates = get_candidates


def _is_chat(model_inputs: Any, key: str) -> bool:
    try:
        prompt: Any = model_inputs.get(key)
        return _CHAT in (type(prompt).__name__, type(prompt[0]).__name__ if type(prompt) in (list, tuple) else "")
    except Exception:
        return False
