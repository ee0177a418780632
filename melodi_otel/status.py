"""What the meter shows now: one record for the status page, ``melodi-otel top`` and programs.

:class:`Status` and its parts are what ``/status.json`` holds, field by field, units in the names. What is not known is None
(null), never 0. No prompt, no answer and no label of a request is in it. :class:`Reporter` makes one from the views that the
composition root hands it; :class:`ModelTotals` counts what finished requests used, by model.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from melodi_otel.attribution.books import BUCKETS, Books, Snapshot
from melodi_otel.attribution.meter import Key, Quality, Share
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.attribution.summary import summarize
from melodi_otel.clock import Clock
from melodi_otel.devices import Device
from melodi_otel.sampler import Cost
from melodi_otel.sources.base import Discovery, Refusal
from melodi_otel.telemetry.metrics import Hardware

SCHEMA: Final = 1
REQUESTS_SHOWN: Final = 100
"""The most open requests that a status lists; ``requests_open`` counts them all."""
MODEL_LIMIT: Final = 200
OTHER: Final = "other"

Mode = Literal["local", "shared", "agent"]


@dataclass(frozen=True, slots=True)
class DeviceStatus:
    """A device: power in W now, J since the start of the meter, seconds since its newest usable sample; ``up``: it answers.

    ``index`` is its number in the vendor's own numbering.
    """

    id: str
    type: str
    name: str | None
    index: int | None
    watts: float | None
    joules: float | None
    sample_age_seconds: float | None
    up: bool | None
    estimated: bool


@dataclass(frozen=True, slots=True)
class RequestStatus:
    """An open request: J and output tokens so far; ``quality`` is that of the joules as they stand."""

    name: str | None
    model: str | None
    service: str | None
    operation: str | None
    age_seconds: float | None
    joules: float | None
    output_tokens: int | None
    quality: Quality | None


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """Finished requests of a model.

    ``joules_per_output_token`` is over the requests of which both joules and tokens are known; ``estimated``: some of its joules
    are no sensor's.
    """

    model: str | None
    requests: int
    output_tokens: int | None
    joules: float | None
    joules_per_output_token: float | None
    estimated: bool


@dataclass(frozen=True, slots=True)
class BookStatus:
    """Where the joules of a device went since the start, see :class:`melodi_otel.attribution.books.Books`."""

    device: str
    measured_joules: float | None
    attributed_joules: float | None
    in_flight_joules: float | None
    idle_joules: float | None
    tail_joules: float | None
    loading_joules: float | None
    foreign_joules: float | None
    unsampled_joules: float | None
    residual_joules: float | None
    imbalance_ratio: float | None


@dataclass(frozen=True, slots=True)
class RefusalStatus:
    """A meter that is not used, why, and what would change that (empty where nothing does)."""

    source: str
    state: str
    reason: str
    fix: str


@dataclass(frozen=True, slots=True)
class SamplerStatus:
    """Reading the meters since the start: rounds that succeeded and failed, and what they cost in s, CPU s and J."""

    rounds: int
    failures: int
    seconds: float
    cpu_seconds: float
    joules: float | None


@dataclass(frozen=True, slots=True)
class HubStatus:
    """A meter for many processes: clients connected now, messages refused since the start."""

    connections: int
    refused_messages: int


@dataclass(frozen=True, slots=True)
class HealthStatus:
    """``publisher``: this meter publishes the host's own series; ``spans_waiting``: spans held back for their joules."""

    refusals: tuple[RefusalStatus, ...]
    sampler: SamplerStatus | None
    hub: HubStatus | None
    publisher: bool | None
    spans_waiting: int | None


