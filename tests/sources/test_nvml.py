"""The NVML source through the real ``pynvml`` on a fake NVML library: exact joules, no sleeps."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.sources.base import CounterSource, PowerSource, Settings, StateSource
from melodi_otel.sources.nvml import LOST_AFTER, NvmlSource, open_nvml
from melodi_otel.sources.nvml_board import gauge_period_s, gauge_window_s
from melodi_otel.testing.clock import ManualClock
from melodi_otel.testing.nvml import ANSWER_ZERO, FakeGpu, FakeNvml, FakeSlice, build_fake_nvml

A, B, C = (f"GPU-{letter * 8}-0000-4000-8000-000000000000" for letter in "abc")
NO_PERMISSION, NOT_SUPPORTED, DRIVER_NOT_LOADED, GPU_IS_LOST, MISMATCH, UNKNOWN = 4, 3, 9, 15, 18, 999


def compiled(directory: Path, without: tuple[str, ...] = ()) -> Path:
    if shutil.which("gcc") is None:
        reason = "gcc is not installed: the fake NVML library cannot be compiled"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return build_fake_nvml(directory, without=without)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compiled(tmp_path_factory.mktemp("fake-nvml"))


class Machine:
    """A fake library, a clock that moves with it, and the sources opened on it."""

    def __init__(self, fake: FakeNvml) -> None:
        self.fake = fake
        self.clock = ManualClock()
        self.sources: list[NvmlSource] = []

    def open(self, **environ: str) -> NvmlSource:
        settings = Settings(clock=self.clock, environ=environ, nvml_library=str(self.fake.library))
        self.sources.append(open_nvml(settings))
        return self.sources[-1]

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.fake.advance(seconds)


Make = Callable[..., Machine]


@pytest.fixture
def machine(tmp_path: Path, library: Path) -> Iterator[Make]:
    made: list[Machine] = []

    def make(*gpus: FakeGpu, build: Path | None = None, init_error: int = 0) -> Machine:
        fake = FakeNvml(tmp_path / str(len(made)), gpus, library=build or library, init_error=init_error)
        made.append(Machine(fake))
        return made[-1]

    yield make
    for one in made:
        for source in one.sources:
            source.close()
        assert one.fake.initialized == 0, "NVML was not shut down as often as it was started"
        one.fake.close()


def joules(source: NvmlSource) -> dict[str, float]:
    return {reading.device: reading.joules for reading in source.counters()}


# joules ----------------------------------------------------------------------------------------------------------------


def test_two_gpus_for_ten_seconds_are_1500_joules(machine: Make) -> None:
    """100 W and 50 W for 10 s are 1,000 J and 500 J by the counters, exactly."""
    m = machine(FakeGpu(A, watts=100), FakeGpu(B, watts=50))
    source = m.open()
    before = joules(source)
    m.advance(10)
    after = joules(source)
    assert {uuid: after[uuid] - before[uuid] for uuid in after} == {A: 1000.0, B: 500.0}
    assert sum(after.values()) - sum(before.values()) == 1500.0


def test_two_gpus_by_power_are_1500_joules(machine: Make) -> None:
    """Without counters the gauges show 100 W and 50 W at every 0.1 s of 10 s: their sum times 0.1 s is 1,500 J."""
    m = machine(FakeGpu(A, watts=100, energy=False), FakeGpu(B, watts=50, energy=False))
    source = m.open()
    total = 0.0
    for _ in range(100):
        m.advance(0.1)
        assert source.counters() == []
        total += sum(reading.watts for reading in source.power()) * 0.1
    assert total == pytest.approx(1500.0, abs=1e-9)


def test_a_counter_moves_in_steps(machine: Make) -> None:
    """Between two updates of the counter the joules stand still; the reading carries the time it was taken."""
    m = machine(FakeGpu(A, watts=300, period_s=0.1, offset_s=0.03))
    source = m.open()
    m.advance(0.05)
    first = source.counters()[0]
    m.advance(0.07)
    second = source.counters()[0]
    m.advance(0.01)
    third = source.counters()[0]
    assert (first.joules, second.joules, third.joules) == (9.0, 9.0, 39.0)
    assert third.t_ns - first.t_ns == 80_000_000


def test_a_reset_is_a_fall_without_a_range(machine: Make) -> None:
    """After a driver reload the counter starts at 0 again, and the reading names no range, so it is no wrap."""
    m = machine(FakeGpu(A, watts=100, base_j=5000))
    source = m.open()
    m.advance(1)
    before = source.counters()[0]
    m.fake.reset_counter(0)
    m.advance(1)
    after = source.counters()[0]
    assert (before.joules, after.joules, after.range_j) == (5100.0, 100.0, None)


def test_power_comes_from_the_call_of_counters(machine: Make) -> None:
    """One round is one GetFieldValues per GPU, and power() adds no call to it."""
    m = machine(FakeGpu(A, watts=100), FakeGpu(B, watts=50))
    source = m.open()
    before = m.fake.calls()
    source.counters()
    watts = [reading.watts for reading in source.power()]
    after = m.fake.calls()
    assert watts == [100.0, 50.0]
    assert {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)} == {
        "nvmlDeviceGetFieldValues": 2
    }


def test_power_alone_makes_a_round_of_its_own(machine: Make) -> None:
    """power() without counters() before it reads the GPUs itself, every time anew."""
    m = machine(FakeGpu(A, watts=100))
    source = m.open()
    first = source.power()[0].watts
    m.fake.watts(0, 300)
    m.advance(1)
    assert (first, source.power()[0].watts) == (100.0, 300.0)


def test_instant_and_average_power_have_their_windows(machine: Make) -> None:
    """0.3 s after a step from 100 to 500 W the instant gauge shows 500 W and the 1 s average 220 W."""
    m = machine(FakeGpu(A, watts=100))
    source = m.open()
    m.fake.watts(0, 500)
    m.advance(0.3)
    source.counters()
    assert source.power()[0].watts == 500.0
    assert source.averages()[0].watts == 220.0


# what a board can do ---------------------------------------------------------------------------------------------------


def test_a_gpu_is_described_by_what_nvml_tells(machine: Make) -> None:
    """hw.id is the UUID, the name is the product's, the index NVML's; periods and peaks that nobody told stay None."""
    m = machine(FakeGpu(B), FakeGpu(A, name="NVIDIA L4"))
    device = m.open().devices[1]
    assert (device.id, device.name, device.index, device.type) == (A, "NVIDIA L4", 1, "gpu")
    assert (device.source, device.scope, device.fraction) == ("nvml.energy_counter", None, 1.0)
    assert (device.window_s, device.period_s, device.peak_flops, device.bytes_per_s) == (None, None, None, None)


def test_the_source_is_counter_gauge_and_state(machine: Make) -> None:
    """One object speaks all three protocols and is called nvml."""
    source = machine(FakeGpu(A)).open()
    assert isinstance(source, CounterSource) and isinstance(source, PowerSource) and isinstance(source, StateSource)
    assert (source.name, source.driver_version) == ("nvml", "570.86.15")


def test_without_field_values_the_energy_call_is_used(tmp_path: Path, machine: Make) -> None:
    """A library without GetFieldValues still counts joules, and shows power.draw as the gauge."""
    m = machine(FakeGpu(A, watts=100), build=compiled(tmp_path / "old", ("nvmlDeviceGetFieldValues",)))
    source = m.open()
    m.advance(2)
    assert joules(source) == {A: 200.0}
    assert [reading.watts for reading in source.power()] == [100.0]
    can = source.capabilities[A]
    assert (can.field_values, can.energy_call, can.power_call, can.gauge) == (False, True, True, "draw")


def test_a_board_without_field_values_uses_the_energy_call(machine: Make) -> None:
    """A board that does not support field values counts by the energy call, also beside one that does."""
    m = machine(FakeGpu(A, watts=100, fields=False), FakeGpu(B, watts=50))
    source = m.open()
    m.advance(2)
    assert joules(source) == {A: 200.0, B: 100.0}
    assert [source.capabilities[uuid].energy_field for uuid in (A, B)] == [False, True]


def test_a_library_without_energy_integrates_power(tmp_path: Path, machine: Make) -> None:
    """Without field values and energy counter there is power.draw with its window and period, and that is the method."""
    build = compiled(tmp_path / "old", ("nvmlDeviceGetFieldValues", "nvmlDeviceGetTotalEnergyConsumption"))
    m = machine(FakeGpu(A, watts=70, name="Tesla V100", architecture=5, capability=(7, 0)), build=build)
    source = m.open()
    device = source.devices[0]
    assert (device.source, device.window_s, device.period_s) == ("nvml.power_integral", 0.01, 0.02)
    assert source.counters() == []
    assert source.power()[0].watts == 70.0


def test_counter_and_gauge_boards_are_read_in_one_round(machine: Make) -> None:
    """A board with a counter and one without are each what they are."""
    m = machine(FakeGpu(A, watts=100), FakeGpu(B, watts=50, energy=False))
    source = m.open()
    m.advance(1)
    assert joules(source) == {A: 100.0}
    assert {reading.device: reading.watts for reading in source.power()} == {A: 100.0, B: 50.0}
    assert [device.source for device in source.devices] == ["nvml.energy_counter", "nvml.power_integral"]


def test_only_the_average_gauge(machine: Make) -> None:
    """A board with no counter and no instant gauge is integrated from its 1 s average."""
    source = machine(FakeGpu(A, energy=False, instant=False)).open()
    assert (source.devices[0].window_s, source.capabilities[A].gauge) == (1.0, "average")


@pytest.mark.parametrize(
    ("gauge", "architecture", "capability", "window"),
    [
        ("draw", 4, (6, 0), 0.01),
        ("draw", 5, (7, 0), 0.01),
        ("draw", 6, (7, 5), 0.1),
        ("draw", 7, (8, 0), 0.025),
        ("draw", 7, (8, 6), 1.0),
        ("draw", 8, (8, 9), 1.0),
        ("draw", 9, (9, 0), 1.0),
        ("draw", 10, (10, 0), 1.0),
        ("draw", 3, (5, 2), None),
        ("draw", None, None, None),
        ("draw", 0xFFFFFFFF, None, None),
        ("draw", 7, None, None),
        ("instant", 7, (8, 0), 0.025),
        ("instant", 7, (8, 6), 0.1),
        ("instant", 8, (8, 9), 0.1),
        ("instant", 9, (9, 0), 0.025),
        ("instant", 10, (10, 0), None),
        ("average", 9, (9, 0), 1.0),
    ],
)
def test_windows_are_those_that_were_measured(
    gauge: str, architecture: int | None, capability: tuple[int, int] | None, window: float | None
) -> None:
    """The averaging window follows architecture and gauge; where nobody measured it, it is None."""
    assert gauge_window_s(gauge, architecture, capability) == window  # type: ignore[arg-type]


def test_periods_are_those_that_were_measured() -> None:
    """Gauges update every 20 ms on Pascal and Volta and every 100 ms from Turing to Hopper; else it is unknown."""
    assert [gauge_period_s(arch) for arch in (None, 3, 4, 5, 6, 7, 8, 9, 10)] == [
        None, None, 0.02, 0.02, 0.1, 0.1, 0.1, 0.1, None,
    ]  # fmt: skip


def test_grace_hopper_counts_the_module(machine: Make) -> None:
    """On a GH200 counter and gauge both cover the module, and the device says so."""
    m = machine(FakeGpu(A, name="NVIDIA GH200 480GB", watts=300, module="too", module_extra_watts=100))
    source = m.open()
    m.advance(1)
    assert joules(source) == {A: 400.0}
    assert source.power()[0].watts == 400.0
    assert source.devices[0].scope == "module"


def test_grace_hopper_without_module_power_shows_no_gauge(machine: Make) -> None:
    """Power of the GPU alone is not put beside a counter of the whole module."""
    source = machine(FakeGpu(A, name="NVIDIA GH200 120GB", watts=300)).open()
    source.counters()
    assert (source.power(), source.devices[0].scope) == ([], "module")


def test_a_board_with_module_power_only(machine: Make) -> None:
    """Where only the module's power answers, that is the gauge and the scope."""
    m = machine(FakeGpu(A, watts=300, energy=False, module="only", module_extra_watts=50))
    source = m.open()
    assert source.power()[0].watts == 350.0
    assert (source.devices[0].scope, source.devices[0].source) == ("module", "nvml.power_integral")


