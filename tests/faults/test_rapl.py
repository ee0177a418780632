"""CPU packages inside requests: wraps, memory beside the package, two packages, mirrored dies, permissions half way."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from melodi_otel.testing.machine import Machine
from melodi_otel.testing.powercap import FakePowercap


def machine(tree: FakePowercap) -> Machine:
    return Machine(tree.advance, sysfs=str(tree.root))


def test_wrap_inside_a_request(sysfs: Path) -> None:
    """A counter that passes its range in the middle of a request costs no joule: 100 W for 1 s are 100 J."""
    tree = FakePowercap(sysfs)
    tree.package(0, watts=100.0, energy_uj=65_532_610_987 - 50_000_000, range_uj=65_532_610_987)
    rig = machine(tree)
    rig.start("rapl")
    energy = rig.request(1.0)
    assert energy.total == pytest.approx(100.0, rel=1e-9)
    assert (energy.quality, energy.coverage) == ("measured", 1.0)


def test_memory_beside_the_package(sysfs: Path) -> None:
    """DRAM is outside the package: 40 W + 8 W for 2 s are 80 J of CPU and 16 J of memory."""
    tree = FakePowercap(sysfs)
    tree.dram(tree.package(0, watts=40.0), watts=8.0)
    rig = machine(tree)
    rig.start("rapl")
    energy = rig.request(2.0)
    assert (energy.cpu, energy.memory) == (pytest.approx(80.0), pytest.approx(16.0))
    assert (energy.total, energy.scope) == (pytest.approx(96.0), "cpu+memory")
    assert energy.source == ("rapl.dram", "rapl.package")


def test_two_packages_sum(sysfs: Path) -> None:
    """Two sockets of 100 W and 60 W for 1 s are 160 J on two devices; psys and core contain no further joule."""
    tree = FakePowercap(sysfs)
    tree.child(tree.package(0, watts=100.0), "core", watts=70.0)
    tree.package(1, watts=60.0)
    tree.psys(2, watts=300.0)
    rig = machine(tree)
    rig.start("rapl")
    energy = rig.request(1.0)
    assert energy.total == pytest.approx(160.0)
    assert energy.devices == ("intel-rapl:0", "intel-rapl:1")


def test_mirrored_die_counts_once(sysfs: Path) -> None:
    """Two zones that show the same counter are one package: 90 W for 2 s are 180 J, not 360."""
    tree = FakePowercap(sysfs)
    first, second = tree.package(0, watts=90.0), tree.package(1)
    first.mirror(second)
    rig = machine(tree)
    rig.start("rapl")
    rig.run(2.0)
    energy = rig.request(2.0)
    assert energy.total == pytest.approx(180.0)
    assert len(energy.devices) == 1


def test_permission_taken_half_way(sysfs: Path) -> None:
    """The descriptor stays open: a file that nobody may open any more is still read, to the joule."""
    tree = FakePowercap(sysfs)
    package = tree.package(0, watts=50.0)
    rig = machine(tree)
    rig.start("rapl")
    key = rig.open()
    rig.run(1.0)
    package.energy_path.chmod(0o000)
    rig.run(1.0)
    future = rig.close(key)
    rig.run(0.3)
    assert rig.energy(future).total == pytest.approx(100.0)


def test_torn_reads_cost_nothing(sysfs: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Rounds that fail are not used; the next good one covers their time."""
    tree = FakePowercap(sysfs)
    package = tree.package(0, watts=50.0)
    rig = machine(tree)
    rig.start("rapl")
    key = rig.open()
    rig.run(0.5)
    with caplog.at_level(logging.WARNING):
        package.write(b"")
        rig.sampler.wake()
        rig.sampler.tick()
    package.set(package.energy_uj)
    rig.run(0.5)
    future = rig.close(key)
    rig.run(0.3)
    energy = rig.energy(future)
    assert energy.total == pytest.approx(50.0)
    assert energy.coverage == 1.0
    assert "this round is not used" in caplog.text


def test_no_meter_is_no_joule(sysfs: Path) -> None:
    """Where nothing measures, a request is unavailable with its reason, never 0 J."""
    sysfs.mkdir()
    rig = Machine(lambda _: None, sysfs=str(sysfs))
    rig.start("rapl")
    energy = rig.request(1.0)
    assert (energy.total, energy.quality, energy.reason) == (None, "unavailable", "no_source")
    assert [refusal.source for refusal in rig.discovery.refusals] == ["rapl"]
