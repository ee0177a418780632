"""What the command line needs of a runtime; :class:`melodi_otel.runtime.Runtime` is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from melodi_otel.attribution.books import Snapshot
from melodi_otel.devices import Device
from melodi_otel.results import Store
from melodi_otel.sources.base import Discovery


class Metering(Protocol):
    """A meter with everything that belongs to it."""

    @property
    def discovery(self) -> Discovery:
        """What was found and refused; known before :meth:`start`."""
        ...

    @property
    def store(self) -> Store: ...

    @property
    def endpoint_url(self) -> str | None:
        """Where /metrics is served, or None."""
        ...

    def devices(self) -> Mapping[str, Device]: ...

    def snapshot(self) -> Snapshot: ...

    def start(self) -> object: ...

    def shutdown(self) -> object: ...

    def instrument_libraries(self) -> object: ...

    def wait_settled(self, timeout: float) -> bool:
        """Whether every closed request is final, after at most ``timeout`` seconds."""
        ...

    def measured_between(self, t0_ns: int, t1_ns: int) -> Mapping[str, float | None]:
        """J that each device used in a time, by ``hw.id``; None where the meter does not cover it."""
        ...
