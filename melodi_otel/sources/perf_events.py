"""The ``power`` PMU of Linux perf events: which RAPL counters it shows, on which CPUs, and the system call that opens them.

::

    /sys/bus/event_source/devices/power   type     10                 number of the PMU, for perf_event_open
                                          cpumask  0,24               one CPU per package (Intel: per die)
                                          events/energy-pkg           event=0x02
                                          events/energy-pkg.unit      Joules
                                          events/energy-pkg.scale     2.3283064365386962890625e-10, which is 2^-32

Counting is for whole CPUs only (``pid`` -1), cannot be sampled and cannot leave anything out; the kernel folds the 32-bit
register into 64 bits by a timer of its own (Linux, ``arch/x86/events/rapl.c``). Who may open it is decided once, at the
opening: a process with CAP_PERFMON or CAP_SYS_ADMIN, or anybody where ``kernel.perf_event_paranoid`` is 0 or less
(``perf_allow_cpu`` in Linux' ``include/linux/perf_event.h``: -EACCES above 0; since 5.8 CAP_PERFMON is enough).
"""

from __future__ import annotations

import ctypes
import os
import platform as host
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from melodi_otel.errors import Refused
from melodi_otel.sources.base import Settings
from melodi_otel.sources.powercap import text_of
from melodi_otel.sources.procstat import cpu_fact

__all__ = ["Cpu", "LinuxPerf", "PerfApi", "PerfEvent", "Pmu", "find_pmu", "paranoid_level"]

_EVENT: Final = re.compile(r"event=(0x[0-9a-fA-F]+|\d+)")
_SYSCALL: Final = {"x86_64": 298, "amd64": 298, "i386": 336, "i686": 336}
"""``perf_event_open`` by machine; RAPL exists on no other."""
_ATTR_V0: Final = 64
_TIMES: Final = 0b11
"""PERF_FORMAT_TOTAL_TIME_ENABLED | PERF_FORMAT_TOTAL_TIME_RUNNING."""
_CLOEXEC: Final = 1 << 3
READING: Final = struct.Struct("=QQQ")
"""What a read brings: the count, and for how many ns the event was enabled and was counting."""
ONE_PER_PACKAGE: Final = frozenset({"AuthenticAMD", "HygonGenuine"})
"""Vendors whose counter belongs to the package: what its dies show is that one counter again."""


class PerfApi(Protocol):
    """The system calls, so that a test can stand in for the kernel."""

    def open(self, kind: int, config: int, cpu: int) -> int:
        """A descriptor that counts event ``config`` of PMU ``kind`` on ``cpu``.

        Raises:
            OSError: the kernel's refusal.
        """
        ...

    def read(self, fd: int) -> bytes:
        """One :data:`READING`, or less where the event is dead.

        Raises:
            OSError: the kernel's refusal.
        """
        ...

    def close(self, fd: int) -> None:
        """Give the descriptor back; never raises."""
        ...


class LinuxPerf:
    """The kernel's own calls.

    Args:
        machine: ``platform.machine()``.

    Raises:
        Refused: on this machine the number of the system call is not known (``unsupported_platform``).
    """

    def __init__(self, machine: str | None = None) -> None:
        machine = machine or host.machine()
        number = _SYSCALL.get(machine.lower())
        if number is None:
            raise Refused(f"RAPL exists on x86 only; this is {machine or 'an unknown machine'}", state="absent")
        self._number = number
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long

    def open(self, kind: int, config: int, cpu: int) -> int:
        attributes = ctypes.create_string_buffer(
            struct.pack("=IIQQQQQIIQ", kind, _ATTR_V0, config, 0, 0, _TIMES, 0, 0, 0, 0), _ATTR_V0
        )
        fd = self._libc.syscall(
            ctypes.c_long(self._number),
            attributes,
            ctypes.c_int(-1),
            ctypes.c_int(cpu),
            ctypes.c_int(-1),
            ctypes.c_ulong(_CLOEXEC),
        )
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return int(fd)

    def read(self, fd: int) -> bytes:
        return os.read(fd, READING.size)

    def close(self, fd: int) -> None:
        try:
            os.close(fd)
        except OSError:
            pass


