"""AMD GPUs by amdsmi: the energy counter where it can be believed, else the power gauge.

A counter is believed after it has been compared with the gauge: on some GPUs and versions of ROCm it is wrong
(ROCm/amdsmi#38), stands still (ROCm/amdsmi#22, ROCm/rocm_smi_lib#180) or goes back (ROCm/amdsmi#115). The comparison takes
time, and the program's start is not kept waiting for it: the first rounds are held back and come out at once, in order,
when it is known which of the two is used. Nothing is lost; the first half second is only late::

    after 0.5 s   within 25 % of the gauge's integral                     the counter
    after 2 s     within a factor of 2 (load may have changed meanwhile)  the counter
                  else                                                    the gauge, and a note with both figures
    after 5 s     nothing was drawn by either                             the counter
                  no gauge, and the counter does not move                 the GPU is left out

A counter that stands still later, for 5 s and 5 readings while the gauge shows power, ends the device: its joules are
unknown, not 0.

An MI250 is two GPUs on one board; the first shows the power of both, the second shows none (ml-energy/zeus#203): the second
is left out, with a note, and the first has the scope ``module``. After a fork the child's source is dead, as with NVML.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Literal

from melodi_otel.devices import Device
from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.sources.amd_library import (
    MEGABYTE,
    AmdApi,
    energy_of,
    load_amd,
    power_of,
    refusal,
    uuids_of,
)
from melodi_otel.sources.amd_visible import AmdBoardId, visible
from melodi_otel.sources.base import CounterReading, GpuState, PowerReading, Settings
from melodi_otel.units import NS_PER_S

__all__ = ["AmdSource", "open_amd"]

log = logging.getLogger("melodi_otel")

COUNTER: Final = "amd.energy_counter"
GAUGE: Final = "amd.power_integral"
LOST_AFTER: Final = 30
_SOON_S, _THEN_S, _LAST_S = 0.5, 2.0, 5.0
_CLOSE: Final = 0.25
_FACTOR: Final = 2.0
_NOTHING_J: Final = 1.0
_DRAWS_W: Final = 5.0
_STILL: Final = 5


@dataclass(slots=True)
class Board:
    """A GPU and what is known of its meters.

    Attributes:
        handle: amdsmi's.
        device: how it is told to others.
        uses: which meter its joules come from, or ``checking``.
        counts, shows: whether it has a counter, a gauge.
        first, last: (monotonic ns, J, W) of the first and newest reading of the comparison.
        gauge_j: integral of the gauge since the first.
        held: readings that wait for the decision.
        moved_ns: when the counter was last seen to move.
        still: readings in a row since then.
        failures: failed rounds in a row.
    """

    handle: Any
    device: Device
    uses: Literal["checking", "counter", "gauge"]
    counts: bool
    shows: bool
    first: tuple[int, float] | None = None
    last: tuple[int, float, float | None] | None = None
    gauge_j: float = 0.0
    held: list[tuple[int, float, float | None]] = field(default_factory=list[tuple[int, float, "float | None"]])
    moved_ns: int | None = None
    still: int = 0
    failures: int = 0


def open_amd(settings: Settings, *, api: AmdApi | None = None) -> AmdSource:
    """Open the GPUs that this program may see.

    Args:
        settings: clock, roots, and the environment with ``ROCR_``, ``HIP_`` and ``CUDA_VISIBLE_DEVICES``.
        api: the module, or what stands for it in a test.

    Raises:
        Refused: there is nothing to measure here; with reason, fix and state.
    """
    calls = api if api is not None else load_amd(settings)
    try:
        calls.amdsmi_init()
    except Exception as error:
        raise refusal(error) from error
    try:
        return _open(calls, settings)
    except Refused:
        _shut_down(calls)
        raise
    except Exception as error:
        _shut_down(calls)
        raise refusal(error) from error


class AmdSource:
    """The visible AMD GPUs: counters, gauges and slow facts.

    Args:
        api: amdsmi.
        settings: readings carry the time of its clock.
        boards: the GPUs.
        notes: what was found out while opening.
        driver: version of amdgpu.

    Attributes:
        driver_version: as above; None: not told.
    """

    name = "amd"

    def __init__(
        self,
        api: AmdApi,
        settings: Settings,
        boards: Sequence[Board],
        notes: Sequence[str] = (),
        driver: str | None = None,
    ) -> None:
        self.driver_version = driver
        self._api = api
        self._clock = settings.clock
        self._boards = list(boards)
        self._notes = list(notes)
        self._pid = os.getpid()
        self._closed = False
        self._watts: list[PowerReading] | None = None

    @property
    def devices(self) -> Sequence[Device]:
        """The GPUs that are still there; their ``source`` says which meter is used as soon as that is known."""
        return tuple(board.device for board in self._boards)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know: GPUs left out, counters not believed."""
        return tuple(self._notes)

    def counters(self) -> Sequence[CounterReading]:
        """Joules of the GPUs whose counter is believed; what was held back comes first, in order.

        Raises:
            Transient: a GPU did not answer; nothing of the round is used.
            Gone: a GPU is lost, or its counter stands still while power is drawn (``device``).
        """
        counters, self._watts = self._round()
        return counters

    def power(self) -> Sequence[PowerReading]:
        """Watts of the round that :meth:`counters` just read; a round of its own where there was none.

        Raises:
            Transient: as :meth:`counters`.
            Gone: as :meth:`counters`.
        """
        watts, self._watts = self._watts, None
        return self._round()[1] if watts is None else watts

    def states(self) -> Sequence[GpuState]:
        """Utilisation 0..1 and used memory in bytes; None for what a GPU does not tell."""
        self._check_alive()
        return [GpuState(b.device.id, self._utilization(b.handle), self._memory(b.handle)) for b in self._boards]

    def close(self) -> None:
        """Give amdsmi back, once; never raises. In a forked child it only lets go."""
        if not self._closed:
            self._closed = True
            if os.getpid() == self._pid:
                _shut_down(self._api)

    def _check_alive(self) -> None:
        if self._closed:
            raise Gone("the AMD source is closed")
        if os.getpid() != self._pid:
            raise Gone("this process was forked: amdsmi must be opened again here")
        if not self._boards:
            raise Gone("no GPU is left")

    def _round(self) -> tuple[list[CounterReading], list[PowerReading]]:
        self._check_alive()
        taken = [(board, *self._read(board)) for board in self._boards]
        counters: list[CounterReading] = []
        watts: list[PowerReading] = []
        for board, t_ns, joules, power in taken:
            board.failures = 0
            if board.uses == "checking":
                assert joules is not None
                board.held.append((t_ns, joules, power))
                self._compare(board, t_ns, joules, power)
                readings = board.held if board.uses != "checking" else []
            else:
                readings = [(t_ns, joules, power)]
            for at_ns, counted, shown in readings:
                if board.uses == "counter" and counted is not None:
                    counters.append(CounterReading(board.device.id, at_ns, counted))
                if shown is not None:
                    watts.append(PowerReading(board.device.id, at_ns, shown))
            if readings is board.held:
                board.held = []
        for board, t_ns, joules, power in taken:
            if board.uses == "counter" and joules is not None:
                self._look_for_a_stop(board, t_ns, joules, power)
        return counters, watts

    def _read(self, board: Board) -> tuple[int, float | None, float | None]:
        try:
            joules = energy_of(self._api, board.handle) if board.uses != "gauge" else None
            t_ns = self._clock.monotonic_ns()
            power = power_of(self._api, board.handle) if board.shows else None
        except self._api.AmdSmiException as error:
            raise self._failed(board, str(error)) from error
        if board.uses == "gauge":
            t_ns = self._clock.monotonic_ns()
        if (joules if board.uses != "gauge" else power) is None:
            raise self._failed(board, "no figure was told")
        return t_ns, joules, power

    def _failed(self, board: Board, why: str) -> Exception:
        board.failures += 1
        if board.failures >= LOST_AFTER:
            return self._drop(board, f"failed {board.failures} times in a row: {' '.join(why.split())}")
        return Transient(f"GPU {board.device.id} did not answer: {' '.join(why.split())}")

    def _drop(self, board: Board, why: str) -> Gone:
        self._boards.remove(board)
        text = f"GPU {board.device.id} is not measured any more: {why}"
        self._notes.append(text)
        return Gone(text, board.device.id)

    def _compare(self, board: Board, t_ns: int, joules: float, power: float | None) -> None:
        if board.first is None or board.last is None or joules < board.last[1]:
            board.first, board.last, board.gauge_j = (t_ns, joules), (t_ns, joules, power), 0.0
            return
        last_ns, _, last_w = board.last
        if power is not None and last_w is not None:
            board.gauge_j += (power + last_w) / 2 * (t_ns - last_ns) / NS_PER_S
        board.last = (t_ns, joules, power)
        since_s, counted_j = (t_ns - board.first[0]) / NS_PER_S, joules - board.first[1]
        verdict = _verdict(since_s, counted_j, board.gauge_j if board.shows else None)
        if verdict == "gauge":
            self._say(
                f"GPU {board.device.id}: the counter shows {counted_j:.1f} J where the gauge shows {board.gauge_j:.1f} J in "
                f"{since_s:.1f} s: the gauge is used"
            )
            board.device = replace(board.device, source=GAUGE)
        elif verdict == "left out":
            self._say(f"GPU {board.device.id} is left out: its counter does not move and it has no power gauge")
            self._boards = [other for other in self._boards if other is not board]
            return
        if verdict is not None:
            board.uses = verdict

    def _look_for_a_stop(self, board: Board, t_ns: int, joules: float, power: float | None) -> None:
        if board.last is None or joules != board.last[1] or not power or power < _DRAWS_W:
            board.moved_ns, board.still = t_ns, 0
        else:
            board.still += 1
        # A GPU that slept between two rare readings, and was woken by the second, has drawn nothing: one pair proves nothing.
        if board.still >= _STILL and board.moved_ns is not None and t_ns - board.moved_ns >= _LAST_S * NS_PER_S:
            raise self._drop(board, f"its counter stands still while the gauge shows {power:.0f} W")
        board.last = (t_ns, joules, power)

    def _say(self, text: str) -> None:
        self._notes.append(text)
        log.warning("amd: %s", text)

    def _utilization(self, handle: Any) -> float | None:
        with contextlib.suppress(self._api.AmdSmiException, AttributeError):
            percent = self._api.amdsmi_get_gpu_activity(handle).get("gfx_activity")
            return percent / 100 if isinstance(percent, int) and 0 <= percent <= 100 else None
        return None

    def _memory(self, handle: Any) -> int | None:
        with contextlib.suppress(self._api.AmdSmiException, AttributeError):
            used_mb = self._api.amdsmi_get_gpu_vram_usage(handle).get("vram_used")
            return used_mb * MEGABYTE if isinstance(used_mb, int) else None
        return None


