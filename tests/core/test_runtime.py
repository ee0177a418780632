"""The composition root: one runtime per program, nothing left behind, labels, publisher, a forked child's own books."""

from __future__ import annotations

import os
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from opentelemetry import baggage, context
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider

import melodi_otel
from melodi_otel import program as root
from melodi_otel.config import Config
from melodi_otel.errors import ConfigError
from melodi_otel.instrumentation.seam import Begin, End
from melodi_otel.publishing import Publisher
from melodi_otel.runtime import Runtime
from melodi_otel.testing.powercap import FakePowercap
from melodi_otel.testing.telemetry import CapturedSpans, points


@pytest.fixture
def tree(tmp_path: Path) -> FakePowercap:
    """A package whose counter stands until it is moved."""
    made = FakePowercap(tmp_path / "sys")
    made.package(0, watts=50.0)
    return made


@pytest.fixture
def config(tree: FakePowercap) -> Config:
    """That package and nothing else."""
    return Config(sysfs_root=str(tree.root), sources=("rapl",), hub="local")


@pytest.fixture
def program() -> Iterator[None]:
    """A program without a runtime, before and after."""
    melodi_otel.uninstrument()
    yield
    melodi_otel.uninstrument()


def request(runtime: Runtime, tokens: int = 5) -> None:
    """A call that begins and ends now."""
    begin = Begin("chat", "transformers", "m", runtime.calls.now_ns(), prompt_tokens=3)
    call = runtime.calls.begin(begin)
    with call.active():
        pass
    call.end(End(runtime.calls.now_ns(), tokens, "stop", ("stop",)))


def test_twice_is_once(program: None, config: Config) -> None:
    """The second instrument() gives the running runtime; after uninstrument() a new one starts."""
    first = melodi_otel.instrument(config=config)
    assert melodi_otel.instrument() is first
    melodi_otel.uninstrument()
    second = melodi_otel.instrument(config=config)
    assert second is not None
    assert second is not first


def test_nothing_is_left(program: None, config: Config) -> None:
    """After uninstrument() no thread runs and a provider that was there has its own processors again."""
    before = {thread.name for thread in threading.enumerate()}
    provider, captured = TracerProvider(shutdown_on_exit=False), CapturedSpans()
    provider.add_span_processor(captured)
    runtime = melodi_otel.instrument(config=config, tracer_provider=provider)
    assert runtime is not None
    assert provider._active_span_processor._span_processors != (captured,)
    request(runtime)
    melodi_otel.uninstrument()
    assert provider._active_span_processor._span_processors == (captured,)
    assert {thread.name for thread in threading.enumerate() if thread.name.startswith("melodi")} <= before
    assert [span.name for span in captured.ended] == ["chat m"]
    assert captured.attributes("chat m")["gen_ai.usage.output_tokens"] == 5


def test_off(program: None) -> None:
    """Disabled: no runtime, a measurement that knows nothing, no result."""
    assert melodi_otel.instrument(config=Config(disabled=True)) is None
    assert len(melodi_otel.recent()) == 0


def test_labels_reach_span_record_and_metrics(config: Config) -> None:
    """A tenant out of the baggage and a team out of the resource are on the span and the record; metrics carry the tenant."""
    environ_before = os.environ.get("OTEL_RESOURCE_ATTRIBUTES")
    os.environ["OTEL_RESOURCE_ATTRIBUTES"] = "team=blue"
    labelled = Config(
        sysfs_root=config.sysfs_root,
        sources=("rapl",),
        labels="tenant=baggage:tenant.id,team=resource:team",
        metric_labels=("tenant",),
        label_limit=1,
        hub="local",
    )
    reader, captured = InMemoryMetricReader(), CapturedSpans()
    metrics = MeterProvider([reader], shutdown_on_exit=False)
    spans = TracerProvider(shutdown_on_exit=False)
    spans.add_span_processor(captured)
    try:
        runtime = Runtime(labelled, environ={}, tracer_provider=spans, meter_provider=metrics)
    finally:
        os.environ.pop("OTEL_RESOURCE_ATTRIBUTES")
        if environ_before is not None:
            os.environ["OTEL_RESOURCE_ATTRIBUTES"] = environ_before
    runtime.start()
    for tenant in ("a", "b"):
        token = context.attach(baggage.set_baggage("tenant.id", tenant))
        request(runtime)
        context.detach(token)
    assert runtime.wait_settled(10.0)
    counted = points(reader, "melodi.requests")
    runtime.shutdown()
    metrics.shutdown()
    assert [dict(record.labels) for record in runtime.store.recent()] == [
        {"tenant": "a", "team": "blue"},
        {"tenant": "b", "team": "blue"},
    ]
    assert captured.attributes("chat m")["tenant"] == "b"
    assert sorted((str(point.attributes["tenant"]), point.value) for point in counted) == [("a", 1.0), ("other", 1.0)]


