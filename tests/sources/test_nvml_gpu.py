"""The NVML source on a real GPU. Nothing here is exact: real counters move when they like."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from melodi_otel.clock import SystemClock
from melodi_otel.errors import Refused
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
