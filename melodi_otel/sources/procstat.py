"""What ``/proc/stat`` says: CPU time that the whole host was busy, and how many CPUs it has.

Shared by the estimate (which turns it into watts) and by :mod:`melodi_otel.processes` (which divides by it). The
descriptor is kept: a ``pread`` costs a few microseconds, an open-read-close several times that.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from melodi_otel.errors import Transient

_HEAD: Final = 512
"""The first line, ``cpu  user nice system …``, always fits; the long tail (interrupts) is not copied."""


def ticks_per_second() -> int:
    """Jiffies per second as procfs counts them (``USER_HZ``), 100 on every usual Linux."""
    try:
        return os.sysconf("SC_CLK_TCK")
    except (AttributeError, ValueError, OSError):
        return 100


def cpu_count(procfs: str) -> int:
    """Online CPUs: the ``cpuN`` lines of ``procfs``/stat.

    Raises:
        OSError: the file cannot be read.
        ValueError: it names no CPU.
    """
    lines = (Path(procfs) / "stat").read_text(encoding="utf-8", errors="replace").splitlines()
    count = sum(line.startswith("cpu") and line[3:4].isdigit() for line in lines)
    if not count:
        raise ValueError(f"{procfs}/stat names no CPU")
    return count


def cpu_model(procfs: str) -> str | None:
    """The ``model name`` of the first CPU in ``procfs``/cpuinfo; None where there is none (ARM, a bare tree)."""
    return cpu_fact(procfs, "model name")


def cpu_fact(procfs: str, key: str) -> str | None:
    """The first value of ``key`` in ``procfs``/cpuinfo, or None."""
    try:
        with (Path(procfs) / "cpuinfo").open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                name, colon, value = line.partition(":")
                if colon and name.strip() == key:
                    return value.strip() or None
    except OSError:
        return None
    return None


class HostBusy:
    """Cumulative busy CPU seconds of the host, in steps of one jiffy (10 ms).

    Busy is user, nice, system and interrupt time. Not busy are idle and iowait, and steal: in that time the hypervisor ran
    somebody else, so no process of this host did. Guest time is part of user already and is not counted twice.

    Args:
        procfs: the root to read below.

    Raises:
        OSError: ``stat`` cannot be opened.
    """

    def __init__(self, procfs: str) -> None:
        self._hz = ticks_per_second()
        self._fd = os.open(str(Path(procfs) / "stat"), os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))

    def read(self) -> float:
        """Seconds since boot, over all CPUs.

        Raises:
            Transient: the file could not be read or understood this time.
        """
        try:
            fields = os.pread(self._fd, _HEAD, 0).split(b"\n", 1)[0].split()
        except OSError as error:
            raise Transient(f"stat: {error.strerror}") from error
        try:
            if fields[0] != b"cpu":
                raise ValueError
            user, nice, system, irq, softirq = (int(fields[i]) for i in (1, 2, 3, 6, 7))
        except (IndexError, ValueError):
            raise Transient("stat: the first line is not the CPU times") from None
        return (user + nice + system + irq + softirq) / self._hz

    def close(self) -> None:
        """Give the descriptor back; a second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
