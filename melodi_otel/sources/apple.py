"""Apple silicon by ``zeus_apple_silicon``: CPU, GPU and memory of the chip, cumulative, without any privilege.

``AppleEnergyMonitor().get_cumulative_energy()`` answers mJ since a point that is fixed for the monitor's life, and None for
what a chip does not tell (zeus-apple-silicon 1.1, README, "API Reference")::

    cpu_total_mj   all CPU clusters                      cpu       gpu_sram_mj   not known to be inside gpu_mj: not added
    gpu_mj         the GPU                               gpu       ane_mj        the neural engine: no device of ours
    dram_mj        memory, not told by older chips       memory

It reads IOReport, the interface behind ``powermetrics``; Apple documents neither, and calls the figures estimates of the
chip. The update period is not documented: it is learnt.
"""

from __future__ import annotations

import importlib
import os
import platform as host
import sys
from collections.abc import Callable, Sequence
from typing import Final, Protocol, cast

from melodi_otel.clock import Clock
from melodi_otel.devices import Device, DeviceType
from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.sources.base import CounterReading, Settings
from melodi_otel.units import millijoules

__all__ = ["AppleMonitor", "AppleSource", "open_apple"]

INSTALL: Final = 'pip install "melodi-otel[apple]"'
LOST_AFTER: Final = 30
_PARTS: Final[tuple[tuple[str, DeviceType, str], ...]] = (
    ("cpu_total_mj", "cpu", "CPU"),
    ("gpu_mj", "gpu", "GPU"),
    ("dram_mj", "memory", "memory"),
)


class AppleMonitor(Protocol):
    """``AppleEnergyMonitor``, as far as it is used."""

    def get_cumulative_energy(self) -> object:
        """An object with ``cpu_total_mj``, ``gpu_mj``, ``dram_mj``, …: int or None."""
        ...


def open_apple(
    settings: Settings,
    *,
    monitor: Callable[[], AppleMonitor] | None = None,
    platform: str = sys.platform,
    machine: str | None = None,
) -> AppleSource:
    """The meters of this chip.

    Args:
        settings: readings carry the time of its clock.
        monitor: makes the monitor; None: ``zeus_apple_silicon.AppleEnergyMonitor``.
        platform: ``sys.platform``.
        machine: ``platform.machine()``.

    Raises:
        Refused: this is no Apple silicon (``absent``), the module is missing, or the chip tells nothing.
    """
    machine = machine or host.machine()
    if platform != "darwin":
        raise Refused(f"this is no Mac ({platform})", state="absent")
    if machine != "arm64":
        raise Refused(
            f"this Mac is no Apple silicon ({machine}), or this Python runs under Rosetta",
            fix="on Apple silicon use a Python for arm64; an Intel Mac has no meter that may be read",
            state="no_device",
        )
    try:
        made = (monitor or _module())()
        shown = made.get_cumulative_energy()
    except Refused:
        raise
    except Exception as error:
        raise Refused(
            f"the chip's energy cannot be read: {error}",
            fix=f"{INSTALL} --upgrade; it needs macOS on hardware, no virtual machine",
            state="failed",
        ) from error
    parts = [part for part in _PARTS if _figure(shown, part[0]) is not None]
    if not parts:
        raise Refused(
            "the chip tells no energy (a virtual machine has none)", fix="measure on the Mac itself", state="no_device"
        )
    return AppleSource(settings.clock, made, parts)


class AppleSource:
    """CPU, GPU and memory of one chip.

    Args:
        clock: stamps each round right after its read.
        monitor: the module's monitor.
        parts: (field, type, name) of what the chip tells.
    """

    name = "apple"

    def __init__(self, clock: Clock, monitor: AppleMonitor, parts: Sequence[tuple[str, DeviceType, str]]) -> None:
        self._clock = clock
        self._monitor: AppleMonitor | None = monitor
        self._parts = tuple(parts)
        self._pid = os.getpid()
        self._failures = 0
        self._devices = tuple(
            Device(f"apple:{kind}", kind, f"apple.{kind}", f"Apple silicon {name}") for _, kind, name in parts
        )

    @property
    def devices(self) -> Sequence[Device]:
        return self._devices

    def counters(self) -> Sequence[CounterReading]:
        """One reading per part, from one call.

        Raises:
            Transient: the call failed, or a part was not told this time.
            Gone: closed, forked, or 30 rounds failed in a row.
        """
        if self._monitor is None or os.getpid() != self._pid:
            raise Gone("the Apple meter is closed, or this process was forked: it must be opened again here")
        try:
            shown = self._monitor.get_cumulative_energy()
        except Exception as error:
            raise self._failed(str(error)) from error
        t_ns = self._clock.monotonic_ns()
        readings: list[CounterReading] = []
        for name, kind, _ in self._parts:
            energy_mj = _figure(shown, name)
            if energy_mj is None:
                raise self._failed(f"{name} was not told")
            readings.append(CounterReading(f"apple:{kind}", t_ns, millijoules(energy_mj)))
        self._failures = 0
        return readings

    def close(self) -> None:
        """Let the monitor go; never raises."""
        self._monitor = None

    forked = close  # a child's copy of the connection to the kernel is of no use

    def _failed(self, why: str) -> Exception:
        self._failures += 1
        return Gone(f"{why}, {self._failures} times in a row") if self._failures >= LOST_AFTER else Transient(why)


def _figure(shown: object, name: str) -> int | None:
    value = getattr(shown, name, None)
    return value if isinstance(value, int) and value >= 0 else None


def _module() -> Callable[[], AppleMonitor]:
    try:
        module = importlib.import_module("zeus_apple_silicon")
        monitor = module.AppleEnergyMonitor
    except ImportError as error:
        raise Refused(
            "the Python module zeus_apple_silicon is not installed", fix=INSTALL, state="module_missing"
        ) from error
    except AttributeError as error:
        raise Refused(
            "the module zeus_apple_silicon is too old", fix=f"{INSTALL} --upgrade", state="module_foreign"
        ) from error
    return cast(Callable[[], AppleMonitor], monitor)
