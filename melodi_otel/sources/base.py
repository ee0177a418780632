"""What a meter is.

Counter and gauge are two kinds and stay two protocols: a counter says how many joules since some start, a gauge says how
many watts over some window. Each becomes intervals in ``timeline``; after that there is one path for GPU, CPU and memory.
A meter that has both kinds from one hardware call implements both protocols and answers ``power()`` from the call that
``counters()`` just made.

Add a meter: a class with these methods, in this folder or in a package of its own under the entry point group
``melodi_otel_source`` (a callable ``(Settings) -> Source`` that raises :class:`melodi_otel.errors.Refused` with reason and
fix when it cannot work).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from melodi_otel.clock import Clock
from melodi_otel.devices import Device, DeviceType

__all__ = [
    "CounterReading",
    "CounterSource",
    "Device",
    "DeviceType",
    "Discovery",
    "GpuState",
    "HistorySource",
    "PowerReading",
    "PowerSource",
    "Refusal",
    "Settings",
    "Sliced",
    "Source",
    "StateSource",
]


@dataclass(frozen=True, slots=True)
class CounterReading:
    """Cumulative joules of a device at ``t_ns`` (monotonic, taken right after the read).

    ``range_j`` is where the counter wraps to 0, in joules; None: it does not wrap, so a fall is a reset.
    """

    device: str
    t_ns: int
    joules: float
    range_j: float | None = None


@dataclass(frozen=True, slots=True)
class PowerReading:
    """Watts of a device, averaged over its ``window_s`` that ends at ``t_ns``."""

    device: str
    t_ns: int
    watts: float


@dataclass(frozen=True, slots=True)
class GpuState:
    """Slow facts of a GPU: ``utilization`` 0..1 and used memory in bytes; None = not reported."""

    device: str
    utilization: float | None = None
    memory_bytes: int | None = None


@runtime_checkable
class Source(Protocol):
    """Anything that measures devices. ``name`` is the short name of ``MELODI_SOURCES`` (``nvml``, ``rapl``, …)."""

    @property
    def name(self) -> str: ...

    @property
    def devices(self) -> Sequence[Device]: ...

    def close(self) -> None:
        """Give descriptors and libraries back; never raises."""
        ...


@runtime_checkable
class CounterSource(Source, Protocol):
    """A meter that counts joules."""

    def counters(self) -> Sequence[CounterReading]:
        """One reading per device, all or nothing.

        Raises:
            Transient: one read failed; nothing of this round may be used.
            Gone: a device or the driver is lost.
        """
        ...


@runtime_checkable
class PowerSource(Source, Protocol):
    """A meter that shows watts."""

    def power(self) -> Sequence[PowerReading]:
        """Readings of the devices that have a gauge, all or nothing; raises as :meth:`CounterSource.counters`."""
        ...


@runtime_checkable
class HistorySource(Source, Protocol):
    """A meter whose driver remembers the power of the last seconds."""

    def history(self, device_id: str, since_ns: int) -> Sequence[PowerReading]:
        """Watts of a device at moments after ``since_ns`` (monotonic), in order, as far back as the driver goes.

        Raises:
            Refused: the driver does not tell; it need not be asked again.
        """
        ...


@runtime_checkable
class StateSource(Source, Protocol):
    """A meter that also knows utilisation and memory; asked at most once a second."""

    def states(self) -> Sequence[GpuState]: ...


@runtime_checkable
class Forkable(Protocol):
    """A source with descriptors that a forked child should not keep."""

    def forked(self) -> None:
        """In a child: close the copies; quick, never raises, and drivers are left alone."""
        ...


@runtime_checkable
class Sliced(Protocol):
    """A source whose boards are partitioned."""

    @property
    def slices(self) -> Mapping[str, str]:
        """By the name under which a program knows its slice (MIG device), the ``hw.id`` of the board that it is a part of."""
        ...


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a meter is not used: for the log, ``doctor`` and ``melodi.energy.reason``."""

    source: str
    state: str
    reason: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class Settings:
    """What a meter may depend on; nothing else is read from the environment.

    ``sysfs`` and ``procfs`` are the roots to read below (containers mount the host's tree elsewhere). ``measured`` are the
    types of device that a meter before this one measures: one silicon may have two meters under two names (RAPL and the
    node's controller), which no id gives away, so whoever may be such a second meter leaves those types out.
    """

    clock: Clock
    environ: Mapping[str, str]
    sysfs: str = "/sys"
    procfs: str = "/proc"
    nvml_library: str | None = None
    estimate_watts: tuple[float, float] | None = None
    asked: frozenset[str] = frozenset()
    measured: frozenset[DeviceType] = frozenset()


@dataclass(frozen=True, slots=True)
class Discovery:
    """What was found: sources in preference order and every refusal with its reason."""

    sources: tuple[Source, ...] = ()
    refusals: tuple[Refusal, ...] = field(default_factory=tuple)

    @property
    def devices(self) -> tuple[Device, ...]:
        """All devices of all sources."""
        return tuple(device for source in self.sources for device in source.devices)
