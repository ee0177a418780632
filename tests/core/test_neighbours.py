"""Who else is on our GPUs: exact shares by a manual clock, without a thread except where the thread is the claim."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from melodi_otel.devices import Device
from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.host_pids import HostPids
from melodi_otel.neighbours import Neighbours
from melodi_otel.sources.base import Settings
from melodi_otel.sources.nvml import NvmlSource, open_nvml
from melodi_otel.sources.nvml_processes import GpuProcesses, ProcessLoad
from melodi_otel.testing.clock import ManualClock
from melodi_otel.testing.machine import Machine
from melodi_otel.testing.nvml import FakeGpu, FakeNvml, FakeSlice, build_fake_nvml

GPU, OTHER = "GPU-aaaa", "GPU-bbbb"
US, THEM = 100, 200
Told = list[tuple[str, float, bool | None]]


class Numbers(HostPids):
    """Which numbers are whose, as the test says."""

    def __init__(self, host: dict[int, int] | None = None, *, nested: bool = False, here: Sequence[int] = ()) -> None:
        self.nested = nested
        self.translated = host
        self.here = set(here)
        self.names: dict[int, str] = {}

    def host(self, pids):
        if not self.nested:
            return frozenset(pids)
        return None if self.translated is None else frozenset(self.translated.get(pid, -1) for pid in pids)

    def live_here(self, pids):
        return set(pids) <= self.here

    def name(self, host_pid):
        return self.names.get(host_pid, "")

    name_here = name


class Gpus:
    """A source whose lists and samples the test writes; samples are (pid, percent of SM)."""

    def __init__(self, clock: ManualClock, *ids: str) -> None:
        self.clock = clock
        self.devices = [Device(name, "gpu") for name in ids or (GPU,)]
        self.lists: dict[str, GpuProcesses | Exception] = {}
        self.samples: dict[str, list[ProcessLoad]] = {}
        self.loads_error: Exception | None = None
        self.asked: list[str] = []
        self.cost_s = 0.0
        self.offset_us = 0

    def on(self, *pids: int, device: str = GPU, **more) -> None:
        self.lists[device] = GpuProcesses(frozenset(pids), **more)

    def used(self, pid: int, percent: int, device: str = GPU) -> None:
        t_us = self.clock.wall_ns() // 1000 - self.offset_us
        self.samples.setdefault(device, []).append(ProcessLoad(pid, t_us, percent))

    def processes(self, device_id: str) -> GpuProcesses:
        self.asked.append("list")
        self.clock.advance(self.cost_s)
        found = self.lists.get(device_id, GpuProcesses())
        if isinstance(found, Exception):
            raise found
        return found

    def process_loads(self, device_id: str, since_us: int) -> Sequence[ProcessLoad]:
        self.asked.append("loads")
        if self.loads_error is not None:
            raise self.loads_error
        return [load for load in self.samples.get(device_id, ()) if load.t_us > since_us]


class Scene:
    """Neighbours, what they told, and one request that has been open for 5 s."""

    def __init__(self, *ids: str, numbers: HostPids | None = None, working=None, ours=(US,)) -> None:
        self.clock = ManualClock()
        self.gpus = Gpus(self.clock, *ids)
        self.told: Told = []
        self.ours = list(ours)
        self.neighbours = Neighbours(
            [self.gpus, object()],
            self.clock,
            lambda: self.ours,
            lambda device, t_ns, share, others: self.told.append((device, share, others)),
            numbers=numbers or Numbers(),
            working=working,
        )
        self.neighbours.activity(1, self.clock.monotonic_ns())
        self.clock.advance(5)

    def look(self) -> Told:
        """Look now and hand out what is news."""
        self.told.clear()
        wait = self.neighbours.tick()
        assert wait is not None
        self.clock.advance(wait)
        return list(self.told)


# shares ----------------------------------------------------------------------------------------------------------------


def test_alone_is_told_once() -> None:
    """Where only our process is listed, share 0 and no others are told at the first look and not again."""
    scene = Scene()
    scene.gpus.on(US)
    assert scene.look() == [(GPU, 0.0, False)]
    assert scene.look() == []


def test_utilisation_is_asked_only_when_somebody_else_is_there() -> None:
    """A look at a GPU of our own is one list; one with a neighbour asks for samples too."""
    scene = Scene()
    scene.gpus.on(US)
    scene.look()
    assert scene.gpus.asked == ["list"]
    scene.gpus.on(US, THEM)
    scene.look()
    assert scene.gpus.asked[1:] == ["list", "loads", "loads"]


def test_who_ours_are_is_asked_when_a_stranger_is_listed() -> None:
    """Looks that list nobody but ours ask once a minute who ours are; one that lists another asks each time."""
    scene, asked = Scene(), []
    scene.neighbours._ours = lambda: asked.append(1) or scene.ours
    scene.gpus.on(US)
    for _ in range(13):  # at 0, 5 … 60 s
        scene.look()
    assert len(asked) == 2
    scene.gpus.on(US, THEM)
    scene.look()
    scene.look()
    assert len(asked) == 4


def test_the_share_is_the_others_part_of_the_sm_time() -> None:
    """60 % and 20 % of ours against 20 % of theirs in the window: a share of 0.2, then 0 when they rest."""
    scene = Scene()
    scene.gpus.on(US, THEM)
    scene.gpus.used(US, 60)
    scene.gpus.used(US, 20)
    scene.gpus.used(THEM, 20)
    assert scene.look() == [(GPU, 0.2, True)]
    scene.gpus.used(US, 90)
    assert scene.look() == [(GPU, 0.0, True)]


def test_who_computed_within_15_seconds_is_still_a_neighbour() -> None:
    """Samples are few and each is booked to one process: none of theirs in 5 s says a share of 0, none in 15 s alone."""
    scene = Scene()
    scene.gpus.on(US, THEM)
    scene.gpus.used(US, 10)
    scene.gpus.used(THEM, 10)
    scene.look()
    scene.gpus.used(US, 90)
    assert scene.look() == [(GPU, 0.0, True)]
    scene.gpus.used(US, 90)
    assert scene.look() == []
    scene.gpus.used(US, 90)
    assert scene.look() == [(GPU, 0.0, False)]


def test_what_was_between_requests_counts_for_the_others_only() -> None:
    """Open for 2 of 5 s, 20 % ours and 50 % theirs: while open ours had 20 / 0.4 = 50 %, so a share of one half."""
    scene = Scene()
    scene.gpus.on(US, THEM)
    scene.look()
    scene.neighbours.activity(0, scene.clock.monotonic_ns() - 3_000_000_000)
    scene.gpus.used(US, 20)
    scene.gpus.used(THEM, 50)
    scene.neighbours.activity(1, scene.clock.monotonic_ns())
    assert scene.look() == [(GPU, 0.5, True)]


def test_a_request_that_just_began_waits_for_a_share_of_its_own() -> None:
    """After a minute of theirs alone nothing is booked at the first look; the second comes 2 s later and knows: 0.25."""
    scene = Scene()
    scene.gpus.on(US)
    scene.look()
    scene.neighbours.activity(0, scene.clock.monotonic_ns())
    scene.clock.advance(60)
    scene.gpus.on(US, THEM)
    scene.gpus.used(THEM, 100)
    scene.neighbours.activity(1, scene.clock.monotonic_ns())
    scene.told.clear()
    assert scene.neighbours.tick() == 2.0
    assert scene.told == [(GPU, 0.0, True)]
    scene.clock.advance(2.0)
    scene.gpus.used(US, 75)
    scene.gpus.used(THEM, 25)
    assert scene.look() == [(GPU, 0.25, True)]


def test_a_request_that_just_began_keeps_the_share_of_the_last_one() -> None:
    """A share of 0.2 was told while requests ran; after a pause of a minute it holds until a new one is known."""
    scene = Scene()
    scene.gpus.on(US, THEM)
    scene.gpus.used(US, 80)
    scene.gpus.used(THEM, 20)
    assert scene.look() == [(GPU, 0.2, True)]
    scene.neighbours.activity(0, scene.clock.monotonic_ns())
    scene.clock.advance(60)
    scene.gpus.used(THEM, 100)
    scene.neighbours.activity(1, scene.clock.monotonic_ns())
    assert scene.look() == []


def test_a_neighbour_that_left_is_none_at_once() -> None:
    """A process that computed and is no longer on the list is nobody's neighbour at the next look."""
    scene = Scene()
    scene.gpus.on(US, THEM)
    scene.gpus.used(THEM, 10)
    scene.look()
    scene.gpus.on(US)
    assert scene.look() == [(GPU, 0.0, False)]


