"""Requests as spans and records: what an instrumentation reports becomes an activity in the meter, a span, a record.

``begin`` opens the activity and starts the span; ``end`` closes both, once. The joules come later: the record is made on
the thread that settles them and handed to every observer (metrics, results, the data set), so histograms cost the request
nothing. Without a recording span (head sampling, no exporter) the request is metered and observed all the same.
"""

from __future__ import annotations

import itertools
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextvars import Token
from types import TracebackType
from typing import Any, Final, Protocol

from opentelemetry import context as otel_context
from opentelemetry.context import Context
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from melodi_otel import semconv as names
from melodi_otel.attribution.meter import Key, Meter, Share, current
from melodi_otel.attribution.record import Observer, RequestRecord
from melodi_otel.attribution.summary import unavailable
from melodi_otel.clock import Clock
from melodi_otel.forks import in_child
from melodi_otel.instrumentation.seam import AttributeValue, Begin, End, Origin
from melodi_otel.telemetry.answers import Part, figure
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.deferral import Deferral, Entry
from melodi_otel.telemetry.delivery import Reports
from melodi_otel.telemetry.late import LateEnds
from melodi_otel.telemetry.lineage import SCOPE, Lineage, Request
from melodi_otel.telemetry.origins import here, within


class Labels(Protocol):
    """Configured labels of a request that begins now."""

    def __call__(
        self, attributes: Mapping[str, AttributeValue], user: str | None = None, adapter: str | None = None
    ) -> Mapping[str, str]:
        """By its first span attributes, and what :class:`~melodi_otel.instrumentation.seam.Begin` says of both."""
        ...


class RequestCalls:
    """The :class:`~melodi_otel.instrumentation.seam.Calls` of a running program.

    Args:
        meter: where activities go.
        group: the group token of this process's engines.
        clock: the clock of everything here.
        tracer: the tracer to use now; asked for every request, so a provider that is set later is used from then on.
        deferral: where spans wait for their joules.
        observers: who gets finished requests.
        lineage: where spans around a request learn of it.
        service, namespace: the service identity that metrics carry, or None.
        labels: finds the configured labels of a request, or None.
        late: who ends the spans of ``tracer`` when their joules are there; None: their processors wait for them.
        rendered: whether this program shows its requests on a page of its own.
        promised: is told of an answer that promises the joules of a request.
        accrued: provisional shares of a request that is not settled.
    """

    def __init__(
        self,
        meter: Meter,
        group: str,
        clock: Clock,
        tracer: Callable[[], Tracer],
        deferral: Deferral,
        observers: Sequence[Observer] = (),
        *,
        lineage: Lineage | None = None,
        service: str | None = None,
        namespace: str | None = None,
        labels: Labels | None = None,
        late: Callable[[], LateEnds | None] = lambda: None,
        rendered: Callable[[], bool] = lambda: False,
        promised: Callable[[str], None] | None = None,
        accrued: Callable[[Key], Sequence[Share]] = lambda _: (),
    ) -> None:
        self._meter = meter
        self._group = group
        self.clock: Final = clock
        # Not a method: the step clock asks once per token.
        self.now_ns: Callable[[], int] = clock.monotonic_ns
        self._tracer = tracer
        self._late = late
        self.deferral: Final = deferral
        self.reports: Final = Reports(observers, deferral.settle)
        self.lineage: Final = lineage or Lineage()
        self._identity = {
            name: value
            for name, value in ((names.SERVICE_NAME, service), (names.SERVICE_NAMESPACE, namespace))
            if value
        }
        self._labels = labels
        self.rendered: Final = rendered
        self._promised = promised
        self._accrued = accrued
        self._salt = secrets.token_hex(4)
        self._numbers = itertools.count(1)
        self._open: dict[Key, _Call] = {}
        self.complain: Final = Complaints("requests")
        in_child(self._forked)

    def _forked(self) -> None:
        # Parent and child go on counting from the same number: their ids must differ in something else.
        self._salt = secrets.token_hex(4)
        self._open = {}

    @property
    def meter(self) -> Meter:
        return self._meter

    @property
    def group(self) -> str:
        return self._group

    def begin(self, begin: Begin) -> _Call:
        """Open the activity and start the span; whatever fails here, the caller gets a call that can be ended."""
        with within(begin.origin):
            call = _Call(self, Key(self._group, f"{self._salt}-{next(self._numbers)}"), begin)
            try:
                call.start(self._tracer(), self._late(), self._identity, self._labels)
                if begin.answer is not None and self._promised is not None:
                    self._promised(begin.answer)
            except Exception as error:
                self.complain("begin", error)
        return call

    def so_far(self, answer: str, keys: Sequence[Key]) -> Mapping[str, Any]:
        """See :meth:`melodi_otel.instrumentation.seam.Calls.so_far`."""
        parts: list[Part] = []
        for key in keys:
            shares = self._accrued(key)
            energy = self.reports.settle(shares) if shares else unavailable(None)
            parts.append(Part(energy.total, energy.uncertainty, energy.scope, energy.quality))
        found = figure(answer, parts, final=False)
        if "joules" not in found:
            found.pop("quality", None)  # nothing is known of it yet
        return found

    def origin(self) -> Origin | None:
        """The caller's OpenTelemetry context and its activity, or None where both are empty."""
        return here()

    def drain(self, timeout_s: float = 5.0) -> bool:
        """Wait until every record whose joules are known has been observed; whether that was so in time."""
        return self.reports.drain(timeout_s)

    def close(self) -> None:
        """Observe what is left and end the thread that does so; calls may go on, a later one starts it again."""
        self.reports.close()

    # --- used by the calls ---

    def opened(self, call: _Call, parent: Key | None) -> None:
        self._open[call.key] = call
        if parent is not None and (outer := self._open.get(parent)) is not None:
            outer.children += 1

    def closed(self, call: _Call) -> None:
        self._open.pop(call.key, None)


