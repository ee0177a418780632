"""Who is on a GPU and how much each used, by the real ``pynvml`` on a fake NVML library."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.sources.base import Settings
from melodi_otel.sources.nvml import NvmlSource, open_nvml
from melodi_otel.sources.nvml_library import NvmlApi
from melodi_otel.sources.nvml_processes import GpuProcesses, ProcessLoad, process_loads
from melodi_otel.testing import nvml as kit
from melodi_otel.testing.clock import ManualClock
from melodi_otel.testing.nvml import FakeGpu, FakeNvml, FakeSlice, build_fake_nvml

A, B = "GPU-aaaa", "GPU-bbbb"
SLICES = (FakeSlice("MIG-1", "3g.40gb", 1), FakeSlice("MIG-2", "3g.40gb", 2), FakeSlice("MIG-3", "1g.10gb", 3))
LIST, DRAW = "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetGraphicsRunningProcesses_v3"
WALL_US = 1_700_000_000_000_000


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        reason = "gcc is not installed: the fake NVML library cannot be compiled"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return build_fake_nvml(tmp_path_factory.mktemp("fake-nvml"))


Open = Callable[..., tuple[FakeNvml, NvmlSource]]


@pytest.fixture
def start(tmp_path: Path, library: Path) -> Iterator[Open]:
    opened: list[tuple[FakeNvml, NvmlSource]] = []

    def make(*gpus: FakeGpu, **environ: str) -> tuple[FakeNvml, NvmlSource]:
        fake = FakeNvml(tmp_path / str(len(opened)), gpus, library=library)
        settings = Settings(clock=ManualClock(), environ=environ, nvml_library=str(fake.library))
        opened.append((fake, open_nvml(settings)))
        return opened[-1]

    yield make
    for fake, source in opened:
        source.close()
        assert fake.initialized == 0
        fake.close()


def test_who_computes_and_who_draws(start: Open) -> None:
    """Both lists, each pid once; an entry without a pid is counted."""
    fake, source = start(FakeGpu(A, pids=(7, 0), graphics=(9,)), FakeGpu(B))
    assert source.processes(A) == GpuProcesses(frozenset({7}), frozenset({9}), unnamed=1)
    assert source.processes(B) == GpuProcesses()
    fake.processes(1, [5, 6], graphics=[5])
    assert source.processes(B).pids == {5, 6}


def test_a_driver_without_the_graphics_list_still_lists_who_computes(start: Open) -> None:
    """A list of graphics processes that is not supported is an empty one."""
    fake, source = start(FakeGpu(A, pids=(7,)))
    fake.fail(DRAW, 3)
    assert source.processes(A) == GpuProcesses(frozenset({7}))


@pytest.mark.parametrize(("code", "error"), [(3, Refused), (4, Refused), (13, Refused), (999, Transient)])
def test_a_list_that_is_not_given_says_why(start: Open, code: int, error: type[Exception]) -> None:
    """Not supported, not permitted and not there are for good; anything else is for now."""
    fake, source = start(FakeGpu(A))
    fake.fail(LIST, code)
    with pytest.raises(error):
        source.processes(A)


def test_a_driver_of_before_version_3_is_asked_by_version_2(tmp_path: Path) -> None:
    """Where the newest call is not there the one before it is used: the list is the same."""
    source_text = kit.SOURCE.read_text()
    assert source_text.count("RunningProcesses_v3(") == 2
    old = tmp_path / "fake_nvml.c"
    old.write_text(source_text.replace("RunningProcesses_v3(", "RunningProcesses_v2("))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kit, "SOURCE", old)
        fake = FakeNvml(tmp_path / "fake", [FakeGpu(A, pids=(7,), graphics=(9,))])
    source = open_nvml(Settings(clock=ManualClock(), environ={}, nvml_library=str(fake.library)))
    assert source.processes(A) == GpuProcesses(frozenset({7}), frozenset({9}))
    assert source.compute_pids(A) == [7]
    source.close()
    fake.close()


def test_a_device_that_is_not_here_is_gone(start: Open) -> None:
    """Lists and samples of an unknown device are Gone, with its name."""
    _, source = start(FakeGpu(A))
    for ask in (lambda: source.processes(B), lambda: source.process_loads(B, 0)):
        with pytest.raises(Gone) as gone:
            ask()
        assert gone.value.device == B


@pytest.mark.parametrize("loads", ["yes", "info"])
def test_samples_newer_than_the_last(start: Open, loads: str) -> None:
    """Time stamps are microseconds since the epoch; only newer samples come, by the older call or the newer one."""
    fake, source = start(FakeGpu(A, loads=cast(Any, loads)))
    fake.used(0, (7, 30), (8, 60), at=1.0)
    fake.used(0, (7, 40), at=2.0)
    fake.advance(3)
    first = source.process_loads(A, 0)
    assert first == [
        ProcessLoad(7, WALL_US + 1_000_000, 30),
        ProcessLoad(8, WALL_US + 1_000_000, 60),
        ProcessLoad(7, WALL_US + 2_000_000, 40),
    ]
    assert source.process_loads(A, WALL_US + 1_000_000) == first[2:]
    assert source.process_loads(A, WALL_US + 2_000_000) == []


def test_no_samples_at_all_is_no_error(start: Open) -> None:
    """NOT_FOUND means that nobody used the GPU."""
    _, source = start(FakeGpu(A))
    assert source.process_loads(A, 0) == []


def test_utilisation_that_is_not_told_is_refused(start: Open) -> None:
    """Neither call supported is Refused; a call that fails is Transient."""
    fake, source = start(FakeGpu(A, loads="no"), FakeGpu(B))
    with pytest.raises(Refused, match="how much each process uses"):
        source.process_loads(A, 0)
    fake.fail("nvmlDeviceGetProcessUtilization", 999)
    with pytest.raises(Transient, match="utilisation"):
        source.process_loads(B, 0)


def test_a_buffer_that_is_filled_up_with_nonsense_is_read_as_far_as_it_is_good() -> None:
    """Entries without a pid, above 100 % or older than asked are not samples."""

    class Failed(Exception):
        value = 0

    samples = [
        SimpleNamespace(pid=pid, timeStamp=t, smUtil=sm)
        for pid, t, sm in [(7, 20, 50), (0, 20, 50), (7, 20, 4_294_967_295), (7, 10, 50)]
    ]
    api = SimpleNamespace(NVMLError=Failed, nvmlDeviceGetProcessUtilization=lambda *_: samples)
    assert process_loads(cast(NvmlApi, api), object(), 10, A) == [ProcessLoad(7, 20, 50)]


def test_a_slice_lists_its_own_and_the_board_the_rest(start: Open) -> None:
    """Ours are two slices: their processes are on what is ours, those of the third are elsewhere."""
    fake, source = start(FakeGpu(A, max_slices=7, slices=SLICES), CUDA_VISIBLE_DEVICES="MIG-1,MIG-2")
    fake.processes(0, [1, 2, 3], slices=[0, 1, 2])
    assert source.processes(A) == GpuProcesses(frozenset({1, 2}), elsewhere=frozenset({3}))
    assert source.devices[0].fraction == pytest.approx(6 / 7)


def test_a_board_that_answers_to_root_only_leaves_the_rest_unknown(start: Open) -> None:
    """Without the privilege the other slices are not told: None, not empty."""
    fake, source = start(FakeGpu(A, max_slices=7, slices=SLICES, mig_private=True), CUDA_VISIBLE_DEVICES="MIG-1")
    fake.processes(0, [1, 3], slices=[0, 2])
    assert source.processes(A) == GpuProcesses(frozenset({1}), elsewhere=None)


def test_a_whole_partitioned_board_is_one(start: Open) -> None:
    """Where the board itself is visible everybody on it is on what is ours, and no utilisation is told."""
    fake, source = start(FakeGpu(A, max_slices=7, slices=SLICES))
    fake.processes(0, [1, 3], slices=[0, 2])
    assert source.processes(A) == GpuProcesses(frozenset({1, 3}))
    with pytest.raises(Refused):
        source.process_loads(A, 0)


def test_a_slice_that_was_destroyed_is_for_now(start: Open) -> None:
    """A slice that is not there any more is Transient: it may be made again."""
    fake, source = start(FakeGpu(A, max_slices=7, slices=SLICES), CUDA_VISIBLE_DEVICES="MIG-1")
    fake.fail("nvmlDeviceGetHandleByUUID", 6)
    with pytest.raises(Transient, match="slice"):
        source.processes(A)


def test_a_slow_list_holds_up_no_reading(start: Open) -> None:
    """While a list is asked for, the counters are read: the reading does not wait for its lock."""
    fake, source = start(FakeGpu(A))
    asked, answered = threading.Event(), threading.Event()
    listed = source._api.nvmlDeviceGetComputeRunningProcesses

    def slow(handle: object) -> Any:
        asked.set()
        assert answered.wait(10)
        return listed(handle)

    source._api.nvmlDeviceGetComputeRunningProcesses = slow  # type: ignore[method-assign]
    asking = threading.Thread(target=source.processes, args=(A,))
    asking.start()
    assert asked.wait(10)
    fake.advance(1)
    assert [reading.joules for reading in source.counters()] == [100.0]
    answered.set()
    asking.join(10)
    assert not asking.is_alive()
