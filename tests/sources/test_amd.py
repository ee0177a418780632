from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.sources.amd import AmdSource, open_amd
from melodi_otel.sources.amd_library import load_amd
from melodi_otel.sources.amd_visible import AmdBoardId, visible
from melodi_otel.sources.base import CounterSource, PowerSource, Settings, StateSource
from melodi_otel.testing.amd import FakeAmdGpu, FakeAmdSmi
from melodi_otel.testing.clock import ManualClock


class Rig:
    """AMD GPUs on manual time, read ten times a second; what came out, by device."""

    def __init__(self, *gpus: FakeAmdGpu, **environ: str) -> None:
        self.clock = ManualClock()
        self.smi = FakeAmdSmi(*gpus)
        self.source: AmdSource = open_amd(Settings(self.clock, environ), api=self.smi)
        self.joules: dict[str, list[tuple[float, float]]] = {}
        self.watts: dict[str, list[tuple[float, float]]] = {}
        self.start_ns = self.clock.monotonic_ns()

    def read(self) -> None:
        for r in self.source.counters():
            self.joules.setdefault(r.device, []).append((self.seconds(r.t_ns), round(r.joules, 3)))
        for w in self.source.power():
            self.watts.setdefault(w.device, []).append((self.seconds(w.t_ns), w.watts))

    def seconds(self, t_ns: int) -> float:
        return round((t_ns - self.start_ns) / 1e9, 3)

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds * 10)):
            self.read()
            self.clock.advance(0.1)
            self.smi.advance(0.1)

    @property
    def methods(self) -> list[str]:
        return [device.source for device in self.source.devices]


def test_a_counter_that_agrees_is_used_and_nothing_is_lost() -> None:
    """The first half second is held back; then all of its readings come at once, in order, with the times they were read."""
    rig = Rig(FakeAmdGpu("u1", watts=300.0))
    rig.run(0.5)
    assert (rig.joules, rig.watts) == ({}, {})
    rig.run(0.1)
    assert rig.joules["u1"] == [(round(t / 10, 1), pytest.approx(1000.0 + 30.0 * t, abs=1e-3)) for t in range(6)]
    assert [w for _, w in rig.watts["u1"]] == [300.0] * 6
    rig.run(0.2)
    assert len(rig.joules["u1"]) == 8
    assert rig.methods == ["amd.energy_counter"]
    assert rig.source.notes == ()
    assert isinstance(rig.source, CounterSource)
    assert isinstance(rig.source, PowerSource)
    assert isinstance(rig.source, StateSource)


@pytest.mark.parametrize("gain", [0.0, 0.01, 0.4, 2.5, 100.0])
def test_a_counter_that_disagrees_is_not_used(gain: float, caplog: pytest.LogCaptureFixture) -> None:
    """Standing still or off by a factor: no joule of it comes out; the gauge is used from the first reading on, and said."""
    rig = Rig(FakeAmdGpu("u1", watts=300.0, gain=gain))
    with caplog.at_level(logging.WARNING, "melodi_otel"):
        rig.run(2.0)
        assert (rig.joules, rig.watts) == ({}, {})
        rig.run(0.2)
    assert rig.joules == {}
    assert [t for t, _ in rig.watts["u1"]] == [round(n / 10, 1) for n in range(22)]
    assert rig.methods == ["amd.power_integral"]
    assert (
        f"shows {600.0 * gain:.1f} J where the gauge shows 600.0 J in 2.0 s: the gauge is used" in rig.source.notes[0]
    )
    assert len(caplog.records) == 1


@pytest.mark.parametrize("gain", [0.6, 1.9])
def test_a_change_of_load_is_no_disagreement(gain: float) -> None:
    """Within a factor of two after two seconds the counter is believed: the gauge may have missed a step of load."""
    rig = Rig(FakeAmdGpu("u1", watts=300.0, gain=gain))
    rig.run(2.0)
    assert rig.joules == {}
    rig.run(0.1)
    assert len(rig.joules["u1"]) == 21


def test_an_idle_gpu_is_believed_after_five_seconds() -> None:
    """Where neither shows anything there is nothing to compare."""
    rig = Rig(FakeAmdGpu("u1", watts=0.0))
    rig.run(5.0)
    assert rig.joules == {}
    rig.run(0.1)
    assert len(rig.joules["u1"]) == 51


