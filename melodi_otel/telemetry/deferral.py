"""Which spans wait for joules, and what the joules look like on a span.

One :class:`Deferral` per meter: requests register the future of their shares under their span's id just before the span
ends; every deferring processor asks here whether a span that ended has such a future. It also holds what all processors
share: the bounds of the wait and the counts.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Final, Protocol

from opentelemetry.sdk.trace import ReadableSpan

from melodi_otel import semconv as names
from melodi_otel.attribution.meter import Reason, Share
from melodi_otel.attribution.summary import Energy, summarize, unavailable
from melodi_otel.clock import Clock
from melodi_otel.devices import Device

log = logging.getLogger("melodi_otel")

_TOLD: Final = 10_000
"""Spans of which it is remembered that they have their joules. Not a setting: several threads forget the oldest at a time."""
AttributeValue = str | bool | int | float | Sequence[str]


@dataclass(eq=False, slots=True)
class Entry:
    """What a span waits for.

    Attributes:
        future: its shares.
        owner: it owns the request; else it encloses the ones that do, or tells of one a second time.
        output_tokens: of the request, where the span names them in a way of its own.
        sums: the shares are those of several requests, each with its own joules; else ``Share.rollup`` has their sum.
    """

    future: Future[list[Share]]
    owner: bool = True
    output_tokens: int | None = None
    sums: bool = False


class Foreign(Protocol):
    """Whoever knows of spans that are not ours."""

    def started(self, span: ReadableSpan) -> None:
        """A recorded span began, ours included; must be quick. Every processor asks."""
        ...

    def ended(self, span: ReadableSpan) -> Entry | None:
        """What a span waits for that ended, or None; must be quick. Every processor asks."""
        ...

    def own_ended(self, span_id: int) -> None:
        """A span of ours ended, whose shares are known here."""
        ...

    def forked(self) -> None:
        """Start over in a child."""
        ...


@dataclass(frozen=True, slots=True)
class SpanCounts:
    """Spans that wait now, and how many stopped waiting by outcome (``semconv.SPAN_OUTCOMES``).

    ``exported``: those that exporters of ours were handed, by ``semconv.SPAN_EXPORTS``; empty where there is no such exporter.
    """

    deferred: int
    settled: Mapping[str, int]
    exported: Mapping[str, int] = field(default_factory=dict[str, int])


def energy_attributes(energy: Energy, output_tokens: int | None, owner: bool = True) -> dict[str, AttributeValue]:
    """The ``melodi.energy.*`` attributes of a span; what is not known is absent.

    Args:
        energy: the request's energy.
        output_tokens: its output tokens, for the energy per token.
        owner: False for a span whose nested requests own the joules: it carries ``rollup`` instead of ``total``.
    """
    found: dict[str, AttributeValue | None] = {
        names.METHOD: energy.method,
        names.QUALITY: energy.quality,
        names.SOURCE: energy.source or None,
        names.SCOPE: energy.scope,
        names.COVERAGE: energy.coverage if energy.quality != "unavailable" else None,
        names.CONCURRENCY: energy.concurrency,
        names.EXCLUSIVE: energy.exclusive,
        names.DEVICES: energy.devices or None,
        names.REASON: energy.reason,
        names.SCHEMA: names.ENERGY_SCHEMA,
    }
    if owner:
        found |= {
            names.TOTAL: energy.total,
            names.GPU: energy.gpu,
            names.CPU: energy.cpu,
            names.MEMORY: energy.memory,
            names.DYNAMIC: energy.dynamic,
            names.STATIC: energy.static,
            names.PREFILL: energy.prefill,
            names.DECODE: energy.decode,
            names.UNCERTAINTY: energy.uncertainty,
            names.PER_OUTPUT_TOKEN: energy.per_token(output_tokens),
        }
    else:
        found[names.ROLLUP] = energy.rollup
    return {name: value for name, value in found.items() if value is not None}


class Deferral:
    """The registry between requests and span processors.

    Args:
        clock: time of the bounds.
        wait_s: the longest time a span waits, in seconds; asked for every span.
        limit: the most spans that wait at a time, per processor.
        devices: the devices now, by ``hw.id``.
        why: the reason to give where there is no share at all.
    """

    def __init__(
        self,
        clock: Clock,
        *,
        wait_s: Callable[[], float] = lambda: 5.0,
        limit: int = 10_000,
        devices: Callable[[], Mapping[str, Device]] = dict,
        why: Callable[[], Reason] = lambda: "no_source",
    ) -> None:
        self.clock: Final = clock
        self.limit: Final = limit
        self._wait_s = wait_s
        self._devices = devices
        self._why = why
        self._entries: dict[int, Entry] = {}
        self._foreign: Foreign | None = None
        # Not a method: every span of the program comes by here.
        self.started: Callable[[ReadableSpan], None] = _nobody_asks
        self._told: OrderedDict[int, None] = OrderedDict()
        self._lock = threading.RLock()
        self._deferred = 0
        self._settled = _none()
        self._exported: dict[str, int] = {}

    def register(self, span_id: int, entry: Entry) -> None:
        """The span with this id, which ends next, waits for ``entry``."""
        self._entries[span_id] = entry

    def forget(self, span_id: int) -> None:
        """The span has ended: every processor has asked by now."""
        self._entries.pop(span_id, None)

    def watch(self, foreign: Foreign | None) -> None:
        """Let spans of others wait too; None: no longer."""
        self._foreign = foreign
        self.started = _nobody_asks if foreign is None else foreign.started

    def find(self, span: ReadableSpan) -> Entry | None:
        """What ``span``, which ended, waits for; None: nothing."""
        context, foreign = span.get_span_context(), self._foreign
        entry = self._entries.get(context.span_id) if context is not None else None
        if foreign is None:
            return entry
        if entry is None or context is None:
            return foreign.ended(span)
        foreign.own_ended(context.span_id)
        return entry

    def has_waited(self, span: ReadableSpan) -> bool:
        """Whether ``span`` has its joules already: a processor of ours deeper in somebody's chain sees it again."""
        context = span.get_span_context()
        # The cheap question first: looking into the attributes of a span costs as much as all the rest.
        return context is not None and context.span_id in self._told and names.SCHEMA in (span.attributes or {})

    def told(self, span: ReadableSpan) -> None:
        """``span`` has been given its joules."""
        context = span.get_span_context()
        if context is not None:
            self._told[context.span_id] = None
            while len(self._told) > _TOLD:
                self._told.popitem(last=False)

    def wait_s(self) -> float:
        """The longest time a span waits that ends now, in seconds."""
        return max(0.0, self._wait_s())

    def settle(self, shares: Sequence[Share]) -> Energy:
        """The energy of these shares, in one figure."""
        return summarize(shares, self._devices()) if shares else unavailable(self._why())

    def settled(self, entry: Entry) -> Energy:
        """The energy that a span shows whose shares are there."""
        shares = entry.future.result()
        energy = self.settle(shares)
        if not entry.sums or energy.total is None:
            return energy
        known = {share.key for share in shares if share.joules is not None}
        missing = [share for share in shares if share.key not in known]
        if missing:
            energy = replace(energy, quality="partial", reason=energy.reason or missing[0].reason)
        return replace(energy, rollup=energy.total)

    def parked(self, change: int) -> None:
        """Count spans that began (+) or stopped (-) waiting."""
        with self._lock:
            self._deferred += change

    def counted(self, outcome: str) -> None:
        """Count one span that was forwarded."""
        with self._lock:
            self._settled[outcome] = self._settled.get(outcome, 0) + 1

    def exported(self, spans: int, outcome: str) -> None:
        """Count spans that an exporter of ours was handed."""
        with self._lock:
            self._exported[outcome] = self._exported.get(outcome, 0) + spans

    def counts(self) -> SpanCounts:
        """The counts now."""
        with self._lock:
            return SpanCounts(self._deferred, dict(self._settled), dict(self._exported))

    def forked(self) -> None:
        """In a child: nothing waits here, the parent counts and exports what did."""
        self._lock = threading.RLock()
        self._entries = {}
        if self._foreign is not None:
            self._foreign.forked()
        self._deferred = 0
        self._settled = _none()
        self._exported = dict.fromkeys(self._exported, 0)


def _nobody_asks(_: ReadableSpan) -> None: ...


def _none() -> dict[str, int]:
    # Every outcome is a series from the start, at 0: a counter that appears with its first event hides that event.
    return dict.fromkeys([str(outcome) for outcome in names.SPAN_OUTCOMES], 0)
