"""One finished request, as spans, metrics, results and the data set see it: the same record for all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from melodi_otel.attribution.meter import Key, Outcome, Quality, Share
from melodi_otel.attribution.summary import Energy
from melodi_otel.units import watt_hours


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """A request whose joules are final (or known to be unavailable).

    Attributes:
        key: its key in the meter.
        name: what a person calls it: the span name, or the name given to ``measure()``.
        kind: ``request`` (a model call) or ``measure`` (a block of the user's code).
        operation, provider, model: the ``gen_ai.*`` values; None where they do not apply.
        start_ns, end_ns: monotonic ns; ``start_wall_ns``: wall time of the start, ns since the epoch.
        first_token_ns: monotonic ns of the first token on the host, or None.
        prompt_tokens, cached_tokens, output_tokens: exact counts, or None.
        outcome: how it ended; ``error_type`` names the exception class where one was raised.
        finish_reasons: one per sequence.
        energy: the sum over devices; ``shares``: what it sums.
        trace_id, span_id: of its span, 0 where there is none; ``sampled``: whether that span is recorded.
        labels: configured labels.
        parent: the activity it is nested in, or None.
        compile_warmup: True: torch.compile worked while it ran, so time and joules are those of a warm-up as well.
        instrumented: False: only somebody else's span tells of it, whose instrumentation reports its tokens and times itself.
        service, namespace: of the program that made it, where that is another one; None: of this one.
        rendered: its program shows it on a page of its own: no page of ours does, too.
        answer: id of the answer that promises its joules, or None.
    """

    key: Key
    name: str
    kind: str
    operation: str | None
    provider: str | None
    model: str | None
    start_ns: int
    end_ns: int
    start_wall_ns: int
    first_token_ns: int | None
    prompt_tokens: int | None
    cached_tokens: int | None
    output_tokens: int | None
    outcome: Outcome
    error_type: str | None
    finish_reasons: Sequence[str]
    energy: Energy
    shares: Sequence[Share] = ()
    trace_id: int = 0
    span_id: int = 0
    sampled: bool = False
    labels: Mapping[str, str] = field(default_factory=dict[str, str])
    parent: Key | None = None
    compile_warmup: bool = False
    instrumented: bool = True
    service: str | None = None
    namespace: str | None = None
    rendered: bool = False
    answer: str | None = None

    @property
    def duration_s(self) -> float:
        """Seconds from start to end."""
        return (self.end_ns - self.start_ns) / 1e9

    @property
    def joules(self) -> float | None:
        """J of the request; of a measured block with everything nested in it. None: not known."""
        return self.energy.rollup if self.kind == "measure" else self.energy.total

    @property
    def watt_hours(self) -> float | None:
        """:attr:`joules` in Wh."""
        return None if self.joules is None else watt_hours(self.joules)

    @property
    def uncertainty(self) -> float | None:
        """1 sigma of its own joules in J."""
        return self.energy.uncertainty

    @property
    def quality(self) -> Quality:
        """How good the figure is."""
        return self.energy.quality

    @property
    def time_to_first_token_s(self) -> float | None:
        """Seconds from start to the first token, or None."""
        return None if self.first_token_ns is None else (self.first_token_ns - self.start_ns) / 1e9


class Observer(Protocol):
    """Whoever wants finished requests. Called on the settle thread, never on the request's; must not block."""

    def finished(self, record: RequestRecord) -> None: ...
