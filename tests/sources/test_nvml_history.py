"""The driver's power history, by the real ``pynvml`` on a fake NVML library."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.sources.base import HistorySource, Settings
from melodi_otel.sources.nvml import NvmlSource, open_nvml
from melodi_otel.testing.clock import ManualClock
from melodi_otel.testing.nvml import FakeGpu, FakeNvml, build_fake_nvml

A = "GPU-aaaa"
CALL = "nvmlDeviceGetSamples"
MS, S = 1_000_000, 1_000_000_000


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        reason = "gcc is not installed: the fake NVML library cannot be compiled"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return build_fake_nvml(tmp_path_factory.mktemp("fake-nvml"))


Open = Callable[..., tuple[FakeNvml, NvmlSource, ManualClock]]


@pytest.fixture
def start(tmp_path: Path, library: Path) -> Iterator[Open]:
    opened: list[tuple[FakeNvml, NvmlSource]] = []

    def make(gpu: FakeGpu) -> tuple[FakeNvml, NvmlSource, ManualClock]:
        fake = FakeNvml(tmp_path / str(len(opened)), (gpu,), library=library)
        clock = ManualClock()
        source = open_nvml(Settings(clock=clock, environ={}, nvml_library=str(fake.library)))
        opened.append((fake, source))
        return fake, source, clock

    yield make
    for fake, source in opened:
        source.close()
        fake.close()


def test_the_last_seconds_in_steps_of_20_ms(start: Open) -> None:
    """After 3 s: 119 values 20 ms apart up to now, in watts, on the monotonic clock."""
    fake, source, clock = start(FakeGpu(A, watts=130.0))
    fake.advance(3.0)
    now = clock.advance(3.0)
    told = source.history(A, 0)
    assert [reading.t_ns for reading in told] == [now - 20 * MS * k for k in range(118, -1, -1)]
    assert {reading.watts for reading in told} == {130.0}
    assert isinstance(source, HistorySource)


def test_only_what_is_new(start: Open) -> None:
    """Asked again after 0.3 s from the last value on: the fifteen new ones, and their power."""
    fake, source, clock = start(FakeGpu(A, watts=130.0))
    fake.advance(3.0)
    last = clock.advance(3.0)
    fake.watts(0, 400.0)
    fake.advance(0.3)
    clock.advance(0.3)
    told = source.history(A, last)
    assert [reading.t_ns - last for reading in told] == [20 * MS * k for k in range(1, 16)]
    assert {reading.watts for reading in told} == {400.0}


def test_nothing_new_is_no_error(start: Open) -> None:
    """The driver has no newer value: an empty answer."""
    fake, source, clock = start(FakeGpu(A))
    fake.advance(1.0)
    assert source.history(A, clock.advance(1.0)) == []


def test_values_of_a_stepped_clock_are_left_out(start: Open) -> None:
    """The time of day was put back by an hour: what the driver stamped before lies in the future and is nobody's."""
    fake, source, clock = start(FakeGpu(A))
    fake.advance(3.0)
    clock.advance(3.0)
    clock.step_wall(-3600.0)
    assert source.history(A, 0) == []


@pytest.mark.parametrize(("code", "error"), [(3, Refused), (4, Refused), (999, Transient)])
def test_a_history_that_is_not_told(start: Open, code: int, error: type[Exception]) -> None:
    """Not supported and not permitted are for good; any other failure is for this time."""
    fake, source, _ = start(FakeGpu(A))
    fake.fail(CALL, code)
    with pytest.raises(error):
        source.history(A, 0)


def test_a_value_that_comes_between_the_bindings_two_calls(start: Open) -> None:
    """It asks for the number and then for so many: where one more has come, it is asked again."""
    fake, source, clock = start(FakeGpu(A))
    fake.advance(1.0)
    clock.advance(1.0)
    fake.fail(CALL, 7, times=1)
    assert len(source.history(A, 0)) == 50


def test_a_history_of_the_gpu_alone_is_not_the_modules(start: Open) -> None:
    """Where the counter covers CPU and memory of the module too, the history is of something else."""
    _, source, _ = start(FakeGpu(A, name="NVIDIA GH200 480GB", module="too"))
    with pytest.raises(Refused, match="no history of the power that the counter counts"):
        source.history(A, 0)


def test_a_type_of_a_later_nvml_is_refused(start: Open) -> None:
    """A figure of a kind that is not known is not guessed."""
    _, source, _ = start(FakeGpu(A))
    source._api = cast(Any, SimpleNamespace(**{CALL: lambda *_: (9, [])}, NVMLError=source._api.NVMLError))
    with pytest.raises(Refused, match="type of a later NVML"):
        source.history(A, 0)


def test_a_device_that_is_not_here_is_gone(start: Open) -> None:
    """No history of a stranger."""
    _, source, _ = start(FakeGpu(A))
    with pytest.raises(Gone):
        source.history("GPU-zzzz", 0)
