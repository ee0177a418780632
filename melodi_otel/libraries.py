"""The engines and servers that are instrumented, by name, each told what it needs of the program's metering."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final, Protocol

from melodi_otel.config import Config
from melodi_otel.instrumentation.asgi import AsgiInstrumentor
from melodi_otel.instrumentation.seam import Calls, Library, Origin
from melodi_otel.instrumentation.transformers import TransformersInstrumentor
from melodi_otel.instrumentation.vllm import VllmInstrumentor
from melodi_otel.telemetry.destinations import spans
from melodi_otel.telemetry.origins import from_headers
from melodi_otel.telemetry.own_page import OwnPage
from melodi_otel.telemetry.whose import Whose

_KNOWN_S: Final = 15.0


class Found(Protocol):
    """A runtime, as far as it is asked where things are."""

    @property
    def endpoint_url(self) -> str | None: ...

    def wait_found(self, timeout: float) -> bool: ...


def libraries(
    calls: Calls,
    config: Config,
    environ: Mapping[str, str],
    whose: Whose,
    page: OwnPage,
    found: Found,
) -> dict[str, Library]:
    """All that is supported.

    Args:
        calls: where requests are reported.
        config: what may be done.
        environ: where engines are described.
        whose: what is asked of a served request.
        page: where requests may be shown on a server's own page.
        found: knows where metrics are served, once the meter is known.
    """

    def where() -> str:
        found.wait_found(_KNOWN_S)
        url = found.endpoint_url or "no page: MELODI_METRICS_ADDR=HOST:PORT makes one"
        return f"joules are on {url}; spans go {spans(environ)}"

    return {
        "transformers": TransformersInstrumentor(calls, environ),
        "vllm": VllmInstrumentor(
            calls,
            from_headers,
            devices=config.engine_devices,
            show_on=page.show_on,
            answer_energy=config.answer_energy,
            where=where,
        ),
        "asgi": AsgiInstrumentor(
            whose.headers,
            user=whose.body,
            origin=_origin,
            active=lambda: whose.served or "vllm" in sys.modules,
        ),
    }


def _origin(headers: Mapping[str, str]) -> Origin | None:
    # vLLM's own requests carry neither baggage nor, before 0.32, a trace; other engines run in the server's own context.
    return from_headers(headers) if "vllm" in sys.modules else None