def test_without_a_gauge_the_counter_must_move() -> None:
    """It is believed with its first step, and left out if there is none in five seconds."""
    rig = Rig(FakeAmdGpu("u1", power=False), FakeAmdGpu("u2", power=False, gain=0.0))
    rig.run(0.2)
    assert len(rig.joules["u1"]) == 2
    rig.run(5.0)
    assert "u2" not in rig.joules
    assert [d.id for d in rig.source.devices] == ["u1"]
    assert rig.source.notes == ("GPU u2 is left out: its counter does not move and it has no power gauge",)


def test_without_a_counter_the_gauge_is_used_at_once() -> None:
    """There is nothing to compare; MI200 tells its average power, before ROCm 6.1 the counter is called power."""
    rig = Rig(FakeAmdGpu("u1", energy=False, power_key="average_socket_power"), FakeAmdGpu("u2", count_key="power"))
    rig.run(0.7)
    assert rig.methods == ["amd.power_integral", "amd.energy_counter"]
    assert len(rig.watts["u1"]) == 7
    assert len(rig.joules["u2"]) == 7


def test_a_counter_that_stops_later_ends_the_device() -> None:
    """Five seconds without a step while power is drawn: its joules are unknown from then on; the other GPU goes on."""
    bad = FakeAmdGpu("u1", watts=300.0)
    rig = Rig(bad, FakeAmdGpu("u2", watts=100.0))
    rig.run(1.0)
    bad.gain = 0.0
    rig.run(5.0)
    with pytest.raises(Gone, match="stands still while the gauge shows 300 W") as caught:
        rig.run(0.3)
    assert caught.value.device == "u1"
    assert [d.id for d in rig.source.devices] == ["u2"]
    rig.run(0.1)


def test_a_counter_at_rest_is_no_stop() -> None:
    """A GPU that draws next to nothing may stand still for as long as it likes."""
    gpu = FakeAmdGpu("u1", watts=100.0)
    rig = Rig(gpu)
    rig.run(1.0)
    gpu.watts = 0.0
    rig.run(20.0)
    assert [d.id for d in rig.source.devices] == ["u1"]


def test_a_gpu_that_was_woken_by_the_reading_is_no_stop() -> None:
    """Thirty seconds apart, equal figures and some watts at the second: it slept in between, and was woken to answer."""
    gpu = FakeAmdGpu("u1", watts=100.0)
    rig = Rig(gpu)
    rig.run(1.0)
    for _ in range(4):
        gpu.gain = 0.0
        rig.clock.advance(30.0)
        rig.read()
    gpu.gain = 1.0
    rig.run(1.0)
    assert [d.id for d in rig.source.devices] == ["u1"]


def test_second_die_of_an_mi250_is_left_out() -> None:
    """The first die shows the power of both and says so by its scope; the second has no meter and is named."""
    name = "AMD Instinct MI250X / MI250"
    rig = Rig(FakeAmdGpu("u1", watts=400.0, name=name), FakeAmdGpu("u2", watts=0.0, name=name, gain=0.0))
    assert [(d.id, d.scope) for d in rig.source.devices] == [("u1", "module")]
    assert rig.source.notes[0].startswith("GPU u2 is left out: it is the second die of an MI250")


def test_only_a_second_die_is_refused() -> None:
    """A program that sees only that die has no meter."""
    name = "AMD Instinct MI250X"
    gpus = FakeAmdGpu("u1", name=name), FakeAmdGpu("u2", watts=0.0, name=name)
    with pytest.raises(Refused, match="second die") as caught:
        Rig(*gpus, ROCR_VISIBLE_DEVICES="1")
    assert caught.value.state == "not_supported"


def test_failures_are_transient_then_the_device_is_gone() -> None:
    """A reading that fails spoils its round for all; thirty in a row end that GPU alone."""
    gpu = FakeAmdGpu("u1")
    rig = Rig(gpu, FakeAmdGpu("u2"))
    rig.run(1.0)
    before = len(rig.joules["u2"])
    gpu.fails = [7]
    with pytest.raises(Transient, match="u1"):
        rig.source.counters()
    rig.read()
    assert len(rig.joules["u2"]) == before + 1
    gpu.fails = [7] * 30
    for _ in range(29):
        with pytest.raises(Transient):
            rig.source.counters()
    with pytest.raises(Gone, match="30 times in a row") as caught:
        rig.source.counters()
    assert caught.value.device == "u1"
    rig.read()


