"""Model classes with a ``generate`` of their own, which a patch of ``GenerationMixin`` alone would miss.

Every class below ``PreTrainedModel`` and ``GenerationMixin`` is looked at once: those that exist now, by a walk; those that a
model's module or a repository's code defines later, when they are made, because ``__init_subclass__`` is asked for each. What
they inherit from outside that tree counts too (diffusion_gemma's mixin has no base). Nothing is imported for it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, cast
from weakref import WeakSet

from melodi_otel.instrumentation.transformers.arguments import POSITIONAL

log = logging.getLogger("melodi_otel")

MODELING: Final = "transformers.modeling_utils"
ROOTS: Final = ("GenerationMixin", "PreTrainedModel")
"""As ``transformers.modeling_utils`` names them."""

IDS_AFTER_PROMPT: Final = frozenset({"DiffusionGemmaGenerationMixin"})
"""Classes with a loop of their own that answer as transformers' own does: the given ids, then the new ones."""

FORECASTS: Final = frozenset({"autoformer", "informer", "patchtsmixer", "patchtst", "time_series_transformer"})
"""Families that generate time series: work of a model, but no language."""
SOUND: Final = frozenset(
    {"bark", "clvp", "csm", "dia", "musicgen", "musicgen_melody", "pocket_tts", "pop2piano", "speecht5"}
)
"""Families that generate sound only; newer transformers says so in ``output_modalities``, 4.57 does not."""


def operation_of(owner: type) -> str | None:
    """``gen_ai.operation.name`` of what ``owner`` generates where that is no text, else None."""
    family = owner.__module__.rpartition(".")[0].rpartition(".")[2]
    modalities: Any = getattr(owner, "output_modalities", None) or ("text",)
    return "generate_content" if family in FORECASTS | SOUND or "text" not in modalities else None


class Overrides:
    """The classes that override ``generate``, wrapped while this is on.

    Args:
        wrap: makes the wrapper: from the class that defines it, its function, and the names of the positional parameters.
    """

    def __init__(self, wrap: Callable[[type, Any, tuple[str, ...]], Any]) -> None:
        self._wrap = wrap
        # Weakly, and no function beside them: a method may know its class, and a class that nobody uses any more must not
        # live for an undo list.
        self._seen: WeakSet[type] = WeakSet()
        self._wrapped: WeakSet[type] = WeakSet()
        self._mark: Final = object()
        self._base: type | None = None
        self._on = False

    def start(self, base: type, roots: Sequence[type]) -> None:
        """Wrap what is there below ``roots``; the ``generate`` of ``base`` is no override."""
        self._on = True
        self._base = base
        for root in roots:
            for kind in _below(root):
                self.visit(kind)

    def stop(self) -> None:
        """Put every override back, unless somebody wrapped it after us."""
        self._on = False
        self._seen.clear()
        for owner in list(self._wrapped):
            there: Any = owner.__dict__.get("generate")
            if getattr(there, "_self_overrides", None) is self._mark:
                _set(owner, there.__wrapped__)
        self._wrapped.clear()

    def visit(self, kind: type) -> None:
        """Wrap every ``generate`` that objects of ``kind`` may reach, but transformers' own."""
        if not self._on or kind in self._seen:
            return
        self._seen.add(kind)
        for owner in kind.__mro__:
            if owner is self._base or owner in self._wrapped:
                continue
            own = owner.__dict__.get("generate")
            if own is None or not _is_method(own):
                continue
            ours = self._wrap(owner, own, positional(own))
            ours._self_overrides = self._mark
            if _set(owner, ours):
                self._wrapped.add(owner)

    def wrap_init_subclass(self, original: Any, owner: type) -> Any:
        """``__init_subclass__`` of ``owner`` that also looks at the new class.

        Args:
            original: what stood there: of ``owner`` itself, or inherited.
            owner: the root that is patched.
        """
        function: Any = getattr(original, "__func__", None)  # None: not the owner's own, so whoever is next is asked

        def init_subclass(cls: type, **kwargs: Any) -> None:
            if function is not None:
                function(cls, **kwargs)
            else:
                super(owner, cls).__init_subclass__(**kwargs)
            try:
                self.visit(cls)
            except Exception:
                log.debug("%s cannot be looked at", cls, exc_info=True)

        return cast(Any, classmethod(init_subclass))


def _set(owner: Any, function: Any) -> bool:
    try:
        owner.generate = function
    except (AttributeError, TypeError):  # a class that cannot be changed
        return False
    return True


def positional(function: Any) -> tuple[str, ...]:
    """Names of the positional parameters after ``self``, as far as they are known.

    A function that takes ``*args`` hands them on, so they are those of transformers' own ``generate``.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())[1:]
    except (TypeError, ValueError):
        return ()
    named = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    takes_more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return POSITIONAL if takes_more and not named else named


def _is_method(found: Any) -> bool:
    """Whether a call of ``found`` generates before it returns: a generator or a coroutine does its work later."""
    if isinstance(found, staticmethod | classmethod | property) or not callable(found):
        return False
    return not (
        inspect.isgeneratorfunction(found) or inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found)
    )


def _below(root: type) -> Iterator[type]:
    """``root`` and all classes below it, each once."""
    found: dict[type, None] = {}
    waiting = [root]
    while waiting:
        kind = waiting.pop()
        if kind not in found:
            found[kind] = None
            waiting += type.__subclasses__(kind)
    return iter(found)
