"""Made-up NVIDIA boards: what a fake has, and how it is written into the state file of the fake NVML library."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from melodi_otel.testing import nvml_state as layout

_MODULE: Final = {"no": 0, "too": 1, "only": 2}
_LOADS: Final = {"no": 0, "yes": 1, "info": 2}
_BEFORE_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class FakeSlice:
    """A MIG device of a fake board.

    Attributes:
        uuid: ``MIG-…``.
        profile: as NVIDIA names it, ``[Nc.]Ng.Mgb``: compute slices, GPU slices, memory.
        gpu_instance: id of the GPU instance.
        compute_instance: id of the compute instance in it.
        attributes: False: the library cannot tell the slices (old driver), only the name can.
    """

    uuid: str
    profile: str = "1g.10gb"
    gpu_instance: int = 1
    compute_instance: int = 0
    attributes: bool = True


@dataclass(frozen=True, slots=True)
class FakeGpu:
    """A fake board as it is at the start. Times in seconds, powers in W, ``base_j`` in J, memory in bytes.

    Attributes:
        watts: what it draws until :meth:`FakeNvml.watts` says otherwise.
        period_s: the energy counter moves in steps of this; 0: always fresh.
        offset_s: phase of those steps.
        delay_s: the counter shows the energy of this long ago.
        base_j: what the counter shows at time 0.
        gauge_period_s: update period of the power gauges.
        instant_window_s: averaging window of the instant gauge (field 186).
        average_window_s: averaging window of the average gauge (field 185).
        draw_window_s: averaging window of ``nvmlDeviceGetPowerUsage``.
        energy: it has an energy counter.
        fields: it answers ``nvmlDeviceGetFieldValues``.
        instant: it has field 186.
        average: it has field 185.
        draw: it answers ``nvmlDeviceGetPowerUsage``.
        module: ``no``; ``too``: also the module's power, and the counter covers the module (Grace Hopper);
            ``only``: no power but the module's.
        module_extra_watts: what the rest of the module draws.
        utilization: 0..1; None: not reported.
        memory_total: 0: not reported.
        fast_poll_s: readings closer than this get ``fast_poll_code`` (0: the value 0).
        pids: processes that compute on it at the start.
        graphics: processes that draw on it at the start.
        loads: what it tells of the processes' utilisation: ``no``, ``yes``, or ``info`` (only by the newer call).
        minor: N of ``/dev/nvidiaN``; None: not told.
        mig_private: only root may ask the whole partitioned board for its processes.
        max_slices: MIG devices that the board could hold; 0: no MIG.
        slices: its MIG devices; any means that MIG is on.
    """

    uuid: str
    name: str = "NVIDIA H100 80GB HBM3"
    watts: float = 100.0
    architecture: int = 9
    capability: tuple[int, int] = (9, 0)
    pci: tuple[int, int, int] | None = None
    cores: int = 16896
    sm_clock_mhz: int = 1980
    period_s: float = 0.1
    offset_s: float = 0.0
    delay_s: float = 0.0
    base_j: float = 0.0
    gauge_period_s: float = 0.1
    instant_window_s: float = 0.025
    average_window_s: float = 1.0
    draw_window_s: float = 1.0
    energy: bool = True
    fields: bool = True
    instant: bool = True
    average: bool = True
    draw: bool = True
    module: Literal["no", "too", "only"] = "no"
    module_extra_watts: float = 0.0
    utilization: float | None = 0.0
    memory_total: int = 80 * 2**30
    memory_used: int = 0
    memory_reserved: int = 0
    fast_poll_s: float = 0.0
    fast_poll_code: int = 0
    pids: tuple[int, ...] = ()
    graphics: tuple[int, ...] = ()
    loads: Literal["no", "yes", "info"] = "yes"
    minor: int | None = None
    mig_private: bool = False
    max_slices: int = 0
    slices: tuple[FakeSlice, ...] = ()


def write_gpu(board: layout.Gpu, gpu: FakeGpu, index: int) -> None:
    """Put ``gpu`` into its place in the state file, as NVML's device ``index``."""
    board.uuid = gpu.uuid.encode()
    board.name = gpu.name.encode()
    board.architecture = gpu.architecture
    board.major, board.minor = gpu.capability
    board.domain, board.bus, board.slot = gpu.pci or (0, 1 + index, 0)
    board.cores = gpu.cores
    board.sm_clock_mhz = gpu.sm_clock_mhz
    board.period_ns = round(gpu.period_s * 1e9)
    board.offset_ns = round(gpu.offset_s * 1e9)
    board.delay_ns = round(gpu.delay_s * 1e9)
    board.gauge_period_ns = round(gpu.gauge_period_s * 1e9)
    board.instant_window_ns = round(gpu.instant_window_s * 1e9)
    board.average_window_ns = round(gpu.average_window_s * 1e9)
    board.draw_window_ns = round(gpu.draw_window_s * 1e9)
    board.base_mj = round(gpu.base_j * 1000)
    board.module_extra_mw = round(gpu.module_extra_watts * 1000)
    board.has_energy = int(gpu.energy)
    board.has_fields = int(gpu.fields)
    board.has_instant = int(gpu.instant)
    board.has_average = int(gpu.average)
    board.has_draw = int(gpu.draw)
    board.module = _MODULE[gpu.module]
    board.has_utilization = int(gpu.utilization is not None)
    board.utilization_percent = round((gpu.utilization or 0.0) * 100)
    board.memory_total = gpu.memory_total
    board.memory_used = gpu.memory_used
    board.memory_reserved = gpu.memory_reserved
    board.fast_poll_ns = round(gpu.fast_poll_s * 1e9)
    board.fast_poll_code = gpu.fast_poll_code
    board.last_read_ns = -(2**63)
    board.max_slices = gpu.max_slices
    board.mig_mode = int(bool(gpu.slices))
    for number, part in enumerate(gpu.slices):
        _write_slice(board.slices[number], part, gpu.name)
    board.slice_count = len(gpu.slices)
    for number, pid in enumerate(gpu.pids):
        board.pids[number] = pid
    board.pid_count = len(gpu.pids)
    for number, pid in enumerate(gpu.graphics):
        board.graphics[number] = pid
    board.graphics_count = len(gpu.graphics)
    board.has_loads = _LOADS[gpu.loads]
    board.minor_plus_one = 0 if gpu.minor is None else gpu.minor + 1
    board.mig_private = int(gpu.mig_private)
    # The script begins an hour before time 0, so that gauges with a window are full when a test starts; the counter
    # counts from 0 on (reset_ns).
    board.segments[0].t_ns = -round(_BEFORE_S * 1e9)
    board.segments[0].mw = round(gpu.watts * 1000)
    board.segment_count = 1


def _write_slice(place: layout.Slice, part: FakeSlice, board_name: str) -> None:
    words = part.profile.split(".")
    compute = words.pop(0) if words[0].endswith("c") else None
    gpu_slices = int(words[0].removesuffix("g"))
    place.uuid = part.uuid.encode()
    place.name = f"{board_name} MIG {part.profile}".encode()
    place.gpu_instance = part.gpu_instance
    place.compute_instance = part.compute_instance
    place.gpu_slices = gpu_slices
    if part.attributes:
        place.compute_slices = gpu_slices if compute is None else int(compute.removesuffix("c"))
    place.memory_mb = int(words[1].removesuffix("gb")) * 1024
