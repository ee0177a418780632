"""Whose CPU time it was, where connected processes stand below each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from melodi_otel.attribution.evidence import WHOLE
from melodi_otel.attribution.meter import EngineId
from melodi_otel.group_clocks import GroupClocks
from melodi_otel.processes import CpuTimes


class Tree:
    """CPU seconds of a process with everything below it, by hand."""

    def __init__(self) -> None:
        self.busy_s = 100.0

    def read(self) -> CpuTimes:
        return CpuTimes(self.busy_s, 1000.0)

    def close(self) -> None:
        pass


@pytest.fixture
def trees() -> dict[int, Tree]:
    return {10: Tree(), 11: Tree(), 12: Tree()}


@pytest.fixture
def clocks(tmp_path: Path, trees: dict[int, Tree]) -> GroupClocks:
    """Of process 10 and its children 11 and 12."""
    for pid, parent in ((10, 1), (11, 10), (12, 10)):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_bytes(b"%d (a) S %d 0 0" % (pid, parent))
    made: Any = trees.__getitem__
    return GroupClocks(processes=str(tmp_path), clock=made)


def used(clocks: GroupClocks) -> dict[str, float]:
    return {engine.group: busy_s for engine, busy_s in clocks.groups().items() if engine.group}


def test_one_group_is_counted_once(clocks: GroupClocks, trees: dict[int, Tree]) -> None:
    """A child of the same group is in its parent's tree already."""
    clocks.add("g", 10)
    clocks.add("g", 11)
    assert used(clocks) == {"g": 0.0}
    trees[10].busy_s += 5.0  # of which the child's are 3
    trees[11].busy_s += 3.0
    assert used(clocks) == {"g": 5.0}


def test_workers_below_a_metered_master(clocks: GroupClocks, trees: dict[int, Tree]) -> None:
    """Workers of groups of their own have their own time, and the master what is left of its tree, whenever it comes."""
    clocks.add("a", 11)
    clocks.add("b", 12)
    used(clocks)
    trees[11].busy_s += 1.0
    trees[10].busy_s += 1.0
    assert used(clocks) == {"a": 1.0, "b": 0.0}
    clocks.add("master", 10)
    used(clocks)
    trees[10].busy_s += 7.0
    trees[11].busy_s += 4.0
    trees[12].busy_s += 2.0
    assert used(clocks) == {"a": 5.0, "b": 2.0, "master": 1.0}


def test_figures_never_fall(clocks: GroupClocks, trees: dict[int, Tree]) -> None:
    """A child whose time its parent's clock has not seen yet takes nothing back; it is caught up with."""
    clocks.add("master", 10)
    clocks.add("a", 11)
    used(clocks)
    trees[10].busy_s += 2.0
    assert used(clocks)["master"] == 2.0
    trees[11].busy_s += 3.0
    assert used(clocks) == {"master": 2.0, "a": 3.0}
    trees[10].busy_s += 4.0
    assert used(clocks) == {"master": 3.0, "a": 3.0}


def test_time_of_one_that_left_stays(clocks: GroupClocks, trees: dict[int, Tree]) -> None:
    """Until the last of its group has left."""
    clocks.add("g", 11)
    clocks.add("g", 12)
    used(clocks)
    trees[11].busy_s += 3.0
    used(clocks)
    assert clocks.remove("g", 11) == []
    assert used(clocks) == {"g": 3.0}
    assert clocks.remove("g", 12) == [EngineId("g", WHOLE)]
    assert used(clocks) == {}