def test_states_are_fractions_and_bytes(machine: Make) -> None:
    """Utilisation is 0..1 and memory is used bytes without the driver's reserve; what is not told is None."""
    m = machine(
        FakeGpu(A, utilization=0.37, memory_used=3 * 2**30, memory_reserved=2**29),
        FakeGpu(B, utilization=None, memory_total=0),
    )
    found = {state.device: (state.utilization, state.memory_bytes) for state in m.open().states()}
    assert found == {A: (0.37, 3 * 2**30), B: (None, None)}


def test_memory_of_an_old_library_is_that_of_the_old_call(tmp_path: Path, machine: Make) -> None:
    """Without version 2 of the call, used memory is what version 1 says, reserve included."""
    build = compiled(tmp_path / "old", ("nvmlDeviceGetMemoryInfo_v2",))
    m = machine(FakeGpu(A, memory_used=1000, memory_reserved=24), build=build)
    assert m.open().states()[0].memory_bytes == 1024


def test_compute_processes_are_listed(machine: Make) -> None:
    """The processes on a GPU come sorted; none is an empty list."""
    m = machine(FakeGpu(A, pids=(300, 20)), FakeGpu(B))
    source = m.open()
    assert (source.compute_pids(A), source.compute_pids(B)) == ([20, 300], [])


