"""One NVIDIA board: what it can tell, found out once, and one reading of it per round.

Which of NVML's power figures means what depends on the architecture; the windows and periods below are measured values
of the literature (SC24, arXiv 2312.02741) and NVML's own documentation. What they do not say is None, never a guess.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from melodi_otel.devices import Device
from melodi_otel.errors import Refused
from melodi_otel.sources import nvml_library as lib
from melodi_otel.sources.nvml_library import NvmlApi
from melodi_otel.sources.nvml_visible import BoardId, Choice, MigSlice, share_of_profile

T = TypeVar("T")
Gauge = Literal["instant", "average", "draw"]

PASCAL: Final = 4
VOLTA: Final = 5
TURING: Final = 6
AMPERE: Final = 7
ADA: Final = 8
HOPPER: Final = 9

_GRACE_HOPPER: Final = re.compile(r"\bGH\d{3}\b")


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a board answered when it was opened.

    Attributes:
        field_values: ``nvmlDeviceGetFieldValues`` works.
        energy_field: field 83, total energy.
        instant_field: field 186, power over some milliseconds.
        average_field: field 185, power over a second.
        energy_call: ``nvmlDeviceGetTotalEnergyConsumption`` works (asked only where the field does not).
        power_call: ``nvmlDeviceGetPowerUsage`` works (asked only where no power field does).
        module_scope: the figures cover the whole module (Grace Hopper), not the GPU alone.
    """

    field_values: bool = False
    energy_field: bool = False
    instant_field: bool = False
    average_field: bool = False
    energy_call: bool = False
    power_call: bool = False
    module_scope: bool = False

    @property
    def counter(self) -> bool:
        """It counts joules, one way or the other."""
        return self.energy_field or self.energy_call

    @property
    def gauge(self) -> Gauge | None:
        """The gauge that is shown: instant before average before ``power.draw``."""
        if self.instant_field:
            return "instant"
        if self.average_field:
            return "average"
        return "draw" if self.power_call else None


@dataclass(frozen=True, slots=True)
class BoardReading:
    """Raw figures of one board, each None where the board did not tell it this time."""

    energy_mj: int | None = None
    power_mw: int | None = None
    average_mw: int | None = None


@dataclass(slots=True)
class Board:
    """A board that is read: its handle, its fixed facts, the MIG devices that are ours, how often it failed in a row."""

    handle: object
    device: Device
    can: Capabilities
    ask: lib.FieldCall | None
    slices: tuple[str, ...] = ()
    failures: int = 0
    last_mj: int = 0
    zeros: int = 0


def gauge_window_s(gauge: Gauge, architecture: int | None, capability: tuple[int, int] | None) -> float | None:
    """Averaging window of a gauge in seconds, from architecture and CUDA compute capability; None: unknown."""
    ga100 = capability == (8, 0)
    if gauge == "average":
        return 1.0
    if architecture is None or architecture > HOPPER:
        # NVML's documentation: power.draw is a 1 s average on Ampere (except GA100) and everything newer.
        return 1.0 if gauge == "draw" and architecture is not None and architecture < 0xFFFFFFFF else None
    if architecture in (PASCAL, VOLTA):
        return 0.01
    if architecture == TURING:
        return 0.1
    if architecture == AMPERE and capability is None:
        return None
    if architecture == AMPERE and ga100:
        return 0.025
    if architecture in (AMPERE, ADA, HOPPER):
        if gauge == "draw":
            return 1.0
        return 0.025 if architecture == HOPPER else 0.1
    return None


def gauge_period_s(architecture: int | None) -> float | None:
    """Update period of the power gauges in seconds; None: unknown."""
    if architecture in (PASCAL, VOLTA):
        return 0.02
    return 0.1 if architecture in (TURING, AMPERE, ADA, HOPPER) else None


def identify(api: NvmlApi, index: int, handle: object) -> BoardId:
    """Who a board is. Its UUID must be readable, everything else may be missing.

    Raises:
        NVMLError: the binding's own, where the UUID cannot be read.
    """
    uuid = api.nvmlDeviceGetUUID(handle)
    pci = _try(api, lambda: api.nvmlDeviceGetPciInfo(handle))
    cores = _try(api, lambda: api.nvmlDeviceGetNumGpuCores(handle))
    clock = _try(api, lambda: api.nvmlDeviceGetMaxClockInfo(handle, lib.CLOCK_SM))
    mode = _try(api, lambda: api.nvmlDeviceGetMigMode(handle))
    mig = bool(mode and mode[0])
    return BoardId(
        uuid=uuid,
        index=index,
        name=_try(api, lambda: api.nvmlDeviceGetName(handle)) or "",
        pci=None if pci is None else (int(pci.domain), int(pci.bus), int(pci.device)),
        speed=None if not cores or not clock else float(cores * clock),
        mig=mig,
        slices=tuple(_slices(api, handle)) if mig else (),
        minor=_try(api, lambda: api.nvmlDeviceGetMinorNumber(handle)),
    )


