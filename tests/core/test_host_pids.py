"""Our processes as the machine numbers them, on made-up procfs trees."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from melodi_otel.host_pids import HostPids, family

MACHINE, CONTAINER, NEXT = "pid:[4026531836]", "pid:[4026533000]", "pid:[4026533999]"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="PID namespaces are Linux's")


class Proc:
    """A procfs of one namespace."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir()

    def process(
        self, pid: int | str, *numbers: int, ns: str | None = None, name: str = "python", parent: int = 1
    ) -> Proc:
        here = self.root / str(pid)
        (here / "ns").mkdir(parents=True)
        if ns is not None:
            (here / "ns" / "pid").symlink_to(ns)
        (here / "comm").write_text(name + "\n")
        (here / "stat").write_text(f"{pid} (a ) b) S {parent} 1 1\n")
        listed = "\t".join(str(number) for number in numbers or (pid,))
        (here / "status").write_text(f"Name:\t{name}\nNSpid:\t{listed}\nThreads:\t1\n")
        return self


@pytest.fixture
def machine(tmp_path: Path) -> Proc:
    """The machine's /proc: our process is 4100 there and 7 in its container; another container has a 7 too."""
    proc = Proc(tmp_path / "host").process("self", ns=CONTAINER).process(2, name="kthreadd", ns=MACHINE)
    proc.process(1, ns=MACHINE).process(4000, 4000, 7, ns=NEXT).process(4100, 4100, 7, ns=CONTAINER)
    return proc.process(4101, 4101, 8, ns=CONTAINER, parent=4100).process(4200, 4200, 9)


@pytest.fixture
def own(tmp_path: Path) -> Proc:
    """The container's /proc."""
    return Proc(tmp_path / "own").process("self", ns=CONTAINER).process(7).process(8, parent=7).process(2, name="sh")


def test_on_the_machine_pids_are_the_machines(tmp_path: Path) -> None:
    """In the machine's namespace nothing is translated."""
    proc = Proc(tmp_path / "proc").process("self", ns=MACHINE)
    pids = HostPids(str(proc.root), str(proc.root))
    assert (pids.nested, pids.host([3, 5])) == (False, frozenset({3, 5}))


def test_this_very_process_agrees_with_the_kernel() -> None:
    """On the real /proc, nested is what the link of the namespace says."""
    assert HostPids().nested == (str(Path("/proc/self/ns/pid").readlink()) != MACHINE)


def test_in_a_container_the_machines_numbers_are_unknown(own: Proc) -> None:
    """With the container's own /proc alone our numbers on the machine are not known."""
    pids = HostPids(str(own.root), str(own.root))
    assert (pids.nested, pids.host([7])) == (True, None)


def test_with_the_machines_proc_they_are_found(machine: Proc, own: Proc) -> None:
    """Where the machine's /proc is mounted, 7 and 8 are 4100 and 4101, and the other container's 7 is not ours."""
    pids = HostPids(str(machine.root), str(own.root))
    assert pids.host([7, 8]) == frozenset({4100, 4101})


def test_a_namespace_that_cannot_be_read_is_not_ours(machine: Proc, own: Proc) -> None:
    """A process whose namespace may not be seen is never taken for one of ours."""
    assert HostPids(str(machine.root), str(own.root)).host([9]) is None


def test_a_number_that_was_given_to_another_process_is_forgotten(machine: Proc, own: Proc) -> None:
    """A translation that was right is looked up anew when the machine's process has another number now."""
    pids = HostPids(str(machine.root), str(own.root))
    assert pids.host([7]) == frozenset({4100})
    (machine.root / "4100" / "status").write_text("NSpid:\t4100\n")
    machine.process(4300, 4300, 7, ns=CONTAINER)
    assert pids.host([7]) == frozenset({4300})


def test_a_proc_of_a_namespace_between_is_not_the_machines(own: Proc, tmp_path: Path) -> None:
    """A mounted /proc without the kernel's process 2 is some container's: its numbers are not the driver's."""
    between = Proc(tmp_path / "between").process(2, name="sh").process(30, 30, 7, ns=CONTAINER)
    assert HostPids(str(between.root), str(own.root)).host([7]) is None


def test_names_are_read_where_the_number_counts(machine: Proc, own: Proc) -> None:
    """A name by the machine's number is read in its /proc, one by our number in ours; unknown is empty."""
    machine.process(4500, name="nvidia-cuda-mps")
    own.process(12, name="worker")
    pids = HostPids(str(machine.root), str(own.root))
    assert (pids.name(4500), pids.name(12), pids.name_here(12)) == ("nvidia-cuda-mps", "", "worker")
    assert HostPids(str(own.root), str(own.root)).name(12) == ""


def test_who_lives_here(own: Proc) -> None:
    """Every number must be a process of the namespace."""
    pids = HostPids(str(own.root), str(own.root))
    assert (pids.live_here([7, 8]), pids.live_here([7, 4100])) == (True, False)


@pytest.mark.parametrize(("name", "nested"), [("kthreadd", False), ("bash", True)])
def test_without_the_link_process_2_tells(tmp_path: Path, name: str, nested: bool) -> None:
    """Where the link of the namespace cannot be read, the kernel's process 2 says whether this is the machine."""
    proc = Proc(tmp_path / "proc").process(2, name=name)
    assert HostPids(str(proc.root), str(proc.root)).nested is nested


def test_no_proc_at_all_is_taken_for_a_container(tmp_path: Path) -> None:
    """Without any procfs nothing is known, so nobody is taken for somebody else."""
    pids = HostPids(str(tmp_path / "none"), str(tmp_path / "none"))
    assert (pids.nested, pids.host([7])) == (True, None)


def test_a_family_is_a_process_and_all_below_it(tmp_path: Path) -> None:
    """Children and grandchildren, not the parent; brackets in a name are no trouble; a root that ended stays listed."""
    proc = Proc(tmp_path / "proc").process(10).process(11, parent=10).process(12, parent=11).process(20)
    assert family([10], str(proc.root)) == {10, 11, 12}
    assert family([99], str(proc.root)) == {99}
