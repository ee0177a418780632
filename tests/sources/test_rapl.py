from __future__ import annotations

import errno
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.sources.base import CounterSource, Settings
from melodi_otel.sources.rapl import RaplSource, open_rapl
from melodi_otel.testing.clock import ManualClock
from melodi_otel.testing.powercap import AMD_RANGE_UJ, FakePowercap
from melodi_otel.timeline.counter import Counter

NOBODY = 65534


@pytest.fixture
def tree(tmp_path: Path) -> FakePowercap:
    return FakePowercap(tmp_path / "sys")


def settings_of(tree: FakePowercap, clock: ManualClock | None = None, **environ: str) -> Settings:
    procfs = tree.root.parent / "proc"
    procfs.mkdir(exist_ok=True)
    return Settings(clock=clock or ManualClock(), environ=environ, sysfs=str(tree.root), procfs=str(procfs))


def joules_of(source: RaplSource, counters: dict[str, Counter]) -> dict[str, float | None]:
    """Read once and repair wraps as the timeline does."""
    out: dict[str, float | None] = {}
    for reading in source.counters():
        change = counters.setdefault(reading.device, Counter()).read(reading.t_ns, reading.joules, reading.range_j)
        out[reading.device] = change.joules
    return out


def test_package_and_dram_are_two_devices(tree: FakePowercap) -> None:
    """DRAM lies beside its package: both are read, the memory names its parent, core and uncore are never read."""
    package = tree.package(0, energy_uj=5_000_000)
    tree.child(package, "core", energy_uj=1)
    tree.child(package, "uncore", energy_uj=2)
    tree.dram(package, energy_uj=7_000_000)
    source = open_rapl(settings_of(tree))
    assert [(d.id, d.type, d.source, d.parent) for d in source.devices] == [
        ("intel-rapl:0", "cpu", "rapl.package", None),
        ("intel-rapl:0:2", "memory", "rapl.dram", "intel-rapl:0"),
    ]
    assert [(r.device, r.joules, r.range_j) for r in source.counters()] == [
        ("intel-rapl:0", 5.0, 262143.32885),
        ("intel-rapl:0:2", 7.0, 262143.32885),
    ]
    assert isinstance(source, CounterSource)
    source.close()