def test_a_driver_that_falls_silent_makes_nobody_alone() -> None:
    """No sample of theirs in the window, and the longer one cannot be asked: others may have computed."""
    scene = Scene()
    scene.gpus.on(US, THEM)
    scene.gpus.used(US, 10)
    asked = scene.gpus.process_loads

    def once(device_id: str, since_us: int) -> Sequence[ProcessLoad]:
        found = asked(device_id, since_us)
        scene.gpus.loads_error = Transient("busy")
        return found

    scene.gpus.process_loads = once
    assert scene.look() == [(GPU, 0.0, True)]


def test_only_newer_samples_count() -> None:
    """Samples of the first look are not counted in the second: 0.5, then all theirs."""
    scene = Scene()
    scene.gpus.on(US, THEM)
    scene.gpus.used(US, 50)
    scene.gpus.used(THEM, 50)
    assert scene.look() == [(GPU, 0.5, True)]
    scene.gpus.used(THEM, 10)
    assert scene.look() == [(GPU, 1.0, True)]


def test_no_new_sample_is_no_use() -> None:
    """After samples were seen, none since the last look means that nobody computed: share 0."""
    scene = Scene()
    scene.gpus.on(US, THEM)
    scene.gpus.used(THEM, 50)
    assert scene.look() == [(GPU, 1.0, True)]
    assert scene.look() == [(GPU, 0.0, True)]


