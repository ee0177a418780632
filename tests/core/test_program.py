"""The program's own runtime in zero-code mode: nothing until there is work, one library at a time, never an exception."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider

import melodi_otel
from melodi_otel import program
from melodi_otel.config import GROUP_VARIABLE
from melodi_otel.telemetry.spans import DeferringProcessor
from melodi_otel.testing.powercap import FakePowercap
from melodi_otel.testing.telemetry import CapturedSpans

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # opentelemetry-instrumentation before 0.49b0 loads a deprecated module
    from melodi_otel.zero_code import AsgiEntry, TransformersEntry, pre_instrument


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program without a runtime, before and after, on a machine with one package."""
    tree = FakePowercap(tmp_path / "sys")
    tree.package(0, watts=50.0)
    monkeypatch.setenv("MELODI_SYSFS_ROOT", str(tree.root))
    monkeypatch.setenv("MELODI_SOURCES", "rapl")
    melodi_otel.uninstrument()
    yield
    for entry in (TransformersEntry(), AsgiEntry()):
        if entry.is_instrumented_by_opentelemetry:
            entry.uninstrument()
    melodi_otel.uninstrument()
    assert GROUP_VARIABLE not in os.environ


@pytest.fixture
def provider() -> Iterator[tuple[TracerProvider, CapturedSpans]]:
    made, captured = TracerProvider(shutdown_on_exit=False), CapturedSpans()
    made.add_span_processor(captured)
    yield made, captured
    made.shutdown()


def ours() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("melodi")]


def test_prepared_is_not_started(provider: tuple[TracerProvider, CapturedSpans]) -> None:
    """Prepared: the processors are wrapped, and neither a meter nor a thread is there; taken back: as it was."""
    tracers, captured = provider
    standby = program.prepare(tracer_provider=tracers)
    assert program.prepare() is standby
    (wrapped,) = tracers._active_span_processor._span_processors
    assert isinstance(wrapped, DeferringProcessor)
    assert program.running() is None
    assert ours() == []
    assert os.environ[GROUP_VARIABLE]
    melodi_otel.uninstrument()
    assert tracers._active_span_processor._span_processors == (captured,)


def test_first_span_of_a_genai_call_starts_it(provider: tuple[TracerProvider, CapturedSpans]) -> None:
    """Ordinary spans start nothing; the first one of a GenAI call starts the meter, on another thread."""
    tracers, captured = provider
    program.prepare(tracer_provider=tracers)
    tracer = tracers.get_tracer("somebody else")
    tracer.start_span("GET /", attributes={"http.method": "GET"}).end()
    assert program.running() is None
    assert ours() == []
    tracer.start_span("chat m", attributes={"gen_ai.operation.name": "chat"}).end()
    for thread in threading.enumerate():
        if thread.name == "melodi-otel-start":
            thread.join(30)
    runtime = program.running()
    assert runtime is not None
    assert runtime.wait_found(10)
    assert list(runtime.devices()) == ["intel-rapl:0"]
    assert [span.name for span in captured.wait_for(2)] == ["GET /", "chat m"]


def test_code_starts_it_at_once(provider: tuple[TracerProvider, CapturedSpans]) -> None:
    """instrument() in a prepared program starts what was prepared, meters included; twice is once."""
    tracers, captured = provider
    program.prepare(tracer_provider=tracers)
    runtime = melodi_otel.instrument()
    assert runtime is not None
    assert list(runtime.devices()) == ["intel-rapl:0"]
    assert melodi_otel.instrument() is runtime
    assert program.prepare() is not None
    assert program.wake() is runtime
    melodi_otel.uninstrument()
    assert tracers._active_span_processor._span_processors == (captured,)


def test_a_measured_block_starts_it() -> None:
    """measure() in a prepared program has its meters before the block begins."""
    program.prepare()
    with melodi_otel.measure("x"):
        runtime = program.running()
        assert runtime is not None
        assert list(runtime.devices()) == ["intel-rapl:0"]


def test_started_by_code_is_not_prepared() -> None:
    """Where a runtime runs, preparing changes nothing."""
    runtime = melodi_otel.instrument()
    pre_instrument()
    assert program.running() is runtime
    assert program.prepare() is None


def test_disabled(monkeypatch: pytest.MonkeyPatch, provider: tuple[TracerProvider, CapturedSpans]) -> None:
    """MELODI_DISABLED=1: no entry does anything."""
    monkeypatch.setenv("MELODI_DISABLED", "1")
    tracers, captured = provider
    TransformersEntry().instrument(tracer_provider=tracers, skip_dep_check=True)
    pre_instrument()
    assert tracers._active_span_processor._span_processors == (captured,)
    assert program.running() is None


def test_a_bad_value_is_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A MELODI_* value that cannot be used is one error line per entry, without a stack, and no exception."""
    monkeypatch.setenv("MELODI_SAMPLE_HZ", "fast")
    pre_instrument()
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "MELODI_SAMPLE_HZ='fast' cannot be used" in record.getMessage()
    assert record.exc_info is None


def test_a_bad_source_is_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """A name that is no source is found out with the first work: one error line, and the requests go without joules."""
    monkeypatch.setenv("MELODI_SOURCES", "steam")
    program.prepare()
    runtime = program.wake()
    assert runtime is not None
    assert runtime.wait_found(10)
    errors = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "'steam' is no source" in errors[0]


def test_entries_are_what_the_package_says() -> None:
    """The entry points lead to these classes, and the extra that old versions of OpenTelemetry ask for is there."""
    points = importlib.metadata.entry_points(group="opentelemetry_instrumentor")
    found = {point.name: point.value for point in points if point.name.startswith("melodi")}
    assert found == {
        "melodi_transformers": "melodi_otel.zero_code:TransformersEntry",
        "melodi_asgi": "melodi_otel.zero_code:AsgiEntry",
    }
    (point,) = importlib.metadata.entry_points(group="opentelemetry_pre_instrument", name="melodi_otel")
    assert point.load() is pre_instrument
    assert "instruments" in (importlib.metadata.metadata("melodi-otel").get_all("Provides-Extra") or [])


PROGRAM = """
import sys, types
from melodi_otel import program
from melodi_otel.zero_code import AsgiEntry, TransformersEntry, pre_instrument
pre_instrument()
AsgiEntry().instrument(skip_dep_check=True)
TransformersEntry().instrument(skip_dep_check=True)
print(program.running(), [name for name in ("numpy", "torch", "transformers", "prometheus_client") if name in sys.modules])
if "off" in sys.argv:
    TransformersEntry().uninstrument()
import transformers
runtime = program.running()
print(runtime is not None)
import transformers.generation.utils as utils
print(hasattr(utils.GenerationMixin.generate, "__wrapped__"))
if runtime is not None:
    TransformersEntry().uninstrument()
    print(hasattr(utils.GenerationMixin.generate, "__wrapped__"))
"""

FAKE = {
    "transformers/__init__.py": "",
    "transformers/generation/__init__.py": "",
    "transformers/generation/utils.py": """
class GenerationMixin:
    def generate(self): ...
    def _has_unfinished_sequences(self): ...
    def _get_candidate_generator(self): ...
""",
}


@pytest.mark.parametrize(("words", "said"), [([], ["True", "True", "False"]), (["off"], ["False", "False"])])
def test_an_engine_starts_it(tmp_path: Path, words: list[str], said: list[str]) -> None:
    """Nothing heavy is loaded before the engine is; then its calls are patched, unless its entry was taken back."""
    for name, text in FAKE.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    root = str(Path(melodi_otel.__file__).parents[1])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *words], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["None []", *said]