def test_processes_that_are_not_told_are_refused(machine: Make) -> None:
    """A driver that does not support the question refuses it, one that fails may answer later, a stranger is gone."""
    m = machine(FakeGpu(A, pids=(1,)), FakeGpu(B))
    source = m.open()
    m.fake.fail("nvmlDeviceGetComputeRunningProcesses_v3", NOT_SUPPORTED, gpu=0)
    m.fake.fail("nvmlDeviceGetComputeRunningProcesses_v3", UNKNOWN, gpu=1)
    with pytest.raises(Refused):
        source.compute_pids(A)
    with pytest.raises(Transient):
        source.compute_pids(B)
    with pytest.raises(Gone):
        source.compute_pids(C)


# which boards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("1", [A]), ("0,2", [B, C]), (C, [C]), ("GPU-cc", [C]), ("1,-1,0", [A])],
)
def test_cuda_visible_devices_chooses(machine: Make, wanted: str, found: list[str]) -> None:
    """Boards are chosen by CUDA index (PCI order, which here is not NVML's), UUID or prefix."""
    m = machine(FakeGpu(A, pci=(0, 7, 0)), FakeGpu(B, pci=(0, 2, 0)), FakeGpu(C, pci=(1, 1, 0)))
    source = m.open(CUDA_VISIBLE_DEVICES=wanted)
    assert [device.id for device in source.devices] == found
    assert [reading.device for reading in source.counters()] == found