def test_what_was_used_long_ago_says_nothing_about_now() -> None:
    """Samples older than two periods are left out after a pause in which nobody looked."""
    scene = Scene()
    scene.gpus.on(US, THEM)
    scene.gpus.used(US, 50)
    scene.look()
    scene.gpus.used(THEM, 100)
    scene.clock.advance(60)
    scene.gpus.used(US, 50)
    assert scene.look() == []


def test_a_driver_that_counts_from_its_start_needs_a_second_look() -> None:
    """Time stamps of another zero are found by asking for all: unknown at first, measured from then on."""
    scene = Scene()
    scene.gpus.offset_us = 1_699_999_000_000_000
    scene.gpus.on(US, THEM)
    scene.gpus.used(THEM, 50)
    assert scene.look() == [(GPU, 0.0, True)]
    scene.gpus.used(US, 25)
    scene.gpus.used(THEM, 75)
    assert scene.look() == [(GPU, 0.75, True)]


@pytest.mark.parametrize("error", [None, Refused("not told"), Transient("busy"), RuntimeError("broken")])
def test_without_utilisation_others_are_there_and_nothing_is_theirs(error: Exception | None) -> None:
    """Another process and no samples: no share is booked, and nobody claims to be alone."""
    scene = Scene()
    scene.gpus.on(US, THEM)
    scene.gpus.loads_error = error
    assert scene.look() == [(GPU, 0.0, True)]


def test_a_process_that_draws_is_a_neighbour() -> None:
    """A graphics process with SM time has a share as a compute process has."""
    scene = Scene()
    scene.gpus.on(US, graphics=frozenset({THEM}))
    scene.gpus.used(US, 75)
    scene.gpus.used(THEM, 25)
    assert scene.look() == [(GPU, 0.25, True)]


def test_a_child_that_ended_is_still_ours() -> None:
    """SM time of a process of ours that ended since the last look is not somebody else's."""
    scene = Scene(ours=(US, US + 1))
    scene.gpus.on(US, US + 1)
    scene.look()
    scene.ours = [US]
    scene.gpus.on(US, THEM)
    scene.gpus.used(US + 1, 50)
    scene.gpus.used(THEM, 50)
    assert scene.look() == [(GPU, 0.5, True)]


