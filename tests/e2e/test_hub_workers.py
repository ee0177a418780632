"""Workers of one server share one hub: every joule of package and GPU is told once, and the machine's energy published once."""

from __future__ import annotations

import ctypes
import json
import re
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from melodi_otel.testing.nvml import CompilerMissing, FakeGpu, FakeNvml
from melodi_otel.testing.telemetry import OtlpReceiver, plain

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(240),
    pytest.mark.skipif(sys.platform != "linux", reason="powercap and hubs are Linux's here"),
]

HERE = Path(__file__).parent
GPU = "GPU-aaaaaaaa-0000-4000-8000-000000000001"
TYPES = {"intel-rapl:0": "melodi.energy.cpu", GPU: "melodi.energy.gpu"}


@pytest.fixture
def gpu(hub_place: Any) -> Iterator[FakeNvml]:
    """A GPU that uses nothing until it is told to, in real time."""
    try:
        with FakeNvml(hub_place.path / "nvml", [FakeGpu(GPU, watts=0.0)], monotonic=True) as made:
            yield made
    except CompilerMissing as missing:
        pytest.skip(str(missing))


def shown(gpu: FakeNvml) -> int:
    """mJ that the GPU's counter shows."""
    library = ctypes.CDLL(str(gpu.library))
    assert library.nvmlInitWithFlags(0) == 0
    handle, energy = ctypes.c_void_p(), ctypes.c_ulonglong()
    assert library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)) == 0
    assert library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(energy)) == 0
    library.nvmlShutdown()
    return energy.value


class Load:
    """Counters that stood still before the first request, and stand still again after the last joule.

    So what the books say is compared with the counters themselves, exactly.
    """

    def __init__(self, place: Any, gpu: FakeNvml) -> None:
        self.place, self.gpu = place, gpu
        self.zone = place.tree.package(0, watts=60.0)
        self.before = {"intel-rapl:0": self.zone.energy_uj / 1e6, GPU: shown(gpu) / 1e3}

    def begin(self) -> None:
        self.live = self.place.tree.live()
        self.live.__enter__()
        self.gpu.watts(0, 200.0)
        self.since_ns = time.time_ns()

    def end(self) -> dict[str, float]:
        """J that each counter counted."""
        self.live.__exit__(None, None, None)
        self.gpu.watts(0, 0.0)
        after = -1
        while (now := shown(self.gpu)) != after:  # it moves in steps of 0.1 s: the same twice is the last
            after = now
            time.sleep(0.5)
        return {
            "intel-rapl:0": self.zone.energy_uj / 1e6 - self.before["intel-rapl:0"],
            GPU: after / 1e3 - self.before[GPU],
        }


def check(load: Load, receiver: OtlpReceiver, services: set[str], requests: int) -> dict[str, dict[str, float]]:
    """The claims of this file; the figures behind them."""
    place = load.place
    spans = receiver.spans(requests, 60.0, lambda span: "melodi.energy.quality" in plain(span.attributes))
    told = [plain(span.attributes) for span in spans]
    counted = load.end()

    def caught_up() -> dict[str, Any] | None:
        books = {book["device"]: book for book in json.loads(place.fetch("/status.json"))["books"]}
        same = all(abs(books[name]["measured_joules"] - joules) < 1e-6 for name, joules in counted.items())
        return books if same else None

    books = place.until(f"the hub has read all of {counted}", caught_up)
    figures: dict[str, dict[str, float]] = {}
    for name, attribute in TYPES.items():
        book = books[name]
        names = ("idle", "tail", "loading", "foreign", "unsampled", "residual")
        buckets = sum(book[f"{bucket}_joules"] for bucket in names)
        in_spans = sum(attributes.get(attribute, 0.0) for attributes in told)
        figures[name] = {"spans": in_spans, "buckets": buckets, "counter": counted[name]}
        assert in_spans > 0
        assert in_spans + buckets == pytest.approx(counted[name], rel=1e-9)
        assert book["in_flight_joules"] == 0
    page = place.fetch()
    shown_joules = dict(re.findall(r'^hw_energy_joules_total\{.*?hw_id="([^"]+)".*?\} (\S+)$', page, re.MULTILINE))
    assert {name: float(joules) for name, joules in shown_joules.items()} == pytest.approx(counted, rel=1e-9)
    lines = re.findall(r'^melodi_requests_total\{.*?service_name="([^"]+)".*?\} (\S+)$', page, re.MULTILINE)
    by_service: dict[str, float] = {}
    for service, number in lines:
        by_service[service] = by_service.get(service, 0.0) + float(number)
    assert set(by_service) == services
    assert sum(by_service.values()) == len(told) == requests
    assert receiver.services("hw.energy", load.since_ns) == {"melodi-otel-hub"}
    assert services <= receiver.services("melodi.request.energy")
    assert place.pid()
    return figures