def test_metric_labels_must_exist() -> None:
    """A metric label that no rule makes is an error that names it."""
    with pytest.raises(
        ConfigError, match=r"MELODI_METRIC_LABELS='tenant' cannot be used: tenant is not in MELODI_LABELS"
    ):
        Runtime(Config(metric_labels=("tenant",), hub="local"), environ={})


def test_trace_that_cannot_be_written(config: Config) -> None:
    """A trace file in a directory that is not there is an error that names variable, value and reason."""
    runtime = Runtime(
        Config(sysfs_root=config.sysfs_root, sources=("rapl",), record="/nonexistent/t.jsonl"), environ={}
    )
    with pytest.raises(ConfigError, match=r"MELODI_RECORD='/nonexistent/t.jsonl' cannot be used \(No such file"):
        runtime.start()
    runtime.shutdown()


def test_one_publisher_per_host() -> None:
    """While one holds the name the other does not publish; when it lets go the other may."""
    first, second = Publisher("melodi-otel/test"), Publisher("melodi-otel/test")
    assert first()
    assert not second()
    first.release()
    second._tried = -10.0
    assert second()
    second.close()
    first._tried = second._tried = -10.0
    assert not second(), "it has let go for good"
    assert first()
    first.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_keeps_the_publishers_name_from_nobody(config: Config) -> None:
    """While a child lives that was forked from the publisher, another meter can take its place."""
    name = f"melodi-otel/test-{os.getpid()}"
    runtime = Runtime(config, environ={})
    runtime._publisher = Publisher(name)
    runtime.start()
    assert runtime._publisher()
    (read, write), (born, bears) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(write)
        os.write(bears, b"x")
        os.read(read, 1)  # until the parent closes its end, or is gone
        os._exit(0)
    os.read(born, 1)
    runtime._publisher.release()
    other = Publisher(name)
    took = other()
    os.close(write)
    os.waitpid(child, 0)
    os.close(read), os.close(born), os.close(bears)
    other.close()
    runtime.shutdown()
    assert took


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_its_own_books(config: Config) -> None:
    """The child meters its own requests with threads of its own; the parent's requests and publishing stay the parent's."""
    runtime = Runtime(config, environ={})
    runtime.start()
    request(runtime, 1)
    assert runtime.wait_settled(10.0)
    publishes = runtime._publisher()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            request(runtime, 2)
            settled = runtime.wait_settled(10.0)
            tokens = [record.output_tokens for record in runtime.store.recent()]
            os.write(write, f"{settled} {tokens} {runtime._publisher()}".encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    said = os.read(read, 1000).decode()
    os.close(read), os.close(write)
    assert said == "True [2] False"
    request(runtime, 3)
    assert runtime.wait_settled(10.0)
    assert [record.output_tokens for record in runtime.store.recent()] == [1, 3]
    assert runtime._publisher() == publishes
    runtime.shutdown()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_counts_from_zero(config: Config) -> None:
    """What the parent had counted and recorded is not in the child's numbers, recorded and observed ones alike."""
    reader = InMemoryMetricReader()
    metrics = MeterProvider([reader], shutdown_on_exit=False)
    runtime = Runtime(config, environ={}, meter_provider=metrics)
    runtime.start()
    for _ in range(7):
        request(runtime, 1)
    assert runtime.wait_settled(10.0)

    def counted() -> dict[str, float]:
        names = ("melodi.requests", "gen_ai.client.token.usage")
        found = points(reader)
        return {name: sum(point.value for point in found if point.name == name) for name in names}

    assert counted() == {"melodi.requests": 7.0, "gen_ai.client.token.usage": 28.0}
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            request(runtime, 1)
            runtime.wait_settled(10.0)
            os.write(write, repr(counted()).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    said = os.read(read, 1000).decode()
    os.close(read), os.close(write)
    assert said == repr({"melodi.requests": 1.0, "gen_ai.client.token.usage": 4.0})
    assert counted() == {"melodi.requests": 7.0, "gen_ai.client.token.usage": 28.0}
    runtime.shutdown()
    metrics.shutdown()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_keeps_no_descriptor(config: Config, tree: FakePowercap, tmp_path: Path) -> None:
    """A child that runs no model has no counter of the machine open and writes nothing of the parent's trace."""
    trace = tmp_path / "trace.jsonl"
    runtime = Runtime(replace(config, record=str(trace)), environ={})
    runtime.start()

    def mine() -> list[str]:
        links = [path for path in Path("/proc/self/fd").iterdir() if path.exists()]
        return sorted({str(path.readlink()) for path in links if str(path.readlink()).startswith(str(tmp_path))})

    assert [Path(name).name for name in mine()] == ["energy_uj", "trace.jsonl"]
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, repr(mine()).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 1000).decode() == "[]"
    os.close(read), os.close(write)
    request(runtime)
    assert runtime.wait_settled(10.0)
    runtime.shutdown()
    lines = trace.read_text().splitlines()
    assert len([line for line in lines if '"kind":"device"' in line]) == 1
    assert len([line for line in lines if '"kind":"close"' in line]) == 1


def test_meters_found_later(config: Config, tree: FakePowercap) -> None:
    """Where meters are looked for in the background, a request that began before is settled by them all the same."""
    runtime = Runtime(config, environ={}, later=True)
    assert not runtime.devices()
    begin = Begin("chat", "transformers", "m", runtime.calls.now_ns(), prompt_tokens=3)
    call = runtime.calls.begin(begin)
    runtime.start()
    assert runtime.wait_found(10.0)
    assert list(runtime.devices()) == ["intel-rapl:0"]
    call.end(End(runtime.calls.now_ns(), 5, "stop", ("stop",)))
    assert runtime.wait_settled(10.0)
    (record,) = runtime.store.recent()
    assert [share.device for share in record.shares] == ["intel-rapl:0"]
    runtime.shutdown()


def test_one_library_by_name(config: Config) -> None:
    """A name that this version does not know switches nothing on, and harms nothing."""
    runtime = Runtime(config, environ={})
    runtime.instrument_libraries(["asgi", "no such library"])
    runtime.uninstrument_libraries(["no such library"])
    runtime.instrument_libraries()
    runtime.uninstrument_libraries()


def test_running_is_told(program: None, config: Config) -> None:
    """The program's runtime can be asked for."""
    assert root.running() is None
    started = melodi_otel.instrument(config=config)
    assert root.running() is started


def test_the_first_block_is_covered(program: None, config: Config, tree: FakePowercap) -> None:
    """A block that begins as soon as metering does is measured from its first instant."""
    runtime = melodi_otel.instrument(config=config)
    assert runtime is not None
    with tree.live(), melodi_otel.measure("first") as m:
        assert not threading.Event().wait(0.3)
    assert m.wait(10.0)
    assert m.energy is not None
    assert m.energy.coverage == 1.0


def test_the_page_says_where_it_runs(config: Config, tmp_path: Path) -> None:
    """target_info of the scraped page is the identity, found below the configured roots."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name\t: A CPU\n", encoding="ascii")
    told = replace(config, procfs_root=str(tmp_path / "proc"), host_id="h1", metrics_addr="127.0.0.1:0")
    runtime = Runtime(told, environ={"SLURM_JOB_ID": "7", "SLURM_PROCID": "3"})
    runtime.start()
    try:
        with urllib.request.urlopen(str(runtime.endpoint_url), timeout=10) as answer:
            (line,) = [line for line in answer.read().decode().splitlines() if line.startswith("target_info{")]
    finally:
        runtime.shutdown()
    for label in ('host_id="h1"', 'host_cpu_model_name="A CPU"', 'slurm_job_id="7"', 'slurm_task_rank="3"'):
        assert label in line
