"""The resource: of our own providers, and on an application's by the SDK's own ways to a detector."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource

from melodi_otel.config import Config
from melodi_otel.identity import Places
from melodi_otel.telemetry import detector
from melodi_otel.telemetry.detector import IdentityDetector, host_resource


@pytest.fixture
def places(tmp_path: Path) -> Places:
    """A machine that has a machine id and nothing else."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/machine-id").write_text("abc123\n")
    return Places(*(str(tmp_path / name) for name in ("", "sys", "proc", "proc")))


def test_host_id_of_the_machine(places: Places) -> None:
    """host.id is the machine id; the SDK's own attributes are there too."""
    found = host_resource(Config(), {}, places=places).attributes
    assert found["host.id"] == "abc123"
    assert found["host.name"]
    assert found["telemetry.sdk.language"] == "python"


def test_host_id_of_the_user(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """MELODI_HOST_ID wins over the machine id, OTEL_RESOURCE_ATTRIBUTES over both."""
    assert host_resource(Config(host_id="mine"), {}, places=places).attributes["host.id"] == "mine"
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "host.id=theirs,host.name=given")
    found = host_resource(Config(host_id="mine"), os.environ, places=places).attributes
    assert (found["host.id"], found["host.name"]) == ("theirs", "given")


def test_host_id_unknown(places: Places) -> None:
    """Without either, host.id is absent."""
    Path(places.root, "etc/machine-id").unlink()
    assert "host.id" not in host_resource(Config(), {}, places=places).attributes


def test_the_detectors_that_were_asked_for(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """A detector that the application asked for is believed before ours, MELODI_HOST_ID before it."""
    told = Resource({"host.id": "i-0abc", "cloud.provider": "aws"})
    monkeypatch.setattr(Resource, "create", staticmethod(lambda: told))
    found = host_resource(Config(), {}, places=places).attributes
    assert (found["host.id"], found["cloud.provider"]) == ("i-0abc", "aws")
    assert host_resource(Config(host_id="mine"), {}, places=places).attributes["host.id"] == "mine"


def test_the_detector_reads_its_settings(places: Places, tmp_path: Path) -> None:
    """MELODI_HOST_ID and the roots hold for the detector; a value that cannot be used is somebody else's to report."""
    (tmp_path / "proc2").mkdir()
    (tmp_path / "proc2/cpuinfo").write_text("model name : A CPU\n")
    environ = {"MELODI_HOST_ID": "mine", "MELODI_PROCFS_ROOT": str(tmp_path / "proc2"), "MELODI_DISABLED": "maybe"}
    found = IdentityDetector(environ=environ).detect().attributes
    assert (found["host.id"], found["host.cpu.model.name"]) == ("mine", "A CPU")


def test_disabled_finds_nothing(places: Places) -> None:
    """MELODI_DISABLED=1 turns this off too."""
    assert dict(IdentityDetector(environ={"MELODI_DISABLED": "1"}, places=places).detect().attributes) == {}


@pytest.mark.parametrize("raise_on_error", [False, True])
def test_it_never_raises(
    raise_on_error: bool, places: Places, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """An error of ours is one warning and an empty resource."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(detector, "identify", broken)
    assert dict(IdentityDetector(raise_on_error, environ={}, places=places).detect().attributes) == {}
    assert [record.levelname for record in caplog.records] == ["WARNING"]


SHOW = """
import json, sys
from opentelemetry.sdk.resources import Resource
from opentelemetry import trace
if "config" in sys.argv:
    from opentelemetry.sdk._configuration import _OTelSDKConfigurator
    _OTelSDKConfigurator().configure()
    resource = trace.get_tracer_provider().resource
else:
    resource = Resource.create()
assert not [name for name in sys.modules if name in ("torch", "numpy", "pynvml", "prometheus_client", "grpc")]
print(json.dumps(dict(resource.attributes)))
"""


def shown(*words: str, **variables: str) -> dict[str, Any]:
    """The resource that a new process gets from its SDK."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "K8S", "KUBE"))}
    done = subprocess.run(
        [sys.executable, "-c", SHOW, *words],
        env={**environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout.splitlines()[-1])


def test_by_the_variable() -> None:
    """OTEL_EXPERIMENTAL_RESOURCE_DETECTORS=melodi_otel: the attributes are on the resource; OTEL_RESOURCE_ATTRIBUTES wins.

    Nothing heavy is imported for it.
    """
    told = {"MELODI_HOST_ID": "h1", "SLURM_JOB_ID": "7", "SLURM_PROCID": "3"}
    assert "host.id" not in shown(**told)
    found = shown(**told, OTEL_EXPERIMENTAL_RESOURCE_DETECTORS="melodi_otel", OTEL_RESOURCE_ATTRIBUTES="slurm.job.id=8")
    assert (found["host.id"], found["slurm.job.id"], found["slurm.task.rank"]) == ("h1", "8", 3)
    assert found["telemetry.sdk.language"] == "python"


CONFIG = """\
file_format: "1.0"
resource:
  attributes:
    - name: service.name
      value: shop
    - name: host.name
      value: written-here
  detection/development:
    detectors:
      - melodi_otel:
tracer_provider:
  processors:
    - simple:
        exporter:
          console:
"""


@pytest.mark.skipif(
    importlib.util.find_spec("opentelemetry.configuration") is None,
    reason="this OpenTelemetry reads no configuration file (opentelemetry-configuration is not installed)",
)
def test_by_a_configuration_file(tmp_path: Path) -> None:
    """In a configuration file the detector has the same name, and what the file says wins."""
    (tmp_path / "otel.yaml").write_text(CONFIG)
    found = shown("config", OTEL_CONFIG_FILE=str(tmp_path / "otel.yaml"), MELODI_HOST_ID="h1")
    assert (found["service.name"], found["host.id"], found["host.name"]) == ("shop", "h1", "written-here")
    assert found["host.arch"]
