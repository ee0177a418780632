"""The status as data: what ``/status.json`` holds, field by field, units in the names.

What is not known is None (null), never 0. No prompt, no answer and no label of a request is in it.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

from melodi_otel.attribution.meter import Quality

SCHEMA: Final = 1

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


def finite(value: float | None) -> float | None:
    """``value``; None where it is no number that JSON has."""
    return value if value is not None and math.isfinite(value) else None
