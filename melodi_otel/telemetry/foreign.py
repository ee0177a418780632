"""Joules on other people's GenAI spans: OpenLLMetry, OpenLIT, OpenInference, OpenTelemetry's clients, vLLM's own.

In one trace one span per request carries ``melodi.energy.total``; the others that enclose it or tell of it a second time
carry ``melodi.energy.rollup``::

    a span encloses requests (of ours, or of a span further in)   -> rollup: their sum
    it tells of a request that has a span already, perhaps in
    another trace (the engine's id of it says so)                 -> rollup: that request's joules
    neither, and its model ran on this host                       -> total: the span is the request, over [start, end]
    neither, and its model ran elsewhere, or nobody knows where   -> as it is

A span is known for what it is when it ends, so a request that only such a span tells of is reported to the meter late: see
:mod:`melodi_otel.attribution.late`.
"""

from __future__ import annotations

import itertools
import secrets
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Final, Protocol

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanContext

from melodi_otel import semconv as names
from melodi_otel.attribution.meter import Key, Late, Meter, Share
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.instrumentation.seam import AttributeValue
from melodi_otel.telemetry import genai
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.deferral import Entry, Foreign
from melodi_otel.telemetry.delivery import Reports
from melodi_otel.telemetry.genai import Kind
from melodi_otel.telemetry.lineage import SCOPE, Lineage, Request

__all__ = ["ForeignSpans", "LateMeter"]

_ASKED: Final = 1_024
"""Decisions that are remembered, for the other processors that ask about the same span."""
Labels = Callable[[Mapping[str, AttributeValue]], Mapping[str, str]]


class LateMeter(Meter, Protocol):
    """A meter that can be told that unseen work is under way."""

    def unseen(self, t_ns: int, change: int) -> None:
        """See :meth:`melodi_otel.attribution.ledger.Ledger.unseen`."""
        ...


