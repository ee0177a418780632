"""Which requests ran inside which spans, and beside which others: what tells whose joules a span may show.

Fed by the start and the end of every recorded span of this process (two dictionary entries each) and by the requests
themselves. Only open spans are known, and of each trace the newest requests::

    span of the HTTP server          is told of request 1 and 2 as inside it
      span of an agent                 1 and 2
        span of another's pipeline       1
          our span: request 1
        our span: request 2
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Container
from concurrent.futures import Future
from typing import Final

from opentelemetry.sdk.trace import ReadableSpan

from melodi_otel.attribution.meter import Share
from melodi_otel.telemetry.genai import Kind, kind_of

INSIDE_LIMIT: Final = 10_000
"""Requests that are remembered per open span; beyond, nobody can tell its sum any more."""
_RECENT: Final = 1_024
"""Requests among which the one is looked for that a span tells of a second time."""
_NAMED: Final = 20_000
"""Requests that are remembered by their engine's id, those that run now among them."""
SCOPE: Final = "melodi_otel"
"""The instrumentation scope of our own spans."""


class Request:
    """A request as the spans around it and beside it see it.

    Attributes:
        trace_id, start_ns, end_ns: of its span, wall ns; ``end_ns`` is None while it is open.
        scope: the instrumentation that told of it.
        place: where the model ran, see ``genai.Seen``.
        told: whether a span beside it has been given its joules.
        name: the engine's id of it, or None.
    """

    __slots__ = ("_asked", "_shares", "end_ns", "name", "place", "scope", "start_ns", "told", "trace_id")

    def __init__(self, trace_id: int, start_ns: int, scope: str, place: str, name: str | None = None) -> None:
        self.name = name
        self.trace_id = trace_id
        self.start_ns = start_ns
        self.scope = scope
        self.place = place
        self.end_ns: int | None = None
        self.told = False
        self._shares: Future[list[Share]] | None = None
        self._asked: Future[list[Share]] | None = None

    @property
    def shares(self) -> Future[list[Share]]:
        """Its joules, in time. One more future is made only for who asks before it has ended."""
        if self._shares is None:
            if self._asked is None:
                self._asked = Future()
            # It may have ended in this very moment, and looked for who asks before it was there.
            return self._asked if self._shares is None else self._shares
        return self._shares

    def ended(self, end_ns: int, shares: Future[list[Share]]) -> None:
        """It is over, and these will be its shares."""
        self.end_ns = end_ns
        self._shares = shares
        asked = self._asked
        if asked is not None:
            shares.add_done_callback(lambda done: asked.set_result([] if done.cancelled() else done.result()))

    def same_as(self, start_ns: int, end_ns: int) -> float:
        """How much of [start, end] and of its own time is common to both, 0..1."""
        end = end_ns if self.end_ns is None else self.end_ns
        both = min(end, end_ns) - max(self.start_ns, start_ns)
        either = max(end, end_ns) - min(self.start_ns, start_ns)
        return max(0.0, both / either) if either > 0 else 1.0


class _Open:
    """An open span; made for every span of the program, so it is as small as can be."""

    __slots__ = ("inside", "parent_id", "span")

    def __init__(self, parent_id: int | None, span: ReadableSpan) -> None:
        self.parent_id = parent_id
        self.span = span
        self.inside: list[Request] | None = None


class Lineage:
    """The open spans of this process and the requests in them."""

    def __init__(self) -> None:
        self.forked()

    def forked(self) -> None:
        """In a child: what is open belongs to the parent."""
        self._lock = threading.RLock()
        self._open: dict[int, _Open] = {}
        self._recent: deque[Request] = deque(maxlen=_RECENT)
        self._named: OrderedDict[str, Request] = OrderedDict()

    def started(self, span_id: int, span: ReadableSpan) -> bool:
        """A span began; False where that was known."""
        # Without the lock: each is one atomic operation of a dictionary, and this runs twice per span of the program.
        parent = span.parent
        opened = _Open(None if parent is None else parent.span_id, span)
        return self._open.setdefault(span_id, opened) is opened

    def ended(self, span_id: int) -> list[Request] | None:
        """A span ended: the requests inside it; None where there was none, or more than can be remembered."""
        span = self._open.pop(span_id, None)
        if span is None or span.inside is None:
            return None
        with self._lock:
            return span.inside if len(span.inside) <= INSIDE_LIMIT else None

    def request(self, made: Request, parent_id: int | None) -> Request:
        """A request begins (or is reported) whose span has this parent: every open span around it is told."""
        self._recent.append(made)
        if made.name is not None:
            with self._lock:
                self._named[made.name] = made
                while len(self._named) > _NAMED:
                    self._named.popitem(last=False)
        around = None if parent_id is None else self._open.get(parent_id)
        if around is None:
            return made
        with self._lock:
            for _ in range(1_000):  # a parent that is its own ancestor would be somebody's mistake
                if around.inside is None:
                    around.inside = []
                if len(around.inside) <= INSIDE_LIMIT:
                    around.inside.append(made)
                further = None if around.parent_id is None else self._open.get(around.parent_id)
                if further is None:
                    break
                around = further
        return made

    def named(self, name: str) -> Request | None:
        """The request of ours that the engine knows by this id."""
        return self._named.get(name)

    def same(self, trace_id: int, start_ns: int, end_ns: int, scope: str, place: str) -> Request | None:
        """The request that a span of this trace, time and place tells of a second time, if there is one.

        Two spans of one instrumentation are two requests, however much they overlap.
        """
        with self._lock:
            free = [
                request
                for request in tuple(self._recent)
                if request.trace_id == trace_id
                and not request.told
                and request.scope != scope
                and request.place == place
            ]
            best = max(free, key=lambda request: request.same_as(start_ns, end_ns), default=None)
            if best is None or best.same_as(start_ns, end_ns) < 0.5:
                return None
            best.told = True
            return best

    def starts(self, kinds: Container[Kind]) -> list[int]:
        """When the open spans of these kinds began, wall ns."""
        return [one.span.start_time or 0 for one in list(self._open.values()) if kind_of(one.span) in kinds]
