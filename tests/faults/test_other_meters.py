"""AMD GPUs, Cray nodes and Apple silicon inside requests: late verdicts, torn updates, one meter per silicon."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from melodi_otel.sources import discovery
from melodi_otel.sources.amd import open_amd
from melodi_otel.sources.apple import open_apple
from melodi_otel.testing.amd import FakeAmdGpu, FakeAmdSmi
from melodi_otel.testing.apple import FakeAppleMonitor
from melodi_otel.testing.cray import FakeCray
from melodi_otel.testing.machine import Machine
from melodi_otel.testing.powercap import FakePowercap


def amd(monkeypatch: pytest.MonkeyPatch, *gpus: FakeAmdGpu) -> Machine:
    smi = FakeAmdSmi(*gpus)
    monkeypatch.setattr(discovery, "_amd", partial(open_amd, api=smi))
    rig = Machine(smi.advance)
    rig.start("amd")
    return rig


def test_a_request_before_the_verdict_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that begins with the program, while the counter is still being compared, has its 300 J, whole."""
    rig = amd(monkeypatch, FakeAmdGpu("u1", watts=300.0))
    energy = rig.request(1.0)
    assert energy.gpu == pytest.approx(300.0, rel=1e-4)
    assert (energy.coverage, energy.source) == (1.0, ("amd.energy_counter",))


@pytest.mark.parametrize("gain", [0.0, 100.0])
def test_a_wrong_counter_charges_nobody(monkeypatch: pytest.MonkeyPatch, gain: float) -> None:
    """A counter that stands still, or counts a hundredfold: the gauge's 900 J come out, and are called the gauge's."""
    rig = amd(monkeypatch, FakeAmdGpu("u1", watts=300.0, gain=gain))
    energy = rig.request(3.0)
    assert energy.gpu == pytest.approx(900.0, rel=1e-3)
    assert energy.source == ("amd.power_integral",)


def test_a_counter_that_stops_is_unknown_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the stop on there are no joules of that GPU; the request says that it is not covered, the other GPU goes on."""
    bad = FakeAmdGpu("u1", watts=300.0)
    rig = amd(monkeypatch, bad, FakeAmdGpu("u2", watts=100.0))
    rig.run(2.0)
    bad.gain = 0.0
    rig.run(6.0)
    energy = rig.request(2.0)
    assert energy.gpu == pytest.approx(200.0, rel=1e-3)
    assert energy.devices == ("u2",)


def test_a_node_and_its_parts(sysfs: Path) -> None:
    """CPU, memory and accelerator of a Cray node are summed; the node, which contains them, is not."""
    node = FakeCray(sysfs, node=700.0, cpu=200.0, memory=50.0, accel0=400.0)
    rig = Machine(node.advance, sysfs=str(sysfs))
    rig.start("cray")
    rig.run(3.0)
    energy = rig.request(4.0)
    update_s = 0.1  # what a border may be off
    assert (energy.cpu, energy.memory, energy.gpu) == (
        pytest.approx(800.0, abs=200.0 * update_s),
        pytest.approx(200.0, abs=50.0 * update_s),
        pytest.approx(1600.0, abs=400.0 * update_s),
    )
    assert energy.devices == ("cray:accel0", "cray:cpu", "cray:memory")


def test_one_cpu_is_measured_once(sysfs: Path) -> None:
    """RAPL and the node's controller beside each other: 200 W of CPU for 4 s are 800 J, not 1600."""
    tree = FakePowercap(sysfs)
    tree.package(0, watts=200.0)
    node = FakeCray(sysfs, node=700.0, cpu=200.0, memory=50.0)

    def tick(seconds: float) -> None:
        tree.advance(seconds)
        node.advance(seconds)

    rig = Machine(tick, sysfs=str(sysfs))
    rig.start("rapl", "cray")
    rig.run(3.0)
    energy = rig.request(4.0)
    assert energy.cpu == pytest.approx(800.0, rel=1e-6)
    assert energy.devices == ("cray:memory", "intel-rapl:0")


def test_a_torn_update_costs_nothing(sysfs: Path) -> None:
    """A node whose files are half written for a moment loses no joule of a request."""
    node = FakeCray(sysfs, node=700.0, cpu=200.0)
    rig = Machine(node.advance, sysfs=str(sysfs))
    rig.start("cray")
    rig.run(3.0)
    key = rig.open()
    rig.run(2.0)
    whole, node.update = node.update, lambda: node.write(node.file("cpu"), b"")  # type: ignore[method-assign]
    rig.run(0.1)  # one update, and the read that follows it
    node.update = whole  # type: ignore[method-assign]
    rig.run(1.95)
    future = rig.close(key)
    rig.run(0.3)
    energy = rig.energy(future)
    assert rig.sampler.cost.failures == 1
    assert energy.coverage == 1.0
    assert energy.cpu == pytest.approx(200.0 * 4.05, abs=200.0 * 0.1)


def test_apple_silicon(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU, GPU and memory of one chip: 10 W + 20 W + 2 W for 2 s are 64 J."""
    chip = FakeAppleMonitor(cpu=10.0, gpu=20.0, dram=2.0)
    monkeypatch.setattr(
        discovery, "_apple", partial(open_apple, monitor=lambda: chip, platform="darwin", machine="arm64")
    )
    rig = Machine(chip.advance)
    rig.start("apple")
    energy = rig.request(2.0)
    assert (energy.cpu, energy.gpu, energy.memory) == (
        pytest.approx(20.0, abs=0.01),
        pytest.approx(40.0, abs=0.01),
        pytest.approx(4.0, abs=0.01),
    )
