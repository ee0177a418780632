"""From the views of a meter to its status."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from melodi_otel.attribution.books import BUCKETS, Books, Snapshot
from melodi_otel.attribution.meter import Key, Share
from melodi_otel.attribution.summary import summarize
from melodi_otel.clock import Clock
from melodi_otel.devices import Device
from melodi_otel.sampler import Cost
from melodi_otel.sources.base import Discovery, Refusal
from melodi_otel.status.record import (
    SCHEMA,
    BookStatus,
    DeviceStatus,
    HealthStatus,
    HubStatus,
    Mode,
    ModelStatus,
    RefusalStatus,
    RequestStatus,
    SamplerStatus,
    Status,
    finite,
)
from melodi_otel.telemetry.metrics import Hardware

REQUESTS_SHOWN: Final = 100
"""The most open requests that a status lists; ``requests_open`` counts them all."""


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
                else SamplerStatus(cost.rounds, cost.failures, cost.seconds, cost.cpu_s, finite(cost.joules)),
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
                finite(hardware.watts.get(device.id)),
                None if book is None else finite(book.measured),
                finite(hardware.sample_age_s.get(device.id)),
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
                finite(energy.total),
                request.output_tokens,
                energy.quality if shares else None,
            )
        )
    lines.sort(key=lambda line: (line.joules is None, -(line.joules or 0.0), -(line.age_seconds or 0.0)))
    return lines


def _book(book: Books) -> BookStatus:
    parts = {
        f"{name}_joules": finite(getattr(book, name)) for name in ("measured", "attributed", "in_flight", *BUCKETS)
    }
    return BookStatus(
        book.device, **parts, residual_joules=finite(book.residual), imbalance_ratio=finite(book.imbalance())
    )