def test_a_failure_during_the_comparison_holds_no_reading_twice() -> None:
    """A round that failed is in nobody's hands: what comes out later is each round once."""
    bad = FakeAmdGpu("u2", watts=300.0)
    rig = Rig(FakeAmdGpu("u1", watts=300.0), bad)
    rig.run(0.3)
    bad.fails = [7]
    with pytest.raises(Transient):
        rig.source.counters()
    rig.run(0.5)
    times = [t for t, _ in rig.joules["u1"]]
    assert times == sorted(set(times))
    assert len(times) == 8


def test_states() -> None:
    """Utilisation 0..1 and bytes; what a GPU does not tell is None."""
    rig = Rig(FakeAmdGpu("u1"), FakeAmdGpu("u2", power=False))
    assert [(s.utilization, s.memory_bytes) for s in rig.source.states()] == [(0.42, 2**30), (None, 2**30)]


def test_names_model_and_driver() -> None:
    """UUIDs are ids; where two GPUs have one UUID, or none, the PCI address is."""
    rig = Rig(FakeAmdGpu("u1"))
    assert [(d.id, d.name, d.type) for d in rig.source.devices] == [("u1", "AMD Instinct MI300X", "gpu")]
    assert rig.source.driver_version == "6.12.12"
    assert [d.id for d in Rig(FakeAmdGpu("u"), FakeAmdGpu("u")).source.devices] == [
        "amd:0000:00:00.0",
        "amd:0000:01:00.0",
    ]


def test_closing_stops_amdsmi_once() -> None:
    """Whoever opened it closes it; a closed source and a refused opening leave no user behind."""
    rig = Rig(FakeAmdGpu("u1"))
    assert rig.smi.users == 1
    rig.source.close()
    rig.source.close()
    assert rig.smi.users == 0
    with pytest.raises(Gone):
        rig.read()
    with pytest.raises(Refused, match="shows no GPU"):
        open_amd(Settings(ManualClock(), {}), api=(none := FakeAmdSmi()))
    assert none.users == 0


def test_a_forked_child_leaves_the_driver_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The session is the parent's: the child's copy is gone and shuts nothing down."""
    rig = Rig(FakeAmdGpu("u1"))
    parent = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: parent + 1)
    with pytest.raises(Gone, match="forked"):
        rig.read()
    rig.source.close()
    assert rig.smi.users == 1


@pytest.mark.parametrize(("code", "state"), [(10, "permission_denied"), (34, "driver_not_loaded"), (7, "failed")])
def test_refusals_of_the_library(code: int, state: str) -> None:
    """Each has its state and its fix."""
    smi = FakeAmdSmi(FakeAmdGpu("u1"))
    smi.refuses = code
    with pytest.raises(Refused) as caught:
        open_amd(Settings(ManualClock(), {}), api=smi)
    assert caught.value.state == state
    assert caught.value.fix


BOARDS = [AmdBoardId(n, None, frozenset({f"gpu-{n}{n}{n}", f"gpu-uuid-{n}"})) for n in range(4)]


@pytest.mark.parametrize(
    ("environ", "seen"),
    [
        ({}, [0, 1, 2, 3]),
        ({"ROCR_VISIBLE_DEVICES": "2,0"}, [2, 0]),
        ({"HIP_VISIBLE_DEVICES": "3"}, [3]),
        ({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "1"}, [3]),
        ({"CUDA_VISIBLE_DEVICES": "1"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "1", "HIP_VISIBLE_DEVICES": "2"}, [2]),
        ({"ROCR_VISIBLE_DEVICES": "GPU-222, GPU-UUID-0"}, [2, 0]),
        ({"ROCR_VISIBLE_DEVICES": "0,9,1"}, [0]),
        ({"ROCR_VISIBLE_DEVICES": "0,-1,1"}, [0]),
        ({"ROCR_VISIBLE_DEVICES": ""}, []),
        ({"ROCR_VISIBLE_DEVICES": "1,1"}, [1]),
    ],
)
def test_visible_devices(environ: dict[str, str], seen: list[int]) -> None:
    """The runtime's variable first, HIP's counts in what is left, UUIDs by any of their names, the list ends at nonsense."""
    chosen, _ = visible(BOARDS, environ)
    assert [board.index for board in chosen] == seen


def test_visible_devices_by_hips_own_order() -> None:
    """Where amdsmi tells HIP's numbers they count; where it does not, the assumption is told."""
    told = [replace(board, hip_index=3 - board.index) for board in BOARDS]
    assert [b.index for b in visible(told, {"HIP_VISIBLE_DEVICES": "0,1"})[0]] == [3, 2]
    assert visible(told, {"HIP_VISIBLE_DEVICES": "0,1"})[1] == ()
    assert "is taken for amdsmi's" in visible(BOARDS, {"HIP_VISIBLE_DEVICES": "0"})[1][0]
    assert "ends at 'x'" in visible(BOARDS, {"ROCR_VISIBLE_DEVICES": "x"})[1][0]


