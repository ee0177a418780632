"""The power management counters of HPE Cray nodes: the whole node, and what of it no other meter measures.

::

    /sys/cray/pm_counters/energy          123456 J 1700000000000000 us   the node, accelerators included: type host, never summed
                          cpu_energy      …                              all CPUs        used where nothing else measures a CPU
                          memory_energy   …                              the memory      used where nothing else measures it
                          accel0_energy … accel_energy                   accelerators    used where no GPU has a meter
                          freshness       4711                           counts every update, about ten a second

The files are for everybody to read (HPE Cray EX documentation, "User Access to Compute Node Power Data"; XC systems have the
same tree). A node is one board with one controller: its CPU and its accelerators are the same silicon that RAPL, NVML and
amdsmi see, under other names. So a type of device that a meter before this one measures is left out here, by
``Settings.measured``. An accelerator counter does not say which GPU it belongs to: where the program sees only some of the
GPUs (``*_VISIBLE_DEVICES``) it is left out too.

All counters of a round belong to one update: ``freshness`` is read before and after, and a round in which it moved is read
once more and then given up.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from melodi_otel.clock import Clock
from melodi_otel.devices import Device, DeviceType
from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.sources.base import CounterReading, Refusal, Settings

__all__ = ["CraySource", "open_cray"]

ReadFile = Callable[[int, int, int], bytes]

PERIOD_S: Final = 0.1
_FILE: Final = re.compile(r"(?:(?P<part>cpu|memory|accel)(?P<number>\d+)?_)?energy")
_COUNTER: Final = re.compile(rb"(\d+) J\b")
_VISIBLE: Final = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL")
_TYPES: Final[dict[str | None, DeviceType]] = {None: "host", "cpu": "cpu", "memory": "memory", "accel": "gpu"}
_WORDS: Final[dict[DeviceType, str]] = {"cpu": "the CPUs", "memory": "the memory modules", "gpu": "the GPUs"}
_LOST: Final = frozenset({errno.ENODEV, errno.ENXIO, errno.ENOENT, errno.ESTALE, errno.EBADF})


def open_cray(settings: Settings, *, reader: ReadFile | None = None, platform: str = sys.platform) -> CraySource:
    """The counters of this node.

    Args:
        settings: clock, roots, and which types of device are measured already.
        reader: ``os.pread``, or what stands for it in a test.
        platform: ``sys.platform``.

    Raises:
        Refused: this is no Cray node (``absent``), or its counters cannot be read (``unreadable``, ``permission_denied``).
    """
    root = Path(settings.sysfs) / "cray/pm_counters"
    try:
        names = sorted(path.name for path in root.iterdir())
    except OSError:
        raise Refused(
            f"this is no HPE Cray node: there is no {root}" if platform.startswith("linux") else f"this is {platform}",
            state="absent",
        ) from None
    pread = reader if reader is not None else os.pread
    chosen, refusals = _choose(names, settings)
    opened: list[tuple[Device, int]] = []
    fds: list[int] = []
    try:
        for name in ("freshness", *chosen):
            fds.append(os.open(root / name, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
            raw = pread(fds[-1], 64, 0)
            if name == "freshness":
                continue
            if _joules(raw, chosen[name]) > 0.0:
                opened.append((chosen[name], fds[-1]))
            else:  # a part that this node does not have shows 0 for ever
                _close(fds.pop())
    except (OSError, Transient) as error:
        for fd in fds:
            _close(fd)
        raise Refused(
            f"the counters in {root} cannot be read: {error}",
            fix=f"see what `grep . {root}/*` shows",
            state="permission_denied" if isinstance(error, PermissionError) else "unreadable",
        ) from error
    return CraySource(settings.clock, fds[0], opened, refusals, pread)


class CraySource:
    """Open counters of a node.

    Args:
        clock: stamps each reading right after its read.
        fresh_fd: descriptor of ``freshness``.
        counters: devices with an open descriptor each.
        refusals: counters that are left out, with the meter's type that stands for them.
        reader: ``os.pread``.
    """

    name = "cray"

    def __init__(
        self,
        clock: Clock,
        fresh_fd: int,
        counters: Sequence[tuple[Device, int]],
        refusals: tuple[Refusal, ...] = (),
        reader: ReadFile | None = None,
    ) -> None:
        self.refusals = refusals
        self._clock = clock
        self._fresh_fd = fresh_fd
        self._counters = list(counters)
        self._devices = tuple(device for device, _ in counters)
        self._pread = reader if reader is not None else os.pread

    @property
    def devices(self) -> Sequence[Device]:
        return self._devices

    def counters(self) -> Sequence[CounterReading]:
        """One reading per counter, all of one update, or nothing.

        A counter that starts again (the node's controller was restarted) falls, which the timeline takes for a reset.

        Raises:
            Transient: an update came in between, twice in a row, or a read was torn.
            Gone: the tree left.
        """
        if not self._counters:
            raise Gone("cray is closed")
        for _ in range(2):  # an update has just come: the next one is 100 ms away
            before = self._read(self._fresh_fd, "freshness")
            readings = [self._reading(device, fd) for device, fd in self._counters]
            if before.strip() and self._read(self._fresh_fd, "freshness") == before:
                return readings
        raise Transient("the node's counters were updated while they were read")

    def close(self) -> None:
        """Close the descriptors; a second call does nothing."""
        counters, self._counters = self._counters, []
        fresh_fd, self._fresh_fd = self._fresh_fd, -1
        for fd in (fresh_fd, *(fd for _, fd in counters)):
            if fd >= 0:
                _close(fd)

    forked = close  # the copies of a child; the parent's stay open

    def _reading(self, device: Device, fd: int) -> CounterReading:
        joules = _joules(self._read(fd, device.id), device)
        return CounterReading(device.id, self._clock.monotonic_ns(), joules)

    def _read(self, fd: int, what: str) -> bytes:
        try:
            return self._pread(fd, 64, 0)
        except OSError as error:
            text = f"{what}: {error.strerror or error}"
            raise (Gone(text) if error.errno in _LOST else Transient(text)) from error


def _choose(names: Sequence[str], settings: Settings) -> tuple[dict[str, Device], tuple[Refusal, ...]]:
    """The files to read, with their device, and what is left out for another meter's sake."""
    found: dict[str, Device] = {}
    left_out: dict[DeviceType, str] = {}
    for name in names:
        match = _FILE.fullmatch(name)
        if match is None:
            continue
        part, number = match["part"], match["number"]
        kind = _TYPES[part]
        if part == "cpu" and number and "cpu_energy" in names:
            continue  # a part of the one beside it
        if part == "accel" and not number and "accel0_energy" in names:
            continue  # the sum of those beside it
        hidden = [variable for variable in _VISIBLE if settings.environ.get(variable) is not None]
        if kind in settings.measured and kind != "host":
            left_out[kind] = f"another meter measures {_WORDS[kind]}, which are the same devices"
        elif kind == "gpu" and hidden:
            left_out[kind] = f"{hidden[0]} is set, and the node does not tell which accelerator is which GPU"
        else:
            label = f"{part or 'node'}{number or ''}"
            found[name] = Device(f"cray:{label}", kind, f"cray.{part or 'node'}", f"Cray {label}", period_s=PERIOD_S)
    return found, tuple(
        Refusal("cray", "superseded", f"its {kind} counters are left out: {why}") for kind, why in left_out.items()
    )


def _joules(raw: bytes, device: Device) -> float:
    match = _COUNTER.match(raw.strip())
    if match is None:
        raise Transient(f"{device.id}: {raw[:20]!r} is not a figure in J")
    return float(int(match[1]))


def _close(fd: int) -> None:
    try:
        os.close(fd)
    except OSError:
        pass
