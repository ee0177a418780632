from __future__ import annotations

import errno
import logging
import os
import platform as host
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.sources.base import CounterSource, Forkable, Settings
from melodi_otel.sources.perf_events import READING, LinuxPerf, find_pmu, paranoid_level
from melodi_otel.sources.perf_rapl import PerfRaplSource, open_perf_rapl
from melodi_otel.sources.rapl import open_rapl
from melodi_otel.sources.rapl_ways import open_rapl_ways
from melodi_otel.testing.clock import ManualClock
from melodi_otel.testing.perf import FakePerf
from melodi_otel.testing.powercap import FakePowercap
from melodi_otel.timeline.counter import Counter


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def tree(tmp_path: Path) -> FakePowercap:
    return FakePowercap(tmp_path / "sys")


@pytest.fixture
def perf(tree: FakePowercap) -> FakePerf:
    return FakePerf(tree)


@pytest.fixture
def settings(tree: FakePowercap, clock: ManualClock) -> Settings:
    return settings_of(tree, clock)


def settings_of(tree: FakePowercap, clock: ManualClock, vendor: str = "GenuineIntel", **environ: str) -> Settings:
    procfs = tree.root.parent / "proc"
    (procfs / "sys/kernel").mkdir(parents=True, exist_ok=True)
    (procfs / "cpuinfo").write_text(f"vendor_id\t: {vendor}\nmodel name\t: Some CPU\n", encoding="ascii")
    (procfs / "sys/kernel/perf_event_paranoid").write_text("2\n", encoding="ascii")
    return Settings(clock, environ, sysfs=str(tree.root), procfs=str(procfs))


def opened(settings: Settings, perf: FakePerf) -> PerfRaplSource:
    return open_perf_rapl(settings, api=perf, platform="linux", interpreter="/usr/bin/python3")


def identity(source: CounterSource) -> list[tuple[object, ...]]:
    return [(d.id, d.type, d.name, d.parent, d.period_s) for d in source.devices]


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def forget_tree(tree: FakePowercap) -> None:
    """As a container runtime does: no powercap at all."""
    tree.root.joinpath("class/powercap").rename(tree.root / "hidden")
    tree.root.joinpath("devices/virtual/powercap").rename(tree.root / "hidden too")


def test_joules_are_counts_times_the_scale(
    tree: FakePowercap, perf: FakePerf, settings: Settings, clock: ManualClock
) -> None:
    """A package of 50 W and its memory of 8 W count 500 J and 80 J in 10 s, from 0 at the opening, without a range."""
    package = tree.package(0, watts=50.0)
    perf.cpu(0, package=package, dram=tree.dram(package, watts=8.0))
    source = opened(settings, perf)
    assert [r.joules for r in source.counters()] == [0.0, 0.0]
    clock.advance(10.0)
    tree.advance(10.0)
    assert [(r.device, r.t_ns, r.range_j) for r in source.counters()] == [
        ("intel-rapl:0", clock.monotonic_ns(), None),
        ("intel-rapl:0:0", clock.monotonic_ns(), None),
    ]
    assert [r.joules for r in source.counters()] == pytest.approx([500.0, 80.0], abs=1e-8)
    assert isinstance(source, CounterSource)
    assert isinstance(source, Forkable)


def test_same_devices_by_both_ways(tree: FakePowercap, perf: FakePerf, settings: Settings) -> None:
    """Ids, names, types and parents are those of powercap; only the method differs."""
    one, two = tree.package(0, name="package-1"), tree.package(1, name="package-0")
    psys = tree.psys(2)
    tree.child(one, "core")
    drams = tree.dram(one), tree.dram(two)
    perf.cpu(24, package=one, dram=drams[0], psys=psys, socket=1)
    perf.cpu(0, package=two, dram=drams[1], psys=psys, socket=0)
    by_perf, by_powercap = opened(settings, perf), open_rapl(settings, platform="linux")
    assert sorted(identity(by_perf)) == sorted(identity(by_powercap))
    assert ("intel-rapl:0:1", "memory", "package-1 dram", "intel-rapl:0", 0.001) in identity(by_perf)
    assert {d.source for d in by_perf.devices} == {"rapl.perf.package", "rapl.perf.dram", "rapl.perf.psys"}
    assert perf.opened.count(("energy-psys", 0)) == 1 == sum(name == "energy-psys" for name, _ in perf.opened)


