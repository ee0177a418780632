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
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Final

from melodi_otel.attribution.meter import Share

INSIDE_LIMIT: Final = 10_000
"""Requests that are remembered per open span; beyond, nobody can tell its sum any more."""
_TRACES: Final = 2_048
_PER_TRACE: Final = 64
Kind = tuple[str, str]
SCOPE: Final = "melodi_otel"
"""The instrumentation scope of our own spans."""


@dataclass(eq=False, slots=True)
class Request:
    """A request as the spans around it and beside it see it.

    Attributes:
        trace_id, start_ns, end_ns: of its span, wall ns; ``end_ns`` is None while it is open.
        scope: the instrumentation that told of it.
        place: where the model ran, see ``genai.Seen``.
        shares: its joules, in time.
        told: whether a span beside it has been given its joules.
    """

    trace_id: int
    start_ns: int
    scope: str
    place: str
    shares: Future[list[Share]] = field(default_factory=Future[list[Share]])
    end_ns: int | None = None
    told: bool = False

    def ended(self, end_ns: int, shares: Future[list[Share]]) -> None:
        """It is over, and these will be its shares."""
        self.end_ns = end_ns
        shares.add_done_callback(lambda done: self.shares.set_result([] if done.cancelled() else done.result()))

    def same_as(self, start_ns: int, end_ns: int) -> float:
        """How much of [start, end] and of its own time is common to both, 0..1."""
        end = end_ns if self.end_ns is None else self.end_ns
        both = min(end, end_ns) - max(self.start_ns, start_ns)
        either = max(end, end_ns) - min(self.start_ns, start_ns)
        return max(0.0, both / either) if either > 0 else 1.0


@dataclass(eq=False, slots=True)
class _Open:
    parent_id: int | None
    kind: Kind
    start_ns: int
    inside: list[Request] = field(default_factory=list[Request])


class Lineage:
    """The open spans of this process and the requests in them."""

    def __init__(self) -> None:
        self.forked()

    def forked(self) -> None:
        """In a child: what is open belongs to the parent."""
        self._lock = threading.RLock()
        self._open: dict[int, _Open] = {}
        self._by_kind: dict[Kind, dict[int, int]] = {}
        self._traces: OrderedDict[int, list[Request]] = OrderedDict()

    def started(self, span_id: int, parent_id: int | None, kind: Kind, start_ns: int) -> bool:
        """A span began; False where that was known."""
        with self._lock:
            if span_id in self._open:
                return False
            self._open[span_id] = _Open(parent_id, kind, start_ns)
            self._by_kind.setdefault(kind, {})[span_id] = start_ns
            return True

    def ended(self, span_id: int) -> list[Request] | None:
        """A span ended: the requests inside it; None where it was not known, or had more than can be remembered."""
        with self._lock:
            span = self._open.pop(span_id, None)
            if span is None:
                return None
            beside = self._by_kind[span.kind]
            del beside[span_id]
            if not beside:
                del self._by_kind[span.kind]
            return span.inside if len(span.inside) <= INSIDE_LIMIT else None

    def request(self, made: Request, parent_id: int | None) -> Request:
        """A request begins (or is reported) whose span has this parent: every open span around it is told."""
        with self._lock:
            around = self._open.get(parent_id) if parent_id is not None else None
            for _ in range(1_000):  # a parent that is its own ancestor would be somebody's mistake
                if around is None:
                    break
                if len(around.inside) <= INSIDE_LIMIT:
                    around.inside.append(made)
                around = self._open.get(around.parent_id) if around.parent_id is not None else None
            known = self._traces.setdefault(made.trace_id, [])
            self._traces.move_to_end(made.trace_id)
            known.append(made)
            del known[:-_PER_TRACE]
            while len(self._traces) > _TRACES:
                self._traces.popitem(last=False)
        return made

    def same(self, trace_id: int, start_ns: int, end_ns: int, scope: str, place: str) -> Request | None:
        """The request that a span of this trace, time and place tells of a second time, if there is one.

        Two spans of one instrumentation are two requests, however much they overlap.
        """
        with self._lock:
            free = [
                request
                for request in self._traces.get(trace_id, ())
                if not request.told and request.scope != scope and request.place == place
            ]
            best = max(free, key=lambda request: request.same_as(start_ns, end_ns), default=None)
            if best is None or best.same_as(start_ns, end_ns) < 0.5:
                return None
            best.told = True
            return best

    def starts(self, kinds: Sequence[Kind]) -> list[int]:
        """When the open spans of these kinds began."""
        with self._lock:
            return [start for kind in kinds for start in self._by_kind.get(kind, {}).values()]