def _verdict(since_s: float, counted_j: float, gauge_j: float | None) -> Literal["counter", "gauge", "left out"] | None:
    """Which meter is used, or None while it is too early to say."""
    if gauge_j is None:
        if counted_j > 0.0:
            return "counter"
        return "left out" if since_s >= _LAST_S else None
    if since_s < _SOON_S:
        return None
    if max(counted_j, gauge_j) < _NOTHING_J:
        return "counter" if since_s >= _LAST_S else None
    if abs(counted_j - gauge_j) <= _CLOSE * gauge_j:
        return "counter"
    if since_s < _THEN_S:
        return None
    return "counter" if gauge_j / _FACTOR <= counted_j <= gauge_j * _FACTOR else "gauge"


def _open(api: AmdApi, settings: Settings) -> AmdSource:
    handles = list(api.amdsmi_get_processor_handles())
    if not handles:
        raise Refused(
            "amdsmi shows no GPU", fix="in a container: --device /dev/kfd --device /dev/dri", state="no_device"
        )
    ids: list[AmdBoardId] = []
    facts: list[tuple[str, str | None]] = []
    for index, handle in enumerate(handles):
        uuid = api.amdsmi_get_gpu_device_uuid(handle)
        uuids, hip, model = uuids_of(api, handle, uuid)
        ids.append(AmdBoardId(index, hip, uuids))
        facts.append((uuid, model))
    seen, told = visible(ids, settings.environ)
    notes = list(told)
    if not seen:
        raise Refused(
            "ROCR_VISIBLE_DEVICES and HIP_VISIBLE_DEVICES leave no GPU visible",
            fix="name a GPU there by number or UUID (amd-smi list), or unset them",
            state="no_visible_device",
        )
    double = len({uuid for uuid, _ in facts}) < len(facts)
    boards: list[Board] = []
    for board_id in seen:
        uuid, model = facts[board_id.index]
        handle = handles[board_id.index]
        name = f"amd:{api.amdsmi_get_gpu_device_bdf(handle)}" if double or not uuid else uuid
        board = _board(api, handle, board_id.index, name, model, notes)
        if board is not None:
            boards.append(board)
    for note in notes:
        log.warning("amd: %s", note)
    if not boards:
        raise Refused("; ".join(notes), fix="virtual GPUs and second dies have no meter", state="not_supported")
    driver: object = None
    with contextlib.suppress(api.AmdSmiException, AttributeError):
        driver = api.amdsmi_get_gpu_driver_info(boards[0].handle).get("driver_version")
    return AmdSource(api, settings, boards, notes, driver if isinstance(driver, str) and driver != "N/A" else None)


def _board(api: AmdApi, handle: Any, index: int, name: str, model: str | None, notes: list[str]) -> Board | None:
    joules, power = energy_of(api, handle), power_of(api, handle)
    two = "MI250" in (model or "")
    if two and not power:
        notes.append(
            f"GPU {name} is left out: it is the second die of an MI250, whose joules are in the first die's meter"
        )
        return None
    if joules is None and power is None:
        notes.append(f"GPU {name} is left out: it tells neither energy nor power")
        return None
    device = Device(name, "gpu", GAUGE if joules is None else COUNTER, model, index, scope="module" if two else None)
    return Board(handle, device, "gauge" if joules is None else "checking", joules is not None, power is not None)


def _shut_down(api: AmdApi) -> None:
    with contextlib.suppress(Exception):
        api.amdsmi_shut_down()