def test_what_is_taken_back_is_told() -> None:
    """A driver that stops telling takes the claim back: others None, once; a passing failure does not."""
    scene = Scene()
    scene.gpus.on(US)
    assert scene.look() == [(GPU, 0.0, False)]
    scene.gpus.lists[GPU] = Transient("busy")
    assert [scene.look() for _ in range(4)] == [[], [], [(GPU, 0.0, None)], []]
    scene.gpus.on(US)
    assert scene.look() == [(GPU, 0.0, False)]


@pytest.mark.parametrize("error", [Refused("not told"), Gone("lost", GPU)])
def test_a_driver_that_never_tells_is_asked_once(error: Exception) -> None:
    """Refused or gone: nothing is told, and it is not asked again."""
    scene = Scene()
    scene.gpus.lists[GPU] = error
    assert [scene.look() for _ in range(3)] == [[], [], []]
    assert scene.gpus.asked == ["list"]


def test_behind_mps_no_share_is_known() -> None:
    """With NVIDIA's MPS server on the list nobody is alone for certain; another client beside it is another process."""
    numbers = Numbers()
    numbers.names[THEM] = "nvidia-cuda-mps-server"[:15]
    scene = Scene(numbers=numbers)
    scene.gpus.on(US, THEM)
    assert scene.look() == []
    scene.gpus.on(US, THEM, 300)
    assert scene.look() == [(GPU, 0.0, True)]
    assert "loads" not in scene.gpus.asked


# who we are ------------------------------------------------------------------------------------------------------------


def test_on_the_machine_who_is_not_ours_is_somebody_else() -> None:
    """Rule 1: a lone process that is not ours is a neighbour, even where none of ours is listed."""
    scene = Scene()
    scene.gpus.on(THEM)
    assert scene.look() == [(GPU, 0.0, True)]


def test_a_driver_that_names_nobody_says_nothing() -> None:
    """Rule 1: empty lists say nothing until one of ours was on one; then an empty list is an empty GPU."""
    scene = Scene(GPU, OTHER)
    assert scene.look() == []
    scene.gpus.on(US)
    assert scene.look() == [(GPU, 0.0, False), (OTHER, 0.0, False)]


def test_entries_without_a_pid_beside_us_are_others() -> None:
    """An entry that the driver does not name is somebody else where we are named, and unknown where we are not."""
    scene = Scene()
    scene.gpus.on(unnamed=1)
    assert scene.look() == []
    scene.gpus.on(US, unnamed=1)
    assert scene.look() == [(GPU, 0.0, True)]


def test_in_a_container_with_the_machines_proc_pids_are_translated() -> None:
    """Rule 2: our pid 100 is 4100 on the machine; 4100 listed alone is us, beside another it has its share."""
    scene = Scene(numbers=Numbers({US: 4100}, nested=True))
    scene.gpus.on(4100)
    assert scene.look() == [(GPU, 0.0, False)]
    scene.gpus.on(4100, THEM)
    scene.gpus.used(4100, 30)
    scene.gpus.used(THEM, 10)
    assert scene.look() == [(GPU, 0.25, True)]


def test_in_a_container_with_known_numbers_a_lone_stranger_is_not_us() -> None:
    """Rule 2: where our number is known and not listed, nothing is said of a lone process."""
    scene = Scene(numbers=Numbers({US: 4100}, nested=True))
    scene.gpus.on(THEM)
    assert scene.look() == []


def test_a_list_of_the_namespace_alone_cannot_say_that_we_are_alone() -> None:
    """Rule 3: our own number listed means that the driver hides other containers: alone is not told, others here are."""
    scene = Scene(numbers=Numbers(nested=True, here=(US, THEM)))
    scene.gpus.on(US)
    assert scene.look() == []
    scene.gpus.on(US, THEM)
    scene.gpus.used(US, 50)
    scene.gpus.used(THEM, 50)
    assert scene.look() == [(GPU, 0.5, True)]


def test_a_number_that_is_ours_by_chance_makes_us_nobody_elses() -> None:
    """Rule 3 needs every listed pid to be a process here: else the numbers are the machine's and ours is not known."""
    scene = Scene(numbers=Numbers(nested=True, here=(US,)))
    scene.gpus.on(US, 54321)
    assert scene.look() == []