@pytest.mark.parametrize("wanted", ["", "-1", "GPU-zzz", "9"])
def test_no_visible_gpu_is_refused_with_the_variable(machine: Make, wanted: str) -> None:
    """A list that hides every GPU is a refusal that names the variable and its value."""
    with pytest.raises(Refused) as refused:
        machine(FakeGpu(A)).open(CUDA_VISIBLE_DEVICES=wanted)
    assert refused.value.state == "no_visible_device"
    assert f"CUDA_VISIBLE_DEVICES={wanted!r}" in refused.value.reason


@pytest.mark.parametrize("attributes", [True, False])
def test_a_mig_slice_is_its_board_with_a_fraction(machine: Make, attributes: bool) -> None:
    """Two slices of one board are one device with the sum of their compute slices; the meter is the board's."""
    slices = (
        FakeSlice("MIG-11111111", "1g.10gb", 7, attributes=attributes),
        FakeSlice("MIG-22222222", "1c.3g.40gb", 2, attributes=attributes),
        FakeSlice("MIG-33333333", "3g.40gb", 3, attributes=attributes),
    )
    m = machine(FakeGpu(A, watts=700, utilization=None, max_slices=7, slices=slices), FakeGpu(B))
    source = m.open(CUDA_VISIBLE_DEVICES="MIG-11111111,MIG-33333333")
    m.advance(1)
    assert joules(source) == {A: 700.0}
    assert source.devices[0].fraction == pytest.approx(4 / 7)
    assert "low confidence" in source.notes[0]
    assert m.open(CUDA_VISIBLE_DEVICES="MIG-22222222").devices[0].fraction == pytest.approx(1 / 7)