@dataclass(frozen=True, slots=True)
class Status:
    """Everything at ``time_unix_seconds``; :meth:`json` is what ``/status.json`` holds."""

    schema: int
    host_id: str | None
    version: str
    mode: Mode
    time_unix_seconds: float
    uptime_seconds: float
    devices: tuple[DeviceStatus, ...]
    requests_open: int
    requests: tuple[RequestStatus, ...]
    models: tuple[ModelStatus, ...]
    books: tuple[BookStatus, ...]
    health: HealthStatus

    def json(self) -> dict[str, Any]:
        """A plain dict for ``json.dumps``."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class OpenRequest:
    """What is known of an open request beside its joules; None = not known. ``start_ns`` is monotonic."""

    key: Key
    name: str | None = None
    model: str | None = None
    service: str | None = None
    operation: str | None = None
    start_ns: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class StatusViews:
    """Where a status is read. All are called on the thread that asks and must be quick.

    Attributes:
        snapshot: the ledger's books.
        devices: all devices by ``hw.id``.
        hardware: what the meters show.
        models: totals of finished requests, see :class:`ModelTotals`.
        accrued: provisional shares of every open request.
        requests: what else is known of open requests.
        refusals: meters that are not used.
        cost: what sampling cost.
        spans_waiting: spans held back for their joules.
        publisher: whether the host's own series are published here.
        hub: of a meter for many processes, else None.
    """

    snapshot: Callable[[], Snapshot]
    devices: Callable[[], Mapping[str, Device]]
    hardware: Callable[[], Hardware] = Hardware
    models: Callable[[], Sequence[ModelStatus]] = tuple
    accrued: Callable[[], Mapping[Key, Sequence[Share]]] = dict
    requests: Callable[[], Iterable[OpenRequest]] = tuple
    refusals: Callable[[], Sequence[Refusal]] = tuple
    cost: Callable[[], Cost | None] = lambda: None
    spans_waiting: Callable[[], int | None] = lambda: None
    publisher: Callable[[], bool | None] = lambda: None
    hub: Callable[[], HubStatus | None] = lambda: None


@dataclass(slots=True)
class _Total:
    requests: int = 0
    tokens: int | None = None
    joules: float | None = None
    paired_tokens: int = 0
    paired_joules: float = 0.0
    estimated: bool = False


@dataclass(slots=True)
class ModelTotals:
    """What finished requests used, by model; an ``Observer``.

    Args:
        limit: models with a line of their own; later ones are counted as ``other``.
    """

    limit: int = MODEL_LIMIT
    _totals: dict[str | None, _Total] = field(default_factory=dict[str | None, _Total], repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def finished(self, record: RequestRecord) -> None:
        """Count a request; blocks of the user's code are none."""
        if record.kind != "request":
            return
        joules, tokens = record.energy.total, record.output_tokens
        with self._lock:
            known = record.model in self._totals or len(self._totals) < self.limit
            total = self._totals.setdefault(record.model if known else OTHER, _Total())
            total.requests += 1
            if tokens is not None:
                total.tokens = (total.tokens or 0) + tokens
            if joules is not None:
                total.joules = (total.joules or 0.0) + joules
                total.estimated |= record.energy.quality == "estimated"
            if tokens and joules is not None:
                total.paired_tokens += tokens
                total.paired_joules += joules

    def models(self) -> tuple[ModelStatus, ...]:
        """One line per model, those that used most first."""
        with self._lock:
            lines = [
                ModelStatus(
                    model,
                    total.requests,
                    total.tokens,
                    _finite(total.joules),
                    _finite(total.paired_joules / total.paired_tokens) if total.paired_tokens else None,
                    total.estimated,
                )
                for model, total in self._totals.items()
            ]
        return tuple(sorted(lines, key=lambda line: -(line.joules or 0.0)))

    def forked(self) -> None:
        """In a child: nothing is counted yet, what was is the parent's."""
        self._lock = threading.Lock()
        self._totals = {}