class ForeignSpans(Foreign):
    """Decides what joules a span that is not ours waits for.

    Args:
        meter: where requests that only such a span tells of are reported.
        group: the group token of this process.
        lineage: which requests ran inside which spans.
        reports: who is told of finished requests.
        monotonic_ns: monotonic time of a wall time, ns.
        owning: whether a span may be a request itself; False: it only sums what is inside it.
        local_providers: see :func:`melodi_otel.telemetry.genai.read`.
        identity: ``service.*`` attributes of this process's requests.
        labels: configured labels of a request by its span's attributes, or None.
    """

    def __init__(
        self,
        meter: LateMeter,
        group: str,
        lineage: Lineage,
        reports: Reports,
        monotonic_ns: Callable[[int], int],
        *,
        owning: bool = True,
        local_providers: Sequence[str] = (),
        identity: Mapping[str, str] | None = None,
        labels: Labels | None = None,
    ) -> None:
        self._meter = meter
        self._group = group
        self._lineage = lineage
        self._reports = reports
        self._monotonic_ns = monotonic_ns
        self._owning = owning
        self._local = frozenset(name.lower() for name in local_providers)
        self._identity = dict(identity or {})
        self._labels = labels
        self._complain = Complaints("other instrumentations' spans")
        self._start_over()

    def _start_over(self) -> None:
        self._salt = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._decided: OrderedDict[int, Entry | None] = OrderedDict()
        # Instrumentations whose spans have been requests of this host: their open ones are work that is under way.
        self._kinds: dict[Kind, None] = {}
        self._under_way: set[int] = set()

    def forked(self) -> None:
        """In a child: what is open and what waits belongs to the parent."""
        self._lineage.forked()
        self._start_over()

    def started(self, span: ReadableSpan) -> None:
        """A recorded span began; asked by every processor."""
        context = span.get_span_context()
        if context is None or not self._lineage.started(context.span_id, span) or not self._kinds:
            return
        if genai.kind_of(span) in self._kinds:
            self._under_way.add(context.span_id)
            self._meter.unseen(self._monotonic_ns(span.start_time or 0), 1)

    def ended(self, span: ReadableSpan) -> Entry | None:
        """What a span that ended waits for; asked by every processor, decided once."""
        try:
            return self._ended(span)
        except Exception as error:
            self._complain("the end of a span", error)
            return None

    def own_ended(self, span_id: int) -> None:
        """One of ours ended; who was inside it has the joules by its own span."""
        self._lineage.ended(span_id)

    def _ended(self, span: ReadableSpan) -> Entry | None:
        context = span.get_span_context()
        if context is None:
            return None
        inside = self._lineage.ended(context.span_id)
        if genai.scope_of(span) == SCOPE:
            return None
        if context.span_id in self._decided:
            return self._decided[context.span_id]
        entry: Entry | None = None
        seen = genai.read(span, self._local)
        if seen is not None:
            entry = self._decide(span, context, seen, genai.kind_of(span), inside)
            self._decided[context.span_id] = entry
            while len(self._decided) > _ASKED:
                self._decided.popitem(last=False)
        if context.span_id in self._under_way:
            self._under_way.discard(context.span_id)
            self._meter.unseen(self._monotonic_ns(span.end_time or 0), -1)
        return entry

    def _decide(
        self, span: ReadableSpan, context: SpanContext, seen: genai.Seen, kind: Kind, inside: list[Request] | None
    ) -> Entry | None:
        if inside:
            self._kinds.pop(kind, None)
            return Entry(_together(inside), owner=False, output_tokens=seen.output_tokens, sums=True)
        if seen.role != "inference" or not span.start_time or not span.end_time:
            return None
        # By its id, whatever trace it is in: where no context came with a request, the engine's span begins a trace of its own.
        named = None if seen.request is None else self._lineage.named(seen.request)
        if named is not None:
            self._kinds.pop(kind, None)
            return Entry(named.shares, owner=False, output_tokens=seen.output_tokens, sums=True)
        twin = self._lineage.same(context.trace_id, span.start_time, span.end_time, kind[0], seen.place)
        if twin is not None:
            self._kinds.pop(kind, None)
            return Entry(twin.shares, owner=False, output_tokens=seen.output_tokens, sums=True)
        if not self._owning or seen.place not in {"here", "host"}:
            self._kinds.pop(kind, None)
            return None
        return self._own(span, context, seen, kind, span.start_time, span.end_time)

    def _own(
        self,
        span: ReadableSpan,
        context: SpanContext,
        seen: genai.Seen,
        kind: Kind,
        start_wall_ns: int,
        end_wall_ns: int,
    ) -> Entry:
        """The span is the request."""
        self._kinds[kind] = None
        start_ns, end_ns = self._monotonic_ns(start_wall_ns), self._monotonic_ns(end_wall_ns)
        beside = tuple(self._monotonic_ns(start) for start in self._lineage.starts(self._kinds))
        key = Key(self._group, f"{self._salt}-s{next(self._numbers)}")
        labels: Mapping[str, str] = {}
        if self._labels is not None:
            attributes: dict[str, Any] = dict(span.attributes or {})
            labels = self._labels(attributes)
        whose = {**labels, **self._identity}
        whose |= {} if seen.provider is None else {names.GEN_AI_PROVIDER: seen.provider}
        self._meter.open(
            key,
            start_ns,
            model=seen.model,
            prompt_tokens=seen.prompt_tokens,
            labels=whose,
            late=Late(beside, elsewhere=seen.place == "host"),
        )
        shares = self._meter.close(key, end_ns, seen.output_tokens, seen.outcome)
        request = Request(context.trace_id, start_wall_ns, kind[0], seen.place)
        self._lineage.request(request, span.parent.span_id if span.parent is not None else None)
        request.ended(end_wall_ns, shares)
        self._reports.when_known(
            shares,
            lambda known: RequestRecord(
                key=key,
                name=span.name,
                kind="request",
                operation=seen.operation,
                provider=seen.provider,
                model=seen.model,
                start_ns=start_ns,
                end_ns=end_ns,
                start_wall_ns=start_wall_ns,
                first_token_ns=None,
                prompt_tokens=seen.prompt_tokens,
                cached_tokens=None,
                output_tokens=seen.output_tokens,
                outcome=seen.outcome,
                error_type=seen.error_type,
                finish_reasons=seen.finish_reasons,
                energy=self._reports.settle(known),
                shares=tuple(known),
                trace_id=context.trace_id,
                span_id=context.span_id,
                sampled=bool(context.trace_flags.sampled),
                labels=labels,
                instrumented=False,
            ),
        )
        return Entry(shares, output_tokens=seen.output_tokens)


def _together(requests: Sequence[Request]) -> Future[list[Share]]:
    """All shares of all these requests, when the last of them is known."""
    if len(requests) == 1:
        return requests[0].shares
    together: Future[list[Share]] = Future()
    known = itertools.count(1)  # counts without a lock: one callback sees the last number, whatever the threads

    def one_is_known(_: object) -> None:
        if next(known) == len(requests):
            together.set_result([share for request in requests for share in request.shares.result()])

    for request in requests:
        request.shares.add_done_callback(one_is_known)
    return together
