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
    assert states(found) == {"nvml": "library_missing", "rapl": "no_device", "estimate": "not_asked"}
    assert all(refusal.reason and refusal.fix for refusal in found.refusals)


def test_first_line_without_a_meter_names_the_variable(settings: Settings) -> None:
    """The line says that joules will be absent, why, and MELODI_SOURCES=estimate."""
    line = describe(discover(settings, plugins={}))
    assert line.startswith("no energy meter: joules will be absent.")
    assert "nvml: no NVIDIA driver (to repair: install one)" in line
    assert "MELODI_SOURCES=estimate" in line


def test_rapl_is_found_and_named(settings: Settings) -> None:
    """A readable package is used without asking; the estimate is not."""
    FakePowercap(Path(settings.sysfs)).package(0)
    found = discover(settings, plugins={})
    assert [source.name for source in found.sources] == ["rapl"]
    assert describe(found) == "energy from rapl: intel-rapl:0 (package-0)"
    assert states(found) == {"nvml": "library_missing", "estimate": "not_asked"}


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
    with pytest.raises(ConfigError, match=r"MELODI_SOURCES='rapl,nvlm'.*'nvlm'.*nvml, rapl, mine, estimate"):
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