def test_slices_are_known_by_both_their_names(machine: Make) -> None:
    """NVML calls a MIG device MIG-…, CUDA leaves that out: both are the board, also where the whole board is metered."""
    slices = (FakeSlice("MIG-11111111", "1g.10gb", 7), FakeSlice("MIG-33333333", "3g.40gb", 3))
    m = machine(FakeGpu(A, max_slices=7, slices=slices), FakeGpu(B))
    names = ("MIG-11111111", "GPU-11111111", "MIG-33333333", "GPU-33333333")
    assert m.open().slices == dict.fromkeys(names, A)


def test_unlike_gpus_leave_a_warning(machine: Make, caplog: pytest.LogCaptureFixture) -> None:
    """An index among unlike boards is mapped fastest first, and a log line says that this is assumed."""
    m = machine(FakeGpu(A, name="T4", cores=2560, sm_clock_mhz=1590), FakeGpu(B))
    assert m.open(CUDA_VISIBLE_DEVICES="0").devices[0].id == B
    assert "assumed" in caplog.text


# refusals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "state", "word"),
    [
        (DRIVER_NOT_LOADED, "driver_not_loaded", "modprobe"),
        (NO_PERMISSION, "permission_denied", "/dev/nvidiactl"),
        (MISMATCH, "driver_mismatch", "reboot"),
        (UNKNOWN, "failed", "nvidia-smi"),
    ],
)
def test_a_start_that_fails_is_refused_with_its_fix(machine: Make, code: int, state: str, word: str) -> None:
    """Each way in which NVML does not start has a state of its own and a fix."""
    with pytest.raises(Refused) as refused:
        machine(FakeGpu(A), init_error=code).open()
    assert refused.value.state == state
    assert word in refused.value.fix


def test_no_gpu_is_refused(machine: Make) -> None:
    """A driver without a GPU is a refusal."""
    with pytest.raises(Refused) as refused:
        machine().open()
    assert refused.value.state == "no_device"


def test_a_missing_library_is_refused_by_name(tmp_path: Path) -> None:
    """A path with no file behind it is refused with path and variable."""
    path = str(tmp_path / "libnvidia-ml.so.1")
    with pytest.raises(Refused) as refused:
        open_nvml(Settings(clock=ManualClock(), environ={}, nvml_library=path))
    assert refused.value.state == "library_missing"
    assert path in refused.value.reason and "MELODI_NVML_LIBRARY" in refused.value.fix


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    """A file that the loader cannot load is refused with the loader's words."""
    path = tmp_path / "libnvidia-ml.so.1"
    path.write_text("no library")
    with pytest.raises(Refused) as refused:
        open_nvml(Settings(clock=ManualClock(), environ={}, nvml_library=str(path)))
    assert (refused.value.state, str(path) in refused.value.reason) == ("library_unusable", True)


@pytest.mark.parametrize("missing", ["nvmlInitWithFlags", "nvmlDeviceGetCount_v2", "nvmlDeviceGetHandleByIndex_v2"])
def test_a_library_that_lacks_the_base_is_too_old(tmp_path: Path, machine: Make, missing: str) -> None:
    """A library without the functions that everything stands on is too old, and the fix is a driver."""
    m = machine(FakeGpu(A), build=compiled(tmp_path / "old", (missing,)))
    with pytest.raises(Refused) as refused:
        m.open()
    assert (refused.value.state, refused.value.fix) == ("library_too_old", "update the NVIDIA driver")


def test_a_board_without_any_meter_is_left_out(machine: Make) -> None:
    """A board that tells neither energy nor power is noted and left out; the others work."""
    m = machine(FakeGpu(A, energy=False, fields=False, draw=False), FakeGpu(B))
    source = m.open()
    assert [device.id for device in source.devices] == [B]
    assert A in source.notes[0]


