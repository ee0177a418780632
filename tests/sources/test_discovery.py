from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import pytest

from melodi_otel.devices import Device
from melodi_otel.errors import ConfigError, MissingDependency, Refused
from melodi_otel.sources import discovery as module
from melodi_otel.sources.base import Discovery, Refusal, Settings, Source
from melodi_otel.sources.discovery import describe, discover, gpus_of
from melodi_otel.testing.clock import ManualClock
from melodi_otel.testing.cray import FakeCray
from melodi_otel.testing.powercap import FakePowercap
from melodi_otel.testing.sources import ScriptedSource


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A machine with CPU times, without NVML and RAPL."""

    def no_nvml(settings: Settings) -> Source:
        raise Refused("no NVIDIA driver", fix="install one", state="library_missing")

    monkeypatch.setattr(module, "_nvml", no_nvml)
    (tmp_path / "proc").mkdir()
    (tmp_path / "sys").mkdir()
    (tmp_path / "proc/stat").write_text("cpu  1 0 1 9 0 0 0 0 0 0\ncpu0 1 0 1 9 0 0 0 0 0 0\n", encoding="ascii")
    return Settings(ManualClock(), {}, sysfs=str(tmp_path / "sys"), procfs=str(tmp_path / "proc"))


def states(found: Discovery) -> dict[str, str]:
    return {refusal.source: refusal.state for refusal in found.refusals}


def test_every_refusal_is_kept(settings: Settings) -> None:
    """Without a meter nothing is used, and each source says why and what helps."""
    found = discover(settings, plugins={})
    assert found.sources == ()
    assert states(found) == {
        "nvml": "library_missing",
        "amd": "absent",
        "apple": "absent",
        "rapl": "no_device",
        "cray": "absent",
        "estimate": "not_asked",
    }
    assert all(refusal.reason and (refusal.fix or refusal.state == "absent") for refusal in found.refusals)


def test_first_line_without_a_meter_names_the_variable(settings: Settings) -> None:
    """The line says that joules will be absent, why, and MELODI_SOURCES=estimate."""
    line = describe(discover(settings, plugins={}))
    assert line.startswith("no energy meter: joules will be absent.")
    assert "nvml: no NVIDIA driver (to repair: install one)" in line
    assert "MELODI_SOURCES=estimate" in line
    assert "apple" not in line
    assert "To estimate them" in line
    assert "To estimate them" not in describe(discover(settings, plugins={}), "darwin")


def test_rapl_is_found_and_named(settings: Settings) -> None:
    """A readable package is used without asking; the estimate is not."""
    FakePowercap(Path(settings.sysfs)).package(0)
    found = discover(settings, plugins={})
    assert [source.name for source in found.sources] == ["rapl"]
    assert describe(found) == (
        "energy from rapl: intel-rapl:0 (package-0) (rapl unconfirmed: not run on real hardware yet)"
    )
    assert "rapl" not in states(found)


def test_estimate_only_if_asked(settings: Settings) -> None:
    """MELODI_SOURCES=estimate, or a caller that asks, gets an estimate that is called one."""
    asked = Settings(
        **{name: getattr(settings, name) for name in settings.__slots__} | {"asked": frozenset({"estimate"})}
    )
    for found in (discover(settings, ("estimate",), plugins={}), discover(asked, plugins={})):
        assert [source.name for source in found.sources] == ["estimate"]
        assert "ESTIMATED" in describe(found)
    assert states(discover(settings, ("estimate",), plugins={})) == {}


def test_no_estimate_beside_a_measured_cpu(settings: Settings) -> None:
    """Where RAPL measures the CPU its joules are not estimated a second time."""
    FakePowercap(Path(settings.sysfs)).package(0)
    found = discover(settings, ("rapl", "estimate"), plugins={})
    assert [source.name for source in found.sources] == ["rapl"]
    assert states(found) == {"estimate": "superseded"}


def test_unknown_name_is_an_error_with_the_valid_ones(settings: Settings) -> None:
    """A typo in MELODI_SOURCES names variable, value and what is allowed, plug-ins included."""
    with pytest.raises(
        ConfigError,
        match=r"MELODI_SOURCES='rapl,nvlm'.*'nvlm'.*nvml, amd, apple, rapl, cray, mine, estimate, rapl_perf, powercap",
    ):
        discover(settings, ("rapl", "nvlm"), plugins={"mine": lambda settings: crash()})


def crash() -> Source:
    raise RuntimeError("boom")


def test_asked_for_and_refused_is_prominent(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    """A refusal of a source that was asked for is an error in the log; of one that was merely tried it is not."""
    with caplog.at_level(logging.DEBUG, "melodi_otel"):
        discover(settings, ("rapl",), plugins={})
        assert [record.levelname for record in caplog.records] == ["ERROR"]
        caplog.clear()
        discover(settings, plugins={})
        assert {record.levelname for record in caplog.records} == {"DEBUG"}


class Broken:
    """A source whose devices cannot be listed."""

    name = "broken"
    closed = False

    @property
    def devices(self) -> Sequence[Device]:
        raise KeyError("devices")

    def close(self) -> None:
        Broken.closed = True
        raise OSError("and it cannot be closed")


def test_crashing_plugin_is_a_refusal(settings: Settings) -> None:
    """Whatever a plug-in raises, at opening or at listing, becomes a refusal; a missing package keeps its pip line."""

    def missing(settings: Settings) -> Source:
        raise MissingDependency("pip install thing")

    found = discover(
        settings, plugins={"bad": lambda settings: crash(), "broken": lambda settings: Broken(), "missing": missing}
    )
    assert states(found).items() >= {"bad": "crashed", "broken": "crashed", "missing": "library_missing"}.items()
    assert Broken.closed
    assert next(r for r in found.refusals if r.source == "bad").reason == "it failed with RuntimeError: boom"
    assert next(r for r in found.refusals if r.source == "missing").fix == "pip install thing"


def test_plugin_is_used_and_never_doubles_a_device(settings: Settings) -> None:
    """A plug-in's devices are used; a second source for a device that is measured already is left out and closed."""
    clock = ManualClock()
    one = ScriptedSource(clock, {Device("x", "cpu"): 1.0}, name="one")
    two = ScriptedSource(clock, {Device("x", "cpu"): 1.0}, name="two")
    none = ScriptedSource(clock, {}, name="none")
    found = discover(settings, plugins={"one": lambda s: one, "two": lambda s: two, "none": lambda s: none})
    assert found.sources == (one,)
    assert states(found).items() >= {"two": "superseded", "none": "no_device"}.items()
    assert (one.closed, two.closed) == (False, True)


