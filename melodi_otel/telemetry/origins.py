"""Where a request came from: its trace, its baggage and its activity, kept for a thread that will not know them."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final, NamedTuple

from opentelemetry import context as otel_context
from opentelemetry import propagate
from opentelemetry.context import Context
from opentelemetry.trace import get_current_span

from melodi_otel.attribution.meter import Key, current

_HERE: Final = nullcontext()


class _Origin(NamedTuple):
    context: Context
    key: Key | None


def here() -> object | None:
    """What the caller stands in now, or None where that is nothing."""
    context, key = otel_context.get_current(), current.get()
    return _Origin(context, key) if context or key is not None else None


def from_headers(headers: Mapping[str, str]) -> object | None:
    """What the headers of a request say about where it came from, by the program's propagators; None: nothing."""
    found = propagate.extract(headers, context=otel_context.get_current())
    return _Origin(found, current.get()) if get_current_span(found).get_span_context().is_valid else None


def within(origin: object | None) -> AbstractContextManager[None]:
    """Stand where ``origin`` was noted, as far as the caller stands nowhere itself.

    A current span of its own wins over the noted one, and so does an open activity of its own: a thread that was given its
    context knows better than the streamer it was handed.
    """
    return _entered(origin) if isinstance(origin, _Origin) else _HERE


@contextmanager
def _entered(origin: _Origin) -> Generator[None]:
    attach = not get_current_span().get_span_context().is_valid
    key = current.set(origin.key) if current.get() is None else None
    token = otel_context.attach(origin.context) if attach else None
    try:
        yield
    finally:
        if token is not None:
            otel_context.detach(token)
        if key is not None:
            current.reset(key)