def test_ids_are_those_that_linux_would_give(tree: FakePowercap, perf: FakePerf, clock: ManualClock) -> None:
    """Where the powercap tree is hidden, the ids are the same that it has outside."""
    one, two = tree.package(0), tree.package(1)
    for package in (one, two):
        tree.child(package, "core")
    drams = tree.dram(one), tree.dram(two)
    psys = tree.psys(2)
    perf.event("energy-cores")
    perf.cpu(0, package=one, dram=drams[0], psys=psys)
    perf.cpu(24, package=two, dram=drams[1], socket=1)
    settings = settings_of(tree, clock)
    outside = sorted(identity(open_rapl(settings, platform="linux")))
    forget_tree(tree)
    assert sorted(identity(opened(settings, perf))) == outside


def test_dies_of_amd_are_one_package(tree: FakePowercap, perf: FakePerf, clock: ManualClock) -> None:
    """AMD's CPUs of one socket read one register: it is counted once, and powercap's second die is not missed."""
    one, two = tree.package(0, name="package-0-die-0"), tree.package(1, name="package-0-die-1")
    perf.cpu(0, package=one, die=0)
    perf.cpu(8, package=one, die=1)
    source = opened(settings_of(tree, clock, "AuthenticAMD"), perf)
    assert [d.id for d in source.devices] == [one.id]
    assert (source.unseen, two.id) == ((), "intel-rapl:1")


def test_dies_of_intel_are_two_meters(tree: FakePowercap, perf: FakePerf, settings: Settings) -> None:
    """Intel's dies have a register each: both are counted, each under the name of its zone."""
    dies = [tree.package(n, name=f"package-0-die-{n}") for n in (0, 1)]
    perf.cpu(0, package=dies[0], die=0)
    perf.cpu(28, package=dies[1], die=1)
    assert [d.id for d in opened(settings, perf).devices] == ["intel-rapl:0", "intel-rapl:1"]


def test_untold_topology_goes_by_order(tree: FakePowercap, perf: FakePerf, settings: Settings) -> None:
    """Without topology files the CPUs of the mask are the packages in their order."""
    perf.cpu(0, package=tree.package(0), socket=None)
    perf.cpu(24, package=tree.package(1), socket=None)
    assert [d.name for d in opened(settings, perf).devices] == ["package-0 (Some CPU)", "package-1 (Some CPU)"]


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_forbidden_is_a_named_state_with_the_fix(
    tree: FakePowercap, perf: FakePerf, settings: Settings, code: int
) -> None:
    """Refused by the kernel: the level in force, and the exact commands; nothing stays open."""
    perf.cpu(0, package=tree.package(0))
    perf.refuses = code
    with pytest.raises(Refused) as caught:
        opened(settings, perf)
    assert caught.value.state == "permission_denied"
    assert "kernel.perf_event_paranoid is 2" in caught.value.reason
    for part in (
        f"sudo setcap cap_perfmon=ep {os.path.realpath('/usr/bin/python3')}",
        "AmbientCapabilities=CAP_PERFMON",
        "sudo sysctl kernel.perf_event_paranoid=0",
    ):
        assert part in caught.value.fix
    assert perf.open_fds == 0


def test_forbidden_in_a_container(tree: FakePowercap, perf: FakePerf, clock: ManualClock) -> None:
    """In a container the fix is the capability of the container."""
    perf.cpu(0, package=tree.package(0))
    perf.refuses = errno.EPERM
    with pytest.raises(Refused, match="may not open") as caught:
        opened(settings_of(tree, clock, KUBERNETES_SERVICE_HOST="10.0.0.1"), perf)
    assert caught.value.fix.startswith("start the container with --cap-add PERFMON")


