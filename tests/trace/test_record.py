"""A recorded run, replayed, gives the same shares and the same books."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Decode, EngineId, Joined, Key, Late, Prefill
from melodi_otel.devices import Device
from melodi_otel.testing.machine import Machine
from melodi_otel.testing.powercap import FakePowercap
from melodi_otel.trace.record import Recorder
from melodi_otel.trace.replay import Replay, replay

ENGINE = EngineId("g", 0)
S = 1_000_000_000


def test_replay_equals_the_run(tmp_path: Path) -> None:
    """Requests, steps in delta form, bound rows, a nested block, a wrap, a gauge-free package with memory: all the same."""
    tree = FakePowercap(tmp_path / "sys")
    package = tree.package(0, watts=70.0, energy_uj=65_532_610_987 - 30_000_000, range_uj=65_532_610_987)
    tree.dram(package, watts=9.0)
    recorder = Recorder(tmp_path / "trace.jsonl")
    rig = Machine(tree.advance, sysfs=str(tree.root), tap=recorder.tap)
    rig.start("rapl")
    rig.run(2.0)
    ledger, now = rig.ledger, rig.clock.monotonic_ns
    devices = tuple(rig.devices)
    block = rig.open()
    ledger.engine(ENGINE, now(), model="m", devices=devices, parameters=1e9, kv_bytes_per_token=1000.0)
    ledger.open(Key("g", "a"), now(), engine=ENGINE, model="m", prompt_tokens=50, parent=block)
    ledger.bind(Key("g", "a"), "a.0")
    ledger.bind(Key("g", "a"), "a.1")
    ledger.open(Key("g", "b"), now(), engine=ENGINE, prompt_tokens=20, parent=block, reason="phase_elsewhere")
    joined = [Joined("a.0", 50), Joined("a.1", 50)]
    futures = []
    for n in range(1, 40):
        start = now()
        rig.run(0.03)
        prefill = [Prefill("b", 20, 0)] if n == 5 else []
        joined += [Joined("b", 20)] if n == 6 else []
        left = ["a.1"] if n == 20 else []
        members = 2 + (n >= 6) - (n >= 20)
        ledger.step(ENGINE, 0, n, start, now(), decode=Decode(members, 0), prefill=prefill, joined=joined, left=left)
        joined = []
        if n == 30:
            futures.append(ledger.close(Key("g", "a"), now(), 50, "stop"))
            ledger.progress(Key("g", "b"), now(), 25)
    futures += [ledger.close(Key("g", "b"), now(), 34, "length"), rig.close(block)]
    rig.run(3.0)
    for future in futures:
        rig.energy(future)
    recorder.close()
    lines = (tmp_path / "trace.jsonl").read_bytes().splitlines()
    rows = list(replay(lines))
    replayed = {(row["id"], row["device"]): row for row in rows if row["kind"] == "share"}
    for share in (share for future in futures for share in future.result(0)):
        row = replayed.pop((share.key.request, share.device))
        assert row["joules"] == pytest.approx(share.joules, rel=1e-9)
        assert row["static"] == pytest.approx(share.static, rel=1e-9)
        assert (row["method"], row["quality"], row["coverage"]) == (share.method, share.quality, share.coverage)
    # Rows of "a" stay in the decode set after its close: that work is nobody's, in the run as in the replay.
    assert {name for name, _ in replayed} == {"anonymous"}
    books = {row["device"]: row for row in rows if row["kind"] == "books"}
    for name, live in rig.ledger.snapshot().books.items():
        assert books[name]["measured"] == pytest.approx(live.measured, rel=1e-9)
        assert books[name]["attributed"] == pytest.approx(live.attributed, rel=1e-9)


def test_a_full_disk_ends_the_recording_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """When the trace cannot be written any more there is one warning and the run goes on."""
    tree = FakePowercap(tmp_path / "sys")
    tree.package(0, watts=10.0)
    recorder = Recorder("/dev/full")
    rig = Machine(tree.advance, sysfs=str(tree.root), tap=recorder.tap)

    rig.start("rapl")
    with caplog.at_level(logging.WARNING):
        rig.run(1.0)
        recorder.flush()
        assert rig.request(1.0).total == pytest.approx(10.0)
        recorder.close()
    assert caplog.text.count("recording stops") == 1


def test_late_work_is_replayed(tmp_path: Path) -> None:
    """Work that was reported when it was over, with the starts of others beside it, gets the same share from its trace."""
    path = tmp_path / "late.jsonl"
    recorder = Recorder(path)
    ledger = Ledger(patience_s=None, tap=recorder.tap)
    ledger.device(Device("D", "gpu", idle_watts=20.0))
    ledger.unseen(0, 2)
    for tick in range(21):
        ledger.counter("D", tick * S // 10, 10.0 * tick)
        ledger.settle(tick * S // 10)
    ledger.open(Key("g", "a"), S, late=Late((3 * S // 2,), elsewhere=True))
    future = ledger.close(Key("g", "a"), 2 * S, None, "stop")
    ledger.flush(2 * S)
    recorder.close()
    (share,) = future.result(0)
    replayed = [line for line in Replay().run(path.read_bytes().splitlines()) if line["kind"] == "share"]
    assert share.joules == pytest.approx(75.0)
    assert [line["joules"] for line in replayed] == [pytest.approx(share.joules, rel=1e-9)]


def test_a_busy_gpu_is_replayed(tmp_path: Path) -> None:
    """What taught no idle power when it was recorded teaches none in the replay."""
    path = tmp_path / "busy.jsonl"
    recorder = Recorder(path)
    ledger = Ledger(patience_s=None, tap=recorder.tap)
    ledger.device(Device("D", "gpu"))
    joules = 0.0
    for second in range(20):
        if second >= 10:
            ledger.busy("D", second * S)
        ledger.counter("D", second * S, joules)
        ledger.settle(second * S)
        joules += 500.0 if second >= 10 else 50.0
    ledger.open(Key("g", "a"), 20 * S, devices=("D",))
    ledger.counter("D", 20 * S, joules)
    future = ledger.close(Key("g", "a"), 21 * S, None, "stop")
    ledger.counter("D", 21 * S, joules + 600.0)
    ledger.settle(21 * S)
    ledger.flush(21 * S)
    recorder.close()
    (share,) = future.result(0)
    assert share.static == pytest.approx(50.0)
    replayed = [line for line in Replay().run(path.read_bytes().splitlines()) if line["kind"] == "share"]
    assert [line["static"] for line in replayed] == [pytest.approx(50.0)]


def test_steps_of_another_process_are_replayed(tmp_path: Path) -> None:
    """A request that waited for steps which came after its end waits for them in the replay, too, and has the same joules."""
    path = tmp_path / "heard.jsonl"
    recorder = Recorder(path)
    ledger = Ledger(patience_s=None, tap=recorder.tap)
    ledger.device(Device("D", "gpu", idle_watts=0.0))
    ledger.counter("D", 0, 0.0)
    engine = EngineId("g", 1)
    ledger.engine(engine, 0, devices=("D",))
    ledger.heard(engine, 0)
    ledger.open(Key("g", "a"), 0, engine=engine)
    future = ledger.close(Key("g", "a"), S, 5, "stop")
    ledger.counter("D", S, 100.0)
    ledger.counter("D", 3 * S // 2, 150.0)
    ledger.settle(S)
    ledger.step(engine, 0, 1, S // 2, S, prefill=[Prefill("a", 5, 0)])
    ledger.heard(engine, S)
    ledger.settle(S)
    recorder.close()
    (share,) = future.result(0)
    replayed = [line for line in Replay().run(path.read_bytes().splitlines()) if line["kind"] == "share"]
    assert [line["joules"] for line in replayed] == [share.joules]
    assert [line["method"] for line in replayed] == [share.method]
