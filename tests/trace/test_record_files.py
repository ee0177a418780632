"""Packed traces and traces in several files: every flushed line is read back, and a replay of all is that of one file."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Decode, EngineId, Joined, Key, Prefill
from melodi_otel.devices import Device
from melodi_otel.errors import MissingDependency, TraceError
from melodi_otel.trace import lines as form
from melodi_otel.trace import packing
from melodi_otel.trace.read import DAMAGED, in_order, lines_of
from melodi_otel.trace.record import Recorder
from melodi_otel.trace.replay import Report, replay

S = 1_000_000_000
ENGINE = EngineId("g", 0)

WRITER = """
import os, signal, sys
from melodi_otel.trace.record import Recorder
now = [0.0]
recorder = Recorder(sys.argv[1], clock=lambda: now[0])
for n in range(50):
    for k in range(100):
        recorder.tap("gauge", ("D", n * 100 + k, 1.5))
    recorder.flush()
    now[0] += 0.25
os.kill(os.getpid(), signal.SIGKILL)
"""


def gauges(recorder: Recorder, first: int, last: int) -> None:
    for n in range(first, last):
        recorder.tap("gauge", ("D", n * S, float(n)))


def watts(lines: list[bytes]) -> list[float]:
    return [json.loads(line)["watts"] for line in lines]


def record(path: Path, **options: int) -> None:
    """Two overlapping requests with steps, bound children, a wrap, a gauge, CPU seconds and token counts, over 40 s."""
    seconds = itertools.count()
    recorder = Recorder(path, ("P",), clock=lambda: float(next(seconds)), **options)
    ledger = Ledger(patience_s=None, tap=recorder.tap, host_devices=["P"])
    ledger.device(Device("G", "gpu", idle_watts=20.0))
    ledger.device(Device("P", "cpu", idle_watts=5.0))
    ledger.device(Device("W", "gpu"))
    ledger.engine(ENGINE, 0, "loading", model="m", devices=("G",), parameters=1e9)
    ledger.engine(ENGINE, S, "ready")
    ledger.unseen(S, 2)
    ledger.unseen(2 * S, -2)
    for n in range(400):
        t_ns = n * S // 10
        ledger.counter("G", t_ns, 10.0 * n)
        ledger.counter("P", t_ns, (3.0 * n) % 1000.0, 1000.0)
        ledger.gauge("W", t_ns, 30.0 + n % 7)
        ledger.cpu("P", None, t_ns, 0.05 * n, 0.2 * n)
        if n % 50 == 20:
            ledger.open(Key("g", f"r{n}"), t_ns, engine=ENGINE, prompt_tokens=40)
            ledger.bind(Key("g", f"r{n}"), f"r{n}.0")
        if n % 50 == 21:
            ledger.step(ENGINE, 0, n, t_ns - S // 10, t_ns, ("G",), prefill=[Prefill(f"r{n - 1}.0", 40, 0)])
        elif n > 21:
            joined = [Joined(f"r{n - 2}.0", 40)] if n % 50 == 22 else []
            left = [f"r{n - 80}.0"] if n % 50 == 0 and n >= 100 else []
            ledger.step(ENGINE, 0, n, t_ns - S // 10, t_ns, ("G",), decode=Decode(1, 0), joined=joined, left=left)
        if n % 50 == 30:
            ledger.progress(Key("g", f"r{n - 10}"), t_ns, 8, first_token_ns=t_ns - S // 2)
        if n % 50 == 0 and n >= 100:
            ledger.close(Key("g", f"r{n - 80}"), t_ns, 78, "stop")
        ledger.settle(t_ns)
        recorder.flush()
    ledger.flush(400 * S // 10)
    recorder.close()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_files_in_a_row_are_one_trace(tmp_path: Path, suffix: str) -> None:
    """The lines of all files are those of one unrotated file, in whatever order they are named; so are the shares."""
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts"
    parts.mkdir()
    record(whole)
    record(parts / f"t{suffix}", rotate=8192 if suffix == ".jsonl" else 600)
    names = sorted(parts.iterdir())
    assert len(names) > 3
    assert list(lines_of(names[::-1])) == list(lines_of([parts])) == whole.read_bytes().splitlines()
    rows = list(replay(lines_of([parts])))
    assert rows == list(replay(lines_of([whole])))
    assert sum(row["kind"] == "share" for row in rows) > 5


def test_each_file_can_be_read_alone(tmp_path: Path) -> None:
    """Every file replays without warning; its requests are known, and what it measures is the part of its own time."""
    record(tmp_path / "t.jsonl", rotate=8192)
    measured = 0.0
    for path in in_order([tmp_path]):
        report = Report()
        rows = list(replay(lines_of([path]), report=report))
        assert (report.broken, report.unknown) == (0, {})
        books = {row["device"]: row for row in rows if row["kind"] == "books"}
        measured += books["G"]["measured"]
        shares = {row["id"] for row in rows if row["kind"] == "share" and row["device"] == "G"}
        assert not {name for name in shares if name.endswith(".0")}, "a child's request was not opened again"
    assert measured == pytest.approx(3990.0, rel=1e-9)


def test_what_a_next_file_begins_with(tmp_path: Path) -> None:
    """Devices, engines as they are now, open requests and their counts, the last readings: each once, marked."""
    recorder = Recorder(tmp_path / "t.jsonl", rotate=600)
    tap = recorder.tap
    tap("device", (Device("D", "gpu"),))
    tap("engine", (ENGINE, 0, "loading", "m", ("D",), None, (1e9, *[None] * 6), "s"))
    tap("engine", (ENGINE, S, "ready", None, None, None, (None,) * 7, None))
    for name in "ab":
        tap("open", (Key("g", name), S, ENGINE, None, None, 4, None, None, None, None, None, None, None))
    tap("bind", (Key("g", "a"), "a.0"))
    tap("progress", (Key("g", "a"), S, 1, S, None, None))
    tap("progress", (Key("g", "a"), 2 * S, 5, None, None, None))
    tap("close", (Key("g", "b"), 2 * S, 5, "stop", None, None, None, None))
    tap("counter", ("D", S, 5.0, None))
    tap("counter", ("D", 2 * S, 7.0, None))
    recorder.flush()
    recorder.close()
    heading, *rest = [json.loads(line) for line in (tmp_path / "t.1.jsonl").read_bytes().splitlines()]
    assert (heading["kind"], heading["number"]) == ("file", 1)
    assert all(line.pop("again") for line in rest)
    engine = {
        "id": "g/0",
        "devices": ["D"],
        "parameters": 1e9,
        "t": 1.0,
        "state": "ready",
        "model": "m",
        "service": "s",
    }
    assert rest == [
        {"kind": "device", "id": "D", "relative_uncertainty": 0.0, "fraction": 1.0, "live": True},
        {"kind": "engine", **engine},
        {"kind": "open", "t": 1.0, "id": "a", "engine": "g/0", "prompt_tokens": 4},
        {"kind": "bind", "t": 1.0, "id": "a", "child": "a.0"},
        {"kind": "tokens", "t": 2.0, "id": "a", "output_tokens": 5, "first_token_t": 1.0},
        {"kind": "sample", "t": 2.0, "device": "D", "joules": 7.0},
    ]


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    """With two files to keep there are never more; the two replay as one."""
    recorder = Recorder(tmp_path / "t.jsonl", rotate=1024, keep=2)
    for n in range(20):
        gauges(recorder, n * 20, n * 20 + 20)
        recorder.flush()
        assert len(list(tmp_path.iterdir())) <= 2
    recorder.close()
    found = watts(list(lines_of([tmp_path])))
    assert found == [float(n) for n in range(int(found[0]), 400)]


def test_a_recording_is_replaced_with_all_its_files(tmp_path: Path) -> None:
    """Files of the recording before are gone; one that only looks like them stays."""
    for _ in range(2):
        recorder = Recorder(tmp_path / "t.jsonl", rotate=1024)
        gauges(recorder, 0, 60)
        recorder.flush()
        recorder.close()
    (tmp_path / "t.9.jsonl").write_text('{"kind":"sample","t":1,"device":"D","watts":1}\n')
    recorder = Recorder(tmp_path / "t.jsonl")
    gauges(recorder, 0, 3)
    recorder.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.9.jsonl", "t.jsonl"]


@pytest.mark.skipif(sys.platform == "win32", reason="no locks")
def test_a_recording_that_went_on_in_a_next_file_is_in_use(tmp_path: Path) -> None:
    """Another recorder of the same name takes a name of its own, and touches none of its files."""
    first = Recorder(tmp_path / "t.jsonl.gz", rotate=100, clock=lambda: 0.0)
    gauges(first, 0, 60)
    first.flush()
    second = Recorder(tmp_path / "t.jsonl.gz")
    gauges(second, 0, 5)
    second.close()
    first.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "t.1.jsonl.gz",
        f"t.{os.getpid()}.jsonl.gz",
        "t.jsonl.gz",
    ]
    assert watts(list(lines_of([tmp_path / "t.1.jsonl.gz", tmp_path / "t.jsonl.gz"]))) == [float(n) for n in range(60)]


@pytest.mark.parametrize(("name", "whole"), [("t.jsonl", 5000), ("t.jsonl.gz", 4900)])
def test_a_killed_writer_loses_no_flushed_line(tmp_path: Path, name: str, whole: int) -> None:
    """After SIGKILL all lines are there that were flushed; packed ones are every second, here every fourth flush."""
    path = tmp_path / name
    done = subprocess.run([sys.executable, "-c", WRITER, str(path)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    found = list(lines_of([path]))
    assert len(found) == whole
    assert [round(form.decode(line).t * 1e9) for line in found] == list(range(whole))


@pytest.mark.parametrize("cut", [1, 8, 30])
def test_an_unfinished_member_counts_once(tmp_path: Path, cut: int, caplog: pytest.LogCaptureFixture) -> None:
    """A last member that was cut gives its whole lines, and one broken one."""
    path = tmp_path / "t.jsonl.gz"
    lines = [b'{"kind":"sample","t":%d,"device":"D","joules":%d}' % (n, n * 7919 % 1000) for n in range(2000)]
    packed = [gzip.compress(b"\n".join(part) + b"\n") for part in (lines[:1000], lines[1000:])]
    path.write_bytes(packed[0] + packed[1][:-cut])
    found, report = list(lines_of([path])), Report()
    assert found[:-1] == lines[: len(found) - 1]
    assert (len(found) > 1900, found[-1]) == (True, DAMAGED)
    list(replay(found, report=report))
    assert (report.broken, report.lines) == (1, len(found) - 1)
    assert "ends in the middle" in caplog.text


def test_a_damaged_member_counts_once(tmp_path: Path) -> None:
    """Rubbish between two members is one broken line; the members before and behind it are read."""
    path = tmp_path / "t.jsonl.gz"
    one, two = gzip.compress(b'{"a":1}\n{"a":2}\n', mtime=0), gzip.compress(b'{"a":3}\n', mtime=0)
    for rubbish in (b"\0" * 100_000, one[:14] + b"\xff" * 9 + one[23:]):
        path.write_bytes(one + rubbish + two)
        assert list(lines_of([path])) == [b'{"a":1}', b'{"a":2}', DAMAGED, b'{"a":3}']


def test_an_unfinished_last_line(tmp_path: Path) -> None:
    """Half a line ends its file and joins nothing; a whole one without its newline is a line."""
    for name, text in (("a.jsonl", '{"a":1}\n{"a"'), ("b.jsonl", '{"a":2}')):
        (tmp_path / name).write_text(text)
    assert list(lines_of([tmp_path])) == [b'{"a":1}', b'{"a"', b'{"a":2}']


def test_a_missing_file_in_between(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without the file before, a file says again what it is about; it is a warning."""
    recorder = Recorder(tmp_path / "t.jsonl", rotate=1024)
    for n in range(4):
        gauges(recorder, n * 30, n * 30 + 30)
        recorder.flush()
    recorder.close()
    found = watts(list(lines_of([tmp_path / "t.jsonl", tmp_path / "t.2.jsonl"])))
    assert found == [float(n) for n in (*range(30), *range(59, 90))]
    assert "between numbers 0 and 2 is missing" in caplog.text