@pytest.mark.parametrize(
    ("code", "state"),
    [(errno.ENOSYS, "unsupported_platform"), (errno.EINVAL, "unreadable"), (errno.EMFILE, "unreadable")],
)
def test_other_refusals_of_the_kernel(
    tree: FakePowercap, perf: FakePerf, settings: Settings, code: int, state: str
) -> None:
    """Each has its state."""
    perf.cpu(0, package=tree.package(0))
    perf.refuses = code
    with pytest.raises(Refused) as caught:
        opened(settings, perf)
    assert caught.value.state == state


def test_an_event_that_cannot_be_opened_is_left_out(tree: FakePowercap, perf: FakePerf, settings: Settings) -> None:
    """Memory that the kernel lists and does not count is noted and counts as unseen; the package works."""
    package = tree.package(0)
    dram = tree.dram(package)
    perf.cpu(0, package=package, dram=dram)
    perf.refuses_event["energy-ram"] = errno.EINVAL
    source = opened(settings, perf)
    assert [d.id for d in source.devices] == ["intel-rapl:0"]
    assert [zone.id for zone in source.unseen] == [dram.id]
    assert source.notes[1].startswith("intel-rapl:0:0 (dram) is left out: perf events answer Invalid argument")


def test_a_package_that_cannot_be_opened_refuses_all(tree: FakePowercap, perf: FakePerf, settings: Settings) -> None:
    """Half of the packages would be half of the joules: nothing is used, and what was open is given back."""
    perf.cpu(0, package=tree.package(0))
    (perf.path / "cpumask").write_text("0,24\n", encoding="ascii")
    with pytest.raises(Refused, match="Invalid argument"):
        opened(settings, perf)
    assert (len(perf.opened), perf.open_fds) == (1, 0)


def test_no_pmu_and_no_linux(tree: FakePowercap, settings: Settings) -> None:
    """Without the PMU, or on another system, there is nothing that a person could repair."""
    with pytest.raises(Refused, match="no power PMU") as caught:
        find_pmu(settings, "linux")
    assert caught.value.state == "absent"
    with pytest.raises(Refused, match="this is darwin") as caught:
        find_pmu(settings, "darwin")
    assert caught.value.state == "unsupported_platform"
    with pytest.raises(Refused, match="x86 only; this is riscv64"):
        LinuxPerf("riscv64")


@pytest.mark.parametrize(("scale", "unit"), [("nan", "Joules"), ("1e3", "Joules"), ("x", "Joules"), ("1e-9", "Watts")])
def test_a_scale_that_is_none_is_refused(
    tree: FakePowercap, perf: FakePerf, settings: Settings, scale: str, unit: str
) -> None:
    """A scale or a unit that cannot be true is never multiplied with."""
    perf.cpu(0, package=tree.package(0))
    perf.event("energy-pkg", scale=scale, unit=unit)
    with pytest.raises(Refused, match="cannot be understood") as caught:
        opened(settings, perf)
    assert caught.value.state == "unreadable"


def test_scale_in_hexadecimal_and_ranges_in_the_mask(tree: FakePowercap, perf: FakePerf, settings: Settings) -> None:
    """Both are written by some kernels."""
    perf.cpu(0, package=tree.package(0))
    perf.event("energy-pkg", scale="0x1.0p-32")
    (perf.path / "cpumask").write_text("0-1,4\n", encoding="ascii")
    pmu = find_pmu(settings, "linux")
    assert [cpu.number for cpu in pmu.cpus] == [0, 1, 4]
    assert pmu.events["energy-pkg"].scale_j == 2.0**-32


def test_short_reads_and_errors_are_transient_then_gone(tree: FakePowercap, perf: FakePerf, settings: Settings) -> None:
    """A failed read spoils its round; thirty in a row are the end; one good round in between starts over."""
    perf.cpu(0, package=tree.package(0))
    source = opened(settings, perf)
    perf.breaks = [b"", errno.EIO]
    for _ in range(2):
        with pytest.raises(Transient, match="intel-rapl:0"):
            source.counters()
    source.counters()
    perf.breaks = [b""] * 30
    for _ in range(29):
        with pytest.raises(Transient):
            source.counters()
    with pytest.raises(Gone, match="30 times in a row"):
        source.counters()


