from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from melodi_otel.errors import Gone, Refused, Transient
from melodi_otel.sources.base import CounterSource, Forkable, Settings
from melodi_otel.sources.cray import CraySource, open_cray
from melodi_otel.testing.clock import ManualClock
from melodi_otel.testing.cray import FakeCray


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def settings(tmp_path: Path, clock: ManualClock) -> Settings:
    return Settings(clock, {}, sysfs=str(tmp_path / "sys"))


@pytest.fixture
def node(tmp_path: Path) -> FakeCray:
    return FakeCray(tmp_path / "sys", node=600.0, cpu=200.0, memory=50.0, accel0=150.0, accel1=100.0)


@pytest.fixture
def source(node: FakeCray, settings: Settings) -> Iterator[CraySource]:
    opened = open_cray(settings)
    yield opened
    opened.close()


def shown(source: CraySource) -> dict[str, str]:
    return {device.id: device.type for device in source.devices}


def test_the_whole_node(source: CraySource) -> None:
    """Alone on a machine it measures everything; the node itself is a host, which is never summed with its parts."""
    assert [(d.id, d.type, d.source, d.period_s) for d in source.devices] == [
        ("cray:accel0", "gpu", "cray.accel", 0.1),
        ("cray:accel1", "gpu", "cray.accel", 0.1),
        ("cray:cpu", "cpu", "cray.cpu", 0.1),
        ("cray:node", "host", "cray.node", 0.1),
        ("cray:memory", "memory", "cray.memory", 0.1),
    ]
    assert isinstance(source, CounterSource)
    assert isinstance(source, Forkable)


def test_joules_of_one_update(source: CraySource, node: FakeCray, clock: ManualClock) -> None:
    """Ten seconds at constant power, to the joule, without a range: a fall is a restart."""
    before = {r.device: r.joules for r in source.counters()}
    clock.advance(10.0)
    node.advance(10.0)
    after = source.counters()
    assert {r.device: r.joules - before[r.device] for r in after} == {
        "cray:accel0": 1500.0,
        "cray:accel1": 1000.0,
        "cray:cpu": 2000.0,
        "cray:node": 6000.0,
        "cray:memory": 500.0,
    }
    assert {(r.t_ns, r.range_j) for r in after} == {(clock.monotonic_ns(), None)}


def test_what_is_measured_already_is_left_out(node: FakeCray, settings: Settings) -> None:
    """The CPU of RAPL and the GPUs of NVML are these very devices: left out, each with its reason; memory and node stay."""
    source = open_cray(replace(settings, measured=frozenset({"cpu", "gpu", "host"})))
    assert shown(source) == {"cray:node": "host", "cray:memory": "memory"}
    assert [(r.source, r.state) for r in source.refusals] == [("cray", "superseded")] * 2
    assert {r.reason.split(":")[0] for r in source.refusals} == {
        "its cpu counters are left out",
        "its gpu counters are left out",
    }
    source.close()


@pytest.mark.parametrize("variable", ["CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"])
def test_a_choice_of_gpus_leaves_accelerators_out(node: FakeCray, settings: Settings, variable: str) -> None:
    """Which accelerator is GPU 0 is not told: a program that sees one GPU is not given four."""
    source = open_cray(replace(settings, environ={variable: ""}))
    assert "gpu" not in shown(source).values()
    assert source.refusals[0].reason.startswith(f"its gpu counters are left out: {variable} is set")
    source.close()


def test_sums_and_their_parts_are_not_both_used(tmp_path: Path, settings: Settings) -> None:
    """One counter for all CPUs wins over those of each; those of each accelerator win over their sum."""
    FakeCray(tmp_path / "sys", node=1.0, cpu=2.0, cpu0=1.0, cpu1=1.0, accel=3.0, accel0=3.0)
    source = open_cray(settings)
    assert set(shown(source)) == {"cray:node", "cray:cpu", "cray:accel0"}
    source.close()


def test_one_accelerator_and_cpus_apart(tmp_path: Path, settings: Settings) -> None:
    """XC nodes have one accelerator without a number; where there is no sum of the CPUs, each is a device."""
    FakeCray(tmp_path / "sys", node=1.0, cpu0=1.0, cpu1=1.0, accel=3.0)
    source = open_cray(settings)
    assert set(shown(source)) == {"cray:node", "cray:cpu0", "cray:cpu1", "cray:accel"}
    source.close()


