"""A real ``vllm serve`` with made-up meters beside it, and programs that run vLLM in one process.

vLLM is in an environment of its own (``scripts/venv vllm torch``); nothing here imports it. Every server and every program has a
place of its own: a runtime directory for its hub, a fake CPU package, fake GPUs, and a receiver of what it exports.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from melodi_otel.testing.nvml import FakeGpu, FakeNvml
from melodi_otel.testing.telemetry import OtlpReceiver

PACKAGE = "intel-rapl:0"
NAME = "tiny"
"""What servers call the model."""
FLAGS = ("--max-model-len", "512", "--max-num-seqs", "16", "--enforce-eager", "--dtype", "float32")
"""Of every server; a later flag of the same name overrides.

Single precision, because with bfloat16 vLLM uses a processor's matrix tiles (AMX) where it says that it has some, and in a
virtual machine that does not give them to every thread its worker dies of an illegal instruction now and then.
"""
ENGINE = {
    "max_model_len": 512,
    "max_num_seqs": 16,
    "enforce_eager": True,
    "distributed_executor_backend": "uni",
    "dtype": "float32",
}
"""Arguments of ``LLM`` for an engine in the program's own process (together with ``IN_PROCESS``)."""
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
START_S = 400.0
"""Patience with the start of a server: half a minute alone on two cores, more beside others."""


def gpu(number: int) -> str:
    """The UUID of a fake GPU."""
    return f"GPU-aaaaaaaa-0000-4000-8000-{number:012d}"


class Meters:
    """One CPU package of 60 W and GPUs of 200 W that stand still until :meth:`go`.

    Args:
        place: a ``HubPlace``: its powercap tree gets the package.
        gpus: how many.
        library: a fake NVML library built before.

    Raises:
        CompilerMissing: there is no gcc to build the fake NVML library.
    """

    def __init__(self, place: Any, gpus: int = 1, library: Path | None = None) -> None:
        self.names = [gpu(number) for number in range(gpus)]
        self.nvml = FakeNvml(
            place.path / "nvml", [FakeGpu(name, watts=0.0) for name in self.names], monotonic=True, library=library
        )
        self._tree = place.tree
        self._zone = place.tree.package(0, watts=60.0)
        self._live = contextlib.ExitStack()
        self._began = self._shown()

    @property
    def environ(self) -> dict[str, str]:
        """Variables of a program that is to see these meters; vLLM computes on the CPU, its devices are said to be the GPUs."""
        return {
            "MELODI_SOURCES": "rapl,nvml",
            "MELODI_METRICS_ADDR": "127.0.0.1:0",
            "MELODI_ENGINE_DEVICES": ",".join(self.names),
            **self.nvml.environ,
        }

    def go(self) -> None:
        """Let them count."""
        self._live.enter_context(self._tree.live())
        for index in range(len(self.names)):
            self.nvml.watts(index, 200.0)

    def still(self) -> dict[str, float]:
        """Stop them; J that each device's counter has counted since the start, exactly as it shows them."""
        for index in range(len(self.names)):
            self.nvml.watts(index, 0.0)
        self._live.close()
        before, now = {}, self._shown()
        while before != now:  # counters of GPUs move in steps of 0.1 s: the same twice is the last
            time.sleep(0.5)
            before, now = now, self._shown()
        return {name: joules - self._began[name] for name, joules in now.items()}

    def close(self) -> None:
        """Stop them and let go of the library."""
        self._live.close()
        self.nvml.close()

    def _shown(self) -> dict[str, float]:
        library = ctypes.CDLL(str(self.nvml.library))
        assert library.nvmlInitWithFlags(0) == 0
        found = {PACKAGE: self._zone.energy_uj / 1e6}
        for index, name in enumerate(self.names):
            handle, energy = ctypes.c_void_p(), ctypes.c_ulonglong()
            assert library.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0
            assert library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(energy)) == 0
            found[name] = energy.value / 1e3
        library.nvmlShutdown()
        return found


def environ(place: Any, meters: Meters, to: OtlpReceiver, more: Mapping[str, str | None]) -> dict[str, str]:
    """Variables of a vLLM on the CPU with these meters; None in ``more`` takes one away.

    MELODI_HUB is ``auto``, as it is where nobody set it, and PYTHONPATH is this checkout.
    """
    given = place.environ(to, MELODI_HUB="auto", **meters.environ)
    given |= {
        "MELODI_SPAN_WAIT": "30",  # two cores are busy with vLLM: joules that come late are no fault of the books
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; else a share of the machine's memory
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
    }
    given |= {name: value for name, value in more.items() if value is not None}
    return {name: value for name, value in given.items() if more.get(name, "") is not None}


class Sample(NamedTuple):
    """One line of a page of metrics."""

    name: str
    labels: dict[str, str]
    value: float