def test_partly_refused_zones_are_told(settings: Settings) -> None:
    """A zone that may not be read is a refusal of its own in the list and in the first line."""

    class Partly(ScriptedSource):
        refusals = (Refusal("rapl", "permission_denied", "intel-rapl:0:0 may not be read", "chmod"),)

    source = Partly(ManualClock(), {Device("x", "cpu"): 1.0}, name="partly")
    found = discover(settings, ("partly",), plugins={"partly": lambda s: source})
    assert states(found) == {"rapl": "permission_denied"}
    assert describe(found) == "energy from partly: x; not used: rapl: intel-rapl:0:0 may not be read (to repair: chmod)"


def test_gpus_and_their_driver() -> None:
    """Models are told once each, the driver's version by the meter that knows it; without a GPU nothing is."""
    cards = [Device(f"GPU-{n}", "gpu", "nvml.energy_counter", name) for n, name in enumerate(("A", "A", "B", None))]
    source = ScriptedSource(
        ManualClock(), dict.fromkeys([*cards, Device("intel-rapl:0", "cpu", "rapl.package", "C")], 1.0)
    )
    assert gpus_of(Discovery((source,))) == (("A", "B"), None)
    source.driver_version = "580.65.06"
    assert gpus_of(Discovery((source,))) == (("A", "B"), "580.65.06")
    assert gpus_of(Discovery()) == ((), None)


def test_a_second_meter_of_one_silicon_leaves_it_out(settings: Settings) -> None:
    """RAPL and the node's controller see one CPU: each type is measured once, by the meter that comes first."""
    sysfs = Path(settings.sysfs)
    FakeCray(sysfs, node=500.0, cpu=200.0, memory=50.0, accel0=100.0)
    alone = discover(settings, plugins={})
    assert {d.id for d in alone.devices} == {"cray:node", "cray:cpu", "cray:memory", "cray:accel0"}
    FakePowercap(sysfs).package(0)
    for wanted in ((), ("rapl", "cray"), ("powercap", "cray")):
        both = discover(settings, wanted, plugins={})
        assert {d.id for d in both.devices} == {"intel-rapl:0", "cray:node", "cray:memory", "cray:accel0"}
        assert [d.type for d in both.devices].count("cpu") == 1
        assert "its cpu counters are left out" in next(r for r in both.refusals if r.source == "cray").reason
        assert "left out" not in describe(both)


def test_a_plugin_hears_what_is_measured(settings: Settings) -> None:
    """Settings.measured holds the types of the meters before it; an estimate is no measurement."""
    heard: list[frozenset[str]] = []

    def listen(settings: Settings) -> Source:
        heard.append(settings.measured)
        raise Refused("only listening")

    guess = Device("guess", "memory", estimated=True)
    one = ScriptedSource(ManualClock(), {Device("x", "gpu"): 1.0, guess: 1.0}, name="one")
    discover(settings, plugins={"one": lambda s: one, "two": listen})
    assert heard == [frozenset({"gpu"})]


def test_one_way_of_rapl_by_name(settings: Settings) -> None:
    """Whoever distrusts perf events names powercap; neither way is tried twice, and unasked neither appears."""
    FakePowercap(Path(settings.sysfs)).package(0)
    found = discover(settings, ("powercap",), plugins={})
    assert [d.source for d in found.devices] == ["rapl.package"]
    assert states(discover(settings, ("rapl_perf",), plugins={})) == {"rapl_perf": "absent"}
    assert states(discover(settings, ("rapl", "powercap"), plugins={})) == {"powercap": "superseded"}
    assert not {"rapl_perf", "powercap"} & states(discover(settings, plugins={})).keys()