def test_serial_numbers_name_gpus() -> None:
    """ROCR's UUID is the GPU's serial number, which amdsmi tells beside its own UUID."""
    gpus = FakeAmdGpu("u1", serial="0xAA"), FakeAmdGpu("u2", serial="0xBB", hip_id=None)
    assert [d.id for d in Rig(*gpus, ROCR_VISIBLE_DEVICES="GPU-bb").source.devices] == ["u2"]
    with pytest.raises(Refused, match="leave no GPU visible"):
        Rig(*gpus, ROCR_VISIBLE_DEVICES="-1")


@pytest.fixture
def driver(tmp_path: Path) -> Settings:
    """A machine with the amdgpu driver."""
    (tmp_path / "sys/module/amdgpu").mkdir(parents=True)
    return Settings(ManualClock(), {"ROCM_PATH": str(tmp_path / "rocm")}, sysfs=str(tmp_path / "sys"))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that behaves as amdsmi does without its library, on the import path."""
    (tmp_path / "lib/amdsmi").mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.delitem(sys.modules, "amdsmi", raising=False)
    path = tmp_path / "lib/amdsmi/__init__.py"
    path.write_text("print('Unable to find libamd_smi.so')\nraise KeyError('libamd_smi.so')\n", encoding="ascii")
    return path


def test_no_driver_no_import(tmp_path: Path, module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the driver the module is not even imported: nobody sees what it prints."""
    with pytest.raises(Refused, match="not loaded") as caught:
        load_amd(Settings(ManualClock(), {}, sysfs=str(tmp_path / "nothing")))
    assert caught.value.state == "absent"
    assert capsys.readouterr().out == ""


def test_no_library_no_import(driver: Settings, module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor without AMD's library, which is looked for where the module would."""
    tried: list[str] = []

    def loads(path: str) -> object:
        tried.append(path)
        raise OSError(path)

    with pytest.raises(Refused, match=r"libamd_smi\.so") as caught:
        load_amd(driver, loads=loads)
    assert caught.value.state == "library_missing"
    assert tried[:2] == [f"{driver.environ['ROCM_PATH']}/lib/libamd_smi.so", "libamd_smi.so"]
    assert str(module.parent / "libamd_smi.so") in tried
    assert capsys.readouterr().out == ""


def test_no_module_or_another(driver: Settings, module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is missing, fails or lacks a function is refused with the pip line."""
    with pytest.raises(Refused, match="cannot be imported") as caught:
        load_amd(driver, loads=lambda path: None)
    assert caught.value.state == "module_foreign"
    module.write_text("class AmdSmiException(Exception): ...\n", encoding="ascii")
    with pytest.raises(Refused, match="lacks amdsmi_init"):
        load_amd(driver, loads=lambda path: None)
    sys.modules.pop("amdsmi")
    module.unlink()
    module.parent.rmdir() if not list(module.parent.iterdir()) else None
    monkeypatch.setitem(sys.modules, "amdsmi", None)
    with pytest.raises(Refused, match="not installed") as caught:
        load_amd(driver, loads=lambda path: None)
    assert 'pip install "melodi-otel[amd]"' in caught.value.fix