class VllmServer:
    """``vllm serve MODEL`` on the loopback.

    Attributes:
        url: where it serves, without a slash at the end.
        place: its ``HubPlace``: books, page and journal of its hub.
        meters: what it is measured by; they count from before its start.
        receiver: where its telemetry arrives; ``{otlp}`` in a flag is its address.
        trace: what its agent records; there is none where it has a shared hub.
        start_s: seconds until it was healthy.
    """

    def __init__(
        self,
        python: Path,
        model: Path,
        place: Any,
        meters: Meters,
        flags: Iterable[str] = (),
        env: Mapping[str, str | None] | None = None,
        *,
        agent: bool = False,
        before: Sequence[str] = (),
    ) -> None:
        self.place = place
        self.trace = place.path / "trace.jsonl"
        self._agent: Path | None = None
        self.meters = meters
        self.receiver = OtlpReceiver()
        self.receiver.__enter__()
        self.start_s = 0.0
        self._log = place.path / "vllm.log"
        with socket.socket() as holder:
            holder.bind(("127.0.0.1", 0))
            port = int(holder.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}"
        words = [*before, str(python.with_name("vllm")), "serve", str(model), "--served-model-name", NAME]
        words += ["--host", "127.0.0.1", "--port", str(port), *FLAGS]
        words += [flag.replace("{otlp}", self.receiver.http_endpoint) for flag in flags]
        meters.go()
        given = environ(place, meters, self.receiver, env or {})
        if agent:
            self._agent = place.path / "agent.sock"
            place.agent({**given, "MELODI_HUB": "local", "MELODI_RECORD": str(self.trace)}, self._agent)
            given["MELODI_HUB"] = str(self._agent)
        self._began = time.monotonic()
        with self._log.open("wb") as log:
            # A session of its own is a process group of its own: what it leaves behind can be found and ended.
            self.process = subprocess.Popen(
                words,
                env=given,
                cwd=place.path,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        """What its processes have said so far."""
        return self._log.read_text(errors="replace")

    def page(self, path: str = "/metrics") -> str:
        """A path of its hub's page."""
        return self.place.fetch(path, self._agent)

    def page_url(self) -> str:
        """Where its hub's page is, without a slash at the end."""
        return str(self.place.page(self._agent)).removesuffix("/metrics")

    def ready(self) -> None:
        """Wait until it is healthy.

        Raises:
            RuntimeError: it ended; with what it said.
            TimeoutError: it did not get there in 400 s.
        """

        def healthy() -> bool:
            if self.process.poll() is not None:
                raise RuntimeError(f"vllm ended with {self.process.returncode}:\n{self.log[-6000:]}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                    return answer.status == 200
            except OSError:
                return False

        self.place.until("vllm is healthy", healthy, START_S)
        self.start_s = time.monotonic() - self._began

    def pids(self) -> dict[int, str]:
        """Its processes and what each calls itself (``VLLM::EngineCore``, …; the launcher by its whole command line)."""
        found: dict[int, str] = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                state, _, group = path.joinpath("stat").read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.process.pid and state != "Z":
                    found[int(path.name)] = path.joinpath("cmdline").read_text().replace("\0", " ").strip()
            except (OSError, ValueError):
                continue  # it has just ended
        return found

    def samples(self) -> list[Sample]:
        """Everything on its own ``/metrics``."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=20) as answer:
            page = answer.read().decode()
        return [
            Sample(sample.name, dict(sample.labels), sample.value)
            for family in text_string_to_metric_families(page)
            for sample in family.samples
        ]

    def counted(self, name: str, **labels: str) -> float:
        """The sum over one of its own counters, ``vllm:`` left out, of the series that have these labels; 0.0: none."""
        return sum(
            sample.value
            for sample in self.samples()
            if sample.name == f"vllm:{name}" and labels.items() <= sample.labels.items()
        )

    def rest(self, seconds: float = 60.0) -> None:
        """Wait until no request runs or waits in it.

        Raises:
            TimeoutError: one still does.
        """
        self.place.until(
            "vllm is at rest",
            lambda: self.counted("num_requests_running") + self.counted("num_requests_waiting") == 0,
            seconds,
        )

    def stop(self) -> int:
        """End it by SIGTERM, as an operator does; its exit code. What is left of its group after half a minute is killed."""
        if self.process.poll() is None:
            self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(30)
        if not self._gone(5.0):  # while one of the group lives, its number is nobody else's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self._gone(30.0)
        return self.process.wait(30)

    def _gone(self, seconds: float) -> bool:
        """Whether all its processes have ended, after at most so many seconds."""
        end = time.monotonic() + seconds
        while (left := self.pids()) and time.monotonic() < end:
            time.sleep(0.1)
        return not left

    def close(self) -> None:
        """End everything of it."""
        self.stop()
        self.meters.close()
        self.receiver.close()
        self.place.close()


def run_program(python: Path, script: Path, env: Mapping[str, str], place: Any, **spec: Any) -> dict[str, Any]:
    """Run a program in vLLM's environment; what it wrote as JSON into the file that its one argument names as ``out``.

    Args:
        python: the interpreter.
        script: the program; its argument is ``spec`` as JSON.
        env: its variables.
        place: where its log (``program.log``) and ``out`` are.
        spec: what the program is to do.

    Raises:
        RuntimeError: it failed; with what it said.
    """
    out = place.path / "told.json"
    process = place.start([str(python), str(script), json.dumps({**spec, "out": str(out)})], env, "program")
    if code := process.wait(START_S):
        raise RuntimeError(f"{script.name} ended with {code}:\n{place.said('program')[-6000:]}")
    return json.loads(out.read_text())
