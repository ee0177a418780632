from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from melodi_otel.processes import ProcessClock
from melodi_otel.sources.procstat import ticks_per_second

HZ = ticks_per_second()


class FakeProc:
    """A procfs with a host and processes whose times are set by hand; its root process is number 100."""

    def __init__(self, root: Path, cpus: int = 2, listed: bool = True) -> None:
        self.root, self.cpus, self.listed = root, cpus, listed
        self.now_ns = 0
        self.own_ns: int | None = None
        self.host(0.0)
        self.process(100, 1, 0.0)

    def host(self, busy_s: float) -> None:
        lines = [f"cpu  {round(busy_s * HZ)} 0 0 9 0 0 0 0 0 0", *(f"cpu{i} 0 0 0 0" for i in range(self.cpus))]
        self._write(self.root / "stat", "\n".join(lines) + "\n")

    def process(self, pid: int, parent: int, busy_s: float, reaped_s: float = 0.0, started: int = 7) -> None:
        new = not (self.root / str(pid)).exists()
        (self.root / f"{pid}/task/{pid}").mkdir(parents=True, exist_ok=True)
        numbers = [parent, *[0] * 9, round(busy_s * HZ), 0, round(reaped_s * HZ), 0, 20, 0, 1, 0, started, 0, 0]
        self._write(self.root / f"{pid}/stat", f"{pid} (a ) b) S " + " ".join(map(str, numbers)) + "\n")
        children = self.root / f"{parent}/task/{parent}/children"
        if self.listed:
            (self.root / f"{pid}/task/{pid}/children").touch()
            if new and children.exists():
                self._write(children, children.read_text(encoding="ascii") + f"{pid} ")

    def end(self, pid: int, parent: int) -> None:
        """The process is gone; what was open of it cannot be read any more."""
        self._write(self.root / f"{pid}/stat", "")
        shutil.rmtree(self.root / str(pid))
        children = self.root / f"{parent}/task/{parent}/children"
        if children.exists():
            left = [word for word in children.read_text(encoding="ascii").split() if word != str(pid)]
            self._write(children, "".join(f"{word} " for word in left))

    def clock(self) -> ProcessClock:
        own = None if self.own_ns is None else lambda: self.own_ns or 0
        root = str(self.root)
        return ProcessClock(root, 100, own_procfs=root, own_time=own, now=lambda: self.now_ns)

    def second(self) -> None:
        self.now_ns += 1_000_000_000

    @staticmethod
    def _write(path: Path, text: str) -> None:
        with path.open("r+" if path.exists() else "w", encoding="ascii") as file:
            file.write(text)
            file.truncate()


@pytest.fixture(params=[True, False], ids=["children", "ppid"])
def proc(request: pytest.FixtureRequest, tmp_path: Path) -> FakeProc:
    """With lists of children, and on a kernel without them."""
    return FakeProc(tmp_path, listed=request.param)


def read(clock: ProcessClock) -> tuple[float, float]:
    times = clock.read()
    assert times is not None
    return round(times.busy_s, 6), round(times.host_busy_s, 6)


def test_tree_is_process_and_descendants(proc: FakeProc) -> None:
    """Children and grandchildren count, strangers do not; the host counts everything."""
    proc.process(101, 100, 0.0)
    proc.process(102, 101, 0.0)
    proc.process(900, 1, 0.0)
    clock = proc.clock()
    assert read(clock) == (0.0, 0.0)
    for pid, parent in ((100, 1), (101, 100), (102, 101), (900, 1)):
        proc.process(pid, parent, 1.0)
    proc.host(4.0)
    assert read(clock) == (3.0, 4.0)
    clock.close()


def test_time_of_an_ended_child_stays(proc: FakeProc) -> None:
    """A child that ends keeps what it had used when last seen, waited for or not, exactly once."""
    proc.process(101, 100, 0.0)
    clock = proc.clock()
    read(clock)
    proc.process(101, 100, 2.0)
    proc.host(5.0)
    assert read(clock) == (2.0, 5.0)
    proc.end(101, 100)
    proc.second()
    assert read(clock) == (2.0, 5.0)
    proc.process(100, 1, 0.0, reaped_s=2.5)  # its parent collects it: half a second of it was not seen before
    proc.host(6.0)
    proc.second()
    assert read(clock) == (2.5, 6.0)
    clock.close()


