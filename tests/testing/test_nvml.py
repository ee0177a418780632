"""The fake NVML library itself, through a private copy of the real ``pynvml``."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from melodi_otel.sources.nvml_library import NvmlApi, code_of, load_api
from melodi_otel.testing import nvml as kit
from melodi_otel.testing.nvml import CompilerMissing, FakeGpu, FakeNvml, build_fake_nvml, main

A, B = "GPU-a", "GPU-b"
Open = Callable[..., tuple[FakeNvml, NvmlApi]]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        reason = "gcc is not installed: the fake NVML library cannot be compiled"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return build_fake_nvml(tmp_path_factory.mktemp("fake-nvml"))


@pytest.fixture
def start(tmp_path: Path, library: Path) -> Iterator[Open]:
    opened: list[tuple[FakeNvml, NvmlApi]] = []

    def make(*gpus: FakeGpu, monotonic: bool = False) -> tuple[FakeNvml, NvmlApi]:
        fake = FakeNvml(tmp_path / str(len(opened)), gpus, library=library, monotonic=monotonic)
        api = load_api(str(fake.library))
        api.nvmlInit()
        opened.append((fake, api))
        return opened[-1]

    yield make
    for fake, api in opened:
        api.nvmlShutdown()
        fake.close()


def test_joules_follow_the_script_of_watts(start: Open) -> None:
    """Piecewise watts integrate exactly, up to the last step of the counter."""
    fake, api = start(FakeGpu(A, watts=100))
    handle = api.nvmlDeviceGetHandleByIndex(0)
    fake.watts(0, 250, at=1.0)
    fake.watts(0, 30, at=1.5)
    fake.advance(2.04)
    assert api.nvmlDeviceGetTotalEnergyConsumption(handle) == 100_000 + 125_000 + 15_000


def test_a_counter_shows_what_it_is_told_to(start: Open) -> None:
    """For boards whose readings are known beforehand; it goes on from there."""
    fake, api = start(FakeGpu(A, watts=0))
    handle = api.nvmlDeviceGetHandleByIndex(0)
    fake.advance(3.0)
    fake.shows(0, 1234.567)
    assert api.nvmlDeviceGetTotalEnergyConsumption(handle) == 1_234_567
    fake.watts(0, 100.0)
    fake.advance(1.0)
    assert api.nvmlDeviceGetTotalEnergyConsumption(handle) == 1_334_567


def test_a_delayed_counter_shows_the_past(start: Open) -> None:
    """With a delay of 0.2 s the counter lags by the joules of 0.2 s."""
    fake, api = start(FakeGpu(A, watts=100, delay_s=0.2))
    fake.advance(1)
    assert api.nvmlDeviceGetTotalEnergyConsumption(api.nvmlDeviceGetHandleByIndex(0)) == 80_000


def test_real_time_needs_nobody(start: Open) -> None:
    """In real time the counter moves by itself, at the scripted watts."""
    fake, api = start(FakeGpu(A, watts=1000, period_s=0), monotonic=True)
    handle = api.nvmlDeviceGetHandleByIndex(0)
    low = fake.seconds()
    shown = api.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000 / 1000
    assert low - 0.001 <= shown <= fake.seconds()
    with pytest.raises(ValueError, match="CLOCK_MONOTONIC"):
        fake.advance(1)


def test_a_rule_waits_and_ends(start: Open) -> None:
    """A failure can come after some calls, for some calls, for one board, and be healed."""
    fake, api = start(FakeGpu(A), FakeGpu(B))
    first, second = api.nvmlDeviceGetHandleByIndex(0), api.nvmlDeviceGetHandleByIndex(1)
    fake.fail("nvmlDeviceGetPowerUsage", 999, gpu=0, after=1, times=2)
    codes: list[int] = []
    for handle in (first, second, first, second, first, first):
        try:
            api.nvmlDeviceGetPowerUsage(handle)
            codes.append(0)
        except api.NVMLError as error:
            codes.append(code_of(error))
    assert codes == [0, 0, 999, 0, 999, 0]
    fake.fail("nvmlDeviceGetPowerUsage", 999)
    fake.heal()
    assert api.nvmlDeviceGetPowerUsage(first) == 100_000


def test_a_call_can_be_slow(start: Open) -> None:
    """A rule with a delay and no code makes a call slow, not wrong."""
    fake, api = start(FakeGpu(A))
    fake.fail("nvmlDeviceGetPowerUsage", 0, delay_s=0.002)
    assert api.nvmlDeviceGetPowerUsage(api.nvmlDeviceGetHandleByIndex(0)) == 100_000


def test_calls_are_counted(start: Open) -> None:
    """The test can ask how often each function was called."""
    fake, api = start(FakeGpu(A))
    handle = api.nvmlDeviceGetHandleByIndex(0)
    api.nvmlDeviceGetPowerUsage(handle)
    api.nvmlDeviceGetPowerUsage(handle)
    assert fake.calls() == {"nvmlInitWithFlags": 1, "nvmlDeviceGetHandleByIndex_v2": 1, "nvmlDeviceGetPowerUsage": 2}


def test_boards_are_found_by_uuid_and_can_be_lost_and_found(start: Open) -> None:
    """A lost board answers GPU_IS_LOST until it is found again."""
    fake, api = start(FakeGpu(A), FakeGpu(B, watts=7))
    handle = api.nvmlDeviceGetHandleByUUID(B)
    fake.lose(1)
    with pytest.raises(api.NVMLError) as lost:
        api.nvmlDeviceGetPowerUsage(handle)
    fake.lose(1, lost=False)
    assert (code_of(lost.value), api.nvmlDeviceGetPowerUsage(handle)) == (15, 7000)


def test_load_and_processes_can_change(start: Open) -> None:
    """Utilisation, memory and processes are what the test last said."""
    fake, api = start(FakeGpu(A))
    handle = api.nvmlDeviceGetHandleByIndex(0)
    fake.load(0, utilization=0.5, memory_used=1024)
    fake.processes(0, [7])
    assert api.nvmlDeviceGetUtilizationRates(handle).gpu == 50
    assert api.nvmlDeviceGetMemoryInfo(handle).used == 1024
    assert [process.pid for process in api.nvmlDeviceGetComputeRunningProcesses(handle)] == [7]


def test_the_buffer_of_samples_forgets_its_oldest_half(start: Open) -> None:
    """The 65th sample pushes the first 32 out; one in the future is not shown yet."""
    fake, api = start(FakeGpu(A))
    handle = api.nvmlDeviceGetHandleByIndex(0)
    for second in range(64):
        fake.used(0, (7, second), at=float(second))
    fake.used(0, (8, 100), at=64.0)
    fake.advance(64)
    shown = cast(Any, api).nvmlDeviceGetProcessUtilization(handle, 0)
    assert [(sample.pid, sample.smUtil) for sample in shown] == [*((7, n) for n in range(32, 64)), (8, 100)]
    fake.used(0, (9, 1), at=65.0)
    assert len(cast(Any, api).nvmlDeviceGetProcessUtilization(handle, 0)) == 33


def test_a_script_that_goes_back_is_refused(start: Open) -> None:
    """Times of a power script rise; the same time again replaces the watts."""
    fake, api = start(FakeGpu(A))
    fake.watts(0, 10, at=1.0)
    fake.watts(0, 20, at=1.0)
    with pytest.raises(ValueError, match="rise"):
        fake.watts(0, 30, at=0.5)
    fake.advance(2)
    assert api.nvmlDeviceGetTotalEnergyConsumption(api.nvmlDeviceGetHandleByIndex(0)) == 120_000


def test_limits_are_errors_with_the_limit(tmp_path: Path, start: Open) -> None:
    """More GPUs, processes, rules or script entries than the state holds are errors that name the limit."""
    with pytest.raises(ValueError, match="at most 16 GPUs"):
        FakeNvml(tmp_path / "many", [FakeGpu(A)] * 17)
    fake, _ = start(FakeGpu(A))
    with pytest.raises(ValueError, match="at most 16 processes"):
        fake.processes(0, range(17))
    with pytest.raises(ValueError, match="at most 32 rules"):
        for _ in range(33):
            fake.fail("nvmlShutdown", 0)
    fake.heal()
    with pytest.raises(ValueError, match="at most 8192 entries"):
        for second in range(8193):
            fake.watts(0, second, at=float(second))


def test_a_closed_fake_says_so(tmp_path: Path, library: Path) -> None:
    """After close() the state cannot be moved; the library still shows it."""
    with FakeNvml(tmp_path, [FakeGpu(A)], library=library) as fake:
        pass
    with pytest.raises(ValueError, match="closed"):
        fake.advance(1)
    api = load_api(str(fake.library))
    api.nvmlInit()
    assert api.nvmlDeviceGetCount() == 1
    api.nvmlShutdown()


def test_no_state_is_no_driver(tmp_path: Path, library: Path) -> None:
    """A fake library without a state answers that no driver is loaded; one of another size, a version mismatch."""
    copy = tmp_path / "libnvidia-ml.so.1"
    shutil.copyfile(library, copy)
    api = load_api(str(copy))
    codes: list[int] = []
    for content in (None, b"\0" * 100, b"\0" * 10_000_000):
        if content is not None:
            (tmp_path / "fake_nvml.state").write_bytes(content)
        with pytest.raises(api.NVMLError) as failed:
            api.nvmlInit()
        codes.append(code_of(failed.value))
    assert codes == [9, 25, 25]


def test_the_state_may_lie_elsewhere(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MELODI_FAKE_NVML_STATE names the state of a library that has none beside it."""
    fake = FakeNvml(tmp_path / "one", [FakeGpu(A), FakeGpu(B)], library=library)
    monkeypatch.setenv(kit.STATE_VARIABLE, str(fake.state_file))
    copy = tmp_path / "libnvidia-ml.so.1"
    shutil.copyfile(library, copy)
    api = load_api(str(copy))
    api.nvmlInit()
    assert api.nvmlDeviceGetCount() == 2
    api.nvmlShutdown()
    fake.close()