def probe(api: NvmlApi, handle: object, name: str) -> Capabilities:
    """Find out once what a board answers.

    Raises:
        Refused: it tells neither energy nor power.
    """
    energy, instant, average, answered = _ask(api, handle, lib.SCOPE_GPU)
    energy_call = not energy and _try(api, lambda: api.nvmlDeviceGetTotalEnergyConsumption(handle)) is not None
    # The counter of a Grace Hopper covers GPU, CPU and memory; the gauge beside it must cover the same, or be absent.
    module = bool(_GRACE_HOPPER.search(name)) and (energy or energy_call)
    power_call = False
    if not module and not (instant or average):
        power_call = _try(api, lambda: api.nvmlDeviceGetPowerUsage(handle)) is not None
    if module or not (instant or average or power_call):
        _, module_instant, module_average, _ = _ask(api, handle, lib.SCOPE_MODULE)
        if module or module_instant or module_average:
            module, instant, average = True, module_instant, module_average
    can = Capabilities(answered, energy, instant, average, energy_call, power_call, module)
    if not can.counter and can.gauge is None:
        raise Refused(f"{name or 'the GPU'} tells neither energy nor power", state="not_supported")
    return can


def describe(api: NvmlApi, handle: object, choice: Choice, can: Capabilities) -> Device:
    """The board as the rest of the house sees it."""
    architecture = _try(api, lambda: api.nvmlDeviceGetArchitecture(handle))
    capability = _try(api, lambda: api.nvmlDeviceGetCudaComputeCapability(handle))
    gauge = None if can.counter else can.gauge
    return Device(
        id=choice.board.uuid,
        type="gpu",
        source="nvml.energy_counter" if can.counter else "nvml.power_integral",
        name=choice.board.name or None,
        index=choice.board.index,
        scope="module" if can.module_scope else None,
        window_s=None if gauge is None else gauge_window_s(gauge, architecture, capability),
        period_s=None if gauge is None else gauge_period_s(architecture),
        fraction=choice.fraction,
    )


def fields_of(can: Capabilities) -> tuple[tuple[int, int], ...]:
    """The (field, scope) pairs of a board's one call per round, in a fixed order; empty: it is not made."""
    scope = lib.SCOPE_MODULE if can.module_scope else lib.SCOPE_GPU
    wanted = ((can.energy_field, lib.TOTAL_ENERGY, lib.SCOPE_GPU), (can.instant_field, lib.POWER_INSTANT, scope),
              (can.average_field, lib.POWER_AVERAGE, scope))  # fmt: skip
    return tuple((field, where) for has, field, where in wanted if has)


def read(api: NvmlApi, board: Board) -> BoardReading:
    """Read a board: one call where it has field values, else one per figure.

    Raises:
        NVMLError: the binding's own, where a whole call failed.
    """
    found = board.ask(board.handle) if board.ask is not None else {}
    energy = found.get(lib.TOTAL_ENERGY)
    if board.can.energy_call:
        energy = api.nvmlDeviceGetTotalEnergyConsumption(board.handle)
    average = found.get(lib.POWER_AVERAGE)
    gauge = board.can.gauge
    if gauge == "draw":
        if board.can.counter:
            power = _try(api, lambda: api.nvmlDeviceGetPowerUsage(board.handle))
        else:
            power = api.nvmlDeviceGetPowerUsage(board.handle)
    else:
        power = found.get(lib.POWER_INSTANT) if gauge == "instant" else average
    # A running board never draws 0 W: that is how some drivers answer when they are asked too fast.
    return BoardReading(energy, power or None, average or None)


def _ask(api: NvmlApi, handle: object, scope: int) -> tuple[bool, bool, bool, bool]:
    """Whether (energy, instant, average) answer in ``scope``, and whether the call itself works."""
    wanted = ((lib.TOTAL_ENERGY, lib.SCOPE_GPU), (lib.POWER_INSTANT, scope), (lib.POWER_AVERAGE, scope))
    answers = _try(api, lambda: api.nvmlDeviceGetFieldValues(handle, wanted))
    if answers is None:
        return False, False, False, False
    energy, instant, average = (lib.number_of(answer) is not None for answer in answers)
    return energy, instant, average, True


def _slices(api: NvmlApi, handle: object) -> Sequence[MigSlice]:
    most = _try(api, lambda: api.nvmlDeviceGetMaxMigDeviceCount(handle)) or 0
    found: list[MigSlice] = []
    for number in range(most):
        part = _try(api, lambda number=number: api.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
        uuid = None if part is None else _try(api, lambda part=part: api.nvmlDeviceGetUUID(part))
        if uuid is None:
            continue
        found.append(
            MigSlice(
                uuid,
                _try(api, lambda part=part: api.nvmlDeviceGetGpuInstanceId(part)),
                _try(api, lambda part=part: api.nvmlDeviceGetComputeInstanceId(part)),
                _share(api, part, most),
            )
        )
    return found


def _share(api: NvmlApi, part: object, slices_of_board: int) -> float | None:
    """Compute slices of a MIG device over those of the board (which holds at most that many devices)."""
    attributes: Any = _try(api, lambda: api.nvmlDeviceGetAttributes(part))
    count = 0 if attributes is None else int(attributes.computeInstanceSliceCount)
    if count > 0 and slices_of_board > 0:
        return min(1.0, count / slices_of_board)
    return share_of_profile(_try(api, lambda: api.nvmlDeviceGetName(part)) or "", slices_of_board)


def _try(api: NvmlApi, call: Callable[[], T]) -> T | None:
    with contextlib.suppress(api.NVMLError):
        return call()
    return None
