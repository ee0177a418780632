"""melodi_otel: joules per LLM request, measured, attributed and told through OpenTelemetry.

Importing starts nothing; names are loaded on first use. The rooms, in the direction a joule travels::

    sources          what does the hardware say?
    timeline         joules over time, per device
    sampler          one thread: sources -> timeline
    attribution      whose joules? (meter = the interface, ledger = the books)
    instrumentation  when does work happen?
    telemetry        how does the world see it? (spans, metrics, scrape endpoint)
    status           what the meter shows now, for the status page and `top`
    results          joules in a variable
    trace            record and replay
    runtime          the composition root: the only module that imports every room
    program          the program's own runtime, and what users call
    standby          before a program runs a model; zero_code: how opentelemetry-instrument finds us
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from melodi_otel.config import Config
    from melodi_otel.program import instrument, last, measure, recent, uninstrument
    from melodi_otel.results import Measurement, Results

__version__: Final = "0.1.0"

_HOME: Final = {
    "Config": "config",
    "Measurement": "results",
    "Results": "results",
    "instrument": "program",
    "last": "program",
    "measure": "program",
    "recent": "program",
    "uninstrument": "program",
}

__all__ = ["Config", "Measurement", "Results", "__version__", "instrument", "last", "measure", "recent", "uninstrument"]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'melodi_otel' has no attribute {name!r}")
    value = getattr(import_module(f"melodi_otel.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


def load_ipython_extension(ipython: Any) -> None:
    """``%load_ext melodi_otel``: adds the magic ``%%joules``."""
    import_module("melodi_otel.program").load_ipython_extension(ipython)
