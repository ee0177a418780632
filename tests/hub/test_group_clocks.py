from __future__ import annotations

import pytest

from melodi_otel.attribution.evidence import WHOLE
from melodi_otel.attribution.meter import EngineId
from melodi_otel.group_clocks import GroupClocks
from melodi_otel.processes import CpuTimes


class Trees:
    """Processes with the CPU seconds of everything below them, and who started whom."""

    def __init__(self, root):
        self.root = root
        self.busy = {}
        self.closed = []

    def process(self, pid, parent=1, busy=0.0, name="py) 9 9"):
        at = self.root / str(pid)
        at.mkdir()
        (at / "stat").write_text(f"{pid} ({name}) S {parent} 1 1\n")
        self.busy[pid] = busy

    def end(self, pid):
        (self.root / str(pid) / "stat").unlink()
        self.busy[pid] = None

    def clock(self, pid):
        trees = self

        class Clock:
            def read(self):
                busy = trees.busy[pid]
                return None if busy is None else CpuTimes(busy, 1e9)

            def close(self):
                trees.closed.append(pid)

        return Clock()


@pytest.fixture
def trees(tmp_path):
    return Trees(tmp_path)


@pytest.fixture
def clocks(trees):
    made = GroupClocks(processes=str(trees.root), clock=trees.clock)
    yield made
    made.close()


def seconds(clocks):
    """By group, without the hub itself."""
    return {engine.group: busy for engine, busy in clocks.groups().items() if engine.group}


def test_a_process_counts_from_when_it_came(trees, clocks):
    """What it had used before is nothing that happened here."""
    trees.process(10, busy=500.0)
    clocks.add("g", 10)
    assert seconds(clocks) == {"g": 0.0}
    trees.busy[10] = 503.0
    assert seconds(clocks) == {"g": 3.0}


def test_the_hub_itself_is_a_series(clocks):
    """Always: with nobody connected the host's load is still known."""
    (engine,) = clocks.groups()
    assert engine == EngineId("", WHOLE)
    assert clocks.read().busy_s > 0.0


def test_processes_of_a_group_are_one_figure(trees, clocks):
    """Two programs of one group, side by side: their sum."""
    for pid in (10, 11):
        trees.process(pid)
        clocks.add("g", pid)
    seconds(clocks)
    trees.busy |= {10: 1.0, 11: 2.0}
    assert seconds(clocks) == {"g": 3.0}


def test_a_nested_process_is_counted_once(trees, clocks):
    """A worker below its master, both connected, with a shell in between: the master's tree has the worker's time already."""
    trees.process(10)
    trees.process(11, parent=10)
    trees.process(12, parent=11)
    for pid in (10, 12):
        clocks.add("g", pid)
    seconds(clocks)
    trees.busy |= {10: 5.0, 12: 3.0}
    assert seconds(clocks) == {"g": 5.0}


def test_a_nested_process_of_another_group_has_its_own_time(trees, clocks):
    """What a worker used is its group's and not its master's, and the two sum to the tree."""
    trees.process(10)
    trees.process(12, parent=10)
    clocks.add("master", 10)
    clocks.add("worker", 12)
    seconds(clocks)
    trees.busy |= {10: 5.0, 12: 3.0}
    assert seconds(clocks) == {"master": 2.0, "worker": 3.0}


def test_files_that_are_not_read_at_one_instant(trees, clocks):
    """The worker's file is ahead of what its master's tree shows: the master pays that back, and no figure falls."""
    trees.process(10)
    trees.process(12, parent=10)
    clocks.add("master", 10)
    clocks.add("worker", 12)
    seconds(clocks)
    trees.busy |= {10: 2.0, 12: 3.0}
    assert seconds(clocks) == {"master": 0.0, "worker": 3.0}
    trees.busy |= {10: 4.0, 12: 3.0}
    assert seconds(clocks) == {"master": 1.0, "worker": 3.0}


