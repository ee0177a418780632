"""The books as they are written to disk, so that the next ledger continues them when this one is killed.

Plain frozen records of builtins, which any encoder of dataclasses takes. All times are those of ``CLOCK_MONOTONIC``: a state
is of use only until the machine restarts, and whoever reads it back has to see to that.

::

    first ledger   |---- booked ----|-- pending --|  killed
    second ledger                   |............ gap ............|---- booked ----|
                                closed_ns      reading         first reading

What was in flight is settled: the requests keep the shares that stand in the state and get the rest from the second ledger.
The joules of the gap are known where the counter shows them, but not whose they were: they are ``unsampled``, and the gap
lowers the coverage of every request that lies in it.
"""

from __future__ import annotations

from dataclasses import dataclass

from melodi_otel.attribution.books import Bucket, Phase, Who
from melodi_otel.attribution.meter import Share
from melodi_otel.devices import Device
from melodi_otel.timeline.counter import Reading


@dataclass(frozen=True, slots=True)
class Booked:
    """J in one bucket of a device; ``holder`` is (service, model) where one engine holds the device."""

    bucket: Bucket
    holder: tuple[str, str] | None
    joules: float


@dataclass(frozen=True, slots=True)
class Attributed:
    """J that requests got on a device, open ones included, by what metrics tell apart."""

    who: Who
    phase: Phase
    quality: str
    joules: float


@dataclass(frozen=True, slots=True)
class DeviceState:
    """The account of one device; joules throughout.

    Attributes:
        device: which one.
        measured: of all closed intervals; ``settled + in_flight + buckets + residual`` to 1e-9.
        settled: of finished requests.
        in_flight: of requests that are open or wait for their joules.
        residual: see :class:`melodi_otel.attribution.books.Books`.
        buckets, attributed: where they went.
        pending: decided by the timeline and not booked yet.
        idle_watts: idle power in W, given or learnt; None: not known.
        closed_ns: up to when the books are closed; None: nothing was read.
        reading: the last reading of its counter; None: it has none, or none was read.
    """

    device: Device
    measured: float = 0.0
    settled: float = 0.0
    in_flight: float = 0.0
    residual: float = 0.0
    buckets: tuple[Booked, ...] = ()
    attributed: tuple[Attributed, ...] = ()
    pending: float = 0.0
    idle_watts: float | None = None
    closed_ns: int | None = None
    reading: Reading | None = None


@dataclass(frozen=True, slots=True)
class State:
    """A whole ledger at ``t_ns``: its accounts, and what its unsettled requests have accrued.

    ``accrued`` holds the shares of :meth:`melodi_otel.attribution.ledger.Ledger.accrued`, each with its key.
    """

    t_ns: int
    devices: tuple[DeviceState, ...] = ()
    accrued: tuple[Share, ...] = ()
