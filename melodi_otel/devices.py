"""Devices: the things that consume energy and have a meter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DeviceType = Literal["gpu", "cpu", "memory", "host"]


@dataclass(frozen=True, slots=True)
class Device:
    """One of them.

    Attributes:
        id: ``hw.id``: the GPU's UUID, ``intel-rapl:0``, …
        type: ``gpu``, ``cpu``, ``memory``; ``host`` only for meters of the whole machine (psys), never summed with others.
        source: method of the joules, e.g. ``nvml.energy_counter``, ``nvml.power_integral``, ``rapl.package``,
            ``rapl.perf.package``, ``amd.energy_counter``, ``cray.node``, ``estimate.cpu_utilization``.
        name: model name for people.
        index: position in the vendor's own numbering (NVML index), for display only.
        parent: id of the device that contains this one (a package for its DRAM), else None.
        scope: ``module`` where the counter covers more than the named device (Grace Hopper, MI250), else None.
        idle_watts: idle power in W where known beforehand; None: it is learnt.
        window_s: averaging window of a gauge in seconds; None: instantaneous or a counter.
        period_s: update period of the sensor in seconds; None: it is learnt.
        peak_flops: dense half-precision peak in FLOP/s; None: unknown.
        bytes_per_s: memory bandwidth in byte/s; None: unknown.
        estimated: True where joules come from a model of the load and not from a sensor.
        relative_uncertainty: 1 sigma of the source itself as a fraction (only for estimates; a sensor's gain is stated
            apart as a systematic).
        fraction: part of a board that is visible here (MIG slice), else 1.0.
    """

    id: str
    type: DeviceType
    source: str = ""
    name: str | None = None
    index: int | None = None
    parent: str | None = None
    scope: str | None = None
    idle_watts: float | None = None
    window_s: float | None = None
    period_s: float | None = None
    peak_flops: float | None = None
    bytes_per_s: float | None = None
    estimated: bool = False
    relative_uncertainty: float = 0.0
    fraction: float = 1.0