def test_two_packages_and_their_names(tree: FakePowercap) -> None:
    """Two packages of 40 W and 25 W count 400 J and 250 J in 10 s; names come from the name file and cpuinfo."""
    clock = ManualClock()
    tree.package(0, name="package-1", watts=40.0)
    tree.package(1, name="package-0", watts=25.0)
    settings = settings_of(tree, clock)
    (Path(settings.procfs) / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU 9000\n", encoding="ascii")
    source = open_rapl(settings)
    assert [d.name for d in source.devices] == ["package-1 (Some CPU 9000)", "package-0 (Some CPU 9000)"]
    counters: dict[str, Counter] = {}
    assert joules_of(source, counters) == {"intel-rapl:0": None, "intel-rapl:1": None}
    clock.advance(10.0)
    tree.advance(10.0)
    assert joules_of(source, counters) == pytest.approx({"intel-rapl:0": 400.0, "intel-rapl:1": 250.0}, rel=1e-12)


def test_every_zone_wraps_at_its_own_range(tree: FakePowercap) -> None:
    """A wrap inside an interval costs no joule, whatever the zone's range."""
    clock = ManualClock()
    one = tree.package(0, energy_uj=262_143_328_850 - 3_000_000)
    two = tree.package(1, energy_uj=AMD_RANGE_UJ - 1_000_000, range_uj=AMD_RANGE_UJ)
    source = open_rapl(settings_of(tree, clock))
    counters: dict[str, Counter] = {}
    joules_of(source, counters)
    one.advance(10.0)
    two.advance(20.0)
    clock.advance(1.0)
    assert one.energy_uj == 7_000_000
    assert joules_of(source, counters) == pytest.approx({"intel-rapl:0": 10.0, "intel-rapl:1": 20.0}, abs=1e-9)


def test_psys_is_the_host_and_no_package(tree: FakePowercap) -> None:
    """A zone named psys is a meter of the whole host, even where it is numbered like a package."""
    tree.package(0)
    tree.psys(1)
    assert [(d.id, d.type, d.source) for d in open_rapl(settings_of(tree)).devices] == [
        ("intel-rapl:0", "cpu", "rapl.package"),
        ("intel-rapl:1", "host", "rapl.psys"),
    ]


def test_memory_mapped_copy_is_the_same_package(tree: FakePowercap) -> None:
    """Registers and memory map show one package: it is kept once, by name; the copy alone is good enough."""
    tree.package(0, view="-mmio")
    assert [d.id for d in open_rapl(settings_of(tree)).devices] == ["intel-rapl-mmio:0"]
    tree.dram(tree.package(0))
    assert [d.id for d in open_rapl(settings_of(tree)).devices] == ["intel-rapl:0", "intel-rapl:0:0"]


def test_links_alone_and_directories_alone_are_enough(tree: FakePowercap, tmp_path: Path) -> None:
    """Whoever mounts only the directories, or a flat copy of the links, still has a meter."""
    tree.dram(tree.package(0))
    flat = tmp_path / "flat"
    shutil.copytree(tree.root / "class", flat / "class")
    shutil.rmtree(tree.root / "class")
    for root in (tree.root, flat):
        settings = Settings(clock=ManualClock(), environ={}, sysfs=str(root), procfs=str(tmp_path))
        assert [d.id for d in open_rapl(settings).devices] == ["intel-rapl:0", "intel-rapl:0:0"]


class MovingClock(ManualClock):
    """A manual clock whose waits let the fake counters count."""

    def __init__(self, tree: FakePowercap) -> None:
        super().__init__()
        self.tree = tree

    def wait(self, event: object, seconds: float | None) -> bool:
        self.advance(seconds or 0.0)
        self.tree.advance(seconds or 0.0)
        return False


def test_mirrored_die_is_dropped_at_the_start(tree: FakePowercap, caplog: pytest.LogCaptureFixture) -> None:
    """Two packages in lock-step are one counter: the second is dropped before anything is counted, and named."""
    die = tree.package(0, name="package-0-die-0", watts=60.0)
    die.mirror(tree.package(1, name="package-0-die-1"))
    with caplog.at_level(logging.WARNING):
        source = open_rapl(settings_of(tree, MovingClock(tree)))
    assert [d.id for d in source.devices] == ["intel-rapl:0"]
    assert [r.device for r in source.counters()] == ["intel-rapl:0"]
    assert "intel-rapl:1 shows the counter of intel-rapl:0" in caplog.text


def test_mirrored_die_is_never_counted_twice_before_it_is_known(tree: FakePowercap) -> None:
    """Where the counters stand still at the start, the suspect is held back until it is found out."""
    clock = ManualClock()
    die = tree.package(0, watts=60.0)
    die.mirror(tree.package(1))
    source = open_rapl(settings_of(tree, clock))
    assert source.undecided == {"intel-rapl:1"}
    seen: list[str] = []
    for _ in range(4):
        seen += [r.device for r in source.counters()]
        clock.advance(1.0)
        tree.advance(1.0)
    assert seen == ["intel-rapl:0"] * 4
    assert [d.id for d in source.devices] == ["intel-rapl:0"]


def test_packages_that_only_start_equal_lose_nothing(tree: FakePowercap) -> None:
    """Two packages with the same first figure are both counted from that figure on once they differ."""
    clock = ManualClock()
    tree.package(0, watts=40.0, energy_uj=1_000_000)
    tree.package(1, watts=25.0, energy_uj=1_000_000)
    source = open_rapl(settings_of(tree, clock))
    first = source.counters()
    clock.advance(10.0)
    tree.advance(10.0)
    second = source.counters()
    assert [(r.device, r.joules) for r in first] == [("intel-rapl:0", 1.0)]
    assert [(r.device, r.joules) for r in second] == [
        ("intel-rapl:0", 401.0),
        ("intel-rapl:1", 1.0),
        ("intel-rapl:1", 251.0),
    ]
    assert second[1].t_ns == first[0].t_ns
    assert {d.id for d in source.devices} == {"intel-rapl:0", "intel-rapl:1"}


def test_mirrors_memory_goes_with_it(tree: FakePowercap) -> None:
    """A mirrored package takes its DRAM zone along: that would be the same memory twice."""
    die = tree.package(0, watts=60.0)
    mirror = tree.package(1)
    die.mirror(mirror)
    tree.dram(die, watts=3.0)
    tree.dram(mirror, watts=3.0)
    source = open_rapl(settings_of(tree, MovingClock(tree)))
    assert [d.id for d in source.devices] == ["intel-rapl:0", "intel-rapl:0:0"]


def forbid(path: Path) -> object:
    def opener(name: str, flags: int) -> int:
        if Path(name) == path:
            raise PermissionError(errno.EACCES, "Permission denied", name)
        return os.open(name, flags)

    return opener


def test_unreadable_counter_is_a_named_state_with_the_fix(tree: FakePowercap) -> None:
    """EACCES says permission_denied and names the command for the very path, the group way and the udev rule."""
    zone = tree.package(0)
    path = str(tree.root / "class/powercap/intel-rapl:0/energy_uj")
    with pytest.raises(Refused) as caught:
        open_rapl(settings_of(tree), opener=forbid(Path(path)))  # type: ignore[arg-type]
    assert caught.value.state == "permission_denied"
    assert f"sudo chmod a+r {path}" in caught.value.fix
    assert "udev" in caught.value.fix
    assert "usermod -aG" in caught.value.fix
    assert path in caught.value.reason
    assert zone.energy_path.exists()


def test_unreadable_counter_in_a_container_gets_the_mount(tree: FakePowercap) -> None:
    """In a container chmod does not help: the fix is a bind mount and MELODI_SYSFS_ROOT."""
    tree.package(0)
    path = tree.root / "class/powercap/intel-rapl:0/energy_uj"
    with pytest.raises(Refused) as caught:
        open_rapl(settings_of(tree, KUBERNETES_SERVICE_HOST="10.0.0.1"), opener=forbid(path))  # type: ignore[arg-type]
    assert "MELODI_SYSFS_ROOT=/host/sys" in caught.value.fix


def test_one_unreadable_zone_is_named_and_the_others_work(tree: FakePowercap) -> None:
    """A DRAM zone that may not be read is a refusal of its own beside a working package."""
    tree.dram(tree.package(0))
    path = tree.root / "class/powercap/intel-rapl:0:0/energy_uj"
    source = open_rapl(settings_of(tree), opener=forbid(path))  # type: ignore[arg-type]
    assert [d.id for d in source.devices] == ["intel-rapl:0"]
    assert [(r.state, "intel-rapl:0:0 (dram)" in r.reason) for r in source.refusals] == [("permission_denied", True)]


@pytest.mark.skipif(not hasattr(os, "setuid"), reason="needs POSIX users")
def test_real_permissions_of_an_ordinary_user() -> None:
    """As an ordinary user on a root-only file, opening is refused with permission_denied."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # the child must get as far as the counter itself
        tree = FakePowercap(Path(folder) / "sys")
        tree.package(0).energy_path.chmod(0o400 if os.getuid() == 0 else 0o000)
        assert state_for_nobody(tree) == "permission_denied"


@pytest.mark.skipif(not hasattr(os, "setuid") or os.getuid() != 0, reason="only root can change to another user")
def test_tree_that_may_not_be_entered_is_refused() -> None:
    """A directory above the tree that is closed to us is a refusal, not a crash."""
    with tempfile.TemporaryDirectory() as folder:
        tree = FakePowercap(Path(folder) / "sys")
        tree.package(0)
        assert state_for_nobody(tree) == "no_device"


def state_for_nobody(tree: FakePowercap) -> str:
    """The state in which a process without privileges finds RAPL."""
    code = (
        "import os, sys\n"
        f"os.getuid() or os.setuid({NOBODY})\n"
        "from melodi_otel.sources.base import Settings\n"
        "from melodi_otel.sources.rapl import open_rapl\n"
        "from melodi_otel.clock import SystemClock\n"
        "from melodi_otel.errors import Refused\n"
        "try:\n"
        f"    open_rapl(Settings(SystemClock(), {{}}, sysfs={str(tree.root)!r}, procfs='/nowhere'))\n"
        "except Refused as error:\n"
        "    print(error.state)\n"
    )
    # Modules are loaded before the change of user where the package itself lies in a closed directory.
    preload = "import melodi_otel.sources.rapl, melodi_otel.clock\n"
    run = subprocess.run([sys.executable, "-c", preload + code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_permission_taken_away_half_way_changes_nothing(tree: FakePowercap) -> None:
    """The descriptor is kept: closing the file to everybody after the start costs no joule."""
    clock = ManualClock()
    zone = tree.package(0)
    source = open_rapl(settings_of(tree, clock))
    counters: dict[str, Counter] = {}
    joules_of(source, counters)
    zone.advance(12.5)
    zone.energy_path.chmod(0o000)
    clock.advance(1.0)
    assert joules_of(source, counters) == {"intel-rapl:0": 12.5}


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_reading_forbidden_half_way_is_a_named_state(tree: FakePowercap, code: int) -> None:
    """A read that the kernel begins to forbid raises Refused with permission_denied and the fix, never 0 J."""
    tree.package(0)
    broken: list[int] = []

    def reader(fd: int, size: int, offset: int) -> bytes:
        if broken:
            raise OSError(broken[0], "no")
        return os.pread(fd, size, offset)

    source = open_rapl(settings_of(tree), reader=reader)
    assert len(source.counters()) == 1
    broken.append(code)
    with pytest.raises(Refused) as caught:
        source.counters()
    assert caught.value.state == "permission_denied"
    assert "chmod" in caught.value.fix


@pytest.mark.parametrize(("code", "kind"), [(errno.ENODEV, Gone), (errno.ENXIO, Gone), (errno.EIO, Transient)])
def test_lost_driver_is_gone_and_a_hiccup_is_transient(tree: FakePowercap, code: int, kind: type[Exception]) -> None:
    """ENODEV means that the module left; an I/O error only costs this round."""
    tree.package(0)
    broken: list[int] = []

    def reader(fd: int, size: int, offset: int) -> bytes:
        if broken:
            raise OSError(broken[0], os.strerror(broken[0]))
        return os.pread(fd, size, offset)

    source = open_rapl(settings_of(tree), reader=reader)
    broken.append(code)
    with pytest.raises(kind):
        source.counters()


@pytest.mark.parametrize("raw", [b"", b"\n", b"garbage\n", b"-5\n", b"12\n34\n"])
def test_torn_read_is_no_reading(tree: FakePowercap, raw: bytes) -> None:
    """An empty or garbled file is Transient and never 0; the next good read covers the time."""
    clock = ManualClock()
    tree.package(0)
    other = tree.package(1)
    source = open_rapl(settings_of(tree, clock))
    counters: dict[str, Counter] = {}
    joules_of(source, counters)
    other.write(raw)
    with pytest.raises(Transient, match="intel-rapl:1"):
        source.counters()
    other.advance(3.0)
    clock.advance(1.0)
    assert joules_of(source, counters) == {"intel-rapl:0": 0.0, "intel-rapl:1": 3.0}


def test_garbage_from_the_start_is_refused(tree: FakePowercap) -> None:
    """A counter that never held a number is refused by name."""
    tree.package(0).write(b"garbage\n")
    with pytest.raises(Refused, match="intel-rapl:0") as caught:
        open_rapl(settings_of(tree))
    assert caught.value.state == "unreadable"


@pytest.mark.parametrize("limit", ["", "0\n", "much\n"])
def test_unknown_range_is_unknown(tree: FakePowercap, limit: str) -> None:
    """Without a usable max_energy_range_uj the reading has no range, so a fall counts as a reset."""
    zone = tree.package(0)
    (zone.path / "max_energy_range_uj").write_text(limit, encoding="ascii")
    assert open_rapl(settings_of(tree)).counters()[0].range_j is None


def refused(settings: Settings, platform: str = "linux") -> Refused:
    with pytest.raises(Refused) as caught:
        open_rapl(settings, platform=platform)
    return caught.value


def test_absent_tree_says_why(tmp_path: Path) -> None:
    """Container mask, virtual machine, missing module, other platform and a wrong root are told apart."""
    sysfs, procfs = tmp_path / "sys", tmp_path / "proc"
    procfs.mkdir()
    settings = Settings(ManualClock(), {}, sysfs=str(sysfs), procfs=str(procfs))
    assert "MELODI_SYSFS_ROOT" in refused(settings).fix
    assert refused(settings, "darwin").state == "unsupported_platform"
    sysfs.mkdir()
    assert refused(settings).state == "no_device"
    (procfs / "cpuinfo").write_text("flags\t\t: fpu hypervisor sse\n", encoding="ascii")
    assert refused(settings).state == "virtual_machine"
    (sysfs / "class/powercap").mkdir(parents=True)
    (sysfs / "class/powercap/intel-rapl:0").symlink_to("../../devices/virtual/powercap/intel-rapl/intel-rapl:0")
    masked = refused(settings)
    assert masked.state == "masked"
    assert "-v /sys/devices/virtual/powercap:/host/sys/devices/virtual/powercap:ro" in masked.fix


def test_module_that_is_not_loaded(tmp_path: Path) -> None:
    """A powercap class without zones names the modules to load."""
    (tmp_path / "class/powercap").mkdir(parents=True)
    settings = Settings(ManualClock(), {}, sysfs=str(tmp_path), procfs=str(tmp_path))
    assert "modprobe intel_rapl_common" in refused(settings).fix


def test_closing_is_final_and_harmless(tree: FakePowercap) -> None:
    """close() gives every descriptor back and may be called twice."""
    tree.dram(tree.package(0))
    folder = Path("/proc/self/fd")
    before = sorted(folder.iterdir()) if folder.is_dir() else []
    source = open_rapl(settings_of(tree))
    source.close()
    source.close()
    assert (sorted(folder.iterdir()) if folder.is_dir() else []) == before
    with pytest.raises(Gone):
        source.counters()
