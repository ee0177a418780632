"""``bench/calibrate_gpu.py`` on a fake NVML library: its NVML half, in made-up time."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from melodi_otel.testing.nvml import FakeGpu, FakeNvml, build_fake_nvml

SCRIPT = Path(__file__).parents[2] / "bench" / "calibrate_gpu.py"
A, B = "GPU-aaaa", "GPU-bbbb"


@pytest.fixture(scope="module")
def calibrate() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("calibrate_gpu", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibrate_gpu"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["calibrate_gpu"]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("gcc") is None:
        reason = "gcc is not installed: the fake NVML library cannot be compiled"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return build_fake_nvml(tmp_path_factory.mktemp("fake-nvml"))


class FakeTime:
    """The fake's own time: a sleep moves it on."""

    def __init__(self, fake: FakeNvml) -> None:
        self.fake = fake

    def monotonic_ns(self) -> int:
        return round(self.fake.seconds() * 1e9)

    def sleep(self, seconds: float) -> None:
        self.fake.advance(seconds)


def test_the_table_and_the_json_hold_what_the_fake_does(
    tmp_path: Path,
    library: Path,
    calibrate: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A counter of 100 ms and 200 W is found as 100 ms steps of 20 J; a board without gauges says so."""
    fake = FakeNvml(
        tmp_path, [FakeGpu(A, name="Fake X", watts=200), FakeGpu(B, instant=False, average=False)], library=library
    )
    monkeypatch.setenv("MELODI_NVML_LIBRARY", str(fake.library))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    out = tmp_path / "gpu.json"
    arguments = ["--seconds", "2", "--calls", "20", "--no-load", "--out", str(out)]
    assert calibrate.main(arguments, FakeTime(fake)) == 0
    first, second = json.loads(out.read_text())
    rows = {row["what"]: row for row in first["rows"]}
    assert (first["device"], first["name"], first["driver"]) == (A, "Fake X", "570.86.15")
    assert rows["counter: update period"]["value"] == pytest.approx(100, abs=1.0)
    assert rows["counter: step"]["value"] == 20_000
    assert rows["power as found, no load of ours"]["value"] == pytest.approx(200, rel=0.01)
    assert rows["cost of field values, 3 fields"]["unit"] == "µs"
    others = {row["what"]: row for row in second["rows"]}
    assert others["instant gauge: update period"]["value"] is None
    assert "not supported" in others["instant gauge: update period"]["note"]
    printed = capsys.readouterr().out
    assert f"### Fake X ({A}, driver 570.86.15)" in printed
    assert "| counter: step | 20000 | 20000 – 20000 | mJ | polled at 1000 Hz for 2 s |" in printed
    assert fake.initialized == 0
    fake.close()


def test_no_gpu_is_one_sentence_and_exit_2(
    tmp_path: Path,
    library: Path,
    calibrate: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where there is no GPU the script says why in a sentence and ends with 2."""
    fake = FakeNvml(tmp_path, [], library=library)
    monkeypatch.setenv("MELODI_NVML_LIBRARY", str(fake.library))
    assert calibrate.main([]) == 2
    assert capsys.readouterr().err.startswith("No NVIDIA GPU can be calibrated here: the NVIDIA driver shows no GPU.")
    fake.close()


def test_a_wrong_variable_is_told(
    calibrate: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A MELODI_* value that cannot be used ends the script with 1 and names the variable."""
    monkeypatch.setenv("MELODI_SAMPLE_HZ", "fast")
    assert calibrate.main([]) == 1
    assert "MELODI_SAMPLE_HZ" in capsys.readouterr().err


def test_a_board_without_a_counter_has_no_mean_power(
    tmp_path: Path,
    library: Path,
    calibrate: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Figures that need the counter are absent where there is none, and the others stand."""
    fake = FakeNvml(tmp_path, [FakeGpu(A, energy=False)], library=library)
    monkeypatch.setenv("MELODI_NVML_LIBRARY", str(fake.library))
    out = tmp_path / "gpu.json"
    assert calibrate.main(["--seconds", "1", "--calls", "3", "--no-load", "--out", str(out)], FakeTime(fake)) == 0
    rows = {row["what"]: row["value"] for row in json.loads(out.read_text())[0]["rows"]}
    assert (rows["counter: update period"], rows["power as found, no load of ours"]) == (None, None)
    fake.close()


def test_a_counter_that_stands_still_is_told(tmp_path: Path, library: Path, calibrate: ModuleType) -> None:
    """Waiting for a counter that never moves ends with an error, not with 0 W."""
    fake = FakeNvml(tmp_path, [FakeGpu(A)], library=library)
    with pytest.raises(LookupError, match="did not move"):
        calibrate.mean_watts(lambda: 5.0, 1.0, FakeTime(fake))
    fake.close()


def test_the_delay_of_a_counter_is_where_its_lines_cross(calibrate: ModuleType) -> None:
    """A counter that shows everything 0.15 s late has a delay of 0.15 s against the step; without a step it is None."""

    def shown(t: float, late: float) -> float:
        return 100 * t + 400 * max(0.0, t - 2.0 - late)

    moves = [0.1 * k for k in range(60)]
    assert calibrate.counter_delay([(t, shown(t, 0.15)) for t in moves], 2.0) == pytest.approx(0.15, abs=1e-6)
    assert calibrate.counter_delay([(t, 100 * t) for t in moves], 2.0) is None
    assert calibrate.counter_delay([(0.1, 1.0)], 2.0) is None


class MadeUpLoad:
    """A GPU of 100 W whose products take 1 ms at 500 W each; the first one of a process waits 200 ms before it."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.joules = 0.0
        self.cold = True
        self.cuda = self

    def monotonic_ns(self) -> int:
        return self.now_ns

    def sleep(self, seconds: float) -> None:
        self.spend(seconds, 100.0)

    def spend(self, seconds: float, watts: float) -> None:
        self.now_ns += round(seconds * 1e9)
        self.joules += seconds * watts

    def __matmul__(self, _other: object) -> None:
        if self.cold:
            self.spend(0.2, 100.0)
            self.cold = False
        self.spend(0.001, 500.0)

    def synchronize(self, _device: object) -> None:
        pass

    def read_mj(self) -> float:
        return self.joules * 1000


def test_the_first_product_of_a_process_is_not_the_counters_delay(calibrate: ModuleType) -> None:
    """A counter without delay is found to have none, however long the libraries take to load."""
    load = MadeUpLoad()
    row = calibrate._delay_row(load, load, None, load.read_mj, load)
    assert row.value == pytest.approx(0.0, abs=1.0)