def test_only_boards_without_a_meter_are_refused(machine: Make) -> None:
    """No board with a meter is a refusal of its own."""
    with pytest.raises(Refused) as refused:
        machine(FakeGpu(A, energy=False, fields=False, draw=False)).open()
    assert refused.value.state == "not_supported"


def test_a_library_that_fails_half_way_leaves_the_rest(machine: Make) -> None:
    """A board whose handle or UUID fails is left out with its reason; the boards after it work."""
    m = machine(FakeGpu(A), FakeGpu(B), FakeGpu(C, watts=40))
    m.fake.fail("nvmlDeviceGetHandleByIndex_v2", UNKNOWN, gpu=0)
    m.fake.fail("nvmlDeviceGetUUID", UNKNOWN, gpu=1)
    source = m.open()
    m.advance(1)
    assert joules(source) == {C: 40.0}
    assert len(source.notes) == 2


@pytest.mark.parametrize(
    ("function", "code", "state"),
    [
        ("nvmlDeviceGetCount_v2", UNKNOWN, "failed"),
        ("nvmlDeviceGetHandleByIndex_v2", UNKNOWN, "failed"),
        ("nvmlDeviceGetHandleByIndex_v2", NO_PERMISSION, "permission_denied"),
        ("nvmlDeviceGetUUID", GPU_IS_LOST, "failed"),
    ],
)
def test_a_library_that_fails_for_good_is_refused_and_given_back(
    machine: Make, function: str, code: int, state: str
) -> None:
    """A start that breaks off after nvmlInit is a refusal, and NVML is shut down again."""
    m = machine(FakeGpu(A))
    m.fake.fail(function, code)
    with pytest.raises(Refused) as refused:
        m.open()
    assert (refused.value.state, m.fake.initialized) == (state, 0)


def test_facts_that_fail_stay_unknown(machine: Make) -> None:
    """Name, address, architecture and driver version may all fail; the joules do not."""
    m = machine(FakeGpu(A, watts=10))
    for function in ("Name", "PciInfo_v3", "Architecture", "CudaComputeCapability", "NumGpuCores", "MigMode"):
        m.fake.fail(f"nvmlDeviceGet{function}", UNKNOWN)
    m.fake.fail("nvmlSystemGetDriverVersion", UNKNOWN)
    source = m.open()
    m.advance(1)
    assert joules(source) == {A: 10.0}
    assert (source.devices[0].name, source.driver_version) == (None, None)


# failures while it runs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [NOT_SUPPORTED, UNKNOWN, ANSWER_ZERO])
def test_one_bad_reading_spoils_its_round_only(machine: Make, code: int) -> None:
    """A board that fails once gives Transient and nothing of any board; the next round has all the joules."""
    m = machine(FakeGpu(A, watts=100, base_j=7), FakeGpu(B, watts=50, base_j=7))
    source = m.open()
    first = joules(source)
    m.fake.fail("nvmlDeviceGetFieldValues", code, gpu=1, times=1)
    m.advance(1)
    with pytest.raises(Transient, match=B):
        source.counters()
    m.advance(1)
    second = joules(source)
    assert {uuid: second[uuid] - first[uuid] for uuid in second} == {A: 200.0, B: 100.0}


@pytest.mark.parametrize("code", [0, NOT_SUPPORTED])
def test_readings_that_come_too_fast_are_transient(machine: Make, code: int) -> None:
    """A driver that answers 0 or NotSupported to fast polling makes the round Transient, never 0 J."""
    m = machine(FakeGpu(A, watts=100, base_j=7, fast_poll_s=0.01, fast_poll_code=code))
    m.fake.watts(0, 100)
    source = m.open()
    m.advance(1)
    before = joules(source)[A]
    m.advance(0.005)
    with pytest.raises(Transient):
        source.counters()
    m.advance(0.995)
    assert joules(source)[A] - before == 100.0


