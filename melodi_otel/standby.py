"""Before a program runs a model: its tracer providers are wrapped, its engines awaited, and nothing else is there yet.

Under ``opentelemetry-instrument`` every Python of a service comes by here, its helpers included, and most of them never run a
model. So no meter is looked for, no thread runs and no numpy is loaded until there is work::

    an engine is imported          -> the runtime, before the import returns; meters are looked for on its settle thread
    a span of a GenAI call begins  -> the same, on a thread of its own (that first span is covered in part, or not at all)
    instrument(), measure()        -> the same at once, meters included
"""

from __future__ import annotations

import functools
import logging
import os
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Final

from opentelemetry.sdk.trace import ReadableSpan

from melodi_otel.clock import SystemClock
from melodi_otel.config import Config
from melodi_otel.instrumentation.loaded import when_loaded
from melodi_otel.instrumentation.vllm.awaken import when_made
from melodi_otel.telemetry import genai
from melodi_otel.telemetry.deferral import Deferral, Entry, Foreign
from melodi_otel.telemetry.tracers import TracerSeam

if TYPE_CHECKING:
    from melodi_otel.attribution.meter import Reason
    from melodi_otel.devices import Device
    from melodi_otel.runtime import Runtime

log = logging.getLogger("melodi_otel")

ENGINES: Final[Mapping[str, Callable[[Callable[[], object]], None]]] = {
    "transformers": lambda act: when_loaded("transformers", act),
    "vllm": when_made,
}
"""What calls an action when there will be work, by the name of the library that is instrumented."""

_WAIT_S: Final = 5.0


class Standby:
    """The seams of a program that has no runtime yet.

    Args:
        config: what the runtime will be told.
        tracer_provider, meter_provider: use these instead of the global ones.
        awaken: makes the runtime of this standby; called at most once at a time, and again if it failed.
    """

    def __init__(
        self,
        config: Config,
        awaken: Callable[[], Runtime | None],
        tracer_provider: object = None,
        meter_provider: object = None,
    ) -> None:
        self.config: Final = config
        self.meter_provider: Final = meter_provider
        self.tracer_provider: Final = tracer_provider
        self.runtime: Runtime | None = None
        self.libraries: set[str] = set()
        self._awaken = awaken
        self._stirred = False
        self._over = False
        deferral = Deferral(
            SystemClock(), wait_s=self._wait_s, limit=config.span_limit, devices=self._devices, why=self._why
        )
        if config.foreign_spans != "off":
            deferral.watch(_FirstCall(self.stir))
        self.tracers: Final = TracerSeam(deferral, os.environ, given=tracer_provider)

    def begin(self) -> None:
        """Wrap the providers that are there, and every one that comes."""
        self.tracers.watch()

    def end(self) -> None:
        """Leave everything as it was; what waits for an engine to be imported stays, and does nothing."""
        self._over = True
        if self.runtime is None:
            self.tracers.unwrap()

    def await_libraries(self, names: Collection[str]) -> None:
        """Instrument these libraries: now where they are loaded, else when they are; one that is no engine with the first."""
        for name in set(names) - self.libraries:
            self.libraries.add(name)
            if name in ENGINES:
                ENGINES[name](functools.partial(self._there, name))
            elif self.runtime is not None:
                self.runtime.instrument_libraries([name])

    def forget_libraries(self, names: Collection[str]) -> None:
        """Instrument these libraries no more."""
        self.libraries -= set(names)

    def forked(self) -> None:
        """In a child: a thread that was starting the runtime is not here."""
        self._stirred = False

    def _there(self, name: str) -> object:
        """An engine is there; its instrumentation, or None where it is not metered."""
        if self._over or name not in self.libraries:
            return None
        if name == "transformers" and self.runtime is None and _is_part_of_vllm():
            return None
        try:
            runtime = self._awaken()
            return None if runtime is None else runtime.instrument(name)
        except Exception as error:
            log.error("melodi_otel: %s is not metered: %s", name, error)
            return None

    def stir(self) -> None:
        """Somebody calls a model: make the runtime, once, and not on this thread, which is the application's."""
        if self._stirred or self.runtime is not None or self._over:
            return
        self._stirred = True
        threading.Thread(target=self._stir, name="melodi-otel-start", daemon=True).start()

    def _stir(self) -> None:
        try:
            self._awaken()
        except Exception as error:
            log.error("melodi_otel: nothing is metered: %s", error)

    # --- what waiting spans ask; nothing waits before there is a runtime ---

    def _wait_s(self) -> float:
        return _WAIT_S if self.runtime is None else self.runtime.span_wait_s()

    def _devices(self) -> Mapping[str, Device]:
        return {} if self.runtime is None else self.runtime.devices()

    def _why(self) -> Reason:
        return "no_source" if self.runtime is None else self.runtime.why()


def _is_part_of_vllm() -> bool:
    """Whether this is one of the processes that vLLM starts: they load transformers, and none of them generates with it."""
    children = sys.modules.get("multiprocessing.process")
    return "vllm" in sys.modules and children is not None and children.parent_process() is not None


class _FirstCall(Foreign):
    """Watches the spans of a program that has no runtime for the first one of a GenAI call."""

    def __init__(self, stir: Callable[[], None]) -> None:
        self._stir = stir

    def started(self, span: ReadableSpan) -> None:
        if genai.may_be(span):
            self._stir()

    def ended(self, span: ReadableSpan) -> Entry | None:
        self.started(span)  # most instrumentations name their attributes only now
        return None

    def own_ended(self, span_id: int) -> None:
        """Without a runtime there are none of ours."""

    def forked(self) -> None:
        """Nothing is kept."""
