"""Intel and AMD RAPL through powercap sysfs: packages, their DRAM, and psys apart.

What the tree looks like and which traps are in it::

    intel-rapl:0      name package-0   used                       intel-rapl-mmio:0  name package-0   the same package again
    intel-rapl:0:0    name core        inside the package: never  intel-rapl:1       name psys        contains the packages:
    intel-rapl:0:1    name dram        beside the package: used                                       type host, never summed

A zone is what its ``name`` file says, never what its number suggests. Every zone wraps at its own range, which travels with
each reading: the timeline repairs it per zone. Descriptors are kept, because ``pread`` costs a microsecond and because a
descriptor that is open survives a later change of permissions. Finding the zones is ``powercap``'s work.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Final

from melodi_otel.clock import Clock
from melodi_otel.devices import Device, DeviceType
from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.sources.base import CounterReading, Refusal, Settings
from melodi_otel.sources.powercap import Kind, Zone, find_zones, permission_fix
from melodi_otel.sources.procstat import cpu_model
from melodi_otel.units import NS_PER_S, microjoules

log = logging.getLogger("melodi_otel")

OpenFile = Callable[[str, int], int]
ReadFile = Callable[[int, int, int], bytes]

_CONFIRM: Final = 2
"""Intervals in which two counters must have moved together to be called one."""
_CONFIRM_WAIT_S: Final = 0.02
_STEP_S: Final = 0.002
"""Two reads of one counter, microseconds apart, can fall on both sides of its update (about every 1 ms)."""
_HOLD: Final = 16
_TYPES: Final[dict[Kind, DeviceType]] = {"package": "cpu", "dram": "memory", "psys": "host"}
_LOST: Final = frozenset({errno.ENODEV, errno.ENXIO, errno.ENOENT, errno.ESTALE, errno.EBADF})
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM})


def open_rapl(
    settings: Settings, *, opener: OpenFile = os.open, reader: ReadFile | None = None, platform: str = sys.platform
) -> RaplSource:
    """All RAPL zones that can be read.

    Args:
        settings: clock and roots.
        opener: ``os.open``, or what stands for it in a test.
        reader: ``os.pread``, or what stands for it in a test.
        platform: ``sys.platform``.

    Raises:
        Refused: no zone can be read; reason, state and fix say why and what helps.
    """
    zones = find_zones(settings, platform)
    pread = reader if reader is not None else os.pread
    open_zones: list[tuple[Zone, int]] = []
    refusals: list[Refusal] = []
    for zone in zones:
        fd = -1
        try:
            fd = opener(zone.energy_path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            _energy_uj(pread(fd, 64, 0), zone)
            open_zones.append((zone, fd))
        except (OSError, Transient) as error:
            if fd >= 0:
                os.close(fd)
            refusals.append(_refusal(zone, error, settings))
    if not open_zones:
        first = next((r for r in refusals if r.state == "permission_denied"), refusals[0])
        raise Refused("; ".join(dict.fromkeys(r.reason for r in refusals)), fix=first.fix, state=first.state)
    for refusal in refusals:
        log.warning("rapl: %s; the other zones are used. To repair: %s", refusal.reason, refusal.fix)
    source = RaplSource(settings.clock, open_zones, cpu_model(settings.procfs), pread, tuple(refusals))
    source.confirm()
    return source


class RaplSource:
    """Open RAPL zones.

    Args:
        clock: stamps each reading right after its read.
        zones: zones with an open descriptor each, packages before what belongs to them.
        model: the CPU's model name, for people.
        reader: ``os.pread``.
        refusals: zones that exist and cannot be used.

    Attributes:
        notes: what a person should know about the way it is read.
    """

    name = "rapl"
    notes: tuple[str, ...] = ("read through powercap",)

    def __init__(
        self,
        clock: Clock,
        zones: Sequence[tuple[Zone, int]],
        model: str | None = None,
        reader: ReadFile | None = None,
        refusals: tuple[Refusal, ...] = (),
    ) -> None:
        self.refusals = refusals
        self._clock = clock
        self._pread = reader if reader is not None else os.pread
        self._zones = list(zones)
        self._devices = tuple(device_of(zone, model) for zone, _ in zones)
        self._twins = _Twins([zone.id for zone, _ in zones if zone.kind == "package"])

    @property
    def devices(self) -> Sequence[Device]:
        """Devices in use; shorter once a mirrored package was found out."""
        return self._devices

    @property
    def undecided(self) -> frozenset[str]:
        """Packages that may be a second view of another one; their readings are held back until that is known."""
        return self._twins.suspects

    def confirm(self) -> None:
        """Look a few milliseconds longer where two packages show the same figure, before anything is counted."""
        for _ in range(_CONFIRM + 1):
            try:
                self._settle(self._read())
            except (Transient, Gone, Refused):
                break
            if not self._twins.suspects:
                break
            self._clock.wait(threading.Event(), _CONFIRM_WAIT_S)
        self._twins.forget_held()  # the first round of the sampler is the baseline for every zone

    def counters(self) -> Sequence[CounterReading]:
        """One reading per zone, all or nothing.

        A package under suspicion to mirror another is left out; if it turns out to be independent, the readings that were
        held back come first, in order.

        Raises:
            Transient: a read was torn or empty.
            Gone: the zones left (module unloaded).
            Refused: reading was forbidden after it had worked (``permission_denied``).
        """
        return self._settle(self._read())

    def close(self) -> None:
        """Close the descriptors; a second call does nothing."""
        zones, self._zones = self._zones, []
        for _, fd in zones:
            _close(fd)

    forked = close  # the copies of a child; the parent's stay open

    def _read(self) -> list[CounterReading]:
        readings: list[CounterReading] = []
        if not self._zones:
            raise Gone("rapl is closed")
        for zone, fd in self._zones:
            try:
                raw = self._pread(fd, 64, 0)
            except OSError as error:
                raise _lost(zone, error) from error
            t_ns = self._clock.monotonic_ns()
            readings.append(CounterReading(zone.id, t_ns, microjoules(_energy_uj(raw, zone)), zone.range_j))
        return readings

    def _settle(self, readings: list[CounterReading]) -> list[CounterReading]:
        if not self._twins.open:
            return readings
        kept, mirrors = self._twins.look(readings)
        for mirror, original in mirrors.items():
            self._drop(mirror, original)
        used = {device.id for device in self._devices}
        return [reading for reading in kept if reading.device in used]

    def _drop(self, mirror: str, original: str) -> None:
        log.warning(
            "rapl: %s shows the counter of %s a second time (mirrored die): it is not counted", mirror, original
        )
        kept: list[tuple[Zone, int]] = []
        for zone, fd in self._zones:
            # What belongs to the package goes with it: a mirror's DRAM would be the same DRAM again.
            if mirror in (zone.id, zone.parent):
                _close(fd)
            else:
                kept.append((zone, fd))
        self._zones = kept
        ids = {zone.id for zone, _ in kept}
        self._devices = tuple(device for device in self._devices if device.id in ids)


class _Twins:
    """Packages that may be one counter under two names (dies of AMD before Zen 3 show the socket's).

    Equal figures are a suspicion, equal figures after both moved are the proof. Until then the second one's readings are
    held back, so that no joule is counted twice and none is lost if they differ after all.
    """

    def __init__(self, packages: Sequence[str]) -> None:
        self._pairs = {(a, b): 0 for i, a in enumerate(packages) for b in packages[i + 1 :]}
        self._before: dict[str, CounterReading] = {}
        self._held: dict[str, list[CounterReading]] = {}

    @property
    def open(self) -> bool:
        """Whether any pair is still undecided."""
        return bool(self._pairs)

    @property
    def suspects(self) -> frozenset[str]:
        """The second of every undecided pair."""
        return frozenset(b for _, b in self._pairs) if self._before else frozenset()

    def forget_held(self) -> None:
        """Drop what was held back so far."""
        self._held.clear()

    def look(self, readings: list[CounterReading]) -> tuple[list[CounterReading], dict[str, str]]:
        """What may be counted of ``readings``, and the mirrors found: mirror → original."""
        now = {reading.device: reading for reading in readings}
        mirrors: dict[str, str] = {}
        for (a, b), agreed in list(self._pairs.items()):
            moved = now[a].joules - self._before[a].joules if a in self._before else 0.0
            since_s = (now[a].t_ns - self._before[a].t_ns) / NS_PER_S if a in self._before else 0.0
            slack = 1e-4 + (_STEP_S * abs(moved) / since_s if since_s > 0 else 0.0)
            if abs(now[a].joules - now[b].joules) > slack:
                del self._pairs[a, b]
            elif moved > 2 * slack:
                self._pairs[a, b] = agreed + 1
                if agreed + 1 >= _CONFIRM:
                    mirrors[b] = a
        self._before = now
        self._pairs = {pair: n for pair, n in self._pairs.items() if not mirrors.keys() & set(pair)}
        suspects = self.suspects
        kept: list[CounterReading] = []
        for reading in readings:
            if reading.device in suspects:
                held = self._held.setdefault(reading.device, [])
                if len(held) >= _HOLD:
                    del held[1]  # the first is the baseline; a lost middle only merges two intervals
                held.append(reading)
            elif reading.device not in mirrors:
                kept += self._held.pop(reading.device, [])
                kept.append(reading)
        for mirror in mirrors:
            self._held.pop(mirror, None)
        return kept, mirrors


def device_of(zone: Zone, model: str | None, way: str = "rapl") -> Device:
    """The device of a zone: id and name do not depend on the ``way`` it is read, only its method does."""
    label = zone.name if zone.kind != "dram" else f"{zone.package} dram"
    return Device(
        id=zone.id,
        type=_TYPES[zone.kind],
        source=f"{way}.{zone.kind}",
        name=f"{label} ({model})" if model and zone.kind == "package" else label,
        parent=zone.parent,
        period_s=0.001,
    )


def _energy_uj(raw: bytes, zone: Zone) -> int:
    text = raw.strip()
    if not text.isdigit():
        shown = text[:20].decode("ascii", "replace")
        raise Transient(f"{zone.id}: energy_uj " + (f"is {shown!r}, not a number" if text else "was empty (torn read)"))
    return int(text)


def _lost(zone: Zone, error: OSError) -> Exception:
    why = f"{zone.id}: {error.strerror or errno.errorcode.get(error.errno or 0, 'read failed')}"
    if error.errno in _FORBIDDEN:
        return Refused(f"{why} (it could be read before)", fix=permission_fix(zone), state="permission_denied")
    return Gone(why) if error.errno in _LOST else Transient(why)


def _refusal(zone: Zone, error: OSError | Transient, settings: Settings) -> Refusal:
    if isinstance(error, OSError) and error.errno in _FORBIDDEN:
        return Refusal(
            "rapl",
            "permission_denied",
            f"{zone.id} ({zone.name}) may not be read: {zone.energy_path} is for root only",
            permission_fix(zone, settings.environ),
        )
    return Refusal(
        "rapl",
        "unreadable",
        f"{zone.id} ({zone.name}) cannot be read: {error}",
        f"see whether `cat {zone.energy_path}` shows a number; the kernel driver may be broken (dmesg | grep -i rapl)",
    )


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        pass
