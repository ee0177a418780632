"""Windows, macOS and WSL, simulated: no machine of those kinds was at hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from melodi_otel.errors import Refused
from melodi_otel.sources import nvml_library
from melodi_otel.sources.base import Settings
from melodi_otel.sources.discovery import describe, discover
from melodi_otel.sources.powercap import find_zones, is_wsl
from melodi_otel.sources.rapl_ways import open_rapl_ways
from melodi_otel.testing.clock import ManualClock

THIRD_PARTY = (
    "asyncio, concurrent.futures, ctypes, ctypes.util, email, http.server, importlib.metadata, json, logging.config, "
    "multiprocessing, platform, psutil, shutil, socketserver, ssl, subprocess, tempfile, typing, urllib.request, uuid, "
    "numpy, msgspec, prometheus_client, rich.console, rich.table, typer, typer.testing, wrapt, opentelemetry.trace, "
    "opentelemetry.metrics, opentelemetry.sdk.trace, opentelemetry.sdk.trace.export, opentelemetry.sdk.metrics, "
    "opentelemetry.sdk.metrics.export, opentelemetry.sdk.resources, opentelemetry.propagate, "
    "opentelemetry.exporter.prometheus, opentelemetry.instrumentation.instrumentor, "
    "opentelemetry.exporter.otlp.proto.grpc.trace_exporter, opentelemetry.exporter.otlp.proto.http.trace_exporter"
)

PROBE = """
import importlib, os, pkgutil, socket, select, sys
for name in {third_party!r}.split(", "):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
platform = sys.argv[1]
missing = {{"win32": ("fcntl", "resource", "pwd", "grp", "termios", "syslog", "posix"), "darwin": ()}}[platform]
for name in missing:
    sys.modules[name] = None
sys.platform = platform
if platform == "win32":
    for name in ("fork", "register_at_fork", "getuid", "geteuid", "getpgid", "setsid", "killpg", "pread", "sysconf",
                 "O_CLOEXEC", "uname", "sched_getaffinity", "pipe2", "mkfifo", "WNOHANG", "getloadavg", "chown"):
        if hasattr(os, name):
            delattr(os, name)
    for name in ("AF_UNIX", "SO_PEERCRED", "socketpair", "CMSG_LEN", "SCM_RIGHTS"):
        if hasattr(socket, name):
            delattr(socket, name)
    for name in ("epoll", "poll", "EPOLLIN"):
        if hasattr(select, name):
            delattr(select, name)
else:
    for module, names in ((os, ("sched_getaffinity", "pipe2")), (socket, ("SO_PEERCRED",)), (select, ("epoll",))):
        for name in names:
            if hasattr(module, name):
                delattr(module, name)
import melodi_otel
wrong = []
for module in pkgutil.walk_packages(melodi_otel.__path__, "melodi_otel."):
    if module.name.startswith("melodi_otel.cli.startup"):
        continue
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name in missing or error.name.startswith("melodi_otel"):
            wrong.append((module.name, repr(error)))  # another library that is not installed here is no fault of ours
    except Exception as error:
        wrong.append((module.name, repr(error)))
assert not wrong, wrong
"""

MEASURE = """
import melodi_otel
from melodi_otel import config
with melodi_otel.measure("x") as m:
    pass
