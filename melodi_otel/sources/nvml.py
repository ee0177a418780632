"""NVIDIA GPUs by NVML: the energy counter, and beside it the power gauges from the same call.

Per GPU and round there is one ``nvmlDeviceGetFieldValues`` (calls serialise in the driver) that brings total energy,
instant and average power. Boards without a counter are gauges. Devices are named by UUID; a MIG device is its board with
a ``fraction``.

Failures: a reading that fails spoils its round (``Transient``); a board that is lost, or that fails
:data:`LOST_AFTER` times in a row, is named once (``Gone``) and no longer asked, so it takes no other board with it.

After a fork the child's source is dead (``Gone``): NVML's session with the driver belongs to the parent, and shutting it
down in the child would end it for both. The child opens a source of its own with :func:`open_nvml`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Final

from melodi_otel.devices import Device
from melodi_otel.errors import Gone, Refused, SourceError, Transient
from melodi_otel.sources import nvml_library as lib
from melodi_otel.sources import nvml_processes as processes
from melodi_otel.sources.base import CounterReading, GpuState, PowerReading, Settings
from melodi_otel.sources.nvml_allotted import allotted, may_open, openable
from melodi_otel.sources.nvml_board import (
    Board,
    BoardReading,
    Capabilities,
    describe,
    fields_of,
    identify,
    probe,
    read,
)
from melodi_otel.sources.nvml_history import power_history
from melodi_otel.sources.nvml_library import NvmlApi, code_of, open_library, refusal
from melodi_otel.sources.nvml_processes import GpuProcesses, ProcessLoad
from melodi_otel.sources.nvml_visible import BoardId, Choice, Visible, visible
from melodi_otel.units import millijoules, milliwatts

__all__ = ["LOST_AFTER", "Capabilities", "NvmlSource", "open_nvml"]

log = logging.getLogger(__name__)

LOST_AFTER: Final = 30
"""Failed readings of a board in a row after which it counts as lost (3 s at 10 Hz)."""

_LOST: Final = frozenset({lib.GPU_IS_LOST, lib.RESET_REQUIRED, lib.GPU_NOT_FOUND})
_DRIVER_LEFT: Final = frozenset({lib.DRIVER_NOT_LOADED, lib.VERSION_MISMATCH})


def open_nvml(settings: Settings, *, devices: str = "/dev") -> NvmlSource:
    """Open the GPUs that this program may see.

    Args:
        settings: ``nvml_library`` names the library to load (None: the driver's); ``CUDA_VISIBLE_DEVICES`` and
            ``CUDA_DEVICE_ORDER``, and in a SLURM job its variables, are read from ``environ``; readings carry the time of
            ``clock``.
        devices: where the nodes ``nvidiaN`` lie; GPUs whose node may not be opened (a SLURM job's control group) are left
            out.

    Raises:
        Refused: there is nothing to measure here; with the reason, the fix, and as ``state`` one of
            ``module_missing``, ``module_foreign``, ``library_missing``, ``library_unusable``, ``library_too_old``,
            ``driver_not_loaded``, ``driver_mismatch``, ``permission_denied``, ``no_device``, ``no_visible_device``,
            ``not_supported``, ``failed``.
    """
    api = open_library(settings.nvml_library)
    try:
        return _open(api, settings, devices)
    except Refused:
        _shut_down(api)
        raise
    except Exception as error:
        _shut_down(api)
        raise Refused(
            f"NVML failed: {error}", fix="run nvidia-smi; if it fails too, repair the driver", state="failed"
        ) from error


class NvmlSource:
    """The visible NVIDIA GPUs: counters, gauges and slow facts.

    Attributes:
        capabilities: what each device answered when it was opened, by ``hw.id``.
        notes: what a person should know about the mapping of ``CUDA_VISIBLE_DEVICES`` and about boards left out.
        driver_version: of the NVIDIA driver; None: not told.
        slices: the ``hw.id`` of the board by the names of its MIG devices: NVML's, and CUDA's, which lacks the ``MIG-``.
    """

    def __init__(
        self,
        api: NvmlApi,
        settings: Settings,
        boards: Sequence[Board],
        notes: Sequence[str],
        driver: str | None,
        slices: Mapping[str, str] | None = None,
    ) -> None:
        self._api = api
        self._clock = settings.clock
        self._boards = tuple(boards)
        self._pid = os.getpid()
        self._lock = threading.Lock()
        # The slow questions have a lock of their own: a reading never waits for them, only close() does.
        self._asking = threading.Lock()
        self._closed = False
        self._round: list[tuple[Board, int, BoardReading]] | None = None
        self._averages: tuple[PowerReading, ...] = ()
        self.notes = tuple(notes)
        self.driver_version = driver
        self.slices: Mapping[str, str] = dict(slices or {})
        self.capabilities: Mapping[str, Capabilities] = {board.device.id: board.can for board in boards}

    @property
    def name(self) -> str:
        return "nvml"

    @property
    def devices(self) -> Sequence[Device]:
        """The GPUs that are still there, in the order the program numbers them."""
        return tuple(board.device for board in self._boards)

    def counters(self) -> Sequence[CounterReading]:
        """Read every GPU; total joules since the driver was loaded of those with a counter.

        The counter does not wrap; a fall is a reset (driver reload).

        Raises:
            Transient: a board did not answer; nothing of the round is used.
            Gone: a board is lost (``device``) or the driver is (None).
        """
        taken = self._read_round()
        self._round = taken
        return [
            CounterReading(board.device.id, t_ns, millijoules(found.energy_mj))
            for board, t_ns, found in taken
            if found.energy_mj is not None
        ]

    def power(self) -> Sequence[PowerReading]:
        """Watts from the round that :meth:`counters` just read; a round of its own where there was none.

        Of a board with a counter the gauge is left out when it did not answer; a board that has only a gauge must answer.

        Raises:
            Transient: as :meth:`counters`.
            Gone: as :meth:`counters`.
        """
        taken, self._round = self._round, None
        if taken is None:
            taken = self._read_round()
        return [
            PowerReading(board.device.id, t_ns, milliwatts(found.power_mw))
            for board, t_ns, found in taken
            if found.power_mw is not None
        ]

    def averages(self) -> Sequence[PowerReading]:
        """The 1 s average gauges of the last complete round: to check a counter's slope against, not to integrate."""
        return self._averages

    def history(self, device_id: str, since_ns: int) -> Sequence[PowerReading]:
        """Watts that the driver remembers, see :func:`power_history`; raises as that and Gone."""
        board = self._named(device_id)
        with self._lock:
            return power_history(self._api, board, self._clock, since_ns)

    def states(self) -> Sequence[GpuState]:
        """Utilisation 0..1 and used memory in bytes; None for what a GPU does not tell (a partitioned board).

        0.9 and 5 µs a board on an H200 (docs/accuracy.md), now and then 1 ms where it meets the driver's own work.
        """
        self._check()
        with self._lock:
            return [
                GpuState(board.device.id, self._utilization(board.handle), self._memory(board.handle))
                for board in self._boards
            ]

    def compute_pids(self, device_id: str) -> list[int]:
        """Processes with a compute context on a GPU, rising: never per round.

        6 to 90 µs on an H200 (docs/accuracy.md). Milliseconds elsewhere: 4.5 ms for the like list of a laptop's RTX 4090
        (MangoHud#2104), 50 to 100 ms for process calls on partitioned boards (Kepler's mig-power-attribution.md).

        Raises:
            Refused: the driver does not tell.
            Transient: it did not answer this time.
            Gone: there is no such device here any more.
        """
        with self._asking:
            return processes.compute_pids(self._api, self._named(device_id).handle, device_id)

    def processes(self, device_id: str) -> GpuProcesses:
        """Who is on a GPU, or on the slices of it that are ours. Slow as :meth:`compute_pids`; raises the same."""
        with self._asking:
            board = self._named(device_id)
            return processes.list_processes(self._api, board.handle, self._slices(board), device_id)

    def process_loads(self, device_id: str, since_us: int) -> Sequence[ProcessLoad]:
        """What processes used of a GPU since ``since_us``, see :func:`process_loads`. Slow; raises as that and Gone."""
        with self._asking:
            return processes.process_loads(self._api, self._named(device_id).handle, since_us, device_id)

    def close(self) -> None:
        """Give NVML back, once; never raises. In a forked child it only lets go (see the module's words on forks)."""
        if self._closed:
            return
        self._closed = True
        if os.getpid() != self._pid:
            return
        # A reading may hang in the driver; the program that ends must not wait for it.
        held = [lock for lock in (self._lock, self._asking) if lock.acquire(timeout=1.0)]
        try:
            if len(held) == 2:
                _shut_down(self._api)
        finally:
            for lock in held:
                lock.release()

    def _check(self) -> None:
        if self._closed:
            raise Gone("the NVML source is closed")
        if os.getpid() != self._pid:
            raise Gone("this process was forked: NVML must be opened again here")

    def _named(self, device_id: str) -> Board:
        self._check()
        found = next((board for board in self._boards if board.device.id == device_id), None)
        if found is None:
            raise Gone(f"{device_id} is not here", device_id)
        return found

    def _slices(self, board: Board) -> list[object]:
        """Handles of the MIG devices that are ours, asked anew: a slice that was made again has another one."""
        try:
            return [self._api.nvmlDeviceGetHandleByUUID(uuid) for uuid in board.slices]
        except self._api.NVMLError as error:
            raise Transient(f"a slice of {board.device.id} is not there: {error}") from error

    def _read_round(self) -> list[tuple[Board, int, BoardReading]]:
        self._check()
        self._round = None
        with self._lock:
            if not self._boards:
                raise Gone("no GPU is left")
            taken: list[tuple[Board, int, BoardReading]] = []
            for board in self._boards:
                try:
                    found = read(self._api, board)
                except self._api.NVMLError as error:
                    raise self._failed(board, error) from error
                t_ns = self._clock.monotonic_ns()
                wrong = _wrong(board, found)
                if wrong:
                    raise self._count_failure(board, wrong)
                taken.append((board, t_ns, found))
            for board, _, found in taken:
                board.failures = board.zeros = 0
                board.last_mj = found.energy_mj or 0
            self._averages = tuple(
                PowerReading(board.device.id, t_ns, milliwatts(found.average_mw))
                for board, t_ns, found in taken
                if found.average_mw is not None
            )
            return taken

    def _failed(self, board: Board, error: Exception) -> SourceError:
        code = code_of(error)
        if code in _LOST:
            return self._drop(board, f"GPU {board.device.id} is lost: {error}")
        if code in _DRIVER_LEFT:
            return Gone(f"the NVIDIA driver left: {error}")
        if code == lib.UNINITIALIZED:
            return self._revive()
        return self._count_failure(board, str(error))

    def _count_failure(self, board: Board, why: str) -> SourceError:
        board.failures += 1
        if board.failures >= LOST_AFTER:
            return self._drop(board, f"GPU {board.device.id} failed {board.failures} times in a row: {why}")
        return Transient(f"GPU {board.device.id} did not answer: {why}")

    def _drop(self, board: Board, message: str) -> Gone:
        self._boards = tuple(other for other in self._boards if other is not board)
        return Gone(message, board.device.id)

    def _revive(self) -> SourceError:
        """Somebody in this process shut NVML down once too often: start it again."""
        try:
            self._api.nvmlInit()
            for board in self._boards:
                board.handle = self._api.nvmlDeviceGetHandleByUUID(board.device.id)
        except self._api.NVMLError as error:
            return Gone(f"NVML was shut down by another part of this program and does not start again: {error}")
        return Transient("NVML was shut down by another part of this program; it is started again")

    def _utilization(self, handle: object) -> float | None:
        with contextlib.suppress(self._api.NVMLError):
            return float(self._api.nvmlDeviceGetUtilizationRates(handle).gpu) / 100
        return None

    def _memory(self, handle: object) -> int | None:
        """Used bytes: version 2 of the call leaves out what the driver reserves, as nvidia-smi does."""
        for version in (lib.MEMORY_V2, None):
            with contextlib.suppress(self._api.NVMLError):
                return int(self._api.nvmlDeviceGetMemoryInfo(handle, version).used)
        return None


def _wrong(board: Board, found: BoardReading) -> str | None:
    """Why a reading cannot be used, or None."""
    if not board.can.counter:
        return "no power was told" if found.power_mw is None else None
    if found.energy_mj is None:
        return "no energy was told"
    if found.energy_mj == 0 and board.last_mj > 0 and board.zeros == 0:
        # Asked too fast, some drivers answer 0 once; a counter that was reset answers it again.
        board.zeros = 1
        return "the counter answered 0"
    return None


def _open(api: NvmlApi, settings: Settings, devices: str) -> NvmlSource:
    try:
        count = api.nvmlDeviceGetCount()
    except api.NVMLError as error:
        raise refusal(code_of(error), error) from error
    if count == 0:
        raise Refused(
            "the NVIDIA driver shows no GPU", fix="in a container start it with --gpus all", state="no_device"
        )
    known, handles, notes, denied, last = _enumerate(api, count)
    if not known:
        if last is not None and code_of(last) in (lib.NO_PERMISSION, lib.FUNCTION_NOT_FOUND):
            raise refusal(code_of(last), last) from last
        raise Refused(f"no GPU answers: {last}", fix="run nvidia-smi; it names the broken GPU", state="failed")
    known, closed = openable(known, lambda minor: may_open(minor, devices))
    known, given = allotted(known, settings.environ)
    scope = denied + closed + given
    for note in scope:
        log.debug("nvml: %s", note)
    seen = visible(known, settings.environ)
    notes += seen.notes
    if not seen.choices:
        raise Refused(
            f"CUDA_VISIBLE_DEVICES={settings.environ.get('CUDA_VISIBLE_DEVICES', '')!r} leaves no GPU visible",
            fix="name a GPU there by index or UUID (nvidia-smi -L), or unset it",
            state="no_visible_device",
        )
    boards = _boards(api, seen, handles, notes)
    for note in notes:
        log.warning("nvml: %s", note)
    try:
        driver = api.nvmlSystemGetDriverVersion()
    except api.NVMLError:
        driver = None
    slices = {
        name: choice.board.uuid
        for choice in seen.choices
        for part in choice.board.slices
        for name in (part.uuid, f"GPU-{part.uuid.removeprefix('MIG-')}")
    }
    return NvmlSource(api, settings, boards, scope + notes, driver, slices)


def _enumerate(
    api: NvmlApi, count: int
) -> tuple[list[BoardId], dict[str, object], list[str], list[str], Exception | None]:
    """Every board that says who it is; one that does not is left out, as CUDA leaves it out.

    Returns:
        The boards, their handles, what is wrong with those left out, which are somebody else's, and the last error.
    """
    known: list[BoardId] = []
    handles: dict[str, object] = {}
    notes: list[str] = []
    denied: list[str] = []
    last: Exception | None = None
    for index in range(count):
        try:
            handle = api.nvmlDeviceGetHandleByIndex(index)
            board = identify(api, index, handle)
        except api.NVMLError as error:
            last = error
            # In a SLURM job that is how the GPUs of other jobs look: no fault, so no warning.
            told = denied if code_of(error) == lib.NO_PERMISSION else notes
            told.append(f"GPU {index} is left out: {error}")
            continue
        known.append(board)
        handles[board.uuid] = handle
    return known, handles, notes, denied, last


def _boards(api: NvmlApi, seen: Visible, handles: Mapping[str, object], notes: list[str]) -> list[Board]:
    boards: list[Board] = []
    refused: Refused | None = None
    for choice in seen.choices:
        handle = handles[choice.board.uuid]
        try:
            boards.append(_board(api, handle, choice))
        except Refused as error:
            refused = error
            notes.append(f"GPU {choice.board.uuid} is left out: {error}")
    if not boards and refused is not None:
        raise Refused(
            refused.reason,
            fix="use a GPU or driver with a power sensor (virtual GPUs often have none)",
            state=refused.state,
        )
    return boards


def _board(api: NvmlApi, handle: object, choice: Choice) -> Board:
    can = probe(api, handle, choice.board.name)
    fields = fields_of(can)
    ask = lib.FieldCall(api, fields) if fields else None
    return Board(handle, describe(api, handle, choice, can), can, ask, tuple(part.uuid for part in choice.slices))


def _shut_down(api: NvmlApi) -> None:
    with contextlib.suppress(Exception):
        api.nvmlShutdown()
