"""The power that an NVIDIA driver remembers: a value every 20 ms for the last 2.4 s (H200), at 0.4 to 0.7 ms a call."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, cast

from melodi_otel.clock import Clock
from melodi_otel.errors import Refused, Transient
from melodi_otel.sources.base import PowerReading
from melodi_otel.sources.nvml_board import Board
from melodi_otel.sources.nvml_library import (
    FUNCTION_NOT_FOUND,
    INSUFFICIENT_SIZE,
    NO_PERMISSION,
    NOT_FOUND,
    NOT_SUPPORTED,
    NvmlApi,
    code_of,
)
from melodi_otel.units import NS_PER_MS, NS_PER_S, milliwatts

__all__ = ["power_history"]

_TOTAL_POWER: Final = 0
_NEVER: Final = frozenset({NOT_SUPPORTED, NO_PERMISSION, FUNCTION_NOT_FOUND})
_MEMBER: Final = {1: "uiVal", 2: "ulVal", 3: "ullVal"}
_OLDEST_NS: Final = 60 * NS_PER_S


def power_history(api: NvmlApi, board: Board, clock: Clock, since_ns: int) -> list[PowerReading]:
    """Watts of a board at moments after ``since_ns`` (monotonic; 0: all that the driver knows), in order.

    The driver stamps them with the time of day. Values that this puts into the future are left out, as those are that are older
    than a minute: the clock was stepped meanwhile.

    Raises:
        Refused: the driver does not tell, or only of the GPU where the counter covers a whole module.
        Transient: it did not answer this time.
    """
    call: Any = getattr(api, "nvmlDeviceGetSamples", None)
    if call is None or board.can.module_scope:
        raise Refused("there is no history of the power that the counter counts", state="not_supported")
    offset_ns = clock.monotonic_ns() - clock.wall_ns()
    now_ns = clock.monotonic_ns()
    since_us = max(0, (since_ns - offset_ns) // 1000) if since_ns else 0
    try:
        try:
            kind, samples = call(board.handle, _TOTAL_POWER, since_us)
        except api.NVMLError as error:
            if code_of(error) != INSUFFICIENT_SIZE:
                raise
            # The binding asks for the number first, and a value more has come meanwhile: not so 20 ms before the next.
            kind, samples = call(board.handle, _TOTAL_POWER, since_us)
    except api.NVMLError as error:
        if code_of(error) == NOT_FOUND:
            return []
        if code_of(error) in _NEVER:
            raise Refused(
                f"the driver does not tell the history of the power: {error}", state="not_supported"
            ) from error
        raise Transient(f"the power history of {board.device.id} was not told: {error}") from error
    member = _MEMBER.get(int(kind))
    if member is None:
        raise Refused("the driver tells the history of the power in a type of a later NVML", state="not_supported")
    found: list[PowerReading] = []
    # The offset is taken anew each time and differs by microseconds: a value must not come twice.
    last_ns = max(since_ns + NS_PER_MS, now_ns - _OLDEST_NS)
    for sample in cast("Iterable[Any]", samples):
        t_ns = int(sample.timeStamp) * 1000 + offset_ns
        if last_ns < t_ns <= now_ns + NS_PER_MS:
            found.append(PowerReading(board.device.id, t_ns, milliwatts(int(getattr(sample.sampleValue, member)))))
            last_ns = t_ns
    return found