def test_a_part_that_is_not_there_shows_nothing(tmp_path: Path, settings: Settings) -> None:
    """An accelerator counter of 0 J is a slot without one, never an accelerator that draws nothing."""
    FakeCray(tmp_path / "sys", node=1.0, accel0=0.0)
    source = open_cray(settings)
    assert set(shown(source)) == {"cray:node"}
    source.close()


class Updating:
    """``os.pread`` during which the node's controller updates its counters, so many times."""

    def __init__(self, node: FakeCray, times: int) -> None:
        self.node, self.times = node, times

    def __call__(self, fd: int, length: int, offset: int) -> bytes:
        raw = os.pread(fd, length, offset)
        if self.times and b" J" in raw and not raw.startswith(b"5000"):
            self.times -= 1
            self.node.advance(0.1)
        return raw


@pytest.mark.parametrize(("updates", "torn"), [(0, False), (1, False), (9, True)])
def test_counters_of_two_updates_are_never_mixed(node: FakeCray, settings: Settings, updates: int, torn: bool) -> None:
    """An update in the middle is read once more; a second one spoils the round."""
    reader = Updating(node, 0)
    source = open_cray(settings, reader=reader)
    node.advance(0.1)
    reader.times = updates
    if torn:
        with pytest.raises(Transient, match="were updated while they were read"):
            source.counters()
    else:
        by_id = {r.device: r.joules - 5000.0 for r in source.counters()}
        assert by_id["cray:node"] == 60.0 * (1 + updates)
        assert by_id["cray:cpu"] == 20.0 * (1 + updates)
    source.close()


@pytest.mark.parametrize("raw", [b"", b"\n", b"12", b"12 W", b"-5 J", b"J", b"nan J"])
def test_a_torn_file_spoils_the_round(source: CraySource, node: FakeCray, raw: bytes) -> None:
    """What is no figure in joules is no reading, and never 0."""
    node.write(node.file("cpu"), raw)
    with pytest.raises(Transient, match="cray:cpu"):
        source.counters()


def test_an_empty_freshness_proves_nothing(source: CraySource, node: FakeCray) -> None:
    """Two empty reads of it are not the same update."""
    node.write(node.path / "freshness", b"")
    with pytest.raises(Transient):
        source.counters()


@pytest.mark.parametrize(("code", "kind"), [(errno.ENODEV, Gone), (errno.EIO, Transient), (errno.EAGAIN, Transient)])
def test_a_lost_tree_is_gone_and_a_hiccup_is_transient(
    node: FakeCray, settings: Settings, code: int, kind: type[Exception]
) -> None:
    """Errors are told apart by what they mean."""
    fails: list[int] = []

    def reader(fd: int, length: int, offset: int) -> bytes:
        if fails:
            raise OSError(code, os.strerror(code))
        return os.pread(fd, length, offset)

    source = open_cray(settings, reader=reader)
    fails.append(code)
    with pytest.raises(kind):
        source.counters()
    source.close()


def test_elsewhere_it_is_absent(settings: Settings) -> None:
    """A machine that is no Cray node is told so, and that there is nothing to repair."""
    for platform, words in (("linux", "this is no HPE Cray node"), ("win32", "this is win32")):
        with pytest.raises(Refused, match=words) as caught:
            open_cray(settings, platform=platform)
        assert (caught.value.state, caught.value.fix) == ("absent", "")


def test_a_tree_that_cannot_be_read_is_refused(node: FakeCray, settings: Settings) -> None:
    """Garbage, a missing freshness and a forbidden file each name what was found; nothing stays open."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    node.write(node.file("memory"), b"oops")
    with pytest.raises(Refused, match="oops") as caught:
        open_cray(settings)
    assert caught.value.state == "unreadable"

    def forbidden(fd: int, length: int, offset: int) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.raises(Refused) as caught:
        open_cray(settings, reader=forbidden)
    assert caught.value.state == "permission_denied"
    (node.path / "freshness").unlink()
    with pytest.raises(Refused, match="freshness"):
        open_cray(settings)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_closing_is_final(node: FakeCray, settings: Settings) -> None:
    """A second close, and a fork after it, do nothing; a closed source is gone."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    source = open_cray(settings)
    source.forked()
    source.close()
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(Gone):
        source.counters()