def test_time_that_was_not_counted_is_a_gap(
    tree: FakePowercap, perf: FakePerf, settings: Settings, clock: ManualClock
) -> None:
    """Where the event was enabled and did not count, the interval's joules are unknown, and the next one's are exact."""
    perf.cpu(0, package=tree.package(0, watts=100.0))
    source, counter = opened(settings, perf), Counter()
    events: list[tuple[str, float | None]] = []
    for stopped_ns in (0, 0, 700_000_000, 700_000_000):
        perf.stopped_ns = stopped_ns
        (reading,) = source.counters()
        change = counter.read(reading.t_ns, reading.joules, reading.range_j)
        events.append((change.event, None if change.joules is None else round(change.joules, 6)))
        clock.advance(1.0)
        tree.advance(1.0)
    assert events == [("first", None), ("advanced", 100.0), ("reset", None), ("advanced", 100.0)]


def test_a_jump_that_nothing_can_draw_is_a_gap(
    tree: FakePowercap, perf: FakePerf, settings: Settings, clock: ManualClock
) -> None:
    """A register that started again while the host slept is no 200 kJ."""
    perf.cpu(0, package=tree.package(0, watts=100.0))
    source, counter = opened(settings, perf), Counter()
    total = 0.0
    for jump_j in (0.0, 0.0, 200_000.0, 200_000.0):
        perf.jump_j = jump_j
        (reading,) = source.counters()
        total += counter.read(reading.t_ns, reading.joules, reading.range_j).joules or 0.0
        clock.advance(1.0)
        tree.advance(1.0)
    assert total == pytest.approx(200.0)


def rounds(source: PerfRaplSource, tree: FakePowercap, clock: ManualClock, seconds: float) -> None:
    for _ in range(round(seconds * 10)):
        source.counters()
        clock.advance(0.1)
        tree.advance(0.1)


