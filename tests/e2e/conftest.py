"""Real programs: what they need must be there where CI runs; for a person its absence is a skip with its reason."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
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
def interpreter() -> Callable[..., Path]:
    """``interpreter("peers")``: that of the environment ``.venv/peers``; ``MELODI_PEERS_PYTHON`` names another one."""

    def find(name: str, more: str = "") -> Path:
        python = Path(os.environ.get(f"MELODI_{name.upper()}_PYTHON") or CHECKOUT / f".venv/{name}/bin/python")
        if not python.exists():
            reason = f"{python} is not there: `scripts/venv {name}{more}` makes it"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
        return python

    return find


@pytest.fixture(scope="session")
def peers_python(interpreter: Callable[..., Path]) -> str:
    """The interpreter of the environment with the instrumentations of others; PYTHONPATH is handed on to what it runs."""
    return str(interpreter("peers", " torch"))


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
            "MELODI_HUB": "local",  # a hub that a test has not asked for would outlive it
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


@pytest.fixture(scope="session")
def system_program() -> Callable[[str], str]:
    """``system_program("prometheus")``: its path; missing it is a skip for a user and a failure where CI is set."""

    def find(name: str) -> str:
        found = shutil.which(name)
        if found is None:
            reason = f"{name} is not installed; on Debian: apt-get install {name}"
            (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
        assert found is not None
        return found

    return find


@pytest.fixture(scope="session")
def bench_module() -> Callable[[str], ModuleType]:
    """``bench_module("accuracy")``: the program ``bench/accuracy.py`` as a module."""

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"bench_{name}", CHECKOUT / "bench" / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(scope="session")
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


class HubPlace:
    """A runtime directory of its own with fake meters: programs and hubs that run here do not outlive it.

    Attributes:
        path: a directory with a short name (of a socket's path there are 107 bytes) that every user may enter; ``open`` in it
            is everybody's.
        tree: the fake powercap tree; its counters stand still until ``tree.live()``.
        socket: of the shared hub.
    """

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="mo", dir="/tmp"))
        self.path.chmod(0o755)
        self.runtime = self.path / "run"
        self.runtime.mkdir(mode=0o700)
        (self.path / "open").mkdir()
        (self.path / "open").chmod(0o777)
        self.tree = FakePowercap(self.path / "sys")
        self.socket = self.runtime / "melodi-otel" / "hub.sock"
        self.sockets = [self.socket]
        self._processes: list[subprocess.Popen[bytes]] = []

    def environ(self, to: OtlpReceiver | None = None, **more: str) -> dict[str, str]:
        """Variables of a program here; telemetry goes to ``to``."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(("MELODI_", "OTEL_"))}
        env |= {
            "XDG_RUNTIME_DIR": str(self.runtime),
            "MELODI_SYSFS_ROOT": str(self.tree.root),
            "MELODI_SOURCES": "rapl",
            "MELODI_NVML_LIBRARY": "/nowhere/libnvidia-ml.so.1",
            "MELODI_HUB": "shared",
            "MELODI_HUB_LINGER": "30",
            "MELODI_METRICS_ADDR": "off",
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
                "OTEL_METRIC_EXPORT_INTERVAL": "500",
                "OTEL_SERVICE_NAME": "chat",
            }
        return env | more

    def start(self, words: list[str], env: Mapping[str, str], name: str = "out") -> subprocess.Popen[bytes]:
        """Run ``words``; what it says goes to ``path/NAME.log``."""
        with (self.path / f"{name}.log").open("ab") as log:
            self._processes.append(subprocess.Popen(words, env=dict(env), stdout=log, stderr=log))
        return self._processes[-1]

    def program(
        self,
        env: Mapping[str, str],
        name: str = "out",
        before: list[str] | None = None,
        **spec: Any,
    ) -> subprocess.Popen[bytes]:
        """Run ``hub_program.py`` behind the words ``before``; it tells what it had in ``path/NAME``."""
        spec.setdefault("out", str(self.path / name))
        words = [*(before or []), sys.executable, str(Path(__file__).with_name("hub_program.py")), json.dumps(spec)]
        return self.start(words, env, name)

    def agent(
        self,
        env: Mapping[str, str],
        at: Path,
        *options: str,
        before: list[str] | None = None,
        named: str | None = None,
    ) -> subprocess.Popen[bytes]:
        """Run ``melodi-otel agent`` and wait until it serves at ``at``, which it knows as ``named``."""
        self.sockets.append(at)
        words = [*(before or []), sys.executable, "-m", "melodi_otel.cli.app", "agent", "--socket", named or str(at)]
        seen = len(self.said("agent"))
        started = self.start([*words, *options], env, "agent")

        def serves() -> bool:
            assert started.poll() is None, self.said("agent")
            return at.exists() and "programs connect to" in self.said("agent")[seen:]

        self.until("the agent serves", serves)
        return started

    def opened(self, at: Path | None = None) -> int:
        """Requests that the hub's journal has open or waiting for their joules."""
        state = self.journal(at).get("state", {})
        return len({so_far[0][1] for so_far in state.get("accrued", [])})

    def said(self, name: str = "out") -> str:
        """What the process ``name`` has said so far."""
        path = self.path / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def said_by_hub(self) -> str:
        """What the shared hub has said so far."""
        return self.socket.with_name("hub.sock.log").read_text(errors="replace")

    def told(self, name: str = "out") -> dict[str, Any]:
        """What the program ``name`` has told so far."""
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else {}

    def ready(self, *names: str) -> None:
        """Wait until these programs may begin."""
        for name in names:
            self.until(f"{name} is ready", lambda name=name: self.told(name))

    def finish(self, process: subprocess.Popen[bytes], name: str = "out", code: int = 0) -> dict[str, Any]:
        """Wait for its end; what it told.

        It must end with ``code`` and may not print a stack.
        """
        ended = process.wait(90)
        assert ended == code, f"{ended}: {self.said(name)}"
        assert "Traceback" not in self.said(name), self.said(name)
        return self.told(name)

    def until(self, what: str, condition: Callable[[], Any], seconds: float = 60.0) -> Any:
        """Wait until ``condition`` is true; its value.

        Raises:
            TimeoutError: it did not become so; with what everything here said.
        """
        end = time.monotonic() + seconds
        while not (found := condition()):
            if time.monotonic() > end:
                logs = [*self.path.glob("*.log"), *self.path.glob("run*/melodi-otel/*.log")]
                said = "\n".join(f"--- {log.name}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)
                raise TimeoutError(f"not within {seconds:g} s: {what}\n{said}")
            time.sleep(0.02)
        return found

    def pid(self, at: Path | None = None) -> int:
        """The hub's process, as the lock beside the socket tells; 0: none."""
        path = at or self.socket
        try:
            text = path.with_name(f"{path.name}.lock").read_text().strip()
            pid = int(text) if text else 0
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, ValueError):
            return 0
        return 0 if state == "Z" else pid

    def hub(self) -> int:
        """The pid of the shared hub, as soon as it serves."""
        return self.until("a hub serves", lambda: self.socket.exists() and self.journal() and self.pid())

    def page(self, at: Path | None = None) -> str | None:
        """Where the hub serves metrics, or None."""
        path = at or self.socket
        try:
            return path.with_name(f"{path.name}.metrics").read_text().strip() or None
        except OSError:
            return None

    def fetch(self, path: str = "/metrics", at: Path | None = None) -> str:
        """A path of the hub's page."""
        url = self.until("the hub tells its page", lambda: self.page(at))
        with urllib.request.urlopen(url.removesuffix("/metrics") + path, timeout=20) as answer:
            return answer.read().decode()

    def journal(self, at: Path | None = None) -> dict[str, Any]:
        """The hub's journal, empty where there is none; devices of its state by id."""
        path = at or self.socket
        try:
            found = msgspec.msgpack.decode(path.with_name(f"{path.name}.journal").read_bytes())
        except OSError:
            return {}
        found["devices"] = {device["device"]["id"]: device for device in found["state"]["devices"]}
        return found

    def settled(self, at: Path | None = None) -> dict[str, dict[str, Any]]:
        """The books by device, from the journal, once nothing is open or under way in them.

        ``counted`` is what requests, buckets and residual sum to, ``usable`` the attributed joules that a span may show.
        """

        def done() -> dict[str, Any] | None:
            state = self.journal(at)
            devices = state.get("devices", {})
            still = devices and all(device["in_flight"] == 0 for device in devices.values())
            return devices if still and not state["state"]["accrued"] else None

        found = self.until("every joule is settled", done)
        for device in found.values():
            buckets = [bucket["joules"] for bucket in device["buckets"]]
            device["counted"] = device["settled"] + device["residual"] + sum(buckets)
            parts = [part["joules"] for part in device["attributed"] if part["quality"] != "unavailable"]
            device["usable"] = sum(parts)
            names = {bucket["bucket"] for bucket in device["buckets"]}
            device["in"] = {name: sum(b["joules"] for b in device["buckets"] if b["bucket"] == name) for name in names}
        return found

    def close(self) -> None:
        """End what still runs here and take the directory away."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for at in self.sockets:
            pid = self.pid(at)
            if pid and b"melodi_otel" in Path(f"/proc/{pid}/cmdline").read_bytes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
                    os.kill(pid, signal.SIGKILL)
                self.until("the hub is gone", lambda at=at: not self.pid(at))
        shutil.rmtree(self.path)


@pytest.fixture
def hub_place() -> Iterator[HubPlace]:
    """Where programs, hubs and fake meters of one test are."""
    place = HubPlace()
    yield place
    place.close()


@pytest.fixture(scope="session")
def new_hub_place() -> Callable[[], HubPlace]:
    """``new_hub_place()``: one more place, which whoever asks for it closes."""
    return HubPlace
