from __future__ import annotations

import logging
import os
import signal
import threading
from bisect import bisect_left
from collections.abc import Sequence

import pytest

from melodi_otel.clock import SystemClock
from melodi_otel.devices import Device
from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.sampler import Sampler
from melodi_otel.sources.base import CounterReading, GpuState, PowerReading
from melodi_otel.testing.clock import ManualClock
from melodi_otel.testing.sources import PowerCurve, ScriptedGauge, ScriptedSource
from melodi_otel.wall_time import WallTime

GPU, CPU = Device("GPU-1", "gpu"), Device("intel-rapl:0", "cpu", period_s=0.001)
S = 1_000_000_000


class Notes:
    """A sink that writes down what it is told, in order."""

    def __init__(self) -> None:
        self.lines: list[tuple[object, ...]] = []

    def counter(self, device_id: str, t_ns: int, joules: float, range_j: float | None) -> None:
        self.lines.append(("counter", device_id, t_ns, joules))

    def gauge(self, device_id: str, t_ns: int, watts: float) -> None:
        self.lines.append(("gauge", device_id, t_ns, watts))

    def cpu(self, t_ns: int, device_ids: Sequence[str], busy_s: float, host_busy_s: float) -> None:
        self.lines.append(("cpu", t_ns, tuple(device_ids), busy_s, host_busy_s))

    def failed(self, device_ids: Sequence[str], t_ns: int, reason: str) -> None:
        self.lines.append(("failed", tuple(device_ids), reason))

    def gone(self, device_id: str, t_ns: int) -> None:
        self.lines.append(("gone", device_id))

    def round_done(self, t_ns: int, moved: bool) -> None:
        self.lines.append(("round", moved))

    def of(self, kind: str) -> list[tuple[object, ...]]:
        return [line[1:] for line in self.lines if line[0] == kind]


def sampler_of(clock: ManualClock, *sources: ScriptedSource | ScriptedGauge, **more: object) -> tuple[Sampler, Notes]:
    notes = Notes()
    more.setdefault("thread_time_ns", lambda: 0)
    return Sampler(sources, notes, clock, **more), notes  # type: ignore[arg-type]


def run(sampler: Sampler, clock: ManualClock, seconds: float) -> None:
    end = clock.monotonic_ns() + round(seconds * S)
    while clock.monotonic_ns() < end:
        clock.advance(max(1e-6, min(sampler.tick(), (end - clock.monotonic_ns()) / S)))


@pytest.mark.parametrize("period_s", [0.1, 0.0998, 0.1003, 0.12])
@pytest.mark.parametrize("offset_s", [0.037, 0.0913])
def test_reads_follow_the_counter(period_s: float, offset_s: float) -> None:
    """After learning, at least 9 in 10 steps are read within 15 ms, and no 2 s hold more than 20 reads, ever."""
    clock = ManualClock()
    start = clock.monotonic_ns()
    source = ScriptedSource(clock, {GPU: 200.0}, period_s=period_s, offset_s=offset_s)
    sampler, _ = sampler_of(clock, source)
    sampler.activity(1, start)
    run(sampler, clock, 30.0)
    reads = source.reads_ns
    assert max(bisect_left(reads, t + 2 * S) - i for i, t in enumerate(reads)) <= 20
    steps = [start + round((offset_s + k * period_s) * S) for k in range(int(3 / period_s), int(29 / period_s))]
    delays = [reads[bisect_left(reads, step)] - step for step in steps]
    assert sum(delay <= 15_000_000 for delay in delays) >= 0.9 * len(delays)
    assert sampler.periods == {"GPU-1": pytest.approx(period_s, rel=1e-3)}