def test_two_ways_that_agree_say_nothing(
    tree: FakePowercap, perf: FakePerf, settings: Settings, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Powercap is watched for a second, over a wrap too, and then let go."""
    package = tree.package(0, watts=40.0, energy_uj=262_143_328_850 - 20_000_000)
    perf.cpu(0, package=package)
    perf.gain = 1.04
    source = opened(settings, perf)
    rounds(source, tree, clock, 1.0)
    assert source._check._beside
    rounds(source, tree, clock, 0.2)
    assert not source._check._beside
    assert (source.notes, caplog.text) == (("read through perf events",), "")


def test_two_ways_that_disagree_are_told_once(
    tree: FakePowercap, perf: FakePerf, settings: Settings, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Six percent apart: one warning with both figures and the setting that decides; the series goes on as it began."""
    perf.cpu(0, package=tree.package(0, watts=40.0))
    perf.gain = 1.06
    source = opened(settings, perf)
    with caplog.at_level(logging.WARNING, "melodi_otel"):
        rounds(source, tree, clock, 5.0)
    assert [r.message for r in caplog.records] == [f"rapl: {source.notes[1]}"]
    assert "intel-rapl:0 counted 42.4 J by perf events and 40.0 J by powercap in the same 1.0 s" in source.notes[1]
    assert source.counters()[0].joules == pytest.approx(5.0 * 40.0 * 1.06)


def test_an_idle_package_is_compared_when_it_has_counted_enough(
    tree: FakePowercap, perf: FakePerf, settings: Settings, clock: ManualClock
) -> None:
    """One watt is not judged after a second but after five joules; what never counts is let go after a minute."""
    package = tree.package(0, watts=1.0)
    perf.cpu(0, package=package, dram=tree.dram(package))
    perf.gain = 2.0
    source = opened(settings, perf)
    rounds(source, tree, clock, 2.4)
    assert len(source.notes) == 1
    rounds(source, tree, clock, 0.3)
    assert len(source.notes) == 2
    assert list(source._check._beside) == ["intel-rapl:0:0"]
    rounds(source, tree, clock, 60.0)
    assert not source._check._beside


def test_closing_is_final_and_a_fork_closes_copies(tree: FakePowercap, perf: FakePerf, settings: Settings) -> None:
    """Every descriptor is given back, a second close does nothing, and a closed source is gone."""
    perf.cpu(0, package=tree.package(0))
    before = open_files()
    source = opened(settings, perf)
    source.forked()
    source.close()
    assert perf.open_fds == 0
    assert open_files() == before
    with pytest.raises(Gone):
        source.counters()


def ways(settings: Settings, perf: FakePerf, **powercap: object):
    return open_rapl_ways(
        settings,
        perf=lambda s: opened(s, perf),
        powercap=lambda s: open_rapl(s, platform="linux", **powercap),
    )


def forbid(path: str, flags: int) -> int:
    raise PermissionError(errno.EACCES, "Permission denied")


def test_perf_events_come_first(tree: FakePowercap, perf: FakePerf, settings: Settings) -> None:
    """Where both are allowed, perf events are used and say so."""
    perf.cpu(0, package=tree.package(0))
    source = ways(settings, perf)
    assert (source.name, source.notes) == ("rapl", ("read through perf events",))
    source.close()


def test_powercap_where_perf_events_are_forbidden(tree: FakePowercap, perf: FakePerf, settings: Settings) -> None:
    """The other way is used, and says why the better one is not and what would change that."""
    perf.cpu(0, package=tree.package(0))
    perf.refuses = errno.EACCES
    source = ways(settings, perf)
    assert source.name == "rapl"
    assert [d.source for d in source.devices] == ["rapl.package"]
    assert source.notes[0] == "read through powercap"
    assert "CAP_PERFMON" in source.notes[1]
    assert "setcap" in source.notes[1]
    source.close()


def test_a_zone_that_only_powercap_shows_decides(tree: FakePowercap, perf: FakePerf, settings: Settings) -> None:
    """Memory that perf events lack would be missing from every sum: powercap is used for all, or it is said."""
    package = tree.package(0)
    tree.dram(package)
    perf.cpu(0, package=package)
    source = ways(settings, perf)
    assert [d.source for d in source.devices] == ["rapl.package", "rapl.dram"]
    assert source.notes == ("read through powercap", "perf events do not show intel-rapl:0:0")
    assert perf.open_fds == 0
    source.close()
    source = ways(settings, perf, opener=forbid)
    assert [d.source for d in source.devices] == ["rapl.perf.package"]
    assert source.notes[1].startswith("perf events do not show intel-rapl:0:0, and powercap may not be read")
    source.close()


def test_both_forbidden_gives_both_fixes(tree: FakePowercap, perf: FakePerf, settings: Settings) -> None:
    """One refusal, with the fix of either way."""
    perf.cpu(0, package=tree.package(0))
    perf.refuses = errno.EACCES
    with pytest.raises(Refused) as caught:
        ways(settings, perf, opener=forbid)
    assert caught.value.state == "permission_denied"
    assert "chmod a+r" in caught.value.fix
    assert "or, through perf events: for this interpreter: sudo setcap" in caught.value.fix


def test_hidden_tree_with_forbidden_perf_events(tree: FakePowercap, perf: FakePerf, clock: ManualClock) -> None:
    """In a container that hides powercap the capability is the shorter way, and is told."""
    perf.cpu(0, package=tree.package(0))
    perf.refuses = errno.EPERM
    forget_tree(tree)
    with pytest.raises(Refused) as caught:
        ways(settings_of(tree, clock, container="docker"), perf)
    assert caught.value.state == "permission_denied"
    assert "--cap-add PERFMON" in caught.value.fix


def test_no_pmu_leaves_the_reason_to_powercap(tree: FakePowercap, clock: ManualClock) -> None:
    """Where there is no RAPL at all, nobody reads of perf events."""
    with pytest.raises(Refused) as caught:
        open_rapl_ways(settings_of(tree, clock), platform="linux")
    assert "perf" not in caught.value.reason + caught.value.fix


@pytest.mark.skipif(not sys.platform.startswith("linux") or host.machine() != "x86_64", reason="needs Linux on x86-64")
def test_the_real_call_counts() -> None:
    """The kernel takes our structure: its CPU clock, counted on CPU 0, moves and was counting all the time."""
    api = LinuxPerf()
    try:
        fd = api.open(1, 0, 0)  # PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.ENOSYS):
            pytest.skip(f"the kernel answers {error.strerror}")
        raise
    first, second = READING.unpack(api.read(fd)), READING.unpack(api.read(fd))
    api.close(fd)
    assert second[0] > first[0]
    assert second[1] == second[2]
    with pytest.raises(OSError, match="Bad file descriptor"):
        api.read(fd)


def test_the_real_call_refuses_what_is_not_there() -> None:
    """A PMU that does not exist is an OSError with the kernel's number, never a descriptor."""
    try:
        api = LinuxPerf()
    except Refused as error:
        pytest.skip(error.reason)
    with pytest.raises(OSError, match="Errno") as caught:
        api.open(0x7FFFFFFF, 2, 0)
    assert caught.value.errno in (errno.ENOENT, errno.EINVAL, errno.EACCES, errno.EPERM, errno.ENOSYS)


KERNEL = """
import encodings.ascii, os, sys  # loaded while the library may still be read
from melodi_otel.clock import SystemClock
from melodi_otel.errors import Refused
from melodi_otel.sources.base import Settings
from melodi_otel.sources.perf_rapl import open_perf_rapl
if len(sys.argv) > 2 and os.getuid() == 0:
    os.setgroups([])
    os.setuid(65534)
try:
    source = open_perf_rapl(Settings(SystemClock(), {}, sysfs=sys.argv[1]))
except Refused as error:
    print(error.state, error.reason, error.fix, sep="|")
else:
    first, second = source.counters()[0].joules, source.counters()[0].joules
    print("counts", first < second < 3600.0, source.devices[0].id, sep="|")
"""


def by_the_kernel(sysfs: Path, *words: str) -> list[str]:
    """The whole way by real calls; the CPU clock (PMU 1, event 0, ns) stands in for RAPL."""
    power = sysfs / "devices/power"
    (power / "events").mkdir(parents=True)
    for name, text in (("type", "1"), ("cpumask", "0"), ("events/energy-pkg", "event=0x00")):
        (power / name).write_text(f"{text}\n", encoding="ascii")
    (power / "events/energy-pkg.scale").write_text("1e-9\n", encoding="ascii")
    (power / "events/energy-pkg.unit").write_text("Joules\n", encoding="ascii")
    done = subprocess.run(
        [sys.executable, "-c", KERNEL, str(sysfs), *words], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.strip().split("|")


@pytest.mark.skipif(not sys.platform.startswith("linux") or host.machine() != "x86_64", reason="needs Linux on x86-64")
def test_the_whole_way_by_the_real_kernel() -> None:
    """Where the kernel allows it, it counts; where not, its own refusal becomes the named state."""
    with tempfile.TemporaryDirectory() as folder:
        told = by_the_kernel(Path(folder))
    if told[0] in ("permission_denied", "unsupported_platform"):
        pytest.skip(told[1])
    assert told == ["counts", "True", "intel-rapl:0"]


@pytest.mark.skipif(not sys.platform.startswith("linux") or host.machine() != "x86_64", reason="needs Linux on x86-64")
def test_the_real_kernel_refuses_an_ordinary_user() -> None:
    """Above a level of 0 the kernel says EACCES to a process without CAP_PERFMON: permission_denied, level and commands."""
    level = paranoid_level("/proc")
    if level is None or level <= 0:
        pytest.skip(f"kernel.perf_event_paranoid is {level}: everybody may")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        told = by_the_kernel(Path(folder), "nobody")
    if told[0] == "unsupported_platform":
        pytest.skip(told[1])
    if told[0] == "counts" and os.getuid() != 0:
        pytest.skip("this user has CAP_PERFMON")
    assert told[0] == "permission_denied"
    assert f"kernel.perf_event_paranoid is {level}, and it has no CAP_PERFMON" in told[1]
    assert "sudo setcap cap_perfmon=ep" in told[2] or "--cap-add PERFMON" in told[2]
