"""``opentelemetry-instrument`` in a house of its own: another distro, libraries left out, values that cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from melodi_otel.testing.telemetry import OtlpReceiver, plain

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
PROGRAM = [sys.executable, str(Path(__file__).with_name("children.py")), "child"]

DISTRO = """
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.instrumentation.distro import BaseDistro
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

class Distro(BaseDistro):
    def _configure(self, **kwargs): ...

class Configurator:
    def configure(self, **kwargs):
        provider = TracerProvider(resource=Resource({"service.name": "house"}))
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        trace.set_tracer_provider(provider)
"""


def test_another_distro(
    tmp_path: Path,
    need: Callable[..., None],
    receiver: OtlpReceiver,
    environment: Callable[..., dict[str, str]],
    zero_code: list[str],
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """A distro with a configurator of its own, as companies have: its provider's spans carry joules."""
    need("torch", "transformers")
    (tmp_path / "house.py").write_text(DISTRO)
    info = tmp_path / "house-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: house\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[opentelemetry_distro]\nhouse = house:Distro\n[opentelemetry_configurator]\nhouse = house:Configurator\n"
    )
    env = environment(receiver, OTEL_PYTHON_DISTRO="house", OTEL_PYTHON_CONFIGURATOR="house")
    env["PYTHONPATH"] = os.pathsep.join([env["PYTHONPATH"], str(tmp_path)])
    run([*zero_code, *PROGRAM], env)
    (span,) = receiver.spans(1)
    assert plain(span.attributes)["melodi.energy.total"] > 0
    # its spans go by the distro's provider; metrics, for which it has none, by our own
    assert {resource["service.name"] for resource in receiver.resources()} == {"house", "chat"}


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("OTEL_PYTHON_DISABLED_INSTRUMENTATIONS", "melodi_transformers", ""),
        ("MELODI_DISABLED", "1", ""),
        ("MELODI_SAMPLE_HZ", "fast", "MELODI_SAMPLE_HZ='fast' cannot be used"),
    ],
)
def test_left_out(
    name: str,
    value: str,
    said: str,
    need: Callable[..., None],
    receiver: OtlpReceiver,
    environment: Callable[..., dict[str, str]],
    zero_code: list[str],
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    """A library that is left out, the meter turned off, a value that cannot be used: the program runs, with no span of ours."""
    need("torch", "transformers")
    lines = run([*zero_code, *PROGRAM], environment(receiver, **{name: value})).stderr.splitlines()
    ours = [line for line in lines if "melodi_otel" in line]
    assert all(said and said in line for line in ours)
    assert bool(ours) is bool(said)
    assert receiver.spans() == []
