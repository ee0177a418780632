"""Debian's Prometheus reads the endpoint: values, names, exemplars; promtool finds nothing to say."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from opentelemetry.sdk.metrics import Histogram
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from melodi_otel import semconv_metrics as metrics
from melodi_otel.attribution.books import Books, Snapshot, Who
from melodi_otel.deploy import recording
from melodi_otel.deploy.settings import Settings
from melodi_otel.instrumentation.seam import Begin, End
from melodi_otel.telemetry.deferral import SpanCounts
from melodi_otel.telemetry.http import Endpoint, serve
from melodi_otel.telemetry.metrics import Configured, Hardware, Views
from melodi_otel.telemetry.providers import ScrapePipeline
from melodi_otel.telemetry.requests import RequestCalls
from melodi_otel.telemetry.sdk import keeps_exemplars


def program(name: str) -> str:
    """The path of a system program; missing it is a skip for a user and a failure where CI is set."""
    found = shutil.which(name)
    if found is None:
        reason = f"{name} is not installed; on Debian: apt-get install prometheus"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


@pytest.fixture
def endpoint(kit: Any) -> Iterator[Endpoint]:
    """Every instrument with a value, served."""
    who = Who("m", "transformers", "svc", "ns", (("tenant", "t1"),))
    snapshot = Snapshot(
        0,
        {"GPU-1": Books("GPU-1", measured=100.0, attributed=60.0, idle=40.0), "psys": Books("psys", measured=300.0)},
        {("GPU-1", who, "decode", "measured"): 60.0},
        {("GPU-1", "idle", ("svc", "m")): 40.0},
        {who: 1},
    )
    hardware = Hardware(
        {"GPU-1": 250.0, "psys": 300.0},
        {"GPU-1": 0.5},
        {"GPU-1": 1 << 30},
        {"GPU-1": 0.1},
        {("nvml", "GPU-1"): True},
        1.0,
        emissions=12.0,
    )
    views = Views(
        lambda: snapshot,
        lambda: kit.devices,
        lambda: hardware,
        lambda: SpanCounts(1, {"measured": 2}, {"sent": 2, "failed": 0}),
        lambda: Configured(400.0, 1.2, 0.3, (("*", 500.0),)),
        metric_labels=("tenant",),
    )
    pipeline = ScrapePipeline(views, Resource({"host.id": "h1", "k8s.pod.name": "p1"}))
    instruments = pipeline.instruments
    instruments.sampled(0.001)
    instruments.finished(kit.record())
    served = serve("127.0.0.1:0", pipeline.registry)
    yield served
    served.close()
    pipeline.close()


def fetch(endpoint: Endpoint, accept: str = "text/plain") -> str:
    request = urllib.request.Request(str(endpoint.url), headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return answer.read().decode()


def test_promtool(endpoint: Endpoint) -> None:
    """Promtool's linter finds nothing in a scrape that shows every instrument."""
    done = subprocess.run(
        [program("promtool"), "check", "metrics"],
        input=fetch(endpoint),
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_metric_is_there(endpoint: Endpoint) -> None:
    """Every metric of the contract that has a source is scraped under the name that semconv says."""
    names = {line.partition("{")[0].partition(" ")[0] for line in fetch(endpoint).splitlines() if line[0] != "#"}
    expected = {metrics.prometheus_name(m) for m in metrics.METRICS.values()}
    assert expected <= names


@contextmanager
def prometheus_of(tmp_path: Path, endpoint: Endpoint) -> Iterator[Callable[..., list[Any]]]:
    """A Prometheus that scrapes an endpoint; ask it by path and parameters."""
    binary = program("prometheus")
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "400ms"},
        "scrape_configs": [{"job_name": "melodi", "static_configs": [{"targets": [f"127.0.0.1:{endpoint.port}"]}]}],
    }
    (tmp_path / "p.yml").write_text(json.dumps(config))
    listen = tmp_path / "port"
    port = _free_port()
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [
                binary,
                f"--config.file={tmp_path}/p.yml",
                f"--storage.tsdb.path={tmp_path}/tsdb",
                f"--web.listen-address=127.0.0.1:{port}",
                "--enable-feature=exemplar-storage",
            ],
            stdout=log,
            stderr=log,
        )

    def ask(path: str, **parameters: str) -> list[Any]:
        """Ask until there is an answer that is not empty, for at most half a minute."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            assert process.poll() is None, (tmp_path / "log").read_text()
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{port}{path}?{urlencode(parameters)}", timeout=5
                ) as answer:
                    data = json.load(answer)["data"]
            except OSError:
                data = []
            found = data["result"] if isinstance(data, dict) else data
            if found:
                return found
            time.sleep(0.1)
        raise TimeoutError(f"{parameters}: no answer; see {listen.parent / 'log'}")

    try:
        yield ask
    finally:
        process.terminate()
        process.wait(timeout=30)


@pytest.fixture
def prometheus(tmp_path: Path, endpoint: Endpoint) -> Iterator[Callable[..., list[Any]]]:
    """A Prometheus that scrapes the endpoint with every instrument."""
    with prometheus_of(tmp_path, endpoint) as ask:
        yield ask


def _free_port() -> int:
    import socket

    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return int(holder.getsockname()[1])


def test_prometheus(endpoint: Endpoint, prometheus: Callable[..., list[Any]]) -> None:
    """Prometheus scrapes the endpoint: the books close in PromQL, target_info joins, and a bucket's exemplar leads to the trace.

    An SDK that keeps no exemplars has none to show.
    """
    query = (
        "sum(melodi_energy_attributed_joules_total) + sum(melodi_energy_unattributed_joules_total)"
        " + sum(melodi_energy_residual_joules) - sum(hw_energy_joules_total)"
    )
    (result,) = prometheus("/api/v1/query", query=query)
    assert float(result["value"][1]) == 0.0
    (result,) = prometheus("/api/v1/query", query='melodi_request_energy_joules_bucket{le=~"50(\\\\.0)?"}')
    assert float(result["value"][1]) == 1.0
    assert result["metric"]["host_id"] == "h1"
    assert result["metric"]["gen_ai_request_model"] == "m"
    joined = "melodi_request_energy_joules_count * on (job, instance) group_left (k8s_pod_name) target_info"
    (result,) = prometheus("/api/v1/query", query=joined)
    assert (result["metric"]["k8s_pod_name"], float(result["value"][1])) == ("p1", 1.0)
    if not keeps_exemplars(Histogram):
        assert " # {" not in fetch(endpoint, accept="application/openmetrics-text")
        return
    now = time.time()
    (series,) = prometheus(
        "/api/v1/query_exemplars",
        query="melodi_request_energy_joules_bucket",
        start=str(now - 600),
        end=str(now + 600),
    )
    exemplar = series["exemplars"][0]
    assert exemplar["labels"] == {"trace_id": f"{0xABC:032x}", "span_id": f"{0xDEF:016x}"}
    assert float(exemplar["value"]) == 30.0


@pytest.mark.skipif(not keeps_exemplars(Histogram), reason="this SDK keeps no exemplars")
def test_exemplars_lead_to_sampled_spans(rig: Any, kit: Any, tmp_path: Path) -> None:
    """query_exemplars names the trace of a request whose span was sampled, of one whose span could not wait for its joules
    too, and of none that head sampling left out.
    """
    unsampled = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    pipeline = ScrapePipeline(
        Views(lambda: Snapshot(0, {}, {}, {}, {}), lambda: kit.devices), Resource({"host.id": "h1"})
    )
    provider: list[Any] = [rig.provider]
    calls = RequestCalls(
        rig.meter, "g", rig.clock, lambda: provider[0].get_tracer("t"), rig.deferral, [pipeline.instruments]
    )
    joules = {"in time": 3.0, "late": 30.0, "not sampled": 300.0}
    for how, used in joules.items():
        provider[0] = unsampled if how == "not sampled" else rig.provider
        call = calls.begin(Begin("chat", "transformers", "m", rig.clock.monotonic_ns()))
        rig.clock.advance(2.0)
        call.end(End(rig.clock.monotonic_ns(), output_tokens=10))
        if how == "late":
            rig.clock.advance(rig.wait_s + 1.0)
            rig.processor.pump()
        rig.meter.futures[call.key].set_result([kit.share(used)])
        rig.processor.pump()
    in_time, late = rig.captured.wait_for(2)
    assert late.attributes["melodi.energy.reason"] == "late"
    served = serve("127.0.0.1:0", pipeline.registry)
    try:
        with prometheus_of(tmp_path, served) as ask:
            (count,) = ask("/api/v1/query", query="melodi_request_energy_joules_count")
            assert float(count["value"][1]) == 3.0
            now = time.time()
            found = ask(
                "/api/v1/query_exemplars",
                query="melodi_request_energy_joules_bucket",
                start=str(now - 600),
                end=str(now + 600),
            )
    finally:
        served.close()
        pipeline.close()
        unsampled.shutdown()
    told = {
        (float(one["value"]), one["labels"]["trace_id"], one["labels"]["span_id"])
        for series in found
        for one in series["exemplars"]
    }
    assert told == {
        (joules[how], f"{span.context.trace_id:032x}", f"{span.context.span_id:016x}")
        for how, span in (("in time", in_time), ("late", late))
    }


def test_queries_of_the_docs(tmp_path: Path) -> None:
    """Every PromQL query in the docs is one, and reads series that the page can have."""
    blocks = [
        block
        for page in sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
        for block in re.findall(r"```promql\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert blocks
    names = {metrics.prometheus_name(metric) for metric in metrics.METRICS.values()}
    recorded = {rule["record"] for group in recording.groups(Settings()) for rule in group["rules"]}
    read = {name for block in blocks for name in re.findall(r"[\w:]*\b(?:melodi|hw)_\w+(?::\w+)*", block)}
    assert read <= names | recorded
    rules = [{"record": f"r{number}", "expr": block} for number, block in enumerate(blocks)]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "docs", "rules": rules}]}))
    done = subprocess.run(
        [program("promtool"), "check", "rules", str(tmp_path / "rules.yml")],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
