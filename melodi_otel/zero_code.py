"""How OpenTelemetry's zero-code tools find us: the entry points of ``opentelemetry-instrument``, its operator and distros.

``opentelemetry_pre_instrument`` runs once the SDK is configured, whether by variables, a file or somebody's distro; the
entries of ``opentelemetry_instrumentor`` switch on one library each, so that ``OTEL_PYTHON_DISABLED_INSTRUMENTATIONS`` can
leave one out. An exception from here would end the auto-instrumentation of the whole program: there is none.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Any, Final

from opentelemetry.instrumentation.instrumentor import BaseInstrumentor  # pyright: ignore[reportMissingTypeStubs]

from melodi_otel import program
from melodi_otel.errors import ConfigError

log = logging.getLogger("melodi_otel")

_PROVIDERS: Final = ("tracer_provider", "meter_provider")


def pre_instrument() -> None:
    """Wrap the registered span processors and wait for the first work; no library is patched by this."""
    _safely(lambda: program.prepare())


class _LibraryEntry(BaseInstrumentor):
    """One library, switched on by name. No state here: the base class makes one instance and initialises it every time."""

    library: str

    def _instrument(self, **kwargs: Any) -> None:
        providers = {name: kwargs[name] for name in _PROVIDERS if kwargs.get(name) is not None}
        _safely(lambda: self._switch_on(providers))

    def _switch_on(self, providers: dict[str, Any]) -> None:
        program.prepare(**providers)
        program.instrument_libraries([self.library])

    def _uninstrument(self, **kwargs: Any) -> None:
        _safely(lambda: program.uninstrument_libraries([self.library]))


class TransformersEntry(_LibraryEntry):
    """Every ``generate()`` of transformers. ``instrument(tracer_provider=…, meter_provider=…)`` works from code too."""

    library = "transformers"

    def instrumentation_dependencies(self) -> Collection[str]:
        """transformers, also a build of its development line."""
        return ("transformers >= 4.57.0.dev0",)


class AsgiEntry(_LibraryEntry):
    """Labels out of allow-listed request headers; nothing where this version has no such instrumentation."""

    library = "asgi"

    def instrumentation_dependencies(self) -> Collection[str]:
        """Nothing: ASGI is a convention."""
        return ()


def _safely(act: Any) -> None:
    try:
        act()
    except ConfigError as error:
        log.error("melodi_otel is off: %s", error)
    except Exception:
        log.exception("melodi_otel is off: it could not be prepared")
