"""One passage through a measured block: opened once, closed once, final when the meter says so."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from uuid import uuid4

from melodi_otel.attribution.meter import Key, Meter, Outcome, Share, current
from melodi_otel.attribution.record import Observer, RequestRecord
from melodi_otel.attribution.summary import Energy, summarize, unavailable
from melodi_otel.clock import Clock
from melodi_otel.devices import Device

log = logging.getLogger("melodi_otel")


@dataclass(frozen=True, slots=True)
class Ingredients:
    """What every passage of one measurement needs; ``meter`` is None where metering is turned off."""

    name: str
    meter: Meter | None
    clock: Clock
    devices: Callable[[], Mapping[str, Device]]
    group: str
    observer: Observer | None


class Run:
    """An activity around user code. No method raises because of the meter.

    Args:
        need: name, meter, clock and where to report.
    """

    __slots__ = (
        "_closed",
        "_future",
        "_need",
        "_opened",
        "_record",
        "end_ns",
        "key",
        "parent",
        "start_ns",
        "start_wall_ns",
    )

    def __init__(self, need: Ingredients) -> None:
        self._need = need
        self._future: Future[list[Share]] | None = None
        self._record: RequestRecord | None = None
        self._closed: tuple[Outcome, str | None] | None = None
        self._opened = False
        self.end_ns: int | None = None
        self.key = Key(need.group, f"measure-{uuid4().hex}")
        self.parent = current.get()
        self.start_wall_ns = need.clock.wall_ns()
        self.start_ns = need.clock.monotonic_ns()
        if need.meter is None:
            return
        try:
            # No thread is named: the block's work may run in any of the program's threads.
            need.meter.open(self.key, self.start_ns, parent=self.parent)
            self._opened = True
        except Exception:
            log.warning("measure(%r) could not be opened", need.name, exc_info=True)

    def finish(self, error: BaseException | None) -> None:
        """Close the activity; a second call does nothing."""
        if self._closed is not None:
            return
        self.end_ns = self._need.clock.monotonic_ns()
        self._closed = (_outcome(error), None if error is None else type(error).__qualname__)
        if self._need.meter is None or not self._opened:
            return
        try:
            self._future = self._need.meter.close(self.key, self.end_ns, None, self._closed[0])
            self._future.add_done_callback(self._settled)
        except Exception:
            log.warning("measure(%r) could not be closed", self._need.name, exc_info=True)

    def wait(self, timeout: float) -> bool:
        """Whether the joules are final, after at most ``timeout`` seconds."""
        if self._future is None:
            return self._closed is not None
        try:
            self._future.exception(timeout)
        except (FutureTimeout, TimeoutError):
            return False
        except Exception:
            log.debug("a measurement was given up", exc_info=True)
        return True

    async def settled(self, timeout: float) -> bool:  # noqa: ASYNC109 - the same argument as wait() has
        """:meth:`wait` without blocking the event loop."""
        if self._future is None or self._future.done():
            return self.wait(0.0)
        done, _ = await asyncio.wait([asyncio.ensure_future(_arrival(self._future))], timeout=timeout)
        return bool(done) and self.wait(0.0)

    def energy(self) -> Energy | None:
        """The energy of the block itself; None while it is open; ``unavailable`` where it is not known (yet)."""
        record = self.record()
        if record is not None:
            return record.energy
        return None if self._closed is None else unavailable("late")

    def record(self) -> RequestRecord | None:
        """The finished record, or None while the block is open or its joules are not final."""
        if self._record is None and self._closed is not None and self.end_ns is not None:
            if self._future is None:
                self._record = self._build([], unavailable("disabled" if self._need.meter is None else "no_source"))
            elif self._future.done():
                shares = [] if self._future.cancelled() or self._future.exception() else self._future.result()
                self._record = self._build(shares, summarize(shares, self._need.devices()))
        return self._record

    def _settled(self, _: Future[list[Share]]) -> None:
        # On the settle thread.
        try:
            record = self.record()
            if record is not None and self._need.observer is not None:
                self._need.observer.finished(record)
        except Exception:
            log.warning("measure(%r) could not be reported", self._need.name, exc_info=True)

    def _build(self, shares: list[Share], energy: Energy) -> RequestRecord:
        outcome, error_type = self._closed or ("stop", None)
        return RequestRecord(
            key=self.key,
            name=self._need.name,
            kind="measure",
            operation=None,
            provider=None,
            model=None,
            start_ns=self.start_ns,
            end_ns=self.start_ns if self.end_ns is None else self.end_ns,
            start_wall_ns=self.start_wall_ns,
            first_token_ns=None,
            prompt_tokens=None,
            cached_tokens=None,
            output_tokens=None,
            outcome=outcome,
            error_type=error_type,
            finish_reasons=(),
            energy=energy,
            shares=tuple(shares),
            parent=self.parent,
        )


def _outcome(error: BaseException | None) -> Outcome:
    if error is None:
        return "stop"
    # What is not an Exception interrupts: Ctrl-C, a cancelled task, a generator that its consumer dropped.
    return "error" if isinstance(error, Exception) else "abort"


async def _arrival(future: Future[list[Share]]) -> None:
    # A cancelled wait must not cancel the meter's future, so an event of the loop stands between the two.
    loop, arrived = asyncio.get_running_loop(), asyncio.Event()

    def tell(_: Future[list[Share]]) -> None:
        try:
            loop.call_soon_threadsafe(arrived.set)
        except RuntimeError:
            pass  # the loop closed first; nobody waits any more

    future.add_done_callback(tell)
    await arrived.wait()
