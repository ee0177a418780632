"""The NVML source on a real GPU. Nothing here is exact: real counters move when they like."""

from __future__ import annotations

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from melodi_otel.clock import SystemClock
from melodi_otel.errors import Refused, SourceError
from melodi_otel.host_pids import HostPids
from melodi_otel.neighbours import Neighbours
from melodi_otel.sources.base import Settings
from melodi_otel.sources.nvml import NvmlSource, open_nvml

pytestmark = pytest.mark.gpu


@pytest.fixture
def source() -> Iterator[NvmlSource]:
    try:
        opened = open_nvml(Settings(clock=SystemClock(), environ=os.environ))
    except Refused as refused:
        pytest.skip(f"needs a real NVIDIA GPU: {refused.reason}")
    yield opened
    opened.close()


def test_a_real_gpu_is_named_by_uuid(source: NvmlSource) -> None:
    """Every device is a GPU with a UUID, a name and a driver version."""
    assert source.driver_version
    for device in source.devices:
        assert device.id.startswith("GPU-")
        assert device.name


def test_a_real_counter_rises_by_plausible_joules(source: NvmlSource) -> None:
    """Over two seconds every counter rises, by more than 1 W and less than 3 kW."""
    before = {reading.device: reading for reading in source.counters()}
    if not before:
        pytest.skip("no GPU here has an energy counter")
    time.sleep(2)
    for reading in source.counters():
        earlier = before[reading.device]
        watts = (reading.joules - earlier.joules) / ((reading.t_ns - earlier.t_ns) / 1e9)
        assert 1 < watts < 3000


def test_a_real_gauge_shows_plausible_watts(source: NvmlSource) -> None:
    """Every gauge shows more than 1 W and less than 3 kW."""
    source.counters()
    for reading in source.power():
        assert 1 < reading.watts < 3000


def test_real_slow_facts_are_in_range(source: NvmlSource) -> None:
    """Utilisation is within 0..1, memory is not negative, and the process list can be asked."""
    for state in source.states():
        assert state.utilization is None or 0 <= state.utilization <= 1
        assert state.memory_bytes is None or state.memory_bytes >= 0
    for device in source.devices:
        assert all(pid > 0 for pid in source.compute_pids(device.id))


WORK = """
import sys, time
import torch
end = time.monotonic() + float(sys.argv[1])
a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
b = torch.empty_like(a)
torch.mm(a, a, out=b)
torch.cuda.synchronize()
print("at work", flush=True)
while time.monotonic() < end:
    for _ in range(50):
        torch.mm(a, a, out=b)
    torch.cuda.synchronize()
"""


@pytest.fixture
def workers() -> Iterator[list[int]]:
    """Pids of two processes that multiply matrices on the first GPU at the same time, for at most half a minute."""
    if importlib.util.find_spec("torch") is None:
        pytest.skip("needs torch")
    started = [
        subprocess.Popen([sys.executable, "-c", WORK, "30"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        for worker in started:
            assert worker.stdout is not None
            assert worker.stderr is not None
            if "at work" not in worker.stdout.readline():
                pytest.skip(f"torch cannot compute on this GPU: {worker.stderr.read()[-300:]}")
        yield [worker.pid for worker in started]
    finally:
        for worker in started:
            worker.kill()
            worker.communicate()


def test_a_real_neighbour_has_a_share(
    source: NvmlSource, workers: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes that do the same work have each about half of the SM time; one alone is alone.

    "About" is 0.2 to 0.8: the driver's scheduler gives equal time slices, its samples are whole percents of short periods.
    """
    device, (ours, theirs), numbers = source.devices[0].id, workers, HostPids()
    told: list[tuple[float, bool | None]] = []
    neighbours = Neighbours(
        [source],
        SystemClock(),
        lambda: [ours],
        lambda d, t, share, others: told.append((share, others)),
        numbers=numbers,
    )
    neighbours.activity(1, time.monotonic_ns())

    def look() -> tuple[float, bool | None] | None:
        wait = neighbours.tick()
        assert wait is not None
        with capsys.disabled():
            print(f"\n  told {told[-1] if told else None}; the next look in {wait:.2f} s")
        time.sleep(min(wait, 10.0))
        return told[-1] if told else None

    found = source.processes(device)
    with capsys.disabled():
        print(f"\n{source.devices[0].name}, driver {source.driver_version}, nested {numbers.nested}; workers {workers}")
        print(f"  listed: compute {sorted(found.compute)}, graphics {sorted(found.graphics)}, unnamed {found.unnamed}")
        for line in _costs(source, device):
            print(f"  {line}")
    if not set(workers) <= found.pids:
        first = look()
        assert first is None or first[0] == 0.0, "a driver that does not name our processes made us foreign"
        pytest.skip("this driver does not name the processes of this machine here (a PID namespace?)")
    look()  # the request has just begun
    look()
    both = look()
    assert both is not None
    assert both[1] is True
    assert 0.2 < both[0] < 0.8
    os.kill(theirs, 9)
    deadline = time.monotonic() + 5
    while theirs in source.processes(device).pids and time.monotonic() < deadline:
        time.sleep(0.2)
    neighbours.tick()
    assert told[-1] == (0.0, False)


def _costs(source: NvmlSource, device: str, times: int = 10) -> Iterator[str]:
    """Milliseconds of each call that tells of processes."""
    api, handle = source._api, source._named(device).handle
    calls: dict[str, Callable[[], object]] = {
        name: (lambda call=getattr(api, name), more=more: call(handle, *more))
        for name, more in {
            "nvmlDeviceGetComputeRunningProcesses": (),
            "nvmlDeviceGetGraphicsRunningProcesses": (),
            "nvmlDeviceGetProcessUtilization": (0,),
            "nvmlDeviceGetProcessesUtilizationInfo": (0,),
        }.items()
        if hasattr(api, name)
    }
    for name, call in calls.items():
        spent: list[float] = []
        answer: object = None
        for _ in range(times):
            before = time.perf_counter()
            try:
                answer = len(call())  # type: ignore[arg-type]
            except (api.NVMLError, SourceError) as error:
                answer = str(error)
            spent.append((time.perf_counter() - before) * 1000)
        yield f"{name}: {statistics.median(spent):.3f} ms (max {max(spent):.3f}), answer {answer}"
    loads = sorted({(load.pid, load.sm_percent, load.t_us) for load in source.process_loads(device, 0)})
    yield f"samples (pid, percent, us before now): {[(p, sm, int(time.time() * 1e6) - t) for p, sm, t in loads][-8:]}"
