"""The state file of the fake NVML library: the structs of ``fake_nvml.c``, byte for byte.

Change both together; the library refuses a state of another size, so a forgotten half shows at once.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

MAX_GPUS: Final = 16
MAX_SLICES: Final = 8
MAX_PIDS: Final = 16
MAX_LOADS: Final = 64
MAX_SEGMENTS: Final = 8192
MAX_RULES: Final = 32
MAX_CALLS: Final = 64
MAGIC: Final = 0x6D656C6F64693031

_NAME: Final = 64
_TEXT = ctypes.c_char * 96
_NUMBERS = ctypes.c_uint32 * MAX_PIDS


class Segment(ctypes.Structure):
    """From ``t_ns`` on, ``mw`` milliwatts."""

    if TYPE_CHECKING:
        t_ns: int
        mw: int
    _fields_ = [("t_ns", ctypes.c_int64), ("mw", ctypes.c_int64)]


class Slice(ctypes.Structure):
    """A MIG device."""

    if TYPE_CHECKING:
        uuid: bytes
        name: bytes
        gpu_instance: int
        compute_instance: int
        gpu_slices: int
        compute_slices: int
        memory_mb: int
    _fields_ = [
        ("uuid", _TEXT),
        ("name", _TEXT),
        ("gpu_instance", ctypes.c_uint32),
        ("compute_instance", ctypes.c_uint32),
        ("gpu_slices", ctypes.c_uint32),
        ("compute_slices", ctypes.c_uint32),
        ("memory_mb", ctypes.c_uint64),
    ]


class Load(ctypes.Structure):
    """What a process used of a board in the sample period that ended at ``t_us``: percent of SM and of memory."""

    if TYPE_CHECKING:
        t_us: int
        pid: int
        sm: int
        memory: int
    _fields_ = [("t_us", ctypes.c_int64), *((name, ctypes.c_uint32) for name in ("pid", "sm", "memory", "unused"))]


class Gpu(ctypes.Structure):
    """A board."""

    if TYPE_CHECKING:
        uuid: bytes
        name: bytes
        architecture: int
        major: int
        minor: int
        domain: int
        bus: int
        slot: int
        cores: int
        sm_clock_mhz: int
        period_ns: int
        offset_ns: int
        delay_ns: int
        gauge_period_ns: int
        instant_window_ns: int
        average_window_ns: int
        draw_window_ns: int
        base_mj: int
        reset_ns: int
        module_extra_mw: int
        has_energy: int
        has_fields: int
        has_instant: int
        has_average: int
        has_draw: int
        module: int
        has_utilization: int
        utilization_percent: int
        memory_total: int
        memory_used: int
        memory_reserved: int
        fast_poll_ns: int
        fast_poll_code: int
        lost: int
        mig_mode: int
        max_slices: int
        slice_count: int
        pid_count: int
        segment_count: int
        minor_plus_one: int
        graphics_count: int
        load_count: int
        has_loads: int
        mig_private: int
        last_read_ns: int
        pids: ctypes.Array[ctypes.c_uint32]
        pid_slices: ctypes.Array[ctypes.c_uint32]
        graphics: ctypes.Array[ctypes.c_uint32]
        loads: ctypes.Array[Load]
        slices: ctypes.Array[Slice]
        segments: ctypes.Array[Segment]
    _fields_ = [
        ("uuid", _TEXT),
        ("name", _TEXT),
        *((name, ctypes.c_uint32) for name in ("architecture", "major", "minor", "domain")),
        *((name, ctypes.c_uint32) for name in ("bus", "slot", "cores", "sm_clock_mhz")),
        *((name, ctypes.c_int64) for name in ("period_ns", "offset_ns", "delay_ns")),
        *((name, ctypes.c_int64) for name in ("gauge_period_ns", "instant_window_ns", "average_window_ns")),
        ("draw_window_ns", ctypes.c_int64),
        ("base_mj", ctypes.c_uint64),
        ("reset_ns", ctypes.c_int64),
        ("module_extra_mw", ctypes.c_int64),
        *((name, ctypes.c_uint32) for name in ("has_energy", "has_fields", "has_instant", "has_average")),
        *((name, ctypes.c_uint32) for name in ("has_draw", "module", "has_utilization", "utilization_percent")),
        *((name, ctypes.c_uint64) for name in ("memory_total", "memory_used", "memory_reserved")),
        ("fast_poll_ns", ctypes.c_int64),
        ("fast_poll_code", ctypes.c_int32),
        *((name, ctypes.c_uint32) for name in ("lost", "mig_mode", "max_slices", "slice_count")),
        *((name, ctypes.c_uint32) for name in ("pid_count", "segment_count", "minor_plus_one")),
        *((name, ctypes.c_uint32) for name in ("graphics_count", "load_count", "has_loads", "mig_private")),
        ("last_read_ns", ctypes.c_int64),
        ("pids", _NUMBERS),
        ("pid_slices", _NUMBERS),
        ("graphics", _NUMBERS),
        ("loads", Load * MAX_LOADS),
        ("slices", Slice * MAX_SLICES),
        ("segments", Segment * MAX_SEGMENTS),
    ]


class Rule(ctypes.Structure):
    """A function that fails: which, for whom, with what, when."""

    if TYPE_CHECKING:
        function: bytes
        gpu: int
        code: int
        after: int
        times: int
        seen: int
        delay_us: int
    _fields_ = [
        ("function", ctypes.c_char * _NAME),
        ("gpu", ctypes.c_int32),
        ("code", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("after", "times", "seen", "delay_us")),
    ]


class Calls(ctypes.Structure):
    """How often a function was called; written by the library."""

    if TYPE_CHECKING:
        function: bytes
        count: int
    _fields_ = [("function", ctypes.c_char * _NAME), ("count", ctypes.c_uint64)]


class State(ctypes.Structure):
    """The file."""

    if TYPE_CHECKING:
        magic: int
        size: int
        driver: bytes
        monotonic: int
        gpu_count: int
        rule_count: int
        init_error: int
        origin_ns: int
        now_ns: int
        epoch_us: int
        initialized: int
        rules: ctypes.Array[Rule]
        calls: ctypes.Array[Calls]
        gpus: ctypes.Array[Gpu]
    _fields_ = [
        ("magic", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("driver", ctypes.c_char * 80),
        ("monotonic", ctypes.c_int32),
        *((name, ctypes.c_uint32) for name in ("gpu_count", "rule_count", "init_error")),
        *((name, ctypes.c_int64) for name in ("origin_ns", "now_ns", "epoch_us", "initialized")),
        ("rules", Rule * MAX_RULES),
        ("calls", Calls * MAX_CALLS),
        ("gpus", Gpu * MAX_GPUS),
    ]
