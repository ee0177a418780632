"""Metrics: the contract's instruments on a meter of OpenTelemetry.

All numbers come from three places: the ledger's snapshot (where joules went), finished requests (what one of them was
like) and :class:`Hardware` (what the meters show now). Nothing is counted twice and nothing is invented: what is not known
is not observed. May be made on several providers, e.g. the application's for OTLP and our own for the scrape endpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from opentelemetry.context import Context
from opentelemetry.metrics import CallbackOptions, Meter, Observation
from opentelemetry.trace import INVALID_SPAN, NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

from melodi_otel import semconv as names
from melodi_otel import semconv_metrics as metrics
from melodi_otel.attribution.books import BUCKETS, Snapshot, Who
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.devices import Device
from melodi_otel.forks import in_child
from melodi_otel.semconv_metrics import Metric
from melodi_otel.telemetry import sdk
from melodi_otel.telemetry.books import SteadyBooks
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.deferral import SpanCounts


@dataclass(frozen=True, slots=True)
class Hardware:
    """What the meters show now, by ``hw.id``; a device that is missing from a mapping is not known there.

    Attributes:
        watts: power in W.
        utilization: of GPUs, 0 to 1.
        memory_bytes: used memory of GPUs.
        sample_age_s: seconds since the newest usable sample.
        up: by (source, hw.id or None for a whole source), whether it answers.
        self_joules: energy of the meter's own work in J, or None.
        intensity: gCO2e per kWh, as told live, or None.
        emissions: g of CO2 equivalent, counted by live intensities, or None.
    """

    watts: Mapping[str, float] = field(default_factory=dict[str, float])
    utilization: Mapping[str, float] = field(default_factory=dict[str, float])
    memory_bytes: Mapping[str, int] = field(default_factory=dict[str, int])
    sample_age_s: Mapping[str, float] = field(default_factory=dict[str, float])
    up: Mapping[tuple[str, str | None], bool] = field(default_factory=dict[tuple[str, str | None], bool])
    self_joules: float | None = None
    intensity: float | None = None
    emissions: float | None = None


@dataclass(frozen=True, slots=True)
class Configured:
    """Configuration that is published as gauges; None = not set, not published.

    ``energy_budget``: (model, J per 1,000 output tokens); ``*`` stands for all models that are not named.
    """

    carbon_intensity: float | None = None
    pue: float | None = None
    energy_price: float | None = None
    energy_budget: tuple[tuple[str, float], ...] = ()

    def budget(self, model: str | None) -> float | None:
        """J per 1,000 output tokens of this model; None: it has no budget."""
        budgets = dict(self.energy_budget)
        return budgets.get(model or "", budgets.get(names.ANY_MODEL))


@dataclass(frozen=True, slots=True)
class Views:
    """Where the instruments read. All are called on the collecting thread and must be quick.

    Attributes:
        snapshot: the ledger's books.
        devices: all devices by ``hw.id``.
        hardware: what the meters show.
        spans: the counts of waiting spans.
        configured: configuration to publish; asked anew each time, for a reload changes it.
        publisher: whether this process publishes the host's own series (``hw.*``, unattributed, residual, …).
        metric_labels: names of the labels that metrics of requests carry.
        identity: ``service.name`` and ``service.namespace`` of the requests made here, where known.
        constant: attributes on every series, e.g. ``host.id`` where the resource lacks it.
        clip: a request's labels as metrics carry them, with the limit on values; None: those of ``metric_labels``.
        counting: whether requests that finish now are counted here (``melodi.requests``); a hub counts those of its programs.
        calls: whether the histograms of single requests are recorded here; on OTLP each program records its own.
        whose: whether those carry the request's ``service.name`` and ``service.namespace``: on a page for several programs.
        page: whether it is a page: those leave out there what the request's program shows on another one.
    """

    snapshot: Callable[[], Snapshot]
    devices: Callable[[], Mapping[str, Device]]
    hardware: Callable[[], Hardware] = Hardware
    spans: Callable[[], SpanCounts] = lambda: SpanCounts(0, {})
    configured: Callable[[], Configured] = Configured
    publisher: Callable[[], bool] = lambda: True
    metric_labels: tuple[str, ...] = ()
    identity: Mapping[str, str] = field(default_factory=dict[str, str])
    constant: Mapping[str, str] = field(default_factory=dict[str, str])
    clip: Callable[[Mapping[str, str]], Iterable[tuple[str, str]]] | None = None
    counting: Callable[[], bool] = lambda: True
    calls: bool = True
    whose: bool = False
    page: bool = False

    def clipped(self, labels: Mapping[str, str]) -> dict[str, str]:
        """The labels that a metric of requests carries."""
        if self.clip is not None:
            return dict(self.clip(labels))
        return {name: value for name, value in labels.items() if name in self.metric_labels}


Rows = Iterable[tuple[float, dict[str, Any]]]


class Instruments:
    """The instruments on one meter; an ``Observer`` of finished requests.

    Args:
        meter: of any provider, the API's proxy included.
        views: where to read. :meth:`rebind` changes it later, because instruments can never be taken back.
    """

    def __init__(self, meter: Meter, views: Views) -> None:
        self._meter = meter
        self._views: Views | None = views
        self._lines = SteadyBooks(views.snapshot)
        self._complain = Complaints("metrics")
        self._lock = threading.Lock()
        self._observe(metrics.HW_ENERGY, lambda v: self._energy(v, host=False))
        self._observe(metrics.HW_HOST_ENERGY, lambda v: self._energy(v, host=True))
        self._observe(metrics.HW_POWER, lambda v: _gauge(v, v.hardware().watts, host=False))
        self._observe(metrics.HW_HOST_POWER, lambda v: _gauge(v, v.hardware().watts, host=True))
        self._observe(metrics.HW_GPU_UTILIZATION, lambda v: _gauge(v, v.hardware().utilization))
        self._observe(metrics.HW_GPU_MEMORY, lambda v: _gauge(v, v.hardware().memory_bytes))
        self._observe(metrics.ATTRIBUTED, self._attributed)
        self._observe(metrics.UNATTRIBUTED, self._unattributed)
        self._observe(metrics.RESIDUAL, self._residual)
        self._observe(metrics.IN_FLIGHT, self._in_flight)
        self._observe(metrics.REQUESTS_ACTIVE, self._active)
        self._observe(
            metrics.SAMPLE_AGE, lambda v: [(s, {names.HW_ID: d}) for d, s in v.hardware().sample_age_s.items()]
        )
        self._observe(metrics.SOURCE_UP, lambda v: [(float(up), _meter_of(key)) for key, up in v.hardware().up.items()])
        self._observe(metrics.SELF_ENERGY, lambda v: _single(v.hardware().self_joules))
        self._observe(metrics.SPAN_DEFERRED, lambda v: [(v.spans().deferred, {})])
        self._observe(
            metrics.SPAN_SETTLED,
            lambda v: [(n, {names.SPAN_OUTCOME: outcome}) for outcome, n in v.spans().settled.items()],
        )
        self._observe(
            metrics.SPAN_EXPORTED,
            lambda v: [(n, {names.SPAN_EXPORT: outcome}) for outcome, n in v.spans().exported.items()],
        )
        self._observe(metrics.CARBON_INTENSITY, lambda v: _single(_intensity(v)))
        self._observe(metrics.CARBON_EMISSIONS, lambda v: _single(v.hardware().emissions))
        self._observe(metrics.PUE, lambda v: _single(v.configured().pue))
        self._observe(metrics.PRICE, lambda v: _single(v.configured().energy_price))
        self._observe(metrics.BUDGET, lambda v: _budgets(v.configured()))
        self._requests = meter.create_counter(
            metrics.REQUESTS.name, metrics.REQUESTS.unit, metrics.REQUESTS.description
        )
        self._over_budget = meter.create_counter(
            metrics.OVER_BUDGET.name, metrics.OVER_BUDGET.unit, metrics.OVER_BUDGET.description
        )
        self._request_energy = sdk.histogram(meter, metrics.REQUEST_ENERGY)
        self._tokens = sdk.histogram(meter, metrics.TOKEN_USAGE)
        self._duration = sdk.histogram(meter, metrics.OPERATION_DURATION)
        self._first_token = sdk.histogram(meter, metrics.TIME_TO_FIRST_TOKEN)
        self._per_token = sdk.histogram(meter, metrics.TIME_PER_OUTPUT_TOKEN)
        self._sampler = sdk.histogram(meter, metrics.SAMPLER_DURATION)
        self._exemplars = sdk.keeps_exemplars(self._request_energy)
        in_child(self._forked)

    def _forked(self) -> None:
        # What was counted before the fork is the parent's: shown by both it would be twice what was used.
        self._lock = threading.Lock()
        if self._views is not None:
            self._lines = SteadyBooks(self._views.snapshot)

    def rebind(self, views: Views | None) -> None:
        """Read elsewhere from now on; None: observe and record nothing any more."""
        with self._lock:
            self._views = views
            if views is not None:
                self._lines = SteadyBooks(views.snapshot)

    def sampled(self, duration_s: float) -> None:
        """One round of readings took ``duration_s`` seconds."""
        views = self._views
        if views is not None and views.publisher():
            self._sampler.record(duration_s, dict(views.constant))

    def finished(self, record: RequestRecord) -> None:
        """Record a request; called on the thread that settled it."""
        views = self._views
        if views is None or record.kind != "request":
            return
        energy = record.energy
        identity = {
            **views.identity,
            **_known({names.SERVICE_NAME: record.service, names.SERVICE_NAMESPACE: record.namespace}),
        }
        call = {
            **(identity if views.whose else {}),
            **views.constant,
            **_known({names.GEN_AI_OPERATION: record.operation, names.GEN_AI_PROVIDER: record.provider}),
            **_known({names.GEN_AI_REQUEST_MODEL: record.model}),
        }
        context = {"context": _context_of(record)} if self._exemplars else {}
        calls = views.calls and not (views.page and record.rendered)
        if energy.total is not None and calls:
            attributes = {**call, **_known({names.SCOPE: energy.scope}), names.QUALITY: energy.quality}
            self._request_energy.record(max(0.0, energy.total), attributes, **context)
        if record.instrumented and calls:
            self._call(record, call, context)
        if not views.counting():
            return
        who = {
            **views.clipped(record.labels),
            **identity,
            **views.constant,
            **_known({names.GEN_AI_REQUEST_MODEL: record.model, names.GEN_AI_PROVIDER: record.provider}),
            names.REQUEST_OUTCOME: record.outcome,
            names.QUALITY: energy.quality,
        }
        self._requests.add(1, who, **context)
        budget = views.configured().budget(record.model)
        used = energy.per_token(record.output_tokens)
        if budget is not None and used is not None:
            # A series that begins with 0 shows its first increase, too.
            over = {name: value for name, value in who.items() if name != names.REQUEST_OUTCOME}
            self._over_budget.add(int(1e3 * used > budget), over, **context)

    def _call(self, record: RequestRecord, call: dict[str, str], context: dict[str, Context]) -> None:
        for kind, tokens in (("input", record.prompt_tokens), ("output", record.output_tokens)):
            if tokens is not None:
                self._tokens.record(tokens, {**call, names.GEN_AI_TOKEN_TYPE: kind}, **context)
        self._duration.record(record.duration_s, {**call, **_known({names.ERROR_TYPE: record.error_type})}, **context)
        if record.outcome in {"stop", "length"}:
            self._latencies(record, call, context)

    def _latencies(self, record: RequestRecord, call: dict[str, str], context: dict[str, Context]) -> None:
        first = record.time_to_first_token_s
        if first is None:
            return
        self._first_token.record(first, call, **context)
        if record.output_tokens is not None and record.output_tokens > 1:
            mean = (record.duration_s - first) / (record.output_tokens - 1)
            self._per_token.record(max(0.0, mean), call, **context)

    # --- observed ---

    def _observe(self, metric: Metric, rows: Callable[[Views], Rows]) -> None:
        def callback(_: CallbackOptions) -> Iterable[Observation]:
            views = self._views
            try:
                if views is None or (metric.publisher and not views.publisher()):
                    return []
                found = [Observation(value, {**labels, **views.constant}) for value, labels in rows(views)]
            except Exception as error:
                self._complain(metric.name, error)
                return []
            return found

        create = {
            "counter": self._meter.create_observable_counter,
            "updowncounter": self._meter.create_observable_up_down_counter,
            "gauge": self._meter.create_observable_gauge,
        }[metric.kind]
        create(metric.name, callbacks=[callback], unit=metric.unit, description=metric.description)

    def _energy(self, views: Views, *, host: bool) -> Rows:
        metric = metrics.HW_HOST_ENERGY if host else metrics.HW_ENERGY
        devices = views.devices()
        for device, measured in self._lines.measured(metric.name).items():
            if (attributes := _device(devices, device, host=host)) is not None:
                yield measured, attributes

    def _attributed(self, views: Views) -> Rows:
        devices = views.devices()
        for (device, who, phase, quality), joules in self._lines.attributed(metrics.ATTRIBUTED.name).items():
            kind = _type(devices, device)
            yield joules, {**_who(who), **kind, names.HW_ID: device, names.PHASE: phase, names.QUALITY: quality}

    def _unattributed(self, views: Views) -> Rows:
        devices = views.devices()
        for (device, bucket, holder), joules in self._lines.unattributed(metrics.UNATTRIBUTED.name).items():
            if bucket not in BUCKETS or _is_host(devices, device):
                continue
            held = {} if holder is None else _known({names.HOLDER_SERVICE: holder[0], names.HOLDER_MODEL: holder[1]})
            yield joules, {**held, **_type(devices, device), names.HW_ID: device, names.BUCKET: bucket}

    def _residual(self, views: Views) -> Rows:
        devices = views.devices()
        for device, joules in self._lines.residual(metrics.RESIDUAL.name).items():
            if not _is_host(devices, device):
                yield joules, {names.HW_ID: device}

    def _in_flight(self, views: Views) -> Rows:
        for device, books in self._lines.snapshot(metrics.IN_FLIGHT.name).books.items():
            if not _is_host(views.devices(), device):
                yield books.in_flight, {names.HW_ID: device}

    def _active(self, views: Views) -> Rows:
        active = self._lines.snapshot(metrics.REQUESTS_ACTIVE.name).active
        return [(number, _who(who)) for who, number in active.items()]


def _budgets(configured: Configured) -> Rows:
    for model, joules in configured.energy_budget:
        yield joules, {} if model == names.ANY_MODEL else {names.GEN_AI_REQUEST_MODEL: model}


_NOBODY: Final = set_span_in_context(INVALID_SPAN, Context())
"""Not an empty context: for the SDK that is none, and it takes whatever span is current on the settling thread."""


def _context_of(record: RequestRecord) -> Context:
    """The request's own span as context, for the exemplar; nobody's where it was not sampled."""
    if not (record.sampled and record.trace_id and record.span_id):
        return _NOBODY
    span = SpanContext(record.trace_id, record.span_id, is_remote=False, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    return set_span_in_context(NonRecordingSpan(span), Context())


def _known(attributes: Mapping[str, str | None]) -> dict[str, str]:
    return {name: value for name, value in attributes.items() if value is not None and value != ""}


def _who(who: Who) -> dict[str, Any]:
    return {
        **dict(who.labels),
        **_known({names.GEN_AI_REQUEST_MODEL: who.model, names.GEN_AI_PROVIDER: who.provider}),
        **_known({names.SERVICE_NAME: who.service, names.SERVICE_NAMESPACE: who.namespace}),
    }


def _is_host(devices: Mapping[str, Device], device: str) -> bool:
    return device in devices and devices[device].type == "host"


def _type(devices: Mapping[str, Device], device: str) -> dict[str, Any]:
    return {names.HW_TYPE: devices[device].type} if device in devices else {}


def _device(devices: Mapping[str, Device], device: str, *, host: bool) -> dict[str, Any] | None:
    """Attributes of a device's own series, or None where it belongs to the other kind."""
    known = devices.get(device)
    if known is None or (known.type == "host") is not host:
        return None
    kind = {} if host else {names.HW_TYPE: known.type}
    return {names.HW_ID: device, **kind, **_known({names.HW_NAME: known.name})}


def _gauge(views: Views, values: Mapping[str, float], *, host: bool = False) -> Rows:
    devices = views.devices()
    for device, value in values.items():
        if (attributes := _device(devices, device, host=host)) is not None:
            yield value, attributes


def _meter_of(key: tuple[str, str | None]) -> dict[str, Any]:
    return _known({names.METER_SOURCE: key[0], names.HW_ID: key[1]})


def _intensity(views: Views) -> float | None:
    live = views.hardware().intensity
    return views.configured().carbon_intensity if live is None else live


def _single(value: float | None) -> Rows:
    return [] if value is None else [(value, {})]
