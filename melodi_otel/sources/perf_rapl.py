"""Intel and AMD RAPL through perf events: the same packages, DRAM and psys as ``rapl``, under the same ids and names.

Preferred to powercap where it is allowed: the kernel counts in 64 bits, so nothing wraps between two readings, and one
read of 24 bytes needs no parsing. Counts begin at 0 when an event is opened. Which package a CPU of the PMU stands for is
told by its topology, and the zone of that name in the powercap tree (whose names everybody may read) gives the id; without
that tree the id is the one that Linux would give.

Two things make a count begin at 0 again, and so a named gap instead of joules: time in which the event did not count, and
a jump that no machine can draw (the register starts again while the host sleeps, which the kernel takes for a wrap).

Where powercap may be read too, both are watched for the first seconds: they are one register and must agree within
:data:`AGREE`. If they do not, that is said once, in a warning and in :attr:`PerfRaplSource.notes`; this process keeps the
way that it has begun with, because half a series from one meter and half from another would be worse, and
``MELODI_SOURCES=powercap`` decides for the next one.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from melodi_otel.clock import Clock
from melodi_otel.devices import Device
from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.sources.base import CounterReading, Settings
from melodi_otel.sources.perf_events import READING, Cpu, LinuxPerf, PerfApi, Pmu, find_pmu, paranoid_level
from melodi_otel.sources.powercap import Kind, Zone, find_zones, in_container
from melodi_otel.sources.procstat import cpu_model
from melodi_otel.sources.rapl import device_of
from melodi_otel.units import NS_PER_MS, NS_PER_S, microjoules

__all__ = ["AGREE", "PerfRaplSource", "open_perf_rapl"]

log = logging.getLogger("melodi_otel")

AGREE: Final = 0.05
"""The most by which the two ways may differ, as a fraction of the larger."""
_CHECK_S: Final = 1.0
_CHECK_J: Final = 5.0
"""They are compared once both have counted for so long and so much: steps of 1 ms no longer matter then."""
_CHECK_UNTIL_S: Final = 60.0
_PLAUSIBLE_WATTS: Final = 5000.0
_SLACK_J: Final = 5.0
_LOST_AFTER: Final = 30
"""Failed rounds in a row after which the events count as dead (3 s at 10 Hz)."""
_FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM})
_EVENTS: Final[dict[Kind, str]] = {"package": "energy-pkg", "dram": "energy-ram", "psys": "energy-psys"}


@dataclass(slots=True)
class Counted:
    """An open event.

    Attributes:
        zone: what it counts.
        fd: its descriptor.
        scale_j: joules per count.
        uncounted_ns: how long it was enabled without counting, as of the last reading.
        base: the count that is shown as 0 J.
        last: (monotonic ns, count) of the last reading.
    """

    zone: Zone
    fd: int
    scale_j: float
    uncounted_ns: int = 0
    base: int = 0
    last: tuple[int, int] | None = None


def open_perf_rapl(
    settings: Settings,
    *,
    api: PerfApi | None = None,
    platform: str = sys.platform,
    interpreter: str = sys.executable,
    opener: Callable[[str, int], int] = os.open,
) -> PerfRaplSource:
    """All RAPL counters of the ``power`` PMU.

    Args:
        settings: clock and roots.
        api: the system calls, or what stands for them in a test.
        platform: ``sys.platform``.
        interpreter: ``sys.executable``, for the command that gives it the right.
        opener: ``os.open``, for the comparison with powercap.

    Raises:
        Refused: perf events cannot be used here; reason, state and fix say why and what helps.
    """
    pmu = find_pmu(settings, platform)
    calls = api if api is not None else LinuxPerf()
    try:
        tree = find_zones(settings, platform)
    except Refused:
        tree = []
    opened: list[Counted] = []
    notes: list[str] = []
    try:
        for zone, cpu, name in _wanted(pmu, tree):
            event = pmu.events[name]
            try:
                opened.append(Counted(zone, calls.open(pmu.kind, event.config, cpu.number), event.scale_j))
            except OSError as error:
                if zone.kind == "package":
                    raise _refused(error, settings, interpreter) from error
                notes.append(f"{zone.id} ({zone.name}) is left out: perf events answer {error.strerror or error}")
        beside = _open_beside(opened, opener)
    except BaseException:
        for counted in opened:
            calls.close(counted.fd)
        raise
    ids = {counted.zone.id for counted in opened}
    mirrors = {zone.id for zone in tree if _mirrors(zone, pmu, ids)}
    unseen = tuple(zone for zone in tree if zone.id not in ids | mirrors and zone.parent not in mirrors)
    return PerfRaplSource(settings.clock, calls, opened, cpu_model(settings.procfs), beside, notes, unseen)


class PerfRaplSource:
    """Open RAPL events.

    Args:
        clock: stamps each reading right after its read.
        api: the system calls.
        events: the open events, packages before what belongs to them.
        model: the CPU's model name, for people.
        beside: descriptors of the same counters in powercap, by device, for the comparison.
        notes: what was found out while opening.
        unseen: zones of powercap that perf events do not show.

    Attributes:
        unseen: as above.
    """

    name = "rapl"

    def __init__(
        self,
        clock: Clock,
        api: PerfApi,
        events: Sequence[Counted],
        model: str | None = None,
        beside: dict[str, tuple[int, float]] | None = None,
        notes: Sequence[str] = (),
        unseen: tuple[Zone, ...] = (),
    ) -> None:
        self.unseen = unseen
        self._clock = clock
        self._api = api
        self._events = list(events)
        self._devices = tuple(device_of(counted.zone, model, "rapl.perf") for counted in events)
        self._check = _Comparison(beside or {})
        self._notes = list(notes)
        self._failures = 0

    @property
    def devices(self) -> Sequence[Device]:
        return self._devices

    @property
    def notes(self) -> tuple[str, ...]:
        """The way it is read, and what a person should know about it."""
        return ("read through perf events", *self._notes)

    def note(self, text: str) -> None:
        """Add to :attr:`notes`."""
        self._notes.append(text)

    def counters(self) -> Sequence[CounterReading]:
        """Joules since the events were opened, one reading per device, all or nothing.

        A count that cannot be trusted (see the module's text) begins at 0 again, which the timeline takes for a reset.

        Raises:
            Transient: a read failed or was short.
            Gone: the events are dead (the PMU left, the CPU was taken away, or 30 rounds failed).
        """
        if not self._events:
            raise Gone("rapl is closed")
        taken: list[tuple[Counted, int, int, int]] = []
        for counted in self._events:
            try:
                raw = self._api.read(counted.fd)
            except OSError as error:
                raise self._failed(counted, error.strerror or str(error)) from error
            t_ns = self._clock.monotonic_ns()
            if len(raw) != READING.size:
                raise self._failed(counted, f"a read brought {len(raw)} bytes instead of {READING.size}")
            count, enabled_ns, running_ns = READING.unpack(raw)
            taken.append((counted, t_ns, count, enabled_ns - running_ns))
        self._failures = 0
        readings = [self._reading(*one) for one in taken]
        self._compare(taken)
        return readings

    def close(self) -> None:
        """Close the descriptors; a second call does nothing."""
        events, self._events = self._events, []
        for counted in events:
            self._api.close(counted.fd)
        self._check.close()

    forked = close  # the copies of a child; the parent's events go on

    def _reading(self, counted: Counted, t_ns: int, count: int, uncounted_ns: int) -> CounterReading:
        if counted.last is not None:
            before_ns, before = counted.last
            most_j = _PLAUSIBLE_WATTS * (t_ns - before_ns) / NS_PER_S + _SLACK_J
            gap_ns = uncounted_ns - counted.uncounted_ns
            if gap_ns > NS_PER_MS or not 0 <= (count - before) * counted.scale_j <= most_j:
                counted.base = count
                what = f"did not count for {gap_ns / NS_PER_MS:.0f} ms" if gap_ns > NS_PER_MS else "jumped"
                log.debug("rapl: %s %s; the joules of that time are not known", counted.zone.id, what)
        counted.last, counted.uncounted_ns = (t_ns, count), uncounted_ns
        return CounterReading(counted.zone.id, t_ns, (count - counted.base) * counted.scale_j)

    def _failed(self, counted: Counted, why: str) -> Exception:
        self._failures += 1
        message = f"{counted.zone.id}: {why}"
        return (
            Gone(f"{message}, {self._failures} times in a row") if self._failures >= _LOST_AFTER else Transient(message)
        )

    def _compare(self, taken: Sequence[tuple[Counted, int, int, int]]) -> None:
        said = self._check.look({c.zone.id: (t_ns, (count - c.base) * c.scale_j) for c, t_ns, count, _ in taken})
        for text in said:
            self._notes.append(text)
            log.warning("rapl: %s", text)


class _Comparison:
    """Perf events against powercap, for as long as it takes to know; then the descriptors are given back."""

    def __init__(self, beside: dict[str, tuple[int, float]]) -> None:
        self._beside = beside
        self._first: dict[str, tuple[int, float, int]] = {}

    def look(self, readings: dict[str, tuple[int, float]]) -> list[str]:
        """Take a round (device: monotonic ns, J); returns a sentence per device that disagrees."""
        said: list[str] = []
        for device, (fd, range_j) in list(self._beside.items()):
            try:
                raw = os.pread(fd, 64, 0).strip()
            except OSError:
                raw = b""
            if device not in readings or not raw.isdigit():
                self._drop(device)
                continue
            (t_ns, joules), energy_uj = readings[device], int(raw)
            t0_ns, joules0, uj0 = self._first.setdefault(device, (t_ns, joules, energy_uj))
            since_s, perf_j = (t_ns - t0_ns) / NS_PER_S, joules - joules0
            powercap_j = microjoules(energy_uj - uj0)
            powercap_j = powercap_j if powercap_j >= 0.0 else powercap_j + range_j
            if perf_j < 0.0 or since_s > _CHECK_UNTIL_S:
                self._drop(device)
            elif since_s >= _CHECK_S and max(perf_j, powercap_j) >= _CHECK_J:
                self._drop(device)
                if abs(perf_j - powercap_j) > AGREE * max(perf_j, powercap_j):
                    said.append(
                        f"{device} counted {perf_j:.1f} J by perf events and {powercap_j:.1f} J by powercap in the same "
                        f"{since_s:.1f} s: one of them is wrong. Perf events are used on; MELODI_SOURCES with powercap in "
                        "the place of rapl uses the other"
                    )
        return said

    def close(self) -> None:
        """Give the descriptors back."""
        for device in list(self._beside):
            self._drop(device)

    def _drop(self, device: str) -> None:
        fd, _ = self._beside.pop(device)
        try:
            os.close(fd)
        except OSError:
            pass


def _wanted(pmu: Pmu, tree: Sequence[Zone]) -> list[tuple[Zone, Cpu, str]]:
    """(zone, CPU, event) of everything to open."""
    found: list[tuple[Zone, Cpu, str]] = []
    used: set[str] = set()
    alone = {package: sum(cpu.package == package for cpu in pmu.cpus) == 1 for package in {c.package for c in pmu.cpus}}
    inside = sum(name in pmu.events for name in ("energy-cores", "energy-gpu"))  # they come before dram in the tree
    for index, cpu in enumerate(pmu.cpus):
        number = index if cpu.package is None else cpu.package
        name = (
            f"package-{number}" if alone[cpu.package] or cpu.package is None else f"package-{number}-die-{cpu.die or 0}"
        )
        package = _zone_of(tree, "package", name) or Zone(f"intel-rapl:{index}", name, "package", name, None, "", None)
        found.append((package, cpu, _EVENTS["package"]))
        used.add(package.id)
        if _EVENTS["dram"] in pmu.events:
            guess = Zone(f"{package.id}:{inside}", "dram", "dram", package.name, package.id, "", None)
            found.append((_zone_of(tree, "dram", package.name) or guess, cpu, _EVENTS["dram"]))
    if _EVENTS["psys"] in pmu.events:
        # There is one, and the first package knows it: the others show 0 or the same.
        guess = Zone(f"intel-rapl:{len(pmu.cpus)}", "psys", "psys", "psys", None, "", None)
        zone = next((zone for zone in tree if zone.kind == "psys"), guess)
        if zone.id not in used:
            found.append((zone, pmu.cpus[0], _EVENTS["psys"]))
    return found


def _zone_of(tree: Sequence[Zone], kind: Kind, package: str) -> Zone | None:
    """The zone of that package; where powercap tells dies apart and the PMU does not, that of its first die."""
    zones = [zone for zone in tree if zone.kind == kind]
    exact = next((zone for zone in zones if zone.package == package), None)
    return exact or next((zone for zone in zones if zone.package.startswith(f"{package}-die-")), None)


def _mirrors(zone: Zone, pmu: Pmu, ids: set[str]) -> bool:
    """Whether a package zone is another die of a package that the PMU shows as one."""
    whole = zone.name.partition("-die-")[0]
    shown = {f"package-{cpu.package}" for cpu in pmu.cpus}
    split = len(pmu.cpus) > len(shown)
    return zone.kind == "package" and zone.id not in ids and zone.name != whole and whole in shown and not split


def _open_beside(opened: Sequence[Counted], opener: Callable[[str, int], int]) -> dict[str, tuple[int, float]]:
    beside: dict[str, tuple[int, float]] = {}
    for counted in opened:
        if counted.zone.energy_path and counted.zone.range_j is not None:
            try:
                fd = opener(counted.zone.energy_path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
            except OSError:
                continue
            beside[counted.zone.id] = (fd, counted.zone.range_j)
    return beside


def _refused(error: OSError, settings: Settings, interpreter: str) -> Refused:
    if error.errno in _FORBIDDEN:
        level = paranoid_level(settings.procfs)
        return Refused(
            "this process may not open RAPL's perf events"
            + ("" if level is None else f" (kernel.perf_event_paranoid is {level}, and it has no CAP_PERFMON)"),
            fix=_permission_fix(settings, interpreter),
            state="permission_denied",
        )
    if error.errno == errno.ENOSYS:
        return Refused("the kernel or a seccomp filter has no perf_event_open", state="unsupported_platform")
    return Refused(
        f"RAPL's perf events cannot be opened: {error.strerror or error}",
        fix="see whether `perf stat -a -e power/energy-pkg/ true` works (dmesg | grep -i rapl)",
        state="unreadable",
    )


def _permission_fix(settings: Settings, interpreter: str) -> str:
    if in_container(settings.environ):
        return "start the container with --cap-add PERFMON (Kubernetes: securityContext.capabilities.add: [PERFMON])"
    return (
        f"for this interpreter: sudo setcap cap_perfmon=ep {os.path.realpath(interpreter)} — or for one systemd unit: "
        "AmbientCapabilities=CAP_PERFMON — or for all users, until reboot: sudo sysctl kernel.perf_event_paranoid=0 (the "
        "counter can leak secrets to whoever reads it)"
    )
