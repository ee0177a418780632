"""GPUs inside requests: sums over boards, counters that step, a driver that is reloaded, boards that are lost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from melodi_otel.testing.machine import Machine
from melodi_otel.testing.nvml import FakeGpu, FakeNvml

A, B = (f"GPU-{letter * 8}-0000-4000-8000-000000000000" for letter in "ab")
Make = Callable[..., tuple[Machine, FakeNvml]]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A machine with these GPUs."""
    if shutil.which("gcc") is None:
        reason = "gcc is not installed: the fake NVML library cannot be compiled"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    rigs: list[Machine] = []

    def build(*gpus: FakeGpu) -> tuple[Machine, FakeNvml]:
        fake = FakeNvml(tmp_path / f"nvml{len(rigs)}", gpus)
        rig = Machine(fake.advance, nvml_library=str(fake.library))
        rigs.append(rig)
        return rig, fake

    yield build
    for rig in rigs:
        for source in rig.discovery.sources:
            source.close()


def test_two_gpus_sum(make: Make) -> None:
    """Boards of 100 W and 50 W for 10 s: 1500 J on one span."""
    rig, _ = make(FakeGpu(A, watts=100.0, period_s=0.0), FakeGpu(B, watts=50.0, period_s=0.0))
    rig.start("nvml")
    energy = rig.request(10.0)
    assert energy.total == pytest.approx(1500.0, rel=1e-9)
    assert (energy.gpu, energy.scope, energy.quality) == (energy.total, "gpu", "measured")
    assert energy.devices == (A, B)


def test_two_stepping_counters_sum(make: Make) -> None:
    """The same boards with counters that move every 100 ms at their own phases: 1500 J within half a percent.

    Reads follow the phase of one of them; the other's border may be one update (50 W x 0.1 s = 5 J) off.
    """
    rig, _ = make(FakeGpu(A, watts=100.0, offset_s=0.013), FakeGpu(B, watts=50.0, offset_s=0.059))
    rig.start("nvml")
    rig.run(5.0)
    assert rig.request(10.0).total == pytest.approx(1500.0, rel=5e-3)


def test_steps_of_the_counter(make: Make) -> None:
    """A counter that moves every 100 ms at an odd phase is dated by its steps: 300 W for 0.5 s are 150 J within 1 %."""
    rig, _ = make(FakeGpu(A, watts=300.0, period_s=0.1, offset_s=0.037))
    rig.start("nvml")
    rig.run(3.0)
    key = rig.open()
    rig.run(0.5)
    future = rig.close(key)
    rig.run(0.5)
    energy = rig.energy(future)
    assert energy.total == pytest.approx(150.0, rel=0.01)
    assert energy.quality == "measured"


def test_driver_reload_is_unknown_time(make: Make) -> None:
    """A counter that starts over in the middle of a request: that interval is unknown, the rest is measured."""
    rig, fake = make(FakeGpu(A, watts=200.0, base_j=5e6, period_s=0.0))
    rig.start("nvml")
    key = rig.open()
    rig.run(1.0)
    fake.reset_counter(0)
    rig.run(1.0)
    future = rig.close(key)
    rig.run(0.5)
    energy = rig.energy(future)
    assert energy.quality == "partial"
    assert energy.reason == "counter_reset"
    assert energy.total == pytest.approx(200.0 * 2.0 * energy.coverage, abs=0.002)  # two readings in whole millijoules
    assert 0.9 <= energy.coverage < 0.99


def test_a_lost_board_leaves_the_other(make: Make) -> None:
    """A board that falls off the bus makes the span partial; the other one goes on to be measured."""
    rig, fake = make(FakeGpu(A, watts=100.0), FakeGpu(B, watts=50.0))
    rig.start("nvml")
    key = rig.open()
    rig.run(1.0)
    fake.lose(0)
    rig.run(1.0)
    future = rig.close(key)
    rig.run(0.5)
    energy = rig.energy(future)
    shares = {share.device: share for share in future.result(0)}
    assert shares[B].joules == pytest.approx(100.0)
    assert shares[B].quality == "measured"
    assert shares[A].joules == pytest.approx(100.0, abs=20.0)
    assert (energy.quality, energy.reason) == ("partial", "device_lost")


def test_visible_devices_only(make: Make, tmp_path: Path) -> None:
    """With one of two boards visible, the span holds that one."""
    rig, fake = make(FakeGpu(A, watts=100.0, period_s=0.0), FakeGpu(B, watts=50.0, period_s=0.0))
    other = Machine(fake.advance, nvml_library=str(fake.library), environ={"CUDA_VISIBLE_DEVICES": B})
    rig.start("nvml")
    other.start("nvml")
    assert other.request(2.0).total == pytest.approx(100.0)
    for source in other.discovery.sources:
        source.close()