def test_always_moving_counter_is_read_at_the_plain_rate() -> None:
    """A counter that moves all the time is neither sought nor chased: ten reads a second, 0.1 s apart."""
    clock = ManualClock()
    source = ScriptedSource(clock, {CPU: 50.0})
    sampler, notes = sampler_of(clock, source)
    sampler.activity(1, clock.monotonic_ns())
    run(sampler, clock, 5.0)
    assert [b - a for a, b in zip(source.reads_ns, source.reads_ns[1:], strict=False)] == [S // 10] * 49
    assert [joules for _, _, joules in notes.of("counter")][:3] == pytest.approx([0.0, 5.0, 10.0])


def test_free_meter_is_read_along_with_a_stepping_one() -> None:
    """A meter that may be read at any time joins the reads behind another's steps, within its own budget."""
    clock = ManualClock()
    gpu = ScriptedSource(clock, {GPU: 200.0}, period_s=0.1, offset_s=0.037)
    cpu = ScriptedSource(clock, {CPU: 50.0})
    sampler, _ = sampler_of(clock, gpu, cpu)
    sampler.activity(1, clock.monotonic_ns())
    run(sampler, clock, 10.0)
    since = clock.monotonic_ns() - 5 * S
    late_gpu, late_cpu = ([t for t in source.reads_ns if t > since] for source in (gpu, cpu))
    assert len(set(late_gpu) & set(late_cpu)) >= 0.9 * len(late_gpu)
    assert 40 <= len(late_cpu) <= 51
    assert max(bisect_left(cpu.reads_ns, t + 2 * S) - i for i, t in enumerate(cpu.reads_ns)) <= 20


def test_slower_rate_is_respected() -> None:
    """MELODI_SAMPLE_HZ=2 reads twice a second."""
    clock = ManualClock()
    source = ScriptedSource(clock, {CPU: 50.0})
    sampler, _ = sampler_of(clock, source, hz=2.0)
    sampler.activity(1, clock.monotonic_ns())
    run(sampler, clock, 5.0)
    assert len(source.reads_ns) == 10


def test_full_rate_until_two_seconds_after_the_last_close() -> None:
    """10 Hz while open and 2 s more, then 1 Hz; the next open is read at once."""
    clock = ManualClock()
    source = ScriptedSource(clock, {CPU: 50.0})
    sampler, _ = sampler_of(clock, source)
    sampler.activity(1, clock.monotonic_ns())
    run(sampler, clock, 1.0)
    closed = clock.monotonic_ns()
    sampler.activity(0, closed)
    run(sampler, clock, 10.0)
    after = [(t - closed) / S for t in source.reads_ns if t >= closed]
    assert len([t for t in after if t < 2.0]) == 20
    assert len([t for t in after if t >= 2.05]) == 7
    clock.advance(0.33)
    opened = clock.monotonic_ns()
    sampler.activity(1, opened)
    sampler.tick()
    assert source.reads_ns[-1] == opened


def test_unused_gpu_falls_asleep_and_the_cpu_meter_does_not() -> None:
    """After a minute of idleness GPUs are read every 30 s, or never if told so; RAPL stays at once a second."""
    for every, expected in ((30.0, 3), (float("inf"), 0)):
        clock = ManualClock()
        gpu = ScriptedSource(clock, {GPU: 10.0}, name="gpu")
        cpu = ScriptedSource(clock, {CPU: 10.0}, name="cpu")
        sampler, _ = sampler_of(clock, gpu, cpu, asleep_every_s=every)
        run(sampler, clock, 62.0)
        before = len(gpu.reads_ns), len(cpu.reads_ns)
        run(sampler, clock, 100.0)
        assert len(gpu.reads_ns) - before[0] == expected
        assert len(cpu.reads_ns) - before[1] == 100


def test_round_with_a_failed_read_commits_nothing() -> None:
    """A Transient round hands nothing on; the next one covers its time and no joule is lost."""
    clock = ManualClock()
    source = ScriptedSource(clock, {GPU: 100.0, CPU: 50.0})
    sampler, notes = sampler_of(clock, source)
    sampler.activity(1, clock.monotonic_ns())
    sampler.tick()
    notes.lines.clear()
    source.fail(Transient("torn"))
    clock.advance(0.1)
    sampler.tick()
    assert notes.lines == [("failed", ("GPU-1", "intel-rapl:0"), "read_failed"), ("round", False)]
    clock.advance(0.1)
    sampler.tick()
    assert {device: joules for device, _, joules in notes.of("counter")} == pytest.approx(
        {"GPU-1": 20.0, "intel-rapl:0": 10.0}
    )
    assert (sampler.cost.rounds, sampler.cost.failures) == (2, 1)


class Both(ScriptedSource):
    """Counter and gauge out of one call; the gauge can break."""

    broken = False

    def power(self) -> Sequence[PowerReading]:
        if self.broken:
            raise Transient("gauge")
        return [PowerReading("GPU-1", self._clock.monotonic_ns(), 100.0)]


def test_counter_waits_for_its_gauge() -> None:
    """Where a source has both, a gauge that fails holds the counter of that round back too."""
    clock = ManualClock()
    source = Both(clock, {GPU: 100.0})
    sampler, notes = sampler_of(clock, source)
    sampler.tick()
    assert [line[0] for line in notes.lines] == ["counter", "gauge", "round"]
    notes.lines.clear()
    source.broken = True
    clock.advance(1.0)
    sampler.tick()
    assert notes.of("counter") == []


def test_one_broken_source_does_not_stop_the_others(caplog: pytest.LogCaptureFixture) -> None:
    """Any exception of a source is a failed round of that source alone, logged once per kind."""
    clock = ManualClock()
    bad, good = ScriptedSource(clock, {GPU: 1.0}, name="bad"), ScriptedSource(clock, {CPU: 1.0}, name="good")
    bad.fail(*[ZeroDivisionError("oops")] * 5)
    sampler, notes = sampler_of(clock, bad, good)
    with caplog.at_level(logging.WARNING):
        run(sampler, clock, 1.5)
    assert caplog.text.count("bad failed with ZeroDivisionError: oops") == 1
    assert set(notes.of("failed")) == {(("GPU-1",), "error")}
    assert len(notes.of("counter")) >= 10


def test_permission_lost_is_named_with_the_fix(caplog: pytest.LogCaptureFixture) -> None:
    """A source refused half way reports its state as the reason, logs the fix once and is asked at the idle rate."""
    clock = ManualClock()
    source = ScriptedSource(clock, {CPU: 1.0})
    source.fail(None, *[Refused("no more", fix="sudo chmod", state="permission_denied")] * 50)
    sampler, notes = sampler_of(clock, source)
    sampler.activity(1, clock.monotonic_ns())
    run(sampler, clock, 5.05)
    assert notes.of("failed")[0] == (("intel-rapl:0",), "permission_denied")
    assert caplog.text.count("sudo chmod") == 1
    assert len(source.reads_ns) == 1 + 10 + 4


def test_lost_device_and_lost_driver() -> None:
    """Gone with a device loses that one; Gone without loses all, closes the source and stops asking."""
    clock = ManualClock()
    source = ScriptedSource(clock, {GPU: 1.0, CPU: 1.0})
    source.fail(Gone("fell off the bus", "GPU-1"), None, Gone("driver left"))
    sampler, notes = sampler_of(clock, source)
    sampler.activity(1, clock.monotonic_ns())
    run(sampler, clock, 1.0)
    assert notes.of("gone") == [("GPU-1",), ("intel-rapl:0",)]
    assert source.closed
    assert len(source.reads_ns) == 3


def test_device_that_a_source_takes_back_is_gone() -> None:
    """A source may find out later that a device is none (mirrored counters): the sink is told once."""
    clock = ManualClock()
    source = ScriptedSource(clock, {GPU: 1.0, CPU: 1.0})
    sampler, notes = sampler_of(clock, source)
    sampler.tick()
    source.lose("GPU-1")
    run(sampler, clock, 1.0)
    assert notes.of("gone") == [("GPU-1",)]


def test_moved_says_whether_anything_changed() -> None:
    """A round in which counter and gauge show what they showed before did not move."""
    clock = ManualClock()
    counter = ScriptedSource(clock, {CPU: PowerCurve((0.0, 0.0), (0.25, 10.0))})
    gauge = ScriptedGauge(clock, {GPU: 7.0})
    sampler, notes = sampler_of(clock, counter, gauge)
    sampler.activity(1, clock.monotonic_ns())
    run(sampler, clock, 0.35)
    assert notes.of("round") == [(True,), (False,), (False,), (True,)]


def test_cpu_times_come_with_the_cpu_meters() -> None:
    """CPU times are read in each round of a CPU or memory meter, and only there; a failing reader costs nothing."""
    clock = ManualClock()
    answers = iter([(1.0, 2.0), None, (1.5, 4.0)])
    memory = Device("intel-rapl:0:0", "memory", period_s=0.001)
    cpu, gpu = ScriptedSource(clock, {CPU: 10.0, memory: 1.0}), ScriptedSource(clock, {GPU: 1.0})
    sampler, notes = sampler_of(clock, cpu, gpu, cpu=lambda: next(answers))
    sampler.activity(1, clock.monotonic_ns())
    start = clock.monotonic_ns()
    run(sampler, clock, 0.55)
    ids = ("intel-rapl:0", "intel-rapl:0:0")
    assert notes.of("cpu") == [(start, ids, 1.0, 2.0), (start + S // 5, ids, 1.5, 4.0)]
    assert len(notes.of("counter")) > 12


def test_it_reports_its_own_cost() -> None:
    """Seconds per round, lateness, CPU time of the thread and its part of the CPU's joules are told."""
    clock = ManualClock()
    source = ScriptedSource(clock, {CPU: 100.0}, read_s=0.002)
    seen: list[tuple[float, float]] = []
    spent = iter(range(0, 10**12, 1_000_000))  # each look at the thread's clock finds 1 ms more
    times = iter([(0.0, 1.0 * i) for i in range(100)])
    sampler, _ = sampler_of(
        clock,
        source,
        observe=lambda s, late: seen.append((s, late)),
        thread_time_ns=lambda: next(spent),
        cpu=lambda: next(times),
    )
    sampler.activity(1, clock.monotonic_ns())
    for _ in range(3):
        clock.advance(sampler.tick() + 0.01)
    assert seen == [(pytest.approx(0.002), 0.0), (pytest.approx(0.002), 0.01), (pytest.approx(0.002), 0.01)]
    assert sampler.cost.cpu_s == pytest.approx(0.003)
    assert sampler.cost.seconds == pytest.approx(0.006)
    # 11 J per round (110 ms at 100 W), 1 ms of a host that was busy for 1 s; the first round is the baseline.
    assert sampler.cost.joules == pytest.approx(2 * 11.0 * 0.001)


def test_observer_and_sink_may_fail(caplog: pytest.LogCaptureFixture) -> None:
    """What the reports are given to may raise: it is logged once and sampling goes on."""
    clock = ManualClock()
    source = ScriptedSource(clock, {CPU: 1.0})

    class Broken(Notes):
        def round_done(self, t_ns: int, moved: bool) -> None:
            raise RuntimeError("sink")

    def observe(seconds: float, late: float) -> None:
        raise RuntimeError("observer")

    sampler = Sampler([source], Broken(), clock, observe=observe)
    run(sampler, clock, 3.0)
    assert len(source.reads_ns) >= 3
    assert caplog.text.count("(said once)") == 2


class WithStates(ScriptedSource):
    """A GPU that also tells how much it is used."""

    asked = 0
    part: float | None = 0.5

    def states(self) -> Sequence[GpuState]:
        self.asked += 1
        return [GpuState("GPU-1", utilization=self.part, memory_bytes=100)]


def test_utilisation_is_asked_once_a_second() -> None:
    """States of a GPU are read at most once a second, while idle with the readings, and kept for whoever asks."""
    clock = ManualClock()
    source = WithStates(clock, {GPU: 1.0})
    sampler, _ = sampler_of(clock, source)
    clock.advance(10.0)
    run(sampler, clock, 10.0)
    assert source.asked <= len(source.reads_ns)
    asked = source.asked
    sampler.activity(1, clock.monotonic_ns())
    run(sampler, clock, 3.0)
    assert source.asked - asked in (3, 4)
    assert sampler.states["GPU-1"].utilization == 0.5


@pytest.mark.parametrize(("part", "told"), [(0.5, True), (0.05, False), (None, False)])
def test_a_busy_gpu_is_told(part: float | None, told: bool) -> None:
    """A GPU that is used while no request is open is told before its readings; a desktop's few percent are not."""

    class Listening(Notes):
        def busy(self, device_id: str, t_ns: int) -> None:
            self.lines.append(("busy", device_id, t_ns))

    clock = ManualClock()
    source = WithStates(clock, {GPU: 1.0})
    source.part = part
    sink = Listening()
    run(Sampler([source], sink, clock), clock, 3.0)
    lines = [line[:2] for line in sink.lines if line[0] in ("busy", "counter")]
    assert (("busy", "GPU-1") in lines) is told
    assert lines[0] == (("busy", "GPU-1") if told else ("counter", "GPU-1"))


def test_several_readings_of_a_device_in_one_round() -> None:
    """A source may hand over readings that it had held back; all reach the sink in order."""

    class Late(ScriptedSource):
        def counters(self) -> Sequence[CounterReading]:
            (now,) = super().counters()
            return [CounterReading(now.device, now.t_ns - 5, now.joules), now]

    clock = ManualClock()
    sampler, notes = sampler_of(clock, Late(clock, {CPU: 1.0}))
    sampler.tick()
    assert [t_ns - clock.monotonic_ns() for _, t_ns, _ in notes.of("counter")] == [-5, 0]


def test_thread_starts_wakes_and_stops() -> None:
    """start() begins, wake() reads at once, stop() reads once more and ends; all of it twice."""
    source = ScriptedSource(SystemClock(), {CPU: 1.0})
    done = threading.Event()

    class Waiting(Notes):
        def round_done(self, t_ns: int, moved: bool) -> None:
            done.set()

    sampler = Sampler([source], Waiting(), SystemClock(), idle_hz=0.001)
    for _ in range(2):
        assert not sampler.running
        sampler.start()
        sampler.start()
        assert sampler.running
        assert done.wait(10)
        done.clear()
        sampler.wake()
        assert done.wait(10)
        done.clear()
        reads = len(source.reads_ns)
        sampler.stop()
        assert not sampler.running
        assert len(source.reads_ns) > reads
        done.clear()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_forked_child_has_no_sampler_until_it_starts_one() -> None:
    """After a fork the child's sampler is not running, its locks are free, and it can be started there."""
    sampler = Sampler([ScriptedSource(SystemClock(), {CPU: 1.0})], Notes(), SystemClock())
    sampler.start()
    with sampler._worker._lock:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(20)
                if not sampler.running:
                    sampler.start()
                    code = 0 if sampler.running else 2
                    sampler.stop()
            finally:
                os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sampler.running
    sampler.stop()


def test_wall_time_survives_a_stepped_clock() -> None:
    """What happened before the clock was set keeps its time; conversions go both ways, also inside the gap."""
    clock = ManualClock(monotonic_s=1000.0, wall_s=50_000.0)
    wall = WallTime(clock)
    for _ in range(3):
        clock.advance(1.0)
        wall.note()
    clock.step_wall(3600.0)
    clock.advance(1.0)
    wall.note()
    assert [pair.monotonic_ns // S for pair in wall.pairs] == [1000, 1001, 1002, 1003, 1004]
    assert wall.wall_ns(1002 * S + 5) == 50_002 * S + 5
    assert wall.wall_ns(1004 * S) == 53_604 * S
    assert wall.wall_ns(999 * S) == 49_999 * S
    assert wall.monotonic_ns(50_002 * S + 5) == 1002 * S + 5
    assert wall.monotonic_ns(53_605 * S) == 1005 * S
    assert wall.monotonic_ns(51_000 * S) == 1004 * S
    assert wall.monotonic_ns(49_999 * S) == 999 * S


def test_wall_time_follows_a_smooth_correction() -> None:
    """A clock that is slewed by 0.4 ms in a second is interpolated, not stepped."""
    clock = ManualClock(monotonic_s=0.0, wall_s=100.0)
    wall = WallTime(clock)
    clock.advance(1.0)
    clock.step_wall(0.0004)
    wall.note()
    assert wall.wall_ns(S // 2) == 100 * S + S // 2 + 200_000


def test_pairs_are_taken_once_a_second() -> None:
    """The sampler keeps a pair per second, however often it ticks."""
    clock = ManualClock()
    sampler, _ = sampler_of(clock, ScriptedSource(clock, {CPU: 1.0}))
    sampler.activity(1, clock.monotonic_ns())
    run(sampler, clock, 5.0)
    assert len(sampler.wall.pairs) == 5