def test_a_missing_compiler_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without gcc the error says which package brings it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompilerMissing, match="apt-get install gcc"):
        build_fake_nvml(tmp_path / "out")


def test_a_compiler_that_fails_is_quoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What gcc said is in the error."""
    gcc = tmp_path / "gcc"
    gcc.write_text("#!/bin/sh\necho 'no room left' >&2\nexit 1\n")
    gcc.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no room left"):
        build_fake_nvml(tmp_path / "out")


def test_the_source_compiles_without_a_warning(tmp_path: Path, library: Path) -> None:
    """The compiler has nothing to say about the fake library, with all warnings on."""
    command = [
        "gcc",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-O2",
        "-shared",
        "-fPIC",
        "-o",
        str(tmp_path / "x"),
        str(kit.SOURCE),
    ]
    subprocess.run([*command, "-ldl"], check=True)


def test_the_command_prints_what_a_shell_needs(
    tmp_path: Path, library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """``python -m melodi_otel.testing.nvml DIR --watts …`` leaves a library in real time and prints the variable."""
    assert main([str(tmp_path / "live"), "--watts", "100", "--watts", "50"]) == 0
    path = tmp_path / "live" / "libnvidia-ml.so.1"
    assert capsys.readouterr().out == f"export MELODI_NVML_LIBRARY={path}\n"
    api = load_api(str(path))
    api.nvmlInit()
    watts = [api.nvmlDeviceGetPowerUsage(api.nvmlDeviceGetHandleByIndex(index)) for index in range(2)]
    api.nvmlShutdown()
    assert watts == [100_000, 50_000]


def test_the_command_names_a_missing_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without gcc the command exits with 1 and the sentence that helps."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([str(tmp_path / "live")]) == 1
    assert "gcc" in capsys.readouterr().err