def test_long_lines_and_small_reads(tmp_path: Path) -> None:
    """Lines longer than what is read at a time are whole, plain and packed."""
    lines = [b"x" * n for n in (1, 700_000, 3, 262_144, 262_143, 1)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    sizes: list[int] = []
    assert list(lines_of([tmp_path], sizes.append)) == lines * 2
    assert sum(sizes) == sum(path.stat().st_size for path in tmp_path.iterdir())


def test_packed_lines_come_over_a_pipe(tmp_path: Path) -> None:
    """A stream shows by its first bytes how it is packed."""
    path = tmp_path / "t"
    path.write_bytes(gzip.compress(b'{"a":1}\n'))
    with path.open("rb") as stream:
        assert list(lines_of([stream])) == [b'{"a":1}']


def test_zstandard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its module the error is the pip line, and no file appears."""
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingDependency, match="pip install zstandard"):
        Recorder(tmp_path / "t.jsonl.zst")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "u.jsonl.zst").write_bytes(packing.MAGIC[".zst"])
    with pytest.raises(MissingDependency, match="pip install zstandard"):
        list(lines_of([tmp_path / "u.jsonl.zst"]))


def test_zstandard_frames(tmp_path: Path) -> None:
    """Where the module is there, frames are written and read as gzip members are, the cut last one included."""
    pytest.importorskip("zstandard")
    path = tmp_path / "t.jsonl.zst"
    now = [0.0]
    recorder = Recorder(path, clock=lambda: now[0])
    gauges(recorder, 0, 50)
    recorder.flush()
    gauges(recorder, 50, 99)
    recorder.close()
    assert watts(list(lines_of([path]))) == [float(n) for n in range(99)]
    path.write_bytes(path.read_bytes()[:-3])
    found = list(lines_of([path]))
    assert found[-1] == DAMAGED
    assert watts(found[:-1])[:50] == [float(n) for n in range(50)]


def test_tiny_flushes_share_a_member(tmp_path: Path) -> None:
    """Ten flushes a second make one member a second; 1 MiB of lines makes one at once."""
    path, now = tmp_path / "t.jsonl.gz", [0.0]
    recorder = Recorder(path, clock=lambda: now[0])
    members: Callable[[], int] = lambda: path.read_bytes().count(b"\x1f\x8b\x08\x00\x00\x00\x00\x00")
    counts = []
    for n in range(40):
        gauges(recorder, n, n + 1)
        recorder.flush()
        counts.append(members())
        now[0] += 0.125
    assert counts == [1 + n // 8 for n in range(40)]
    gauges(recorder, 40, 40_000)
    assert members() > counts[-1]
    recorder.close()


def test_a_directory_without_traces(tmp_path: Path) -> None:
    """The error says what is expected in it."""
    with pytest.raises(TraceError, match=r"expected files \*\.jsonl"):
        list(lines_of([tmp_path]))
