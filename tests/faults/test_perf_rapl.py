"""CPU packages by perf events inside requests: the same joules as by powercap, and gaps that stay gaps."""

from __future__ import annotations

from pathlib import Path

import pytest

from melodi_otel.sources import discovery
from melodi_otel.sources.perf_rapl import open_perf_rapl
from melodi_otel.testing.machine import Machine
from melodi_otel.testing.perf import FakePerf
from melodi_otel.testing.powercap import FakePowercap


@pytest.fixture
def tree(sysfs: Path) -> FakePowercap:
    """One package of 100 W with memory of 10 W, and the platform around them."""
    tree = FakePowercap(sysfs)
    tree.dram(tree.package(0, watts=100.0), watts=10.0)
    tree.psys(1, watts=250.0)
    return tree


@pytest.fixture
def perf(tree: FakePowercap, monkeypatch: pytest.MonkeyPatch) -> FakePerf:
    """That machine's perf events, in the place of the kernel's."""
    perf = FakePerf(tree)
    package, dram, psys = tree.zones
    perf.cpu(0, package=package, dram=dram, psys=psys)
    monkeypatch.setattr(discovery, "_rapl", lambda settings: open_perf_rapl(settings, api=perf, platform="linux"))
    return perf


def machine(tree: FakePowercap) -> Machine:
    rig = Machine(tree.advance, sysfs=str(tree.root))
    rig.start("rapl")
    return rig


def test_joules_of_a_request(tree: FakePowercap, perf: FakePerf) -> None:
    """100 W + 10 W for 2 s are 220 J by the way they were read; the platform contains them and is not summed."""
    energy = machine(tree).request(2.0)
    assert energy.total == pytest.approx(220.0, rel=1e-9)
    assert (energy.cpu, energy.memory) == (pytest.approx(200.0), pytest.approx(20.0))
    assert energy.source == ("rapl.perf.dram", "rapl.perf.package")
    assert (energy.quality, energy.coverage) == ("measured", 1.0)


def test_time_that_was_not_counted_lowers_the_coverage(tree: FakePowercap, perf: FakePerf) -> None:
    """What the events did not count in the middle of a request is not known, and is neither 0 J nor guessed."""
    rig = machine(tree)
    key = rig.open()
    rig.run(1.0)
    perf.stopped_ns = 50_000_000
    rig.run(1.0)
    future = rig.close(key)
    rig.run(0.3)
    energy = rig.energy(future)
    assert energy.coverage == pytest.approx(0.95, abs=0.01)
    assert energy.total == pytest.approx(110.0 * 2.0 * energy.coverage, rel=1e-6)


def test_a_jump_is_nobodys_energy(tree: FakePowercap, perf: FakePerf) -> None:
    """A register that began again while the host slept charges no request 200 kJ."""
    rig = machine(tree)
    key = rig.open()
    rig.run(1.0)
    perf.jump_j = 200_000.0
    rig.run(1.0)
    future = rig.close(key)
    rig.run(0.3)
    energy = rig.energy(future)
    assert energy.total is not None
    assert energy.total < 220.0
    assert energy.coverage is not None
    assert 0.9 < energy.coverage < 1.0


def test_a_short_read_costs_nothing(tree: FakePowercap, perf: FakePerf) -> None:
    """A round that failed is covered by the next one, to the joule."""
    rig = machine(tree)
    key = rig.open()
    rig.run(1.0)
    perf.breaks = [b"", b"\x00" * 8]
    rig.run(1.0)
    future = rig.close(key)
    rig.run(0.3)
    assert rig.energy(future).total == pytest.approx(220.0, rel=1e-9)
