"""A whole program, metered: its spans and metrics at an OTLP receiver, its page for Prometheus, its errors its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.metrics import Histogram

from melodi_otel.telemetry.sdk import keeps_exemplars
from melodi_otel.testing.powercap import FakePowercap
from melodi_otel.testing.telemetry import OtlpReceiver, plain

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
PROGRAM = Path(__file__).with_name("program.py")
WATTS = 60.0


@pytest.fixture
def sysfs(tmp_path: Path, need: Callable[..., None]) -> Iterator[Path]:
    """A package of 60 W that counts in real time."""
    need("torch")
    tree = FakePowercap(tmp_path / "sys")
    tree.package(0, watts=WATTS)
    with tree.live():
        yield tree.root


def run(sysfs: Path, *words: str, **environ: str) -> str:
    """Output of the program, which must succeed and say nothing on standard error."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MELODI_", "OTEL_"))}
    env |= {"MELODI_SYSFS_ROOT": str(sysfs), "MELODI_NVML_LIBRARY": "/nowhere/libnvidia-ml.so.1", "HF_HUB_OFFLINE": "1"}
    env |= {"OMP_NUM_THREADS": "1", **environ}
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *words], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_spans_and_metrics_arrive(sysfs: Path, protocol: str) -> None:
    """Every request is one span with exact tokens and measured joules; the metrics' sums are those of the spans."""
    with OtlpReceiver() as receiver:
        endpoint = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
        run(sysfs, OTEL_EXPORTER_OTLP_ENDPOINT=endpoint, OTEL_EXPORTER_OTLP_PROTOCOL=protocol, OTEL_SERVICE_NAME="chat")
        spans = receiver.spans(4)
        metrics = {metric.name: metric for metric in receiver.metrics(1)}
        resources = receiver.resources()
    assert len(spans) == 4
    found = [plain(span.attributes) for span in spans]
    assert [a.get("gen_ai.usage.output_tokens") for a in found[:2]] == [64, 32]
    assert [a.get("error.type") for a in found[2:]] == ["ValueError", "KeyboardInterrupt"]
    for attributes in found:
        assert attributes["melodi.energy.total"] > 0
        assert attributes["melodi.energy.quality"] in ("measured", "interpolated")
        assert attributes["melodi.energy.source"] == ["rapl.package"]
        assert attributes["melodi.energy.scope"] == "cpu"
        assert "melodi.energy.rollup" not in attributes
    assert all(resource.get("service.name") == "chat" for resource in resources)
    energy = metrics["melodi.request.energy"]
    total = sum(point.sum for point in energy.histogram.data_points)
    assert total == pytest.approx(sum(attributes["melodi.energy.total"] for attributes in found), rel=1e-9)
    kept = keeps_exemplars(Histogram)
    assert any(point.exemplars for point in energy.histogram.data_points) is kept
    booked = sum(
        point.as_double
        for name in ("melodi.energy.attributed", "melodi.energy.unattributed", "melodi.energy.residual")
        if name in metrics
        for point in metrics[name].sum.data_points
    )
    counted = sum(point.as_double for point in metrics["hw.energy"].sum.data_points)
    assert booked == pytest.approx(counted, rel=1e-9)


def test_head_sampling_does_not_hide_requests(sysfs: Path) -> None:
    """With ratio 0 no span leaves, and every request is metered all the same."""
    with OtlpReceiver() as receiver:
        out = run(
            sysfs,
            OTEL_EXPORTER_OTLP_ENDPOINT=receiver.http_endpoint,
            OTEL_EXPORTER_OTLP_PROTOCOL="http/protobuf",
            OTEL_TRACES_SAMPLER="traceidratio",
            OTEL_TRACES_SAMPLER_ARG="0",
        )
        metrics = {metric.name: metric for metric in receiver.metrics(1)}
        assert receiver.spans() == []
    assert "measured True True" in out
    assert sum(point.count for point in metrics["melodi.request.energy"].histogram.data_points) == 4


def test_the_page_is_clean(sysfs: Path) -> None:
    """The scrape endpoint shows the contract's names, and promtool has nothing to say."""
    out = run(sysfs, MELODI_METRICS_ADDR="127.0.0.1:0", MELODI_ENERGY_PRICE="0.3")
    page = out[out.index("# HELP") :]
    for name in (
        "hw_energy_joules_total",
        "melodi_request_energy_joules_bucket",
        "melodi_energy_attributed_joules_total",
    ):
        assert name in page
    promtool = shutil.which("promtool")
    if promtool is None:
        reason = "promtool is not installed; on Debian: apt-get install prometheus"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    done = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_without_a_meter_nothing_breaks(tmp_path: Path) -> None:
    """No meter: the program runs as ever, its requests are seen, its joules are None and never 0."""
    (tmp_path / "sys").mkdir()
    out = run(tmp_path / "sys")
    assert "measured True False" in out
    assert "recent 5" in out


def test_disabled(sysfs: Path) -> None:
    """MELODI_DISABLED=1: nothing is patched, measured or kept."""
    out = run(sysfs, MELODI_DISABLED="1")
    assert "measured True False" in out
    assert "recent 0" in out
