"""A FastAPI application with a model, as its author wrote it, under ``opentelemetry-instrument``: every request has joules."""

from __future__ import annotations

import importlib.util
import socket
import sys
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from melodi_otel.testing.telemetry import OtlpReceiver, plain

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
EXAMPLES = Path(__file__).parents[2] / "examples"
UVICORN = ["-m", "uvicorn", "--app-dir", str(EXAMPLES), "--port", "0", "fastapi_app:app"]
CLIENTS = [("/generate", 40), ("/generate", 60), ("/stream", 50)]
LOST = 400

CONFIG = """
file_format: "1.0-rc.1"
resource:
  attributes:
    - {name: service.name, value: chat}
propagator:
  composite: [{tracecontext: {}}, {baggage: {}}]
tracer_provider:
  processors:
    - batch:
        schedule_delay: 100
        exporter:
          otlp_http: {endpoint: "ENDPOINT/v1/traces"}
meter_provider:
  readers:
    - periodic:
        exporter:
          otlp_http: {endpoint: "ENDPOINT/v1/metrics"}
"""


def ask(url: str, path: str, tokens: int) -> str:
    with urllib.request.urlopen(f"{url}{path}?prompt=hello+there&tokens={tokens}", timeout=90) as answer:
        return answer.read().decode()


def hang_up(url: str) -> None:
    """A client that goes away once it has begun to read."""
    parts = urlsplit(url)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0)), 30) as client:
        client.sendall(f"GET /stream?prompt=hello&tokens={LOST} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        assert client.recv(16)


def by_tokens(spans: list[Any]) -> dict[int, tuple[Any, dict[str, Any]]]:
    """Our spans and their attributes, by what the client asked for."""
    found = [(span, plain(span.attributes)) for span in spans]
    return {a["gen_ai.request.max_tokens"]: (span, a) for span, a in found if "gen_ai.request.max_tokens" in a}


@pytest.mark.parametrize("configured", ["by variables", "by a file"])
def test_every_client_has_its_joules(
    configured: str,
    tmp_path: Path,
    need: Callable[..., None],
    receiver: OtlpReceiver,
    environment: Callable[..., dict[str, str]],
    zero_code: list[str],
    serve: Callable[..., Any],
) -> None:
    """HTTP span → our span with joules, streamed or not, for three clients at once and one who hangs up; sums agree."""
    need("torch", "transformers", "fastapi", "uvicorn", "opentelemetry.distro", "opentelemetry.instrumentation.fastapi")
    env = environment(receiver)
    if configured == "by a file":
        if importlib.util.find_spec("opentelemetry.configuration") is None:
            pytest.skip("OTEL_CONFIG_FILE needs the package opentelemetry-configuration, SDK 1.43 or newer")
        file = tmp_path / "otel.yaml"
        file.write_text(CONFIG.replace("ENDPOINT", receiver.http_endpoint))
        env = environment(OTEL_CONFIG_FILE=str(file))
    server = serve([*zero_code, sys.executable, *UVICORN], env)
    url = server.ready()
    assert ask(url, "/health", 0) == '"ok"'
    with ThreadPoolExecutor(4) as pool:
        lost = pool.submit(hang_up, url)
        answers = list(pool.map(lambda client: ask(url, *client), CLIENTS))
        lost.result()
    assert all(answers)
    spans: list[Any] = []
    wanted = {*(tokens for _, tokens in CLIENTS), LOST}
    for more in range(200):
        spans = receiver.spans(len(spans) + 1 if more else 1, 60.0)
        if wanted <= by_tokens(spans).keys():
            break
    assert server.stop() == 0, server.output
    assert "Traceback" not in server.output
    spans = receiver.spans()
    http = {span.span_id: span for span in spans if span.kind == span.SPAN_KIND_SERVER}
    ours = by_tokens(spans)
    assert ours.keys() == wanted
    for path, tokens in [*CLIENTS, ("/stream", LOST)]:
        span, attributes = ours[tokens]
        assert attributes["gen_ai.usage.output_tokens"] == tokens
        assert attributes["melodi.energy.total"] > 0, attributes
        assert attributes["melodi.energy.source"] == ["rapl.package"]
        assert attributes["melodi.energy.quality"] in ("measured", "interpolated", "partial")
        assert "melodi.energy.rollup" not in attributes
        assert span.parent_span_id in http, f"{path} has lost its request"
        assert http[span.parent_span_id].name == f"GET {path}"
        assert http[span.parent_span_id].trace_id == span.trace_id
    assert sum("melodi.energy.total" in plain(span.attributes) for span in spans) == 4
    # several readings arrive: the last one of the sum counts
    sums = [
        sum(point.sum for point in metric.histogram.data_points)
        for metric in receiver.metrics(1)
        if metric.name == "melodi.request.energy"
    ]
    assert max(sums) == pytest.approx(sum(a["melodi.energy.total"] for _, a in ours.values()), rel=1e-9)
    assert {resource.get("service.name") for resource in receiver.resources()} == {"chat"}
