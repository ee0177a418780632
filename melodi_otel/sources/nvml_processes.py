"""Which processes are on an NVIDIA GPU, and how much of it each used.

These calls are slow: 4.5 ms for the list of graphics processes, up to 100 ms on a partitioned board. They are never part of
a sampling round; :mod:`melodi_otel.neighbours` makes them every few seconds.

What the driver tells depends on who asks. Pids are those of the machine, or, with newer drivers, those of the caller's PID
namespace, and then the list holds that namespace's processes only. On a partitioned (MIG) board a slice lists its own
processes, the whole board answers to root only, and no one is told utilisation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Final, cast

from melodi_otel.errors import Refused, Transient
from melodi_otel.sources import nvml_library as lib
from melodi_otel.sources.nvml_library import NvmlApi, code_of

__all__ = ["GpuProcesses", "ProcessLoad", "compute_pids", "list_processes", "process_loads"]

_NOTHING: Final = frozenset({0, lib.NOT_FOUND})
"""Codes of an answer without samples: older bindings raise even the code of success."""
_COMPUTE: Final = "nvmlDeviceGetComputeRunningProcesses"
_GRAPHICS: Final = "nvmlDeviceGetGraphicsRunningProcesses"
_DENIED: Final = frozenset({lib.NOT_SUPPORTED, lib.FUNCTION_NOT_FOUND, lib.NO_PERMISSION})
_MOST: Final = 100
"""Percent; some drivers fill the unused end of their buffer with larger figures."""


@dataclass(frozen=True, slots=True)
class GpuProcesses:
    """Who is on a GPU, as far as the driver names them. Pids are as the driver numbers processes.

    Attributes:
        compute: processes with a compute context; on a partitioned board those on the slices that are ours.
        graphics: processes that draw.
        unnamed: entries without a pid (a container may see that somebody is there, not who).
        elsewhere: processes on the other slices of the board; None: not told. Empty where the whole board is ours.
    """

    compute: frozenset[int] = frozenset()
    graphics: frozenset[int] = frozenset()
    unnamed: int = 0
    elsewhere: frozenset[int] | None = frozenset()

    @property
    def pids(self) -> frozenset[int]:
        """Everybody who is named on what is ours of the board."""
        return self.compute | self.graphics


@dataclass(frozen=True, slots=True)
class ProcessLoad:
    """What a process used of a GPU in one sample period of the driver.

    Attributes:
        pid: as the driver numbers processes.
        t_us: when the period ended, in the driver's microseconds (by its documentation the CPU's time).
        sm_percent: part of the period in which kernels of the process ran, 0..100.
    """

    pid: int
    t_us: int
    sm_percent: int


def compute_pids(api: NvmlApi, handle: object, device_id: str) -> list[int]:
    """Processes with a compute context on a board, rising.

    Raises:
        Refused: the driver does not tell.
        Transient: it did not answer this time.
    """
    return sorted(set(_pids(api, _COMPUTE, handle, device_id)))


def list_processes(api: NvmlApi, handle: object, slices: Collection[object], device_id: str) -> GpuProcesses:
    """Who is on a board, or on ``slices`` of it where those are all that is ours.

    Raises:
        Refused: the driver does not tell.
        Transient: it did not answer this time.
    """
    compute = [pid for part in slices or (handle,) for pid in _pids(api, _COMPUTE, part, device_id)]
    graphics = [pid for part in slices or (handle,) for pid in _told(api, _GRAPHICS, part, device_id) or ()]
    elsewhere: frozenset[int] | None = frozenset()
    if slices:
        board = _told(api, _COMPUTE, handle, device_id)
        # One process may work on two slices only with a context on each: what is ours is taken out by pid.
        elsewhere = None if board is None else frozenset(board) - frozenset(compute) - {0}
    return GpuProcesses(
        compute=frozenset(compute) - {0},
        graphics=frozenset(graphics) - {0},
        unnamed=(compute + graphics).count(0),
        elsewhere=elsewhere,
    )


def process_loads(api: NvmlApi, handle: object, since_us: int, device_id: str) -> list[ProcessLoad]:
    """What processes used since ``since_us`` (0: all that the driver still knows); empty: nobody used anything.

    Raises:
        Refused: the driver does not tell (partitioned boards, some containers, WSL).
        Transient: it did not answer this time.
    """
    refused: Exception | None = None
    for name in ("nvmlDeviceGetProcessUtilization", "nvmlDeviceGetProcessesUtilizationInfo"):
        call: Any = getattr(api, name, None)
        if call is None:
            continue
        try:
            return _loads(cast("Iterable[Any]", call(handle, since_us)), since_us)
        except api.NVMLError as error:
            if code_of(error) in _NOTHING:
                return []
            if code_of(error) not in _DENIED:
                raise Transient(f"the utilisation of processes on {device_id} was not told: {error}") from error
            refused = error
    raise Refused("the driver does not tell how much each process uses the GPU", state="not_supported") from refused


def _loads(samples: Iterable[Any], since_us: int) -> list[ProcessLoad]:
    found = ((int(sample.pid), int(sample.timeStamp), int(sample.smUtil)) for sample in samples)
    return [ProcessLoad(pid, t_us, sm) for pid, t_us, sm in found if pid and t_us > since_us and sm <= _MOST]


def _told(api: NvmlApi, call: str, handle: object, device_id: str) -> list[int] | None:
    """Pids, or None where the driver does not tell."""
    try:
        return _pids(api, call, handle, device_id)
    except Refused:
        return None


def _pids(api: NvmlApi, call: str, handle: object, device_id: str) -> list[int]:
    try:
        return [int(process.pid) for process in _ask(api, call, handle)]
    except api.NVMLError as error:
        if code_of(error) in _DENIED:
            raise Refused("the driver does not tell which processes use the GPU", state="not_supported") from error
        raise Transient(f"the processes on {device_id} could not be listed: {error}") from error


def _ask(api: NvmlApi, call: str, handle: object) -> Iterable[Any]:
    """The list of processes by the newest call that driver and binding both know."""
    ask: Any = getattr(api, call, None)
    try:
        return [] if ask is None else ask(handle)
    except Exception as error:
        # Driver 470 lacks version 3, which the binding's plain name stands for; it then raises an error of another kind.
        older: Any = getattr(api, f"{call}_v2", None)
        if type(error).__name__ != "NVMLLibraryMismatchError" or older is None:
            raise
        return older(handle)
