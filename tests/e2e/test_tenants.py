"""A server that knows nothing of labels, under uvicorn: each tenant's requests, joules and spans are its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from melodi_otel.attribution.labels import Digest
from melodi_otel.testing.powercap import FakePowercap
from melodi_otel.testing.telemetry import OtlpReceiver, plain

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
HERE = Path(__file__).parent


@pytest.fixture
def sysfs(tmp_path: Path, need: Callable[..., None]) -> Iterator[Path]:
    """A package of 60 W that counts in real time."""
    need("torch", "fastapi", "uvicorn", "httpx", "opentelemetry.instrumentation.fastapi")
    tree = FakePowercap(tmp_path / "sys")
    tree.package(0, watts=60.0)
    with tree.live():
        yield tree.root


def free_port() -> int:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


@contextmanager
def served(sysfs: Path, log: Path, receiver: OtlpReceiver, **environ: str) -> Iterator[tuple[str, str]]:
    """The application under uvicorn: its address and that of the page; ended as a server is, by SIGTERM."""
    port, page = free_port(), free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MELODI_", "OTEL_"))}
    env |= {
        "MELODI_SYSFS_ROOT": str(sysfs),
        "MELODI_SOURCES": "rapl",
        "MELODI_METRICS_ADDR": f"127.0.0.1:{page}",
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{receiver.http_endpoint}/v1/traces",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        **environ,
    }
    command = [sys.executable, "-m", "uvicorn", "tenant_app:app", "--app-dir", str(HERE), "--port", str(port)]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 90
        while "running on" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{page}/metrics"
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()


def counted(page: str, name: str, label: str = "tenant") -> dict[str | None, float]:
    """By value of a label, the sum of a series on the page; None: without the label."""
    found: dict[str | None, float] = {}
    for labels, value in re.findall(rf"^{name}\{{(.*)\}} (\S+)$", page, re.MULTILINE):
        who = re.search(rf'(?:^|,){label}="([^"]*)"', labels)
        key = who.group(1) if who else None
        found[key] = found.get(key, 0.0) + float(value)
    return found


def test_each_tenant_its_own(sysfs: Path, tmp_path: Path) -> None:
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
        OtlpReceiver() as receiver,
        served(
            sysfs,
            tmp_path / "log",
            receiver,
            MELODI_LABELS="tenant=header:x-tenant-id,user=user,path=span:http.target|span:url.path",
            MELODI_METRIC_LABELS="tenant",
        ) as (url, page),
        httpx.Client(base_url=url, timeout=60) as client,
    ):

        def ask(one: tuple[str | None, str]) -> int:
            return client.get(one[1], headers={"X-Tenant-Id": one[0]} if one[0] else {}).status_code

        with ThreadPoolExecutor(3) as pool:
            assert list(pool.map(ask, asked)) == [200] * len(asked)
        body = {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], "user": "jane"}
        assert client.post("/v1/chat/completions", json=body, headers={"x-tenant-id": "acme"}).status_code == 200
        spans = receiver.spans(2 * (len(asked) + 1), timeout_s=60)
        ours = _ours(receiver, len(asked) + 1)
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


def _ours(receiver: OtlpReceiver, number: int) -> list[Any]:
    """The spans of model calls, as soon as there are so many."""
    deadline = time.monotonic() + 60
    while True:
        found = [
            span for span in receiver.spans() if span.kind == 1 and "melodi.energy.schema" in plain(span.attributes)
        ]
        if len(found) >= number:
            return found
        assert time.monotonic() < deadline, [span.name for span in receiver.spans()]
        time.sleep(0.05)


def test_forged_and_hashed(sysfs: Path, tmp_path: Path) -> None:
    """A hundred forged tenants behind two listed ones, with a keyed hash: three tenants on the page, no raw name in it, in
    our spans, in the trace file or in the log.
    """
    import httpx

    key, trace = "a secret of ours", tmp_path / "t.jsonl"
    with (
        OtlpReceiver() as receiver,
        served(
            sysfs,
            tmp_path / "log",
            receiver,
            MELODI_LABELS="tenant=header:x-tenant-id",
            MELODI_METRIC_LABELS="tenant",
            MELODI_LABEL_VALUES="tenant=acme|globex",
            MELODI_LABEL_HASH_KEY=key,
            MELODI_RECORD=str(trace),
        ) as (url, page),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        names = [*(f"forged-{number}" for number in range(100)), "acme", "globex", "acme"]
        for name in names:
            assert client.get("/thread?tokens=1", headers={"x-tenant-id": name}).status_code == 200
        ours = _ours(receiver, len(names))
        shown = httpx.get(page, timeout=30).text
    digest = Digest(key)
    assert counted(shown, "melodi_requests_total") == {digest("acme"): 2.0, digest("globex"): 1.0, "other": 100.0}
    assert set(counted(shown, "melodi_energy_attributed_joules_total")) <= {digest("acme"), digest("globex"), "other"}
    assert {plain(span.attributes)["tenant"] for span in ours} == {digest(name) for name in names}
    for text in (shown, trace.read_text(), (tmp_path / "log").read_text(), *map(str, ours)):
        assert not re.search(r"forged-\d|acme|globex", text)
        assert key not in text