class _Call:
    """One request in flight, see :class:`~melodi_otel.instrumentation.seam.OpenCall`."""

    __slots__ = (
        "_begin", "_calls", "_context", "_ended", "_labels", "_late", "_opened", "_parent", "_seen", "_span", "_wall_ns",
        "children",
        "key",
    )  # fmt: skip

    def __init__(self, calls: RequestCalls, key: Key, begin: Begin) -> None:
        self.key: Final = key
        self.children = 0
        self._calls = calls
        self._begin = begin
        self._parent = current.get()
        self._span: Span | None = None
        self._seen: Request | None = None
        self._late: LateEnds | None = None
        self._context: Context | None = None
        self._labels: Mapping[str, str] = {}
        self._opened = False
        self._ended = threading.Lock()
        clock = calls.clock
        self._wall_ns = clock.wall_ns() - (clock.monotonic_ns() - begin.start_ns)

    def start(self, tracer: Tracer, late: LateEnds | None, identity: Mapping[str, str], labels: Labels | None) -> None:
        begin = self._begin
        self._late = late
        attributes: dict[str, AttributeValue] = {
            names.GEN_AI_OPERATION: begin.operation,
            names.GEN_AI_PROVIDER: begin.provider,
        }
        whose = {names.GEN_AI_PROVIDER: begin.provider, names.GEN_AI_OPERATION: begin.operation, **identity}
        if begin.model is not None:
            attributes[names.GEN_AI_REQUEST_MODEL] = begin.model
        if begin.prompt_tokens is not None:
            attributes[names.GEN_AI_INPUT_TOKENS] = begin.prompt_tokens
        if begin.cached_tokens is not None:
            attributes[names.GEN_AI_CACHED_TOKENS] = begin.cached_tokens
        attributes.update(begin.attributes)
        if labels is not None:
            try:
                self._labels = labels(attributes, begin.user, begin.adapter)
            except Exception as error:
                self._calls.complain("labels", error)
            attributes.update(self._labels)
            whose = {**self._labels, **whose}
        self._calls.meter.open(
            self.key,
            begin.start_ns,
            engine=begin.engine,
            devices=begin.devices,
            model=begin.model,
            prompt_tokens=begin.prompt_tokens,
            cached_tokens=begin.cached_tokens,
            labels=whose,
            parent=self._parent,
            thread=begin.thread,
            probe=begin.probe,
            reason=begin.reason,
        )
        self._opened = True
        self._calls.opened(self, self._parent)
        self._span = tracer.start_span(
            self._name, kind=SpanKind.INTERNAL, attributes=attributes, start_time=self._wall_ns
        )
        self._context = set_span_in_context(self._span)
        self._seen = self._seen_by_spans(self._span)

    def _seen_by_spans(self, span: Span) -> Request | None:
        context = span.get_span_context()
        if not context.is_valid:
            return None
        parent = getattr(span, "parent", None)
        name = self._begin.attributes.get(names.GEN_AI_RESPONSE_ID)
        request = Request(context.trace_id, self._wall_ns, SCOPE, "here", name if isinstance(name, str) else None)
        return self._calls.lineage.request(request, None if parent is None else parent.span_id)

    @property
    def _name(self) -> str:
        begin = self._begin
        return f"{begin.operation} {begin.model}" if begin.model else begin.operation

    def active(self) -> _Active:
        return _Active(self.key, self._context)

    def bind(self, child_id: str) -> None:
        try:
            self._calls.meter.bind(self.key, child_id)
        except Exception as error:
            self._calls.complain("bind", error)

    def end(self, end: End) -> None:
        if not self._ended.acquire(blocking=False):
            return
        try:
            self._calls.closed(self)
            future = self._close(end)
            if self._seen is not None:
                self._seen.ended(self._wall_ns + end.end_ns - self._begin.start_ns, future)
            self._end_span(end, future)
            self._calls.reports.when_known(future, lambda shares: self.record(end, shares))
        except Exception as error:
            self._calls.complain("end", error)

    def _close(self, end: End) -> Future[list[Share]]:
        try:
            if self._opened:
                return self._calls.meter.close(
                    self.key,
                    end.end_ns,
                    end.output_tokens,
                    end.outcome,
                    first_token_ns=end.first_token_ns,
                    prompt_tokens=end.prompt_tokens,
                    cached_tokens=end.cached_tokens,
                )
        except Exception as error:
            self._calls.complain("close", error)
        unknown: Future[list[Share]] = Future()
        unknown.set_result([])
        return unknown

    def _end_span(self, end: End, future: Future[list[Share]]) -> None:
        span = self._span
        if span is None:
            return
        end_time = self._wall_ns + end.end_ns - self._begin.start_ns
        if not span.is_recording():
            span.end(end_time)
            return
        deferral = self._calls.deferral
        span_id = span.get_span_context().span_id
        entry = Entry(future, owner=self.children == 0)
        try:
            span.set_attributes(self._outcome(end))
            if end.error is not None:
                span.set_status(Status(StatusCode.ERROR, str(end.error) or None))
        except Exception as error:
            self._calls.complain("span", error)
        if self._late is not None:
            self._late.hold(span, end_time, entry, end.output_tokens)
            return
        deferral.register(span_id, entry)
        try:
            span.end(end_time)
        finally:
            deferral.forget(span_id)

    def _outcome(self, end: End) -> dict[str, AttributeValue]:
        found: dict[str, AttributeValue] = {}
        if end.prompt_tokens is not None:
            found[names.GEN_AI_INPUT_TOKENS] = end.prompt_tokens
        if end.cached_tokens is not None:
            found[names.GEN_AI_CACHED_TOKENS] = end.cached_tokens
        if end.output_tokens is not None:
            found[names.GEN_AI_OUTPUT_TOKENS] = end.output_tokens
        if end.finish_reasons:
            found[names.GEN_AI_FINISH_REASONS] = tuple(end.finish_reasons)
        if end.first_token_ns is not None:
            found[names.GEN_AI_TIME_TO_FIRST_CHUNK] = (end.first_token_ns - self._begin.start_ns) / 1e9
        if end.error is not None:
            found[names.ERROR_TYPE] = _error_type(end.error)
        found.update(end.attributes)
        return found

    def record(self, end: End, shares: Sequence[Share]) -> RequestRecord:
        """The finished request; ``shares`` may be empty where nothing is known."""
        begin = self._begin
        context = None if self._span is None else self._span.get_span_context()
        return RequestRecord(
            key=self.key,
            name=self._name,
            kind="request",
            operation=begin.operation,
            provider=begin.provider,
            model=begin.model,
            start_ns=begin.start_ns,
            end_ns=end.end_ns,
            start_wall_ns=self._wall_ns,
            first_token_ns=end.first_token_ns,
            prompt_tokens=begin.prompt_tokens if end.prompt_tokens is None else end.prompt_tokens,
            cached_tokens=begin.cached_tokens if end.cached_tokens is None else end.cached_tokens,
            output_tokens=end.output_tokens,
            outcome=end.outcome,
            error_type=None if end.error is None else _error_type(end.error),
            finish_reasons=tuple(end.finish_reasons),
            energy=self._calls.reports.settle(shares),
            shares=tuple(shares),
            trace_id=context.trace_id if context else 0,
            span_id=context.span_id if context else 0,
            sampled=bool(context and context.trace_flags.sampled),
            labels=self._labels,
            parent=self._parent,
            rendered=self._calls.rendered(),
            answer=begin.answer,
            compile_warmup=end.attributes.get(names.COMPILE_WARMUP) is True,
        )


class _Active:
    """Makes a call the current one; leaves both contexts as they were, also when it is left in another task."""

    __slots__ = ("_context", "_key", "_otel", "_token")

    def __init__(self, key: Key, context: Context | None) -> None:
        self._key = key
        self._context = context
        self._token: Token[Key | None] | None = None
        self._otel: Token[Context] | None = None

    def __enter__(self) -> None:
        self._token = current.set(self._key)
        if self._context is not None:
            self._otel = otel_context.attach(self._context)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        token, otel = self._token, self._otel
        self._token = self._otel = None
        if token is None:
            return
        try:
            current.reset(token)
        except ValueError:
            # A stream was closed by another task or by the collector. Its tokens mean nothing in this context, where
            # OpenTelemetry would log an error about its own.
            return
        if otel is not None:
            otel_context.detach(otel)


def _error_type(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
