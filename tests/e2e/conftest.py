"""Real programs: what they need must be there where CI runs; for a person its absence is a skip with its reason."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from melodi_otel.testing.powercap import FakePowercap
from melodi_otel.testing.telemetry import OtlpReceiver

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def need() -> Callable[..., None]:
    """``need("torch", …)``: skip, in CI fail, unless these modules are installed."""

    def check(*modules: str) -> None:
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(f"not installed: {', '.join(missing)}")

    return check


@pytest.fixture(scope="session")
def peers_python() -> str:
    """The interpreter of the environment with the instrumentations of others; PYTHONPATH is handed on to what it runs."""
    python = Path(os.environ.get("MELODI_PEERS_PYTHON") or CHECKOUT / ".venv/peers/bin/python")
    if not python.exists():
        reason = f"{python} is not there: `scripts/venv peers torch` makes it"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return str(python)


@pytest.fixture
def live_package(tmp_path: Path) -> Iterator[Path]:
    """The root of a sysfs whose one package uses 60 W in real time."""
    tree = FakePowercap(tmp_path / "sys")
    tree.package(0, watts=60.0)
    with tree.live():
        yield tree.root


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    """Where OTLP arrives."""
    with OtlpReceiver() as made:
        yield made


@pytest.fixture
def environment(live_package: Path) -> Callable[..., dict[str, str]]:
    """``environment(receiver, NAME=value, …)``: this process's own, the fake package, and OTLP to ``receiver`` if given."""

    def make(to: OtlpReceiver | None = None, **more: str) -> dict[str, str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith(("MELODI_", "OTEL_"))}
        env |= {
            "MELODI_SYSFS_ROOT": str(live_package),
            "MELODI_NVML_LIBRARY": "/nowhere/libnvidia-ml.so.1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": os.pathsep.join([str(CHECKOUT), env.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "PYTHONUNBUFFERED": "1",
        }
        if to is not None:
            env |= {
                "OTEL_EXPORTER_OTLP_ENDPOINT": to.http_endpoint,
                "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                "OTEL_LOGS_EXPORTER": "none",
                "OTEL_BSP_SCHEDULE_DELAY": "100",
                "OTEL_SERVICE_NAME": "chat",
            }
        return env | more

    return make


@pytest.fixture
def free_port() -> Callable[[], int]:
    """``free_port()``: a port of the loopback that nobody listens on."""

    def find() -> int:
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            return int(holder.getsockname()[1])

    return find


@pytest.fixture
def run() -> Callable[[list[str], Mapping[str, str]], subprocess.CompletedProcess[str]]:
    """``run(words, env)``: a program that must succeed, and may not print a stack."""

    def start(words: list[str], env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(words, env=dict(env), capture_output=True, text=True, timeout=200, check=False)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return start


@pytest.fixture
def zero_code() -> list[str]:
    """The words that run a program under ``opentelemetry-instrument``."""
    tool = Path(sys.executable).with_name("opentelemetry-instrument")
    if not tool.exists():
        reason = "opentelemetry-instrument is not installed (opentelemetry-instrumentation)"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return [str(tool)]


class Server:
    """A server in a process of its own, known by the address that it prints."""

    def __init__(self, words: list[str], env: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(words, env=dict(env), stderr=subprocess.PIPE, text=True)
        self.said: list[str] = []
        self._address = threading.Event()
        self.url = ""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)
            if found := re.search(r"running on (http://[\d.:]+)", line):
                self.url = found[1]
                self._address.set()
        self._address.set()

    def ready(self) -> str:
        """Its URL, as soon as it serves."""
        assert self._address.wait(90)
        assert self.url, self.output
        return self.url

    @property
    def output(self) -> str:
        return "".join(self.said)

    def stop(self, by: signal.Signals = signal.SIGINT) -> int:
        """End it by a signal; its exit code.

        Raises:
            TimeoutExpired: it did not end; it is killed.
        """
        if self.process.poll() is None:
            self.process.send_signal(by)
        try:
            return self.process.wait(60)
        finally:
            self.kill()

    def kill(self) -> None:
        """End it, if it still runs."""
        self.process.kill()
        self.process.wait()
        self._reader.join(5)
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def serve() -> Iterator[Callable[[list[str], Mapping[str, str]], Server]]:
    """``serve(words, env)``: a :class:`Server` that does not outlive the test."""
    made: list[Server] = []

    def start(words: list[str], env: Mapping[str, str]) -> Server:
        made.append(Server(words, env))
        return made[-1]

    yield start
    for server in made:
        server.kill()