def test_child_found_late_is_counted_within_the_hosts_time(proc: FakeProc) -> None:
    """Time used before a child was found is handed out as far as the host was busy; the share stays within 1."""
    clock = proc.clock()
    read(clock)
    proc.process(101, 100, 0.9)
    proc.host(0.5)
    proc.second()
    assert read(clock) == (0.5, 0.5)
    proc.host(1.5)
    assert read(clock) == (0.9, 1.5)
    clock.close()


def test_pid_used_again_is_another_process(proc: FakeProc) -> None:
    """A number that was given to a stranger after its process ended does not bring the stranger's time in."""
    proc.process(101, 100, 1.0)
    clock = proc.clock()
    proc.host(10.0)
    start = read(clock)
    proc.end(101, 100)
    proc.process(101, 1, 500.0, started=99)
    proc.host(20.0)
    proc.second()
    assert read(clock)[0] == start[0]
    clock.close()


def test_child_of_an_ended_child_stays_ours(proc: FakeProc) -> None:
    """A process that was below us is counted on when its parent ends and it gets another one."""
    proc.process(101, 100, 0.0)
    proc.process(102, 101, 0.0)
    clock = proc.clock()
    read(clock)
    proc.end(101, 100)
    proc.process(102, 1, 3.0)
    proc.host(4.0)
    proc.second()
    assert read(clock) == (3.0, 4.0)
    proc.process(102, 1, 4.0)
    proc.host(5.0)
    proc.second()
    assert read(clock) == (4.0, 5.0)
    clock.close()


def test_share_never_exceeds_one(tmp_path: Path) -> None:
    """Nanoseconds against jiffies: in no interval does the process use more than the host, and neither falls."""
    proc = FakeProc(tmp_path)
    proc.own_ns = 0
    clock = proc.clock()
    before = read(clock)
    first = before
    for i in range(1, 101):
        proc.own_ns = i * 13_700_000  # one CPU busy all the time, read every 13.7 ms
        proc.host(i * 13_700_000 // 10_000_000 / 100)
        now = read(clock)
        assert 0 <= now[0] - before[0] <= now[1] - before[1] + 1e-9
        before = now
    assert before[0] - first[0] == pytest.approx(1.37, abs=0.001)
    assert before[1] - first[1] == pytest.approx(1.37, abs=0.02)
    clock.close()


def test_impossible_claim_is_not_believed(tmp_path: Path) -> None:
    """What the process claims beyond the host's busy time (and two jiffies per CPU) is not handed out later either."""
    proc = FakeProc(tmp_path)
    proc.own_ns = 0
    clock = proc.clock()
    read(clock)
    proc.own_ns = 9_000_000_000
    proc.host(1.0)
    assert read(clock) == (1.04, 1.04)
    proc.host(5.0)
    assert read(clock) == (1.04, 5.0)
    clock.close()


def test_without_procfs_nothing_is_known(tmp_path: Path) -> None:
    """Off Linux the answer is None, not 0."""
    assert ProcessClock(str(tmp_path)).read() is None


def test_garbled_stat_is_none_and_passes(proc: FakeProc) -> None:
    """A torn read of the host is None this time and costs nothing the next."""
    clock = proc.clock()
    read(clock)
    (proc.root / "stat").write_text("", encoding="ascii")
    assert clock.read() is None
    proc.host(2.0)
    proc.process(100, 1, 1.0)
    proc.second()
    assert read(clock) == (1.0, 2.0)
    clock.close()


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux procfs")
def test_real_process_and_child() -> None:
    """On a real procfs, own work and a child's work both show, and the host's is at least as much."""
    now = [0]
    clock = ProcessClock(now=lambda: now[0])
    before = clock.read()
    assert before is not None
    sum(range(3_000_000))
    code = "import time\nwhile time.process_time() < 0.3: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    now[0] += 2_000_000_000
    after = clock.read()
    assert after is not None
    assert after.busy_s - before.busy_s >= 0.29
    assert after.host_busy_s - before.host_busy_s >= after.busy_s - before.busy_s
    clock.close()
