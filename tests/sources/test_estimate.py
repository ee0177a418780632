from __future__ import annotations

from pathlib import Path

import pytest

from melodi_otel.errors import Refused, Transient
from melodi_otel.sources.base import CounterSource, Settings
from melodi_otel.sources.estimate import EstimateSource, open_estimate
from melodi_otel.sources.procstat import HostBusy, cpu_count, ticks_per_second
from melodi_otel.testing.clock import ManualClock

HZ = ticks_per_second()


def write_stat(procfs: Path, busy_s: float, cpus: int = 4, **more: int) -> None:
    """CPU times with ``busy_s`` in user time; idle, iowait, steal and guest are there and must not count."""
    user = round(busy_s * HZ)
    fields = [user, 0, 0, 99_000, more.get("iowait", 500), 0, 0, more.get("steal", 700), more.get("guest", 0), 0]
    lines = ["cpu  " + " ".join(map(str, fields))] + [f"cpu{i} 0 0 0 0 0 0 0 0 0 0" for i in range(cpus)] + ["intr 5"]
    with (procfs / "stat").open("r+" if (procfs / "stat").exists() else "w", encoding="ascii") as file:
        file.write("\n".join(lines) + "\n")
        file.truncate()


def source_of(procfs: Path, clock: ManualClock, watts: tuple[float, float] | None = None) -> EstimateSource:
    return open_estimate(Settings(clock, {}, procfs=str(procfs), estimate_watts=watts, asked=frozenset({"estimate"})))


def test_nobody_gets_an_estimate_unasked(tmp_path: Path) -> None:
    """Without being asked for, the estimate is refused as not_asked and names the variable."""
    write_stat(tmp_path, 0.0)
    with pytest.raises(Refused) as caught:
        open_estimate(Settings(ManualClock(), {}, procfs=str(tmp_path)))
    assert (caught.value.state, caught.value.fix) == ("not_asked", "MELODI_SOURCES=estimate")


def test_linear_model_is_exact_over_time_and_load(tmp_path: Path) -> None:
    """20 W idle to 100 W on 4 CPUs: 10 s with 8 busy CPU seconds are 200 J idle + 160 J of load, however often read."""
    for reads in (1, 10):
        clock = ManualClock()
        write_stat(tmp_path, 50.0)
        source = source_of(tmp_path, clock, (20.0, 100.0))
        assert source.counters()[0].joules == 0.0
        for i in range(1, reads + 1):
            clock.advance(10.0 / reads)
            write_stat(tmp_path, 50.0 + 8.0 * i / reads)
            reading = source.counters()[0]
        assert reading.joules == pytest.approx(360.0, rel=1e-12)
        assert (reading.device, reading.t_ns, reading.range_j) == ("estimate:cpu", clock.monotonic_ns(), None)
        source.close()


def test_it_never_looks_measured(tmp_path: Path) -> None:
    """The device says estimated, its source, its idle power and how wrong it may be."""
    write_stat(tmp_path, 0.0)
    source = source_of(tmp_path, ManualClock())
    (device,) = source.devices
    assert isinstance(source, CounterSource)
    assert (device.id, device.type, device.source, device.estimated) == (
        "estimate:cpu",
        "cpu",
        "estimate.cpu_utilization",
        True,
    )
    assert device.idle_watts == pytest.approx(4 * 0.74)
    assert device.relative_uncertainty == 0.6
    (users,) = source_of(tmp_path, ManualClock(), (10.0, 30.0)).devices
    assert (users.idle_watts, users.relative_uncertainty) == (10.0, 0.25)


def test_waiting_stolen_and_guest_time_is_not_busy_time(tmp_path: Path) -> None:
    """Iowait and steal do not count; guest time is in user time already."""
    write_stat(tmp_path, 3.0, iowait=900, steal=800, guest=200)
    assert HostBusy(str(tmp_path)).read() == 3.0
    assert cpu_count(str(tmp_path)) == 4


def test_falling_cpu_time_is_no_negative_energy(tmp_path: Path) -> None:
    """A CPU that goes offline takes its time along; the joules only grow by the idle power."""
    clock = ManualClock()
    write_stat(tmp_path, 100.0)
    source = source_of(tmp_path, clock, (10.0, 50.0))
    source.counters()
    clock.advance(1.0)
    write_stat(tmp_path, 40.0)
    assert source.counters()[0].joules == pytest.approx(10.0)


def test_torn_stat_is_transient(tmp_path: Path) -> None:
    """An unreadable first line costs a round, not a wrong figure."""
    write_stat(tmp_path, 1.0)
    source = source_of(tmp_path, ManualClock())
    with (tmp_path / "stat").open("r+", encoding="ascii") as file:
        file.truncate(0)
    with pytest.raises(Transient):
        source.counters()


def test_without_procfs_it_is_refused(tmp_path: Path) -> None:
    """Where there is no /proc/stat the reason names it."""
    with pytest.raises(Refused) as caught:
        source_of(tmp_path, ManualClock())
    assert caught.value.state == "no_device"
