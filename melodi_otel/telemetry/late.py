"""Ends that are called late, for spans of a provider that is not the SDK's.

Such a provider has no processors that could be wrapped, but its spans take attributes until they are ended, and an end may
name its time. So a request's own span is held open until its joules are there, then gets them and is ended with the time at
which the request ended. The public API is all that this needs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from opentelemetry.trace import Span

from melodi_otel.attribution.summary import Energy
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.deferral import Deferral, Entry, energy_attributes
from melodi_otel.telemetry.parking import Parking


@dataclass(frozen=True, slots=True)
class _End:
    span: Span
    end_time: int
    output_tokens: int | None


class LateEnds:
    """Ends spans when their joules are there, within the bound of every span that waits.

    Args:
        deferral: how long, how many, and what the joules of shares are.
        threaded: False leaves :meth:`pump` to the caller.
    """

    def __init__(self, deferral: Deferral, *, threaded: bool = True) -> None:
        self._complain = Complaints("late end")
        self._parking: Parking[_End] = Parking(deferral, self._end, self._complain, threaded=threaded)

    def hold(self, span: Span, end_time: int, entry: Entry, output_tokens: int | None) -> None:
        """End ``span`` as of ``end_time`` (wall ns) when the joules of ``entry`` are there; at once where that cannot be."""
        if not self._parking.park(_End(span, end_time, output_tokens), entry):
            span.end(end_time)

    def pump(self) -> float | None:
        """See :meth:`melodi_otel.telemetry.parking.Parking.pump`."""
        return self._parking.pump()

    def flush(self, timeout_s: float) -> bool:
        """End what is held, with or without joules, within ``timeout_s`` seconds; whether that was in time."""
        return self._parking.drain("flush", time.monotonic() + timeout_s)

    def release(self) -> None:
        """End what is held; whatever comes later is ended at once."""
        self._parking.release()

    def _end(self, held: _End, entry: Entry, energy: Energy) -> None:
        try:
            held.span.set_attributes(energy_attributes(energy, held.output_tokens, entry.owner))
        except Exception as error:
            self._complain("attributes", error)
        try:
            held.span.end(held.end_time)
        except Exception as error:
            self._complain("end", error)
