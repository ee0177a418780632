"""The span processors of one provider: found, wrapped, and put back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from opentelemetry.sdk.trace import SpanProcessor

from melodi_otel.telemetry.deferral import Deferral
from melodi_otel.telemetry.spans import DeferringProcessor

_DEPTH: Final = 3


def processors_of(provider: object) -> Any:
    """The SDK's multi-processor of ``provider``, or of the provider that it holds (a proxy of a vendor); None: neither."""
    # Asked for every request, and nearly always about the SDK's own provider: that one first.
    multi = _multi_of(provider)
    return multi if multi is not None else inside(provider, _multi_of, "get_tracer")


def _multi_of(one: object) -> Any:
    multi = getattr(one, "_active_span_processor", None)
    return multi if isinstance(getattr(multi, "_span_processors", None), tuple) else None


def inside(provider: object, find: Callable[[object], Any], method: str) -> Any:
    """What ``find`` finds first: in ``provider``, or in an object with ``method`` that it holds, a few levels deep."""
    layer: list[object] = [provider]
    for _ in range(_DEPTH):
        for one in layer:
            if (found := find(one)) is not None:
                return found
        # The type is asked, not the object: looking must not run somebody's lazy attributes.
        layer = [held for one in layer for held in _held_by(one) if callable(getattr(type(held), method, None))]
    return None


def _held_by(provider: object) -> list[object]:
    try:
        return list(vars(provider).values())
    except TypeError:  # it has slots, or none at all
        return []


class Wrapped:
    """The processors of one provider, wrapped; kept with what is needed to take it all back.

    Args:
        multi: the provider's multi-processor.
        deferral: what the wrapping processors ask.
    """

    def __init__(self, multi: Any, deferral: Deferral) -> None:
        self.multi: Final = multi
        self._deferral = deferral
        self._ours: list[DeferringProcessor] = []
        self._undone = False
        self._add = multi.add_span_processor
        with multi._lock:
            multi._span_processors = tuple(self._wrap(processor) for processor in multi._span_processors)
        # On the instance: the class, and with it every other provider, stays as it is.
        multi.add_span_processor = self._late

    def _wrap(self, processor: SpanProcessor) -> SpanProcessor:
        own = vars(processor) if hasattr(processor, "__dict__") else {}
        if isinstance(processor, DeferringProcessor) or (
            type(processor).on_end is SpanProcessor.on_end and "on_end" not in own
        ):
            return processor  # ours already, or one that never looks at ended spans
        ours = DeferringProcessor(processor, self._deferral)
        self._ours.append(ours)
        return ours

    def _late(self, processor: SpanProcessor) -> None:
        self._add(processor if self._undone else self._wrap(processor))

    def undo(self) -> None:
        """Forward what waits and leave the provider as it was found."""
        self._undone = True
        if self.multi.add_span_processor == self._late:  # else somebody has hooked in after us, and calls us
            del self.multi.add_span_processor
        for ours in self._ours:
            ours.release()
        with self.multi._lock:
            self.multi._span_processors = tuple(
                processor.next if processor in self._ours else processor  # type: ignore[union-attr]
                for processor in self.multi._span_processors
            )