def test_a_counter_that_stays_at_zero_was_reset(machine: Make) -> None:
    """A second 0 in a row is no glitch: the counter was reset and does not move."""
    m = machine(FakeGpu(A, watts=0, base_j=7))
    source = m.open()
    assert joules(source) == {A: 7.0}
    m.fake.reset_counter(0)
    with pytest.raises(Transient):
        source.counters()
    assert joules(source) == {A: 0.0}


def test_a_gauge_that_fails_beside_a_counter_is_left_out(machine: Make) -> None:
    """0 W is no power: beside a counter the gauge is absent that time, and the joules stand."""
    m = machine(FakeGpu(A, watts=100))
    source = m.open()
    m.fake.watts(0, 0)
    m.advance(2)
    assert len(source.counters()) == 1
    assert source.power() == []


def test_a_gauge_board_must_answer(machine: Make) -> None:
    """A board that has only a gauge and answers 0 W makes the round Transient."""
    m = machine(FakeGpu(A, watts=100, energy=False))
    source = m.open()
    m.fake.watts(0, 0)
    m.advance(2)
    with pytest.raises(Transient):
        source.power()


def test_a_lost_gpu_is_named_once_and_takes_no_other_with_it(machine: Make) -> None:
    """GPU_IS_LOST is Gone with the board's UUID; from the next round on the others are read without it."""
    m = machine(FakeGpu(A, watts=100), FakeGpu(B, watts=50))
    source = m.open()
    m.fake.lose(0)
    with pytest.raises(Gone) as gone:
        source.counters()
    m.advance(1)
    assert gone.value.device == A
    assert joules(source) == {B: 50.0}
    assert [device.id for device in source.devices] == [B]


def test_the_last_lost_gpu_ends_the_source(machine: Make) -> None:
    """With no board left the source itself is gone."""
    m = machine(FakeGpu(A))
    source = m.open()
    m.fake.lose(0)
    with pytest.raises(Gone):
        source.counters()
    with pytest.raises(Gone) as gone:
        source.counters()
    assert gone.value.device is None


def test_a_gpu_that_never_answers_again_is_lost(machine: Make) -> None:
    """A board that fails many times in a row is given up, so that the others are measured again."""
    m = machine(FakeGpu(A, watts=100), FakeGpu(B, watts=50))
    source = m.open()
    m.fake.fail("nvmlDeviceGetFieldValues", UNKNOWN, gpu=0)
    for _ in range(LOST_AFTER - 1):
        with pytest.raises(Transient):
            source.counters()
    with pytest.raises(Gone) as gone:
        source.counters()
    assert gone.value.device == A
    assert set(joules(source)) == {B}


def test_a_driver_that_leaves_takes_the_source(machine: Make) -> None:
    """A driver that is unloaded is Gone without a device."""
    m = machine(FakeGpu(A))
    source = m.open()
    m.fake.fail("nvmlDeviceGetFieldValues", DRIVER_NOT_LOADED)
    with pytest.raises(Gone) as gone:
        source.counters()
    assert gone.value.device is None


def test_nvml_shut_down_by_somebody_else_is_started_again(machine: Make) -> None:
    """When other code in the program shuts NVML down once too often, one round is lost and the next works."""
    m = machine(FakeGpu(A, watts=100))
    source = m.open()
    source._api.nvmlShutdown()
    with pytest.raises(Transient):
        source.counters()
    m.advance(1)
    assert joules(source) == {A: 100.0}


def test_nvml_that_does_not_start_again_is_gone(machine: Make) -> None:
    """When NVML cannot be started again, the source is gone."""
    m = machine(FakeGpu(A))
    source = m.open()
    source._api.nvmlShutdown()
    m.fake.fail("nvmlInitWithFlags", DRIVER_NOT_LOADED)
    with pytest.raises(Gone):
        source.counters()