def test_in_a_container_the_only_process_is_us_where_we_work() -> None:
    """Rule 4: one process of unknown number on the only GPU is us; two are unknown, and so is none."""
    scene = Scene(numbers=Numbers(nested=True))
    scene.gpus.on()
    assert scene.look() == []
    scene.gpus.on(54321)
    assert scene.look() == [(GPU, 0.0, False)]
    scene.gpus.on(54321, 54322)
    assert scene.look() == [(GPU, 0.0, None)]


def test_an_only_entry_without_a_pid_is_us_too() -> None:
    """Rule 4: the one entry that a container's driver shows without a number is us."""
    scene = Scene(numbers=Numbers(nested=True))
    scene.gpus.on(unnamed=1)
    assert scene.look() == [(GPU, 0.0, False)]


def test_on_several_gpus_the_only_process_is_us_only_where_we_are_known_to_work() -> None:
    """Rule 4 needs to know where requests are open: without it nothing is said of two GPUs, with it of one."""
    scene = Scene(GPU, OTHER, numbers=Numbers(nested=True))
    scene.gpus.on(54321)
    scene.gpus.on(54322, device=OTHER)
    assert scene.look() == []
    scene = Scene(GPU, OTHER, numbers=Numbers(nested=True), working=lambda: [OTHER])
    scene.gpus.on(54321)
    scene.gpus.on(54322, device=OTHER)
    assert scene.look() == [(OTHER, 0.0, False)]
    assert scene.gpus.asked == ["list"]


# slices ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elsewhere", "told"),
    [
        (frozenset(), [(GPU, 0.0, False)]),
        (frozenset({THEM}), [(GPU, 0.0, True)]),
        (frozenset({US}), [(GPU, 0.0, False)]),
        (None, []),
    ],
)
def test_other_slices_of_the_board(elsewhere: frozenset[int] | None, told: Told) -> None:
    """Others on other slices take no share (the fraction has it) but the board is not ours alone; untold is unknown."""
    scene = Scene()
    scene.gpus.on(US, elsewhere=elsewhere)
    assert scene.look() == told


# pace ------------------------------------------------------------------------------------------------------------------


def test_nobody_at_work_is_nothing_asked() -> None:
    """Before the first request and 2 s after the last one, nothing is asked and the thread waits for work alone."""
    scene = Scene()
    scene.neighbours.activity(0, scene.clock.monotonic_ns())
    scene.clock.advance(2)
    assert scene.neighbours.tick() is None
    scene.neighbours.activity(1, scene.clock.monotonic_ns())
    assert scene.neighbours.tick() == 5.0
    assert scene.gpus.asked == ["list"]


def test_a_look_that_falls_due_just_after_the_last_request_is_made() -> None:
    """1.9 s after the last close a due look is still made."""
    scene = Scene()
    scene.look()
    scene.clock.advance(-1.9)
    scene.neighbours.activity(0, scene.clock.monotonic_ns())
    scene.clock.advance(1.9)
    scene.neighbours.tick()
    assert scene.gpus.asked == ["list", "list"]


def test_at_most_every_five_seconds() -> None:
    """Requests that come and go do not bring the next look nearer; a shorter period cannot be asked for."""
    scene = Scene()
    scene.neighbours.tick()
    for _ in range(9):
        scene.clock.advance(0.5)
        scene.neighbours.activity(0, scene.clock.monotonic_ns())
        scene.neighbours.activity(1, scene.clock.monotonic_ns())
        scene.neighbours.tick()
    assert scene.gpus.asked == ["list"]
    scene.clock.advance(0.5)
    scene.neighbours.tick()
    assert scene.gpus.asked == ["list", "list"]


def test_a_dear_look_is_rare() -> None:
    """A look that takes 100 ms is followed by 10 s of rest: at most a hundredth of the time."""
    scene = Scene()
    scene.gpus.cost_s = 0.1
    assert scene.neighbours.tick() == pytest.approx(10.0)


def test_a_failure_of_ours_is_said_once_and_the_thread_lives(caplog: pytest.LogCaptureFixture) -> None:
    """Whatever fails in a look is one line in the log; the next look is due as ever."""
    scene = Scene()
    scene.neighbours._tell = lambda *_: 1 / 0  # type: ignore[assignment]
    scene.gpus.on(US)
    with caplog.at_level(logging.WARNING, "melodi_otel"):
        assert [scene.neighbours.tick(), scene.clock.advance(5), scene.neighbours.tick()][::2] == [5.0, 5.0]
    assert [record.message for record in caplog.records] == [
        "looking for other processes on the GPU failed (said once)"
    ]