class Reporter:
    """Makes a :class:`Status`.

    Args:
        views: where to read.
        clock: time.
        version: of melodi_otel.
        mode: where this meter lives.
        host_id: ``host.id``, where known.
    """

    def __init__(
        self, views: StatusViews, clock: Clock, *, version: str, mode: Mode = "local", host_id: str | None = None
    ) -> None:
        self._views = views
        self._clock = clock
        self._version = version
        self._mode: Mode = mode
        self._host_id = host_id
        self._start_ns = clock.monotonic_ns()

    def __call__(self) -> Status:
        """The status now."""
        views = self._views
        now_ns = self._clock.monotonic_ns()
        devices, snapshot = views.devices(), views.snapshot()
        requests = _requests(views.accrued(), views.requests(), devices, now_ns)
        cost = views.cost()
        return Status(
            SCHEMA,
            self._host_id,
            self._version,
            self._mode,
            self._clock.wall_ns() / 1e9,
            (now_ns - self._start_ns) / 1e9,
            _devices(devices, snapshot, views.hardware()),
            max(len(requests), sum(snapshot.active.values())),
            tuple(requests[:REQUESTS_SHOWN]),
            tuple(views.models()),
            tuple(_book(book) for book in snapshot.books.values()),
            HealthStatus(
                tuple(RefusalStatus(r.source, r.state, r.reason, r.fix) for r in views.refusals()),
                None
                if cost is None
                else SamplerStatus(cost.rounds, cost.failures, cost.seconds, cost.cpu_s, _finite(cost.joules)),
                views.hub(),
                views.publisher(),
                views.spans_waiting(),
            ),
        )

    def json(self) -> dict[str, Any]:
        """The status now as a plain dict."""
        return self().json()


def not_ready(discovery: Discovery, hardware: Hardware, *, found: bool = True) -> str | None:
    """Why the meter is not ready, in one line; None: every source has given at least one reading.

    Args:
        discovery: what is measured and what was refused.
        hardware: what the meters show.
        found: False: the meters are still being looked for.
    """
    if not found:
        return "the meters are still being looked for"
    if not discovery.sources:
        why = "; ".join(f"{refusal.source}: {refusal.reason}" for refusal in discovery.refusals)
        return _line(f"no energy meter{': ' if why else ''}{why}")
    silent = [
        source.name
        for source in discovery.sources
        if not any(device.id in hardware.sample_age_s for device in source.devices)
    ]
    return _line(f"no reading yet from {', '.join(silent)}") if silent else None


def _line(text: str) -> str:
    return " ".join(text.split())


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _devices(devices: Mapping[str, Device], snapshot: Snapshot, hardware: Hardware) -> tuple[DeviceStatus, ...]:
    up = {device: alive for (_, device), alive in hardware.up.items() if device is not None}
    lines: list[DeviceStatus] = []
    for device in devices.values():
        book = snapshot.books.get(device.id)
        if book is not None and not book.measured and device.id not in hardware.sample_age_s:
            book = None  # nothing was read yet: that is not known, and no zero
        lines.append(
            DeviceStatus(
                device.id,
                device.type,
                device.name,
                device.index,
                _finite(hardware.watts.get(device.id)),
                None if book is None else _finite(book.measured),
                _finite(hardware.sample_age_s.get(device.id)),
                up.get(device.id),
                device.estimated,
            )
        )
    return tuple(lines)


def _requests(
    accrued: Mapping[Key, Sequence[Share]], known: Iterable[OpenRequest], devices: Mapping[str, Device], now_ns: int
) -> list[RequestStatus]:
    """All open requests, those that used most first and those without joules last."""
    described = {request.key: request for request in known}
    lines: list[RequestStatus] = []
    for key in dict.fromkeys((*described, *accrued)):
        request, shares = described.get(key) or OpenRequest(key), accrued.get(key, ())
        energy = summarize(shares, devices)
        start_ns = request.start_ns
        if start_ns is None:
            start_ns = min((share.t0_ns for share in shares), default=None)
        lines.append(
            RequestStatus(
                request.name,
                request.model,
                request.service,
                request.operation,
                None if start_ns is None else max(0.0, (now_ns - start_ns) / 1e9),
                _finite(energy.total),
                request.output_tokens,
                energy.quality if shares else None,
            )
        )
    lines.sort(key=lambda line: (line.joules is None, -(line.joules or 0.0), -(line.age_seconds or 0.0)))
    return lines


def _book(book: Books) -> BookStatus:
    parts = {
        f"{name}_joules": _finite(getattr(book, name)) for name in ("measured", "attributed", "in_flight", *BUCKETS)
    }
    return BookStatus(
        book.device, **parts, residual_joules=_finite(book.residual), imbalance_ratio=_finite(book.imbalance())
    )