@pytest.mark.parametrize("group", ["g", "h"])
def test_the_outer_one_leaves(trees, clocks, group):
    """From then on the inner one's time is its own alone, and none of the time before comes back."""
    trees.process(10)
    trees.process(12, parent=10)
    clocks.add("g", 10)
    clocks.add(group, 12)
    seconds(clocks)
    trees.busy |= {10: 5.0, 12: 3.0}
    before = sum(seconds(clocks).values())
    gone = clocks.remove("g", 10)
    assert gone == ([] if group == "g" else [EngineId("g", WHOLE)])
    trees.busy[12] = 4.0
    assert before == 5.0
    assert seconds(clocks) == ({"g": 6.0} if group == "g" else {"h": 4.0})


def test_who_leaves_keeps_its_time_in_the_group(trees, clocks):
    """The sum of the group does not fall; when the last one leaves, the series ends."""
    for pid in (10, 11):
        trees.process(pid)
        clocks.add("g", pid)
    seconds(clocks)
    trees.busy |= {10: 1.0, 11: 2.0}
    seconds(clocks)
    assert clocks.remove("g", 10) == []
    assert seconds(clocks) == {"g": 3.0}
    assert clocks.remove("g", 11) == [EngineId("g", WHOLE)]
    assert seconds(clocks) == {}
    assert trees.closed == [10, 11]


def test_who_comes_back_brings_nothing_along(trees, clocks):
    """Gone and connected again while the group lives: the time meanwhile is not counted, and that before not twice."""
    for pid in (10, 11):
        trees.process(pid)
        clocks.add("g", pid)
    seconds(clocks)
    trees.busy[10] = 2.0
    seconds(clocks)
    clocks.remove("g", 10)
    trees.busy[10] = 50.0
    clocks.add("g", 10)
    assert seconds(clocks) == {"g": 2.0}
    trees.busy[10] = 51.0
    assert seconds(clocks) == {"g": 3.0}


def test_two_connections_of_a_process(trees, clocks):
    """It is there until both have ended."""
    trees.process(10)
    clocks.add("g", 10)
    clocks.add("g", 10)
    assert clocks.pids() == [10]
    assert clocks.remove("g", 10) == []
    assert clocks.pids() == [10]
    assert clocks.remove("g", 10) == [EngineId("g", WHOLE)]
    assert clocks.remove("g", 10) == []


@pytest.mark.parametrize("pid", [0, -1])
def test_a_process_that_cannot_be_seen(clocks, pid):
    """In another pid namespace: its time is not known, so there is no figure, not even 0."""
    clocks.add("g", pid)
    assert (seconds(clocks), clocks.pids(), clocks.remove("g", pid)) == ({}, [], [])


def test_a_process_that_dies_between_two_readings(trees, clocks):
    """Its files are gone before its connection is: the figure stands still."""
    trees.process(10)
    trees.process(12, parent=10)
    clocks.add("g", 10)
    clocks.add("h", 12)
    seconds(clocks)
    trees.busy |= {10: 4.0, 12: 1.0}
    assert seconds(clocks) == {"g": 3.0, "h": 1.0}
    trees.end(12)
    trees.busy[10] = 5.0
    assert seconds(clocks) == {"g": 4.0, "h": 1.0}


@pytest.mark.parametrize("stat", ["", "12", "12 (py"])
def test_a_file_that_says_nothing(trees, clocks, stat):
    """A process that is just ending has an empty file: it is nobody's child then."""
    trees.process(10)
    trees.process(12, parent=10)
    (trees.root / "12/stat").write_text(stat)
    clocks.add("g", 10)
    clocks.add("h", 12)
    assert seconds(clocks) == {"g": 0.0, "h": 0.0}


def test_figures_never_fall(trees, clocks):
    """A clock that falls (it must not) changes nothing."""
    trees.process(10, busy=5.0)
    clocks.add("g", 10)
    seconds(clocks)
    trees.busy[10] = 7.0
    assert seconds(clocks) == {"g": 2.0}
    trees.busy[10] = 6.0
    assert seconds(clocks) == {"g": 2.0}
    trees.busy[10] = 8.0
    assert seconds(clocks) == {"g": 3.0}


def test_one_that_is_hidden_is_remembered() -> None:
    """While one is connected that is known, for it may be whom a driver's list of processes names."""
    clocks = GroupClocks()
    try:
        clocks.add("g", 0)
        clocks.add("h", 0)
        assert clocks.hidden
        assert clocks.remove("g", 0) == []
        assert clocks.hidden
        clocks.remove("h", 0)
        assert not clocks.hidden
    finally:
        clocks.close()