class Stepping(ManualClock):
    """A clock whose waits end when the event is set, or at once after ``seconds``."""

    def wait(self, event: threading.Event, seconds: float | None) -> bool:
        if seconds is not None:
            self.advance(seconds)
            return event.is_set()
        return event.wait(10)


def test_the_thread_looks_when_work_begins() -> None:
    """The thread sleeps without a limit until the first request, looks, and ends when stopped."""
    clock, done, told = Stepping(), threading.Event(), []
    gpus = Gpus(clock)
    gpus.on(US)

    def tell(*what: object) -> None:
        told.append(what)
        done.set()

    neighbours = Neighbours([gpus], clock, lambda: [US], tell, numbers=Numbers())
    neighbours.start()
    neighbours.start()
    assert neighbours.running
    assert [thread.name for thread in threading.enumerate()].count("melodi-otel-neighbours") == 1
    neighbours.activity(1, clock.monotonic_ns())
    assert done.wait(10)
    neighbours.stop()
    assert not neighbours.running
    assert told[0][0] == GPU


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_no_thread_until_it_starts_one() -> None:
    """After a fork the child's thread is not there and its locks are free."""
    neighbours = Neighbours([Gpus(ManualClock())], Stepping(), lambda: [US], lambda *_: None, numbers=Numbers())
    neighbours.start()
    try:
        with neighbours._worker._lock:
            pid = os.fork()
            if pid == 0:
                good = not neighbours.running and neighbours._worker._lock.acquire(timeout=1)
                os._exit(0 if good else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    finally:
        neighbours.stop()


def test_what_cannot_list_processes_is_of_no_use() -> None:
    """Without a source that lists processes the thread need not be started."""
    clock = ManualClock()
    assert not Neighbours([object()], clock, list, lambda *_: None, numbers=Numbers()).useful
    assert Neighbours([Gpus(clock)], clock, list, lambda *_: None, numbers=Numbers()).useful


# with NVML -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        reason = "gcc is not installed: the fake NVML library cannot be compiled"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return build_fake_nvml(tmp_path_factory.mktemp("fake-nvml"))


Watch = Callable[..., tuple[FakeNvml, Callable[[], Told]]]


@pytest.fixture
def watch(tmp_path: Path, library: Path) -> Iterator[Watch]:
    opened: list[tuple[FakeNvml, NvmlSource]] = []

    def make(gpu: FakeGpu, **environ: str) -> tuple[FakeNvml, Callable[[], Told]]:
        fake, clock = FakeNvml(tmp_path / str(len(opened)), [gpu], library=library), ManualClock()
        source = open_nvml(Settings(clock=clock, environ=environ, nvml_library=str(fake.library)))
        opened.append((fake, source))
        told: Told = []
        neighbours = Neighbours(
            [source],
            clock,
            lambda: [US],
            lambda d, t, share, others: told.append((d, share, others)),
            numbers=Numbers(),
        )
        neighbours.activity(1, clock.monotonic_ns())

        def look() -> Told:
            clock.advance(5)
            fake.advance(5)
            told.clear()
            neighbours.tick()
            return list(told)

        return fake, look

    yield make
    for fake, source in opened:
        source.close()
        fake.close()


@pytest.mark.parametrize("loads", ["yes", "info"])
def test_an_intruder_on_a_real_binding(watch: Watch, loads: str) -> None:
    """Alone, then a neighbour of 3 in 4 SM seconds, then alone again: 0, 0.75, 0, by either call of the driver."""
    fake, look = watch(FakeGpu(GPU, pids=(US,), loads=loads))
    assert look() == [(GPU, 0.0, False)]
    fake.processes(0, [US, THEM])
    fake.used(0, (US, 20), (THEM, 60), at=fake.seconds() + 4)
    assert look() == [(GPU, 0.75, True)]
    fake.processes(0, [US])
    assert look() == [(GPU, 0.0, False)]
    counted = fake.calls()
    assert counted["nvmlDeviceGetGraphicsRunningProcesses_v3"] >= 3
    assert counted.get("nvmlDeviceGetProcessesUtilizationInfo", 0) == (2 if loads == "info" else 0)


def test_a_slice_of_a_board(watch: Watch) -> None:
    """On one of two slices: the other slice's process makes the board shared, one on ours too; no share is told."""
    parts = (FakeSlice("MIG-a", "3g.40gb", 1), FakeSlice("MIG-b", "3g.40gb", 2))
    fake, look = watch(FakeGpu(GPU, max_slices=7, slices=parts), CUDA_VISIBLE_DEVICES="MIG-a")
    fake.processes(0, [US], slices=[0])
    assert look() == [(GPU, 0.0, False)]
    fake.processes(0, [US, THEM], slices=[0, 1])
    assert look() == [(GPU, 0.0, True)]
    fake.processes(0, [US], slices=[0])
    assert look() == [(GPU, 0.0, False)]
    fake.processes(0, [US, THEM], slices=[0, 0])
    assert look() == [(GPU, 0.0, True)]


def test_a_slice_whose_board_answers_to_root_only(watch: Watch) -> None:
    """Where the rest of the board is not told, nobody claims to be alone; a neighbour on our own slice is seen."""
    parts = (FakeSlice("MIG-a", "3g.40gb", 1), FakeSlice("MIG-b", "3g.40gb", 2))
    fake, look = watch(FakeGpu(GPU, max_slices=7, slices=parts, mig_private=True), CUDA_VISIBLE_DEVICES="MIG-a")
    fake.processes(0, [US, 300], slices=[0, 1])
    assert look() == []
    fake.processes(0, [US, THEM], slices=[0, 0])
    assert look() == [(GPU, 0.0, True)]


# the whole way ---------------------------------------------------------------------------------------------------------


def test_a_neighbours_joules_are_not_the_requests(tmp_path: Path, library: Path) -> None:
    """100 W at rest, 300 W while a neighbour has 3 of 4 SM seconds: of the 200 W above rest the request has 50 W."""
    fake = FakeNvml(tmp_path, [FakeGpu(GPU, watts=100, pids=(US, THEM))], library=library)
    machine = Machine(fake.advance, nvml_library=str(fake.library), environ={})
    machine.start("nvml")
    neighbours = Neighbours(
        machine.discovery.sources,
        machine.clock,
        lambda: [US],
        lambda device, t_ns, share, others: machine.ledger.foreign(device, t_ns, share),
        numbers=Numbers(),
    )
    machine.run(60)
    neighbours.activity(1, machine.clock.monotonic_ns())
    machine.run(5)
    fake.used(0, (US, 25), (THEM, 75))
    neighbours.tick()
    fake.watts(0, 300)
    energy = machine.request(10)
    assert energy.total == pytest.approx(100 * 10 + 50 * 10, rel=0.02)
    assert energy.exclusive is False
    assert machine.ledger.snapshot().books[GPU].foreign == pytest.approx(150 * 10, rel=0.05)
    for source in machine.discovery.sources:
        source.close()
    fake.close()


def test_a_slice_has_its_part_of_the_board(tmp_path: Path, library: Path) -> None:
    """3 of 7 compute slices of 140 W for 10 s are 600 J by interpolation at best; the other 800 J are foreign."""
    parts = (FakeSlice("MIG-a", "3g.40gb", 1), FakeSlice("MIG-b", "4g.40gb", 2))
    board = FakeGpu(GPU, watts=140, max_slices=7, slices=parts)
    fake = FakeNvml(tmp_path, [board], library=library)
    machine = Machine(fake.advance, nvml_library=str(fake.library), environ={"CUDA_VISIBLE_DEVICES": "MIG-a"})
    machine.start("nvml")
    before = machine.ledger.snapshot().books[GPU].foreign if GPU in machine.ledger.snapshot().books else 0.0
    energy = machine.request(10)
    assert energy.total == pytest.approx(600, rel=0.02)
    assert energy.quality == "interpolated"
    assert machine.ledger.snapshot().books[GPU].foreign - before == pytest.approx(80 * 10.3, rel=0.03)
    for source in machine.discovery.sources:
        source.close()
    fake.close()
