"""One engine core's scheduler, watched: every step of it, with its work and its time, to the meter.

The scheduler's two methods are replaced on the very object, so a scheduler of the user's own class (``--scheduler-cls``) is
watched as well, and two engines in one process are kept apart. A step lasts from the call that scheduled it, or from the end
of the step before where that is later (asynchronous scheduling plans a step while another one runs), to the moment its
output is handed in. Batches that fill a pipeline run beside each other: each place in the pipeline is a lane.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable
from typing import Any, Final

from melodi_otel.attribution.meter import EngineId, Meter
from melodi_otel.instrumentation.vllm.complaints import Complaints
from melodi_otel.instrumentation.vllm.work import Work, WorkReader

_IN_FLIGHT: Final = 64
"""Steps that may be under way; a pipeline has a few. Whatever is older was never handed in."""
METHODS: Final = ("schedule", "update_from_output")


class _Lane:
    __slots__ = ("number", "reader", "seq", "t1_ns")

    def __init__(self, number: int, reader: WorkReader) -> None:
        self.number = number
        self.reader = reader
        self.seq = 0
        self.t1_ns = 0


class WatchedScheduler:
    """Steps of one scheduler.

    Args:
        scheduler: of an engine core.
        engine: whose it is.
        meter: where steps go.
        lanes: batches that may run beside each other.
        now_ns: monotonic ns.
        complaints: where our own failures go.

    Raises:
        AttributeError: the scheduler lacks one of :data:`METHODS`; nothing was changed.
    """

    def __init__(
        self,
        scheduler: Any,
        engine: EngineId,
        meter: Callable[[], Meter],
        *,
        lanes: int,
        now_ns: Callable[[], int],
        complaints: Complaints,
    ) -> None:
        self._scheduler = scheduler
        self._engine = engine
        self._meter = meter
        self._now_ns = now_ns
        self._complaints = complaints
        self._lanes = [_Lane(number, WorkReader(self._length_of)) for number in range(max(1, lanes))]
        self._next = 0
        self._flying: deque[tuple[Any, _Lane, Work, int]] = deque(maxlen=_IN_FLIGHT)
        self._broken = False
        schedule, update = (getattr(scheduler, name) for name in METHODS)
        self._before = {name: scheduler.__dict__.get(name) for name in METHODS}
        scheduler.schedule = self._wrap_schedule(schedule)
        scheduler.update_from_output = self._wrap_update(update)
        self._ours = {name: scheduler.__dict__[name] for name in METHODS}

    def stop(self) -> None:
        """Watch no more, and leave the scheduler as it was."""
        self._broken = True
        for name, ours in self._ours.items():
            if self._scheduler.__dict__.get(name) is not ours:
                continue
            if (before := self._before[name]) is None:
                delattr(self._scheduler, name)
            else:
                setattr(self._scheduler, name, before)

    def _wrap_schedule(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def schedule(*args: Any, **kwargs: Any) -> Any:
            t0_ns = self._now_ns()
            output = original(*args, **kwargs)
            if not self._broken:
                try:
                    self._scheduled(output, t0_ns)
                except Exception:
                    self._give_up("a scheduler's output")
            return output

        return schedule

    def _wrap_update(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def update_from_output(*args: Any, **kwargs: Any) -> Any:
            if not self._broken:
                try:
                    self._handed_in(args[0] if args else kwargs["scheduler_output"], self._now_ns())
                except Exception:
                    self._give_up("a step")
            return original(*args, **kwargs)

        return update_from_output

    def _scheduled(self, output: Any, t0_ns: int) -> None:
        lane = self._lanes[self._next]
        work = lane.reader.read(output)
        if work is None:
            return
        self._next = (self._next + 1) % len(self._lanes)
        self._flying.append((output, lane, work, t0_ns))

    def _handed_in(self, output: Any, t1_ns: int) -> None:
        if not any(step[0] is output for step in self._flying):
            return  # it computed nothing
        while True:
            known, lane, work, t0_ns = self._flying.popleft()
            lane.seq += 1
            if known is output:
                break
            lane.reader.forget()  # a step that nobody handed in: the gap in the numbers voids the meter's set, too
        start_ns = max(t0_ns, lane.t1_ns)
        lane.t1_ns = t1_ns
        self._meter().step(
            self._engine,
            lane.number,
            lane.seq,
            start_ns,
            t1_ns,
            decode=work.decode,
            prefill=work.prefill,
            computed=work.computed,
            joined=work.joined,
            left=work.left,
        )

    def _length_of(self, name: str) -> int | None:
        request = self._scheduler.requests.get(name)
        return None if request is None else int(request.num_tokens)

    def _give_up(self, what: str) -> None:
        # What the decode set is can no longer be said: without steps the requests are told apart by their tokens.
        self._broken = True
        self._complaints.about(f"{what} cannot be read; steps of this engine are not metered any more")
