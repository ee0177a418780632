"""The engines and servers that are instrumented, by name, each told what it needs of the program's metering."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from melodi_otel.config import Config
from melodi_otel.instrumentation.asgi import AsgiInstrumentor
from melodi_otel.instrumentation.seam import Calls, Library, Origin
from melodi_otel.instrumentation.transformers import TransformersInstrumentor
from melodi_otel.instrumentation.vllm import VllmInstrumentor
from melodi_otel.telemetry.origins import from_headers
from melodi_otel.telemetry.own_page import OwnPage
from melodi_otel.telemetry.whose import Whose


def libraries(
    calls: Calls, config: Config, environ: Mapping[str, str], whose: Whose, page: OwnPage
) -> dict[str, Library]:
    """All that is supported.

    Args:
        calls: where requests are reported.
        config: what may be done.
        environ: where engines are described.
        whose: what is asked of a served request.
        page: where requests may be shown on a server's own page.
    """
    return {
        "transformers": TransformersInstrumentor(calls, environ),
        "vllm": VllmInstrumentor(
            calls,
            from_headers,
            devices=config.engine_devices,
            show_on=page.show_on,
            answer_energy=config.answer_energy,
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