def test_close_gives_nvml_back_once(machine: Make) -> None:
    """close() shuts down once, however often it is called, raises nothing, and leaves a source that is gone."""
    m = machine(FakeGpu(A))
    first, second = m.open(), m.open()
    m.fake.fail("nvmlShutdown", UNKNOWN, after=1, times=1)
    first.close()
    first.close()
    assert m.fake.initialized == 1
    with pytest.raises(Gone):
        first.counters()
    assert len(second.counters()) == 1
    second.close()
    assert m.fake.calls()["nvmlShutdown"] == 2
    second._api.nvmlShutdown()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_opens_its_own(machine: Make) -> None:
    """In a forked child the parent's source is gone, closing it there does not end the parent's session, and a new
    source works.
    """
    m = machine(FakeGpu(A, watts=100))
    source = m.open()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            try:
                source.counters()
            except Gone:
                source.close()
                own = m.open()
                code = 0 if len(own.counters()) == 1 and m.fake.calls().get("nvmlShutdown") is None else 2
                own.close()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(source.counters()) == 1
    source.close()
    assert "nvmlShutdown" in m.fake.calls()


# the binding -----------------------------------------------------------------------------------------------------------


def python(code: str, path: Path | None = None, *arguments: str) -> str:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("MELODI_", "PYTHON"))}
    where = [str(path)] if path else []
    environ["PYTHONPATH"] = os.pathsep.join([*where, str(Path(__file__).parents[2])])
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environ, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


OPEN = """
import sys
from melodi_otel.errors import Refused
from melodi_otel.sources.base import Settings
from melodi_otel.sources.nvml import open_nvml
from melodi_otel.testing.clock import ManualClock
{before}
try:
    source = open_nvml(Settings(clock=ManualClock(), environ={{}}, nvml_library={library}))
    print("opened", *(device.id for device in source.devices))
    source.close()
except Refused as refused:
    print(refused.state, refused.fix, sep="|")
{after}
"""


@pytest.mark.parametrize("library", ["None", "'/nowhere/libnvidia-ml.so.1'"])
def test_without_the_binding_the_fix_is_its_pip_line(library: str) -> None:
    """No module pynvml is a refusal whose fix is the pip line."""
    out = python(OPEN.format(before="sys.modules['pynvml'] = None", library=library, after=""))
    assert out == 'module_missing|pip install "melodi-otel[nvidia]"'


@pytest.mark.parametrize("library", ["None", "'/nowhere/libnvidia-ml.so.1'"])
@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("pynvml/__init__.py", "def nvmlInit(): raise SystemExit('must not run')"),
        ("pynvml.py", "def nvmlInit(): raise SystemExit('must not run')"),
        ("pynvml.py", "raise RuntimeError('broken')"),
    ],
)
def test_another_module_of_that_name_is_refused(tmp_path: Path, library: str, file: str, text: str) -> None:
    """The old wrapper package, an ancient binding and a broken one are refused with the lines that repair them."""
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text)
    out = python(OPEN.format(before="", library=library, after=""), tmp_path)
    assert out.startswith("module_foreign|pip uninstall -y pynvml")


def test_importing_the_source_does_not_import_the_binding() -> None:
    """The module pynvml is imported when NVML is opened, not before."""
    assert python("import melodi_otel.sources.nvml, sys; print('pynvml' in sys.modules)") == "False"


def test_a_library_of_ones_own_leaves_the_programs_binding_alone(tmp_path: Path, library: Path) -> None:
    """With MELODI_NVML_LIBRARY the host program's own pynvml keeps its own library."""
    fake = FakeNvml(tmp_path, [FakeGpu(A)], library=library)
    after = "import pynvml\nprint(pynvml.nvmlLib, [name for name in sys.modules if 'pynvml' in name])"
    out = python(OPEN.format(before="", library=repr(str(fake.library)), after=after))
    fake.close()
    assert out.splitlines() == [f"opened {A}", "None ['pynvml']"]


def test_a_binding_that_is_already_in_use_is_shared(tmp_path: Path, library: Path) -> None:
    """Without MELODI_NVML_LIBRARY the program's pynvml and its library are used, and its own reference stays."""
    fake = FakeNvml(tmp_path, [FakeGpu(A)], library=library)
    before = f"import ctypes, pynvml\npynvml.nvmlLib = ctypes.CDLL({str(fake.library)!r})\npynvml.nvmlInit()"
    out = python(OPEN.format(before=before, library="None", after="print(pynvml.nvmlDeviceGetCount())"))
    assert (out.splitlines(), fake.initialized) == ([f"opened {A}", "1"], 1)
    fake.close()