assert m.joules is None
from melodi_otel.cli.doctor import examine
from melodi_otel.config import Config
from melodi_otel.runtime import Runtime
report = examine(Config(), Runtime(Config(), environ={}).discovery, {})
assert report["exit_code"] == 3
states = {refusal["source"]: refusal["state"] for refusal in report["refusals"]}
assert states["rapl"] == "unsupported_platform", states
assert "MELODI_SOURCES=estimate" not in report["verdict"]
print("ok")
"""


def run(code: str, platform: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, platform], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_every_module_can_be_imported(platform: str) -> None:
    """No module needs at import what that system does not have (simulated)."""
    done = run(PROBE.format(third_party=THIRD_PARTY), platform)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("platform", ["win32", "darwin"])
def test_measure_and_doctor_work_without_a_meter(platform: str) -> None:
    """A block is measured with no joules, and doctor says why, where RAPL cannot be (simulated)."""
    done = run(PROBE.format(third_party=THIRD_PARTY) + MEASURE, platform)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "ok"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    (tmp_path / "proc/sys/kernel").mkdir(parents=True)
    (tmp_path / "sys").mkdir()
    return Settings(ManualClock(), {}, sysfs=str(tmp_path / "sys"), procfs=str(tmp_path / "proc"))


def wsl(settings: Settings) -> Settings:
    """As WSL 2 shows itself."""
    root = Path(settings.procfs)
    (root / "sys/kernel/osrelease").write_text("5.15.167.4-microsoft-standard-WSL2\n", encoding="ascii")
    (root / "cpuinfo").write_text("flags\t: fpu hypervisor\n", encoding="ascii")
    return settings


@pytest.mark.parametrize(
    ("platform", "reason", "fix"),
    [
        ("darwin", "macOS has no RAPL interface", 'pip install "melodi-otel[apple]"'),
        ("win32", "Windows has no powercap", "NVIDIA GPUs are measured here"),
        ("freebsd14", "this is freebsd14", "measure on Linux"),
    ],
)
def test_rapl_elsewhere(settings: Settings, platform: str, reason: str, fix: str) -> None:
    """The reason names the system, the fix what there is instead; perf events are not mentioned."""
    with pytest.raises(Refused, match=reason) as caught:
        open_rapl_ways(settings, platform=platform)
    assert caught.value.state == "unsupported_platform"
    assert fix in caught.value.fix
    assert "perf" not in caught.value.reason


def test_rapl_in_wsl(settings: Settings) -> None:
    """WSL is a virtual machine too, and is called by its name, with what works there."""
    assert not is_wsl(settings.procfs)
    with pytest.raises(Refused, match="the kernel of WSL has no powercap") as caught:
        find_zones(wsl(settings), "linux")
    assert "MELODI_SOURCES=nvml,estimate" in caught.value.fix


def test_the_first_line_in_wsl(settings: Settings) -> None:
    """What a person reads there."""
    line = describe(discover(wsl(settings), ("rapl",), plugins={}), "linux")
    assert "rapl: the kernel of WSL has no powercap" in line


def refused(platform: str) -> Refused:
    return nvml_library.refusal(nvml_library.LIBRARY_NOT_FOUND, RuntimeError(), platform)


def test_nvml_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """macOS has no driver, Windows names its own library, WSL is sent to Windows for it, Linux as ever."""
    assert refused("darwin").state == "absent"
    assert "nvml.dll" in refused("win32").reason
    monkeypatch.setattr(nvml_library, "WSL_LIBRARY", str(tmp_path / "nothing/libnvidia-ml.so.1"))
    assert "NVIDIA runtime" in refused("linux").fix
    monkeypatch.setattr(nvml_library, "WSL_LIBRARY", str(tmp_path / "libnvidia-ml.so.1"))
    assert "install the NVIDIA driver on Windows, not here" in refused("linux").fix


def test_wsl_library_that_the_loader_does_not_know(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where the binding finds no library, WSL's own is loaded by its path."""
    path = tmp_path / "libnvidia-ml.so.1"
    path.touch()
    monkeypatch.setattr(nvml_library, "WSL_LIBRARY", str(path))
    asked: list[str | None] = []

    class Api:
        class NVMLError(Exception):
            value = nvml_library.LIBRARY_NOT_FOUND

        def nvmlInit(self) -> None:
            if asked[-1] is None:
                raise self.NVMLError

    def load(library: str | None) -> Api:
        asked.append(library)
        return Api()

    monkeypatch.setattr(nvml_library, "load_api", load)
    nvml_library.open_library(None)
    assert asked == [None, str(path)]
