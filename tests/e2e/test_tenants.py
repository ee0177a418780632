"""A server that knows nothing of labels, under uvicorn: each tenant's requests, joules and spans are its own."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from melodi_otel.attribution.labels import Digest
from melodi_otel.testing.telemetry import OtlpReceiver, plain

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
HERE = Path(__file__).parent


Served = Callable[..., AbstractContextManager[tuple[str, str, Any]]]


@pytest.fixture
def served(
    need: Callable[..., None],
    serve: Callable[..., Any],
    environment: Callable[..., dict[str, str]],
    receiver: OtlpReceiver,
    free_port: Callable[[], int],
) -> Served:
    """The application under uvicorn, with these settings: its address, the page, the server; ended by SIGTERM."""
    need("torch", "fastapi", "uvicorn", "httpx", "opentelemetry.instrumentation.fastapi")

    @contextmanager
    def start(**settings: str) -> Iterator[tuple[str, str, Any]]:
        page = free_port()
        env = environment(receiver, MELODI_SOURCES="rapl", MELODI_METRICS_ADDR=f"127.0.0.1:{page}", **settings)
        app = ["tenant_app:app", "--app-dir", str(HERE), "--port", str(free_port())]
        server = serve([sys.executable, "-m", "uvicorn", *app], env)
        yield server.ready(), f"http://127.0.0.1:{page}/metrics", server
        server.stop(signal.SIGTERM)
        assert "Traceback" not in server.output

    return start


def counted(page: str, name: str, label: str = "tenant") -> dict[str | None, float]:
    """By value of a label, the sum of a series on the page; None: without the label."""
    found: dict[str | None, float] = {}
    for labels, value in re.findall(rf"^{name}\{{(.*)\}} (\S+)$", page, re.MULTILINE):
        who = re.search(rf'(?:^|,){label}="([^"]*)"', labels)
        key = who.group(1) if who else None
        found[key] = found.get(key, 0.0) + float(value)
    return found


def test_each_tenant_its_own(served: Served, receiver: OtlpReceiver) -> None:
    """Concurrent requests in the thread pool, by to_thread, streamed and chat-like, of three tenants and nobody: every
    span of ours carries its own tenant and stands inside its server span; what the page counts per tenant is the sum of
    its spans' joules.
    """
    import httpx

    asked = [
        ("acme", "/thread?tokens=24"),
        ("globex", "/thread?tokens=16"),
        ("acme", "/loop?tokens=8"),
        ("initech", "/loop?tokens=20"),
        ("globex", "/stream?tokens=12"),
        (None, "/thread?tokens=10"),
    ]
    with (
        served(
            MELODI_LABELS="tenant=header:x-tenant-id,user=user,path=span:http.target|span:url.path",
            MELODI_METRIC_LABELS="tenant",
        ) as (url, page, _server),
        httpx.Client(base_url=url, timeout=60) as client,
    ):

        def ask(one: tuple[str | None, str]) -> int:
            return client.get(one[1], headers={"X-Tenant-Id": one[0]} if one[0] else {}).status_code

        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(ask, asked)) == [200] * len(asked)
        body = {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "user": "jane"}
        assert client.post("/v1/chat/completions", json=body, headers={"x-tenant-id": "acme"}).status_code == 200
        spans = receiver.spans(2 * (len(asked) + 1), timeout_s=60)
        ours = receiver.spans(len(asked) + 1, timeout_s=60, where=is_ours)
        shown = httpx.get(page, timeout=30).text
    servers = {span.span_id: span for span in receiver.spans() if span.kind == 2}
    assert len(spans) >= len(ours)
    told = {
        (found.get("tenant"), found["gen_ai.usage.output_tokens"], found.get("user"), found["path"].partition("?")[0])
        for found in (plain(span.attributes) for span in ours)
    }
    expected = {(tenant, int(path.partition("=")[2]), None, path.partition("?")[0]) for tenant, path in asked}
    assert told == expected | {("acme", 9, "jane", "/v1/chat/completions")}
    assert all(span.parent_span_id in servers for span in ours)
    joules: dict[str | None, float] = {}
    for found in (plain(span.attributes) for span in ours):
        joules[found.get("tenant")] = joules.get(found.get("tenant"), 0.0) + found["melodi.energy.total"]
    assert counted(shown, "melodi_requests_total") == {"acme": 3.0, "globex": 2.0, "initech": 1.0, None: 1.0}
    assert counted(shown, "melodi_energy_attributed_joules_total") == pytest.approx(joules, rel=1e-6)


def is_ours(span: Any) -> bool:
    """Whether it is the span of a model call."""
    return span.kind == 1 and "melodi.energy.schema" in plain(span.attributes)


def test_forged_and_hashed(served: Served, receiver: OtlpReceiver, tmp_path: Path) -> None:
    """A hundred forged tenants behind two listed ones, with a keyed hash: three tenants on the page, no raw name in it, in
    our spans, in the trace file or in the log.
    """
    import httpx

    key, trace = "a secret of ours", tmp_path / "t.jsonl"
    with (
        served(
            MELODI_LABELS="tenant=header:x-tenant-id",
            MELODI_METRIC_LABELS="tenant",
            MELODI_LABEL_VALUES="tenant=acme|globex",
            MELODI_LABEL_HASH_KEY=key,
            MELODI_RECORD=str(trace),
        ) as (url, page, server),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        names = [*(f"forged-{number}" for number in range(100)), "acme", "globex", "acme"]
        for name in names:
            assert client.get("/thread?tokens=1", headers={"x-tenant-id": name}).status_code == 200
        ours = receiver.spans(len(names), timeout_s=60, where=is_ours)
        shown = httpx.get(page, timeout=30).text
    digest = Digest(key)
    assert counted(shown, "melodi_requests_total") == {digest("acme"): 2.0, digest("globex"): 1.0, "other": 100.0}
    assert set(counted(shown, "melodi_energy_attributed_joules_total")) <= {digest("acme"), digest("globex"), "other"}
    assert {plain(span.attributes)["tenant"] for span in ours} == {digest(name) for name in names}
    for text in (shown, trace.read_text(), server.output, *map(str, ours)):
        assert not re.search(r"forged-\d|acme|globex", text)
        assert key not in text
