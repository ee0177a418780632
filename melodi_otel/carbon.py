"""The grid's carbon intensity where somebody tells it live, and what was emitted meanwhile.

What is configured is a number and stays one: carbon is then a matter of queries. Only with a live intensity is there a counter,
because no query could know later what the grid was like at the time.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from typing import Final, Protocol

from melodi_otel.clock import Clock
from melodi_otel.errors import ConfigError

log = logging.getLogger("melodi_otel")

GROUP: Final = "melodi_otel_carbon"
"""Entry points of providers: a callable that takes the region (or None) and returns gCO2e per kWh."""
EVERY_S: Final = 300.0
STALE_S: Final = 3600.0
"""A figure that is older than that says nothing of the grid any more."""
_J_PER_KWH: Final = 3.6e6


class Provider(Protocol):
    """Asks somebody for the intensity of now; it may take its time, and may raise."""

    def __call__(self, region: str | None) -> float:
        """gCO2e per kWh."""
        ...


def installed(name: str, found: Sequence[EntryPoint] | None = None) -> Provider:
    """The provider of this name.

    Raises:
        ConfigError: no installed package has it, or it cannot be loaded.
    """
    points = {point.name: point for point in (entry_points(group=GROUP) if found is None else found)}
    if name not in points:
        known = ", ".join(sorted(points)) or "none is installed"
        raise ConfigError(f"MELODI_CARBON_PROVIDER={name}: allowed is the name of an entry point of {GROUP} ({known})")
    try:
        return points[name].load()
    except Exception as error:
        raise ConfigError(f"MELODI_CARBON_PROVIDER={name} cannot be loaded: {error!r}") from error


class LiveCarbon:
    """Intensity as a provider tells it, and grams of CO2 equivalent of the joules that were measured meanwhile.

    Joules count at the intensity that was known when they were used; those of a time for which none was known do not count, and
    the log says so.

    Args:
        provider: asked every 5 min on a thread of its own.
        region: handed to it.
        joules: all joules of the devices so far; called on the thread that collects and on our own.
        clock: its time.
    """

    def __init__(self, provider: Provider, region: str | None, joules: Callable[[], float], clock: Clock) -> None:
        self._provider = provider
        self._region = region
        self._joules = joules
        self._clock = clock
        self._lock = threading.Lock()
        self._intensity: float | None = None
        self._known_ns = 0
        self._mark = 0.0
        self._grams: float | None = None
        self._complained = False
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def intensity(self) -> float | None:
        """gCO2e per kWh; None: not known, or older than an hour."""
        with self._lock:
            if self._old:
                self._book()
            return self._intensity

    @property
    def grams(self) -> float | None:
        """Grams of CO2 equivalent since the first answer; None: there was none yet."""
        with self._lock:
            self._book()
            return self._grams

    def ask(self) -> None:
        """Ask the provider now; what is known stays as it is where it fails."""
        try:
            told = float(self._provider(self._region))
            if not math.isfinite(told) or told < 0.0:
                raise ValueError(f"{told} is no intensity")
        except Exception as error:
            if not self._complained:
                log.warning("carbon intensity is not told: %r; the last one counts for an hour", error)
            self._complained = True
            return
        self._complained = False
        with self._lock:
            self._book()
            if self._grams is None:
                self._grams, self._mark = 0.0, self._joules()
            self._intensity, self._known_ns = told, self._clock.monotonic_ns()

    def start(self) -> None:
        """Ask from now on, until :meth:`stop`."""
        if self._thread is None:
            self._end.clear()
            self._thread = threading.Thread(target=self._run, name="melodi-carbon", daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Ask no more; a question under way is left alone."""
        self._end.set()
        self._thread = None

    def _run(self) -> None:
        end = self._end
        while not end.is_set():
            self.ask()
            end.wait(EVERY_S)

    @property
    def _old(self) -> bool:
        return self._clock.monotonic_ns() - self._known_ns > STALE_S * 1e9

    def _book(self) -> None:
        if self._grams is None:
            return
        joules = self._joules()
        if self._intensity is not None:
            self._grams += max(0.0, joules - self._mark) / _J_PER_KWH * self._intensity
            if self._old:
                log.warning("carbon intensity is older than an hour: joules from now on are not in the emissions")
                self._intensity = None
        self._mark = max(self._mark, joules)
