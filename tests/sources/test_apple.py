from __future__ import annotations

import sys
import types

import pytest

from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.sources.apple import AppleSource, open_apple
from melodi_otel.sources.base import CounterSource, Forkable, Settings
from melodi_otel.testing.apple import FakeAppleMonitor
from melodi_otel.testing.clock import ManualClock


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def opened(clock: ManualClock, chip: FakeAppleMonitor) -> AppleSource:
    return open_apple(Settings(clock, {}), monitor=lambda: chip, platform="darwin", machine="arm64")


def test_cpu_gpu_and_memory(clock: ManualClock) -> None:
    """Ten seconds at constant power, to the joule; the neural engine and the GPU's memory are in no device."""
    chip = FakeAppleMonitor(cpu=10.0, gpu=20.0, dram=2.0, sram=1.0, ane=3.0)
    source = opened(clock, chip)
    assert [(d.id, d.type, d.source) for d in source.devices] == [
        ("apple:cpu", "cpu", "apple.cpu"),
        ("apple:gpu", "gpu", "apple.gpu"),
        ("apple:memory", "memory", "apple.memory"),
    ]
    assert isinstance(source, CounterSource)
    assert isinstance(source, Forkable)
    before = source.counters()
    clock.advance(10.0)
    chip.advance(10.0)
    after = source.counters()
    assert [b.joules - a.joules for a, b in zip(before, after, strict=True)] == [100.0, 200.0, 20.0]
    assert {(r.t_ns, r.range_j) for r in after} == {(clock.monotonic_ns(), None)}


def test_a_part_that_is_not_told_is_no_device(clock: ManualClock) -> None:
    """Older chips do not tell their memory: it is absent, not 0."""
    assert [d.id for d in opened(clock, FakeAppleMonitor(cpu=1.0, gpu=1.0)).devices] == ["apple:cpu", "apple:gpu"]


def test_failures_are_transient_then_gone(clock: ManualClock) -> None:
    """A failed call or a part that is missing spoils its round; thirty in a row are the end."""
    chip = FakeAppleMonitor(cpu=1.0, gpu=1.0)
    source = opened(clock, chip)
    chip.fails = [RuntimeError("IOReport")]
    with pytest.raises(Transient, match="IOReport"):
        source.counters()
    source.counters()
    chip.forget("gpu")
    for _ in range(29):
        with pytest.raises(Transient, match="gpu_mj was not told"):
            source.counters()
    with pytest.raises(Gone, match="30 times"):
        source.counters()


@pytest.mark.parametrize(
    ("platform", "machine", "state", "words"),
    [
        ("linux", "x86_64", "absent", "this is no Mac"),
        ("win32", "AMD64", "absent", "this is no Mac"),
        ("darwin", "x86_64", "no_device", "Rosetta"),
    ],
)
def test_elsewhere(clock: ManualClock, platform: str, machine: str, state: str, words: str) -> None:
    """Other systems and Intel Macs are told what they are."""
    with pytest.raises(Refused, match=words) as caught:
        open_apple(Settings(clock, {}), platform=platform, machine=machine)
    assert caught.value.state == state


def test_missing_and_old_modules(clock: ManualClock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the module, or with one that lacks the monitor, the pip line is told."""
    for module, state in ((None, "module_missing"), (types.ModuleType("zeus_apple_silicon"), "module_foreign")):
        monkeypatch.setitem(sys.modules, "zeus_apple_silicon", module)
        with pytest.raises(Refused) as caught:
            open_apple(Settings(clock, {}), platform="darwin", machine="arm64")
        assert caught.value.state == state
        assert 'pip install "melodi-otel[apple]"' in caught.value.fix


def test_a_monitor_that_fails_or_tells_nothing(clock: ManualClock) -> None:
    """Both are refusals with what helps."""
    chip = FakeAppleMonitor()
    with pytest.raises(Refused, match="tells no energy") as caught:
        opened(clock, chip)
    assert caught.value.state == "no_device"
    chip.fails = [RuntimeError("no IOReport")]
    with pytest.raises(Refused, match="no IOReport") as caught:
        opened(clock, chip)
    assert caught.value.state == "failed"


def test_closed_and_forked_are_gone(clock: ManualClock) -> None:
    """A child's copy is dead, and so is a closed source."""
    source = opened(clock, FakeAppleMonitor(cpu=1.0))
    source.forked()
    source.close()
    with pytest.raises(Gone):
        source.counters()