def environ(place: Any, gpu: FakeNvml, receiver: OtlpReceiver, port: int) -> dict[str, str]:
    settings = {"MELODI_HUB": "auto", "MELODI_SOURCES": "rapl,nvml", "MELODI_METRICS_ADDR": f"127.0.0.1:{port}"}
    settings["MELODI_ENGINE_DEVICES"] = GPU  # the tiny model computes on the CPU; whoever says so is believed
    return place.environ(receiver, **settings, **gpu.environ)


def test_spawned_workers(
    hub_place: Any,
    gpu: FakeNvml,
    receiver: OtlpReceiver,
    free_port: Callable[[], int],
    need: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four spawned processes that instrument themselves find each other."""
    need("torch", "transformers")
    load = Load(hub_place, gpu)
    env = environ(hub_place, gpu, receiver, free_port())
    words = [sys.executable, str(HERE / "hub_spawned.py"), str(hub_place.path), "12"]
    program = hub_place.start(words, env)
    hub_place.until("four workers are ready", lambda: len(list(hub_place.path.glob("ready-*"))) == 4, 120)
    hub_place.until("the hub publishes", lambda: "hw_energy_joules_total{" in hub_place.fetch())
    load.begin()
    (hub_place.path / "go").touch()
    assert program.wait(120) == 0, hub_place.said()
    figures = check(load, receiver, {f"worker-{number}" for number in range(4)}, 48)
    with capsys.disabled():
        print(f"\n  spawned: {figures}", end="")


def test_preforked_workers(
    hub_place: Any,
    gpu: FakeNvml,
    receiver: OtlpReceiver,
    free_port: Callable[[], int],
    need: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Four workers that gunicorn forks from a metered master do too; the master had no request and has no hub."""
    need("torch", "transformers", "gunicorn")
    load = Load(hub_place, gpu)
    env = environ(hub_place, gpu, receiver, free_port())
    address = f"127.0.0.1:{free_port()}"
    words = [sys.executable, "-m", "gunicorn", "--preload", "--workers", "4", "--bind", address, "--chdir", str(HERE)]
    server = hub_place.start([*words, "--graceful-timeout", "20", "hub_wsgi:app"], env)

    def ask(tokens: int) -> int:
        with urllib.request.urlopen(f"http://{address}/{tokens}", timeout=60) as answer:
            return json.loads(answer.read())["pid"]

    def serves() -> bool:
        assert server.poll() is None, hub_place.said()
        try:
            return bool(ask(0))
        except OSError:
            return False

    hub_place.until("gunicorn serves", serves, 120)
    pids = {ask(5)}  # the first request of a worker starts the hub
    asked = 1
    hub_place.until("the hub publishes instead of the master", lambda: "hw_energy_joules_total{" in hub_place.fetch())
    load.begin()
    with ThreadPoolExecutor(8) as pool:
        while len(pids) < 4 or asked < 48:
            assert asked < 800, "the kernel gives all requests to some of the workers"
            pids |= set(pool.map(ask, [20 + 10 * (number % 5) for number in range(16)]))
            asked += 16
    figures = check(load, receiver, {"chat"}, asked)
    server.terminate()
    assert server.wait(60) == 0, hub_place.said()
    with capsys.disabled():
        print(f"\n  pre-forked: {asked} requests, {len(pids)} workers, {figures}", end="")
