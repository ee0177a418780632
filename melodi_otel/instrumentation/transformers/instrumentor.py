"""What is patched in transformers, and what the patched functions do.

``GenerationMixin.generate`` and every ``generate`` that a model class or a repository puts in its place is a call,
``GenerationMixin._has_unfinished_sequences`` its step clock, ``GenerationMixin._get_candidate_generator`` tells how many
drafts an assisted step verifies, and ``_forward`` of the text pipelines tells a chat from a completion. All exist alike in
4.57 and 5.x; one that does not is left out with a warning. What must reach another thread is in ``streams`` and ``serving``.
Continuous batching has patches of its own, in ``continuous``.
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import ModuleType
from typing import Any, Final
from weakref import ref

import wrapt

from melodi_otel import semconv as names
from melodi_otel.instrumentation.patches import Patches
from melodi_otel.instrumentation.seam import AttributeValue, Calls
from melodi_otel.instrumentation.transformers import serving, streams
from melodi_otel.instrumentation.transformers.arguments import POSITIONAL
from melodi_otel.instrumentation.transformers.call import Entry, GenerateCall
from melodi_otel.instrumentation.transformers.complaints import Complaints
from melodi_otel.instrumentation.transformers.continuous import ContinuousBatching
from melodi_otel.instrumentation.transformers.engines import Engines
from melodi_otel.instrumentation.transformers.overrides import (
    IDS_AFTER_PROMPT,
    ROOTS,
    Overrides,
    operation_of,
)
from melodi_otel.instrumentation.transformers.parallel import Ranks
from melodi_otel.instrumentation.transformers.streams import Streams

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
        environ: where a launcher of several processes leaves this one's rank.
    """

    def __init__(self, calls: Calls, environ: Mapping[str, str] = os.environ) -> None:
        self._calls = calls
        self._complaints = Complaints()
        self._engines = Engines(calls)
        self._patches = Patches()
        self._overrides = Overrides(self._wrap_override)
        self._streams = Streams(calls, self._complaints)
        self._ranks = Ranks(environ)
        self._patchers: dict[str, Callable[[ModuleType], None]] = {
            **dict.fromkeys(ROOTS, self._patch_models),
            GENERATION: self._patch_generation,
            streams.MODULE: self._patch_streamers,
            serving.MODULE: self._patch_serving,
            **dict.fromkeys(PIPELINES, self._patch_pipeline),
        }
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
        for name in self._patchers:
            module = sys.modules.get(name)
            if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
                self._patch(module)
            elif not self._hooked:
                wrapt.register_post_import_hook(self._patch, name)
        self._hooked = True
        self._batches.instrument()

    def uninstrument(self) -> None:
        """Put everything back; calls in flight still end. Modules loaded later stay as they are."""
        self._on = False
        self._overrides.stop()
        self._patches.undo()
        self._batches.uninstrument()

    def _patch(self, module: ModuleType) -> None:
        if self._on:
            self._patchers[module.__name__](module)

    def _patch_pipeline(self, module: ModuleType) -> None:
        owner, key = PIPELINES[module.__name__]
        self._replace(module, owner, "_forward", functools.partial(self._wrap_forward, key=key))

    def _patch_generation(self, module: ModuleType) -> None:
        self._clocked = self._replace(module, "GenerationMixin", "_has_unfinished_sequences", self._wrap_clock)
        self._replace(module, "GenerationMixin", "_get_candidate_generator", self._wrap_candidates)
        self._replace(module, "GenerationMixin", "load_custom_generate", self._wrap_load)
        self._replace(module, "GenerationMixin", "generate", self._wrap_generate)
        self._patch_models(module)

    def _patch_models(self, module: ModuleType) -> None:
        root: type | None = getattr(module, ROOTS[module.__name__], None)
        if root is not None:
            wrap = functools.partial(self._overrides.wrap_init_subclass, owner=root)
            self._replace(module, root.__name__, "__init_subclass__", wrap)
            self._overrides.start(root)

    def _patch_streamers(self, module: ModuleType) -> None:
        self._replace(module, streams.OWNER, "__init__", self._streams.wrap_init)

    def _patch_serving(self, module: ModuleType) -> None:
        for method in serving.METHODS:
            self._replace(module, serving.OWNER, method, serving.wrap_submit)

    def _replace(self, module: ModuleType, owner: str, name: str, wrap: Callable[[Any], Any]) -> bool:
        try:
            self._patches.replace(getattr(module, owner), name, wrap)
        except Exception:
            log.warning("%s.%s.%s cannot be instrumented", module.__name__, owner, name, exc_info=True)
            return False
        return True

    def _wrap_generate(self, original: Any) -> Any:
        current = self._call
        entry = Entry(POSITIONAL, self._clocked)

        def generate(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
            if not self._on:
                return wrapped(*args, **kwargs)
            outer = current.get()
            if outer is None or outer.over or outer.thread != _get_ident():
                if self._batches.takes(kwargs):
                    return self._batched(entry, instance, wrapped, args, kwargs)
                return self._outermost(entry, instance, wrapped, args, kwargs)
            # an assistant's draft, a healed token, what a model's own generate() hands over: part of the call it runs in
            held = outer.nested(instance, args, kwargs)
            try:
                result = wrapped(*args, **kwargs)
            except BaseException as error:
                outer.unnested(held, error=error)
                raise
            outer.unnested(held, result)
            return result

        return wrapt.FunctionWrapper(original, generate)

    def _wrap_override(self, owner: type, original: Any, parameters: tuple[str, ...]) -> Any:
        known = owner.__name__ in IDS_AFTER_PROMPT
        entry = Entry(parameters, self._clocked, not known, stepped=False, operation=operation_of(owner))
        return self._wrap_custom(original, entry)

    def _wrap_custom(self, original: Any, entry: Entry) -> Any:
        """Somebody else's function that generates: a method, or a function that is given the model by name."""
        current = self._call

        def generate(wrapped: Callable[..., Any], instance: Any, args: Any, kwargs: Any) -> Any:
            outer = current.get() if self._on else None
            inside = outer is not None and not outer.over and outer.thread == _get_ident()
            if instance is None:
                instance = kwargs.get("model")
            if inside or instance is None or not self._on:
                return wrapped(*args, **kwargs)
            return self._outermost(entry, instance, wrapped, args, kwargs)

        return wrapt.FunctionWrapper(original, generate)

    def _outermost(self, entry: Entry, model: Any, wrapped: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        current = self._call
        call = GenerateCall(self._calls, self._complaints, model, entry)
        token = current.set(call)
        try:
            call.begin(
                self._engines,
                self._operation.get(),
                model,
                args,
                kwargs,
                origin=self._streams.origin(kwargs.get("streamer")),
                attributes=self._place(),
            )
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

    def _batched(self, entry: Entry, model: Any, wrapped: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A ``generate()`` that continuous batching serves: its requests are the calls, unless it is refused."""

        def refused(error: BaseException) -> None:
            call = GenerateCall(self._calls, self._complaints, model, entry)
            call.begin(self._engines, self._operation.get(), model, args, kwargs)
            call.leave(error)
            call.fail(error)

        return self._batches.generate(lambda: wrapped(*args, **kwargs), refused)

    def _place(self) -> Mapping[str, AttributeValue] | None:
        place = self._ranks.place()
        return None if place is None else {names.RANK: place.rank, names.WORLD_SIZE: place.world}

    def _wrap_load(self, original: Any) -> Any:
        """``load_custom_generate``: the function of a repository that takes the place of ``generate``.

        A model whose repository ships one gets it as an attribute of its own, in front of the class; here is the only place
        where both 4.57 and 5.x get hold of it.
        """
        entry = Entry((), self._clocked, delegates=True, stepped=False)

        @functools.wraps(original)
        def load_custom_generate(model: Any, *args: Any, **kwargs: Any) -> Any:
            function = original(model, *args, **kwargs)
            try:
                return self._wrap_custom(function, entry) if self._on and callable(function) else function
            except Exception:
                self._complaints.about("following the repository's generate()")
                return function

        return load_custom_generate

    def _wrap_clock(self, original: Any) -> Any:
        current, now_ns, complaints = self._call, self._calls.now_ns, self._complaints

        # a plain function: this runs once per token, and a wrapt proxy would double its cost
        @functools.wraps(original)
        def has_unfinished_sequences(model: Any, *args: Any, **kwargs: Any) -> Any:
            call = current.get()
            if call is not None and call.clock_id == id(model):
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
            if call is not None and call.clock_id == id(model):
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