@dataclass(frozen=True, slots=True)
class PerfEvent:
    """One counter: its number for the system call, and joules per count."""

    config: int
    scale_j: float


@dataclass(frozen=True, slots=True)
class Cpu:
    """A CPU that stands for a package or die, and the number of each (None: the kernel does not tell)."""

    number: int
    package: int | None
    die: int | None


@dataclass(frozen=True, slots=True)
class Pmu:
    """What the PMU shows: its number, CPUs that each stand for one counter of every event, events by name."""

    kind: int
    cpus: tuple[Cpu, ...]
    events: Mapping[str, PerfEvent]


def find_pmu(settings: Settings, platform: str) -> Pmu:
    """The ``power`` PMU below ``settings.sysfs``.

    Raises:
        Refused: there is none (``absent``), or it cannot be understood (``unreadable``).
    """
    sysfs = Path(settings.sysfs)
    if not platform.startswith("linux"):
        raise Refused(f"perf events are Linux'; this is {platform}", state="unsupported_platform")
    roots = (sysfs / "bus/event_source/devices/power", sysfs / "devices/power")
    root = next((path for path in roots if text_of(path / "type") is not None), None)
    if root is None:
        raise Refused("the kernel shows no RAPL through perf events (no power PMU)", state="absent")
    kind, mask = text_of(root / "type") or "", _numbers(text_of(root / "cpumask") or "")
    events = {
        name: event
        for name in ("energy-pkg", "energy-ram", "energy-psys", "energy-cores", "energy-gpu")
        if (event := _event(root / "events" / name)) is not None
    }
    if not kind.isdigit() or not mask or "energy-pkg" not in events:
        raise Refused(
            f"{root} cannot be understood (type {kind!r}, {len(mask)} CPUs, events {', '.join(events) or 'none'})",
            fix=f"tell us what `grep . {root}/type {root}/cpumask {root}/events/*` shows",
            state="unreadable",
        )
    cpus = [_cpu(sysfs, number) for number in mask]
    if cpu_fact(settings.procfs, "vendor_id") in ONE_PER_PACKAGE:
        # Some kernels list a CPU per die here too; all of them read the register of the package.
        first: dict[int | None, Cpu] = {}
        for cpu in cpus:
            first.setdefault(cpu.package, cpu)
        cpus = list(first.values()) if None not in first else cpus
    return Pmu(int(kind), tuple(sorted(cpus, key=_order)), events)


def paranoid_level(procfs: str) -> int | None:
    """``kernel.perf_event_paranoid``; None: not told."""
    text = text_of(Path(procfs) / "sys/kernel/perf_event_paranoid")
    try:
        return None if text is None else int(text)
    except ValueError:
        return None


def _event(path: Path) -> PerfEvent | None:
    match = _EVENT.search(text_of(path) or "")
    scale, unit = text_of(path.with_name(path.name + ".scale")), text_of(path.with_name(path.name + ".unit"))
    if match is None or scale is None or unit != "Joules":
        return None
    try:
        scale_j = float.fromhex(scale) if scale.startswith("0x") else float(scale)
    except ValueError:
        return None
    return PerfEvent(int(match[1], 0), scale_j) if 0.0 < scale_j < 1.0 else None


def _cpu(sysfs: Path, number: int) -> Cpu:
    topology = sysfs / f"devices/system/cpu/cpu{number}/topology"
    return Cpu(number, _number(topology / "physical_package_id"), _number(topology / "die_id"))


def _order(cpu: Cpu) -> tuple[int, int, int]:
    return (cpu.number if cpu.package is None else cpu.package, cpu.die or 0, cpu.number)


def _numbers(mask: str) -> list[int]:
    """``0-2,5`` → 0, 1, 2, 5; empty where it is no list of numbers."""
    numbers: list[int] = []
    for part in mask.split(",") if mask else ():
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            return []
        numbers += range(int(first), int(last if dash else first) + 1)
    return numbers


def _number(path: Path) -> int | None:
    text = text_of(path)
    return int(text) if text is not None and text.isdigit() else None
