"""Where a server's spans go: nowhere where nobody asked, and into the trace of whoever instruments the server."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from melodi_otel.testing.telemetry import plain
from tests.e2e.with_vllm.books import told
from tests.e2e.with_vllm.clients import Ask, fire
from tests.e2e.with_vllm.rig import VllmServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

CHECKOUT = Path(__file__).parents[3]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PARTS = (
    "asgiref",
    "opentelemetry/distro",
    "opentelemetry/instrumentation/asgi",
    "opentelemetry/instrumentation/fastapi",
    "opentelemetry/util/http",
)
"""What instruments a FastAPI server without code, beside what vLLM has itself."""


def test_nobody_asked_for_spans(vllm_server: Callable[..., VllmServer]) -> None:
    """Without a destination no span is made; joules are counted all the same, and the log says where, and what sends spans."""
    server = vllm_server(env={"OTEL_EXPORTER_OTLP_ENDPOINT": None, "OTEL_EXPORTER_OTLP_PROTOCOL": None})
    answers = fire(server.url, [Ask(f"{n} joules", max_tokens=8) for n in range(4)])
    assert [answer.tokens("completion") for answer in answers] == [8] * 4
    server.place.until("the hub has counted them", lambda: "melodi_requests_total" in server.page())
    said = [line for line in server.log.splitlines() if "melodi_otel: joules are on" in line]
    assert len(said) == 1
    assert f"joules are on {server.page_url()}/metrics" in said[0]
    assert "spans go nowhere; OTEL_EXPORTER_OTLP_ENDPOINT=http://HOST:4318 sends them" in said[0]
    assert server.receiver.spans() == []


@pytest.fixture
def instrumentations(tmp_path: Path) -> Path:
    """A folder with OpenTelemetry's distribution and its instrumentation of FastAPI, for a Python that has neither."""
    import opentelemetry.sdk

    site = Path(opentelemetry.sdk.__path__[0]).parents[1]
    for part in PARTS:
        (tmp_path / part).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / part).symlink_to(site / part)
    for name in ("distro", "instrumentation_asgi", "instrumentation_fastapi", "util_http"):
        (found,) = site.glob(f"opentelemetry_{name}-*.dist-info")
        (tmp_path / found.name).symlink_to(found)
    return tmp_path


def test_opentelemetry_instrument(
    vllm_server: Callable[..., VllmServer], instrumentations: Path, vllm_python: Path
) -> None:
    """Under `opentelemetry-instrument` each request's span stands under that of its HTTP request, in its caller's trace."""
    own = next(vllm_python.parents[1].glob("lib/python3*/site-packages/opentelemetry_instrumentation-*.dist-info")).name
    ours = next(instrumentations.glob("opentelemetry_distro-*")).name
    if own.split("-")[1].split(".dist")[0] != ours.split("-")[1].split(".dist")[0]:
        pytest.skip(f"this vLLM has {own}, which {ours} does not fit")
    server = vllm_server(
        env={
            "PYTHONPATH": os.pathsep.join([str(instrumentations), str(CHECKOUT)]),
            "OTEL_PYTHON_FASTAPI_EXCLUDED_URLS": "health,metrics",
        },
        before=(str(vllm_python.with_name("opentelemetry-instrument")),),
    )
    asks = [
        Ask(f"{n} traced", max_tokens=6, stream=n % 2 == 1, headers={"traceparent": f"00-{TRACE}-{SPAN}-01"})
        for n in range(4)
    ]
    fire(server.url, asks)
    spans = told(server, 4)
    assert len(spans) == 4
    doors = {
        span.span_id.hex(): span.parent_span_id.hex()
        for span in server.receiver.spans(4, where=lambda span: span.name == "POST /v1/completions")
        if "http.route" in plain(span.attributes)
    }
    assert {span.trace for span in spans} == {TRACE}
    assert {doors[span.parent] for span in spans} == {SPAN}
    assert all(span.of("melodi.energy.total") > 0 for span in spans)
    assert "spans go to the provider that the program has set" in server.log
