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
from typing import NamedTuple

from melodi_otel.attribution.books import Bucket, Phase, Who
from melodi_otel.attribution.meter import EngineId, Key, Reason, Tier
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


class SoFar(NamedTuple):
    """What one request has accrued on one device: all that is needed to make its share, and made in a sixth of the time.

    Attributes:
        key, device: whose, and ``hw.id``.
        t0_ns, t1_ns, final_ns: as in its share.
        coverage: part of the interval with known energy, 0..1.
        seen: part of the engine's devices that are seen here, 0..1.
        reset: readings in the interval said nothing of their time.
        exclusive: as in its share, as far as other processes are looked for.
        late: it was reported when it was over.
        assumed: its devices are.
        stepped: it stood in steps; else ``tier`` is the evidence there is.
        nested: J of the requests nested in it; None: there is none.
        accrued: whether any interval was divided among its participants; else the figures below mean nothing.
        prefill, decode, unsplit, static: J.
        shared, tiers: J by tier, the first only what was really divided with others.
        busy_ns, company_ns, intervals, interval_ns: how long it was there, with how many, in how many intervals.
        foreign: other processes computed meanwhile.
        unbased: idle power was not known in some interval.
        part: why this is a part of what the request used; None: it is all of it.
        spread: 1 sigma in J of what was divided, from the errors of the weights.
        unfit: J of intervals that the fitted costs do not describe well.
        tilt: 1 sigma in J, signed, from how prompts are priced against decoded tokens.
    """

    key: Key
    device: str
    t0_ns: int
    t1_ns: int
    final_ns: int
    coverage: float
    seen: float
    reset: bool
    exclusive: bool | None
    late: bool
    assumed: bool
    stepped: bool
    tier: Tier
    nested: float | None
    accrued: bool
    prefill: float
    decode: float
    unsplit: float
    static: float
    shared: dict[Tier, float]
    tiers: dict[Tier, float]
    busy_ns: int
    company_ns: int
    intervals: int
    interval_ns: int
    foreign: bool
    unbased: bool
    part: Reason | None = None
    spread: float = 0.0
    unfit: float = 0.0
    tilt: float = 0.0


class Known(NamedTuple):
    """What a share has to be told of its device.

    Attributes:
        device: which one.
        idle_watts: idle power in W; None: not known.
        interval_s: usual seconds between two readings.
        gone: it is lost.
        process: the CPU time of processes says whose its joules are.
        rough: relative 1 sigma of an interval about what fitted costs predict for it; None: there are none.
        delayed: whether its meter may be late by an amount that is not known.
        idle_part: how much of the joules of requests is idle energy, 0..1; None: not known.
    """

    device: Device
    idle_watts: float | None
    interval_s: float
    gone: bool
    process: bool
    rough: float | None = None
    delayed: bool = False
    idle_part: float | None = None


@dataclass(frozen=True, slots=True)
class Learnt:
    """What the fit of step costs and the search for the meter's delay have found on a device.

    Attributes:
        engines: whose costs, in the order of the blocks of the sums.
        gram, moment: weighted sums of products of features (row by row) and of features and joules.
        rows: how many rows are in them.
        lag_ns, lag_known: the delay of the meter, and whether it was found.
    """

    engines: tuple[EngineId, ...] = ()
    gram: tuple[float, ...] = ()
    moment: tuple[float, ...] = ()
    rows: int = 0
    lag_ns: int = 0
    lag_known: bool = False


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
        interval_s, gone, process, rough, delayed, idle_part: see :class:`Known`.
        learnt: None: nothing yet.
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
    interval_s: float = 0.1
    gone: bool = False
    process: bool = False
    rough: float | None = None
    delayed: bool = False
    learnt: Learnt | None = None
    idle_part: float | None = None

    @property
    def known(self) -> Known:
        """What shares are told of it."""
        return Known(
            self.device,
            self.idle_watts,
            self.interval_s,
            self.gone,
            self.process,
            self.rough,
            self.delayed,
            self.idle_part,
        )


@dataclass(frozen=True, slots=True)
class State:
    """A whole ledger at ``t_ns``: its accounts, and what its unsettled requests have accrued.

    ``accrued`` holds what :meth:`melodi_otel.attribution.ledger.Ledger.accrued` gives, before it is made into shares; see
    :func:`melodi_otel.attribution.finishing.accrued_in`.
    """

    t_ns: int
    devices: tuple[DeviceState, ...] = ()
    accrued: tuple[SoFar, ...] = ()
