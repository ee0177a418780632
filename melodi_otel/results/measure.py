"""``measure("name")``: what a block of code used, with everything that ran inside it.

A measurement opens an activity around the block; model calls in the block are nested in it and own their joules, the
block owns the rest, and ``joules`` is both together. Figures are late by nature: they exist once the meter has read beyond
the end of the block, so every property waits for that, bounded, and says None when it could not be known. Never 0.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, cast

from melodi_otel.attribution.meter import Key, Meter, Quality, Reason, Tier, current
from melodi_otel.attribution.record import Observer, RequestRecord
from melodi_otel.attribution.summary import QUALITIES, TIERS, Energy
from melodi_otel.clock import Clock
from melodi_otel.devices import Device
from melodi_otel.results.generators import measured_async_generator, measured_generator
from melodi_otel.results.run import Ingredients, Run
from melodi_otel.results.table import Results, number
from melodi_otel.units import seconds, watt_hours

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_WAIT_S = 5.0
"""How long a property waits for the meter; the longest that a span waits too."""

_entered: ContextVar[tuple[tuple[Measurement, Run], ...]] = ContextVar("melodi_otel_measurements", default=())
"""Blocks that this context is in, so that one measurement may be entered by many threads and tasks, and in itself."""


class Measurement:
    """The energy of a block: a context manager (also ``async with``) and a decorator.

    As a decorator it measures every call of a function, coroutine function, generator function or asynchronous generator
    function. Of a generator, the time from the first to the last item counts, and only what runs inside the generator is
    nested in it. Where one measurement is entered several times, its figures are those of the block entered last; every
    block is in ``recent()``.

    Args:
        name: what to call it in tables.
        meter: where activities are opened; None: metering is off and every figure is None.
        clock: the meter's clock.
        devices: the devices by ``hw.id``, asked when figures arrive.
        group: the group token of this process's activities.
        observer: told of every finished block.
        nested: finished requests inside an activity at any depth, for the uncertainty and quality of the sum.
        wait_s: how long a property waits for the meter, in seconds.
    """

    def __init__(
        self,
        name: str,
        *,
        meter: Meter | None,
        clock: Clock,
        devices: Callable[[], Mapping[str, Device]],
        group: str,
        observer: Observer | None = None,
        nested: Callable[[Key], Iterable[RequestRecord]] | None = None,
        wait_s: float = DEFAULT_WAIT_S,
    ) -> None:
        self.name = name
        self._need = Ingredients(name, meter, clock, devices, group, observer)
        self._nested = nested
        self._wait_s = wait_s
        self._run: Run | None = None

    # entering and leaving

    def __enter__(self) -> Self:
        run = self._begin()
        _entered.set((*_entered.get(), (self, run)))
        current.set(run.key)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        entered = list(_entered.get())
        for place in range(len(entered) - 1, -1, -1):
            if entered[place][0] is self:
                run = entered.pop(place)[1]
                _entered.set(tuple(entered))
                break
        else:
            # Left in another context than it was entered in (a fixture, a framework's thread pool).
            run = self._run
        if run is None:
            return
        if current.get() == run.key:
            current.set(run.parent)
        run.finish(error)

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)

    def __call__(self, function: Callable[P, R]) -> Callable[P, R]:
        """Measure every call of ``function``."""
        if inspect.isasyncgenfunction(function):
            return cast(Callable[P, R], measured_async_generator(self._begin, function))
        if inspect.isgeneratorfunction(function):
            return cast(Callable[P, R], measured_generator(self._begin, function))
        if inspect.iscoroutinefunction(function):
            coroutine = cast(Callable[..., Any], function)

            @functools.wraps(function)
            async def measured_coroutine(*args: Any, **kwargs: Any) -> Any:
                with self:
                    return await coroutine(*args, **kwargs)

            return cast(Callable[P, R], measured_coroutine)

        @functools.wraps(function)
        def measured(*args: P.args, **kwargs: P.kwargs) -> R:
            with self:
                return function(*args, **kwargs)

        return measured

    def within(self, function: Callable[P, R]) -> Callable[P, R]:
        """``function`` for another thread, nested in this block: ``pool.submit(m.within(work), …)``.

        Threads do not inherit the context they were started from, so their model calls stand beside the block otherwise.
        """
        run = self._run

        @functools.wraps(function)
        def nested(*args: P.args, **kwargs: P.kwargs) -> R:
            token = current.set(None if run is None else run.key)
            try:
                return function(*args, **kwargs)
            finally:
                current.reset(token)

        return nested

    # figures

    def wait(self, timeout: float | None = None) -> bool:
        """Wait at most ``timeout`` seconds for the joules; whether they are final. False at once inside the block."""
        return self._run is not None and self._run.wait(self._wait_s if timeout is None else timeout)

    async def settled(self, timeout: float | None = None) -> bool:  # noqa: ASYNC109 - the same argument as wait() has
        """:meth:`wait` without blocking the event loop."""
        return self._run is not None and await self._run.settled(self._wait_s if timeout is None else timeout)

    @property
    def energy(self) -> Energy | None:
        """The energy of the block without what is nested in it; None inside the block."""
        self.wait()
        return None if self._run is None else self._run.energy()

    @property
    def joules(self) -> float | None:
        """J of the block and everything nested in it; None: not known."""
        energy = self.energy
        if energy is None or energy.total is None:
            return None
        if energy.rollup is not None:
            return energy.rollup
        # No sum was given: the block's own joules are the whole answer only if nothing is nested in it.
        return None if self._inside() else energy.total

    @property
    def watt_hours(self) -> float | None:
        """:attr:`joules` in Wh."""
        joules = self.joules
        return None if joules is None else watt_hours(joules)

    @property
    def uncertainty(self) -> float | None:
        """1 sigma of :attr:`joules` in J; None where a nested request is not kept any more, so nobody can tell."""
        energy, joules = self.energy, self.joules
        if energy is None or energy.total is None or joules is None:
            return None
        inside = self._inside()
        held = math.fsum([energy.total, *(record.energy.total or 0.0 for record in inside)])
        if not math.isclose(held, joules, rel_tol=1e-6, abs_tol=1e-9):
            return None
        parts = [energy, *(record.energy for record in inside if record.energy.total is not None)]
        if any(part.uncertainty is None for part in parts):
            return None
        # Sharing errors are independent, so they add in squares; an estimate is wrong by the same factor everywhere.
        together = math.fsum(part.uncertainty or 0.0 for part in parts if part.quality == "estimated")
        return math.hypot(together, *(part.uncertainty or 0.0 for part in parts if part.quality != "estimated"))

    @property
    def quality(self) -> Quality | None:
        """The worst quality among the block and what is nested in it; None inside the block."""
        energy = self.energy
        if energy is None or energy.total is None:
            return None if energy is None else energy.quality
        worst: Quality = max((energy.quality, *(record.energy.quality for record in self._inside())), key=_badness)
        # Some of the joules are known, so the sum is there and lacks a part.
        return "partial" if worst == "unavailable" else worst

    @property
    def reason(self) -> Reason | None:
        """Why the quality is ``partial`` or ``unavailable``, else None."""
        energy = self.energy
        if energy is None:
            return None
        return next((e.reason for e in (energy, *(record.energy for record in self._inside())) if e.reason), None)

    @property
    def method(self) -> Tier | None:
        """The least exact evidence that holds at least 5 % of the joules."""
        energy = self.energy
        if energy is None:
            return None
        held: dict[Tier, float] = {}
        for part in (energy, *(record.energy for record in self._inside())):
            if part.method is not None and part.total is not None:
                held[part.method] = held.get(part.method, 0.0) + abs(part.total)
        enough: list[Tier] = [tier for tier, joules in held.items() if joules >= 0.05 * math.fsum(held.values())]
        return max(enough, key=_rank) if enough else None

    @property
    def duration(self) -> float | None:
        """Seconds of the block, so far if it has not ended; None before it starts."""
        if self._run is None:
            return None
        end_ns = self._need.clock.monotonic_ns() if self._run.end_ns is None else self._run.end_ns
        return seconds(end_ns - self._run.start_ns)

    def results(self) -> Results:
        """The block's nested requests and the block itself; waits as the figures do."""
        self.wait()
        record = None if self._run is None else self._run.record()
        return Results([*self._inside(), *([] if record is None else [record])])

    def __repr__(self) -> str:
        if self._run is None or not self._run.wait(0.0):
            return f"<measure {self.name!r}: {'not entered' if self._run is None else 'not final yet'}>"
        return f"<measure {self.name!r}: {number(self.joules)} J ± {number(self.uncertainty)} J, {self.quality}>"

    def _begin(self) -> Run:
        self._run = Run(self._need)
        return self._run

    def _inside(self) -> list[RequestRecord]:
        if self._run is None or self._nested is None:
            return []
        return list(self._nested(self._run.key))


def _rank(tier: Tier) -> int:
    return TIERS.index(tier)


def _badness(quality: Quality) -> int:
    return QUALITIES.index(quality)
