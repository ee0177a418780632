from __future__ import annotations

import errno
import logging
import os
import subprocess
import time
from pathlib import Path

import msgspec
import pytest

from melodi_otel.attribution.finishing import accrued_in
from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Key, Share
from melodi_otel.devices import Device
from melodi_otel.hub.journal import FRESH_S, Journal, Promise, boot_id
from melodi_otel.testing.clock import ManualClock

S = 1_000_000_000
SHARE = Share(Key("g", "r"), "D", 0, S, 100.0, *([None] * 4), 1.0, "equal", "interpolated", 1.0, 1.0, S)
PROMISES = [Promise("g", "r", [SHARE]), Promise("g", "s", [], False)]


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
def state(clock):
    """100 W for a second, of which an open request has 100 J."""
    ledger = Ledger(patience_s=None)
    now_ns = clock.monotonic_ns()
    ledger.device(Device("D", "gpu", idle_watts=20.0))
    ledger.counter("D", now_ns, 0.0)
    ledger.open(Key("g", "open"), now_ns, devices=("D",))
    ledger.counter("D", now_ns + S, 100.0)
    ledger.settle(now_ns + S)
    return ledger.state(now_ns + S)


def journal(path, clock, boot="this one"):
    return Journal(path, boot, clock.monotonic_ns)


def test_what_was_written_is_read(tmp_path, clock, state):
    """Books, promises and the hub's name come back as they were, to the last digit; the file is for this user alone."""
    path = tmp_path / "hub.sock.journal"
    assert journal(path, clock).save("h", state, PROMISES)
    page = journal(path, clock).load()
    assert (page.hub, page.state, page.promises) == ("h", state, PROMISES)
    assert [share.joules for share in accrued_in(page.state)[Key("g", "open")]] == [100.0]
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in tmp_path.iterdir()] == ["hub.sock.journal"]


def test_nothing_there(tmp_path, clock, state):
    """No file, or no path at all: the books start anew, and nothing is said."""
    assert journal(tmp_path / "none", clock).load() is None
    nowhere = journal(None, clock)
    assert nowhere.load() is None
    assert nowhere.save("h", state, []) is False
    nowhere.remove()


@pytest.mark.parametrize(("seconds", "used"), [(0.0, True), (FRESH_S, True), (FRESH_S + 0.001, False), (-0.001, False)])
def test_it_is_used_while_it_is_fresh(tmp_path, clock, state, seconds, used):
    """Ten minutes old it is gone on from; older, or from the future, it is not."""
    path = tmp_path / "j"
    journal(path, clock).save("h", state, [])
    clock.advance(seconds)
    assert (journal(path, clock).load() is not None) == used


def test_another_start_of_the_machine(tmp_path, clock, state):
    """Monotonic time began anew: what it says means nothing."""
    path = tmp_path / "j"
    journal(path, clock, "before").save("h", state, [])
    assert journal(path, clock, "now").load() is None


def test_a_stepping_wall_clock(tmp_path, clock, state):
    """Set back by a year or forward, it changes nothing."""
    path = tmp_path / "j"
    journal(path, clock).save("h", state, [])
    for seconds in (-31_536_000, 2 * 31_536_000):
        clock.step_wall(seconds)
        assert journal(path, clock).load() is not None


@pytest.mark.parametrize(
    "raw", [b"", b"\xc1", b"not a journal", b"\x91" * 5000, b"\xdd\xff\xff\xff\xff", b"\x80"], ids=repr
)
def test_a_file_that_is_no_journal(tmp_path, clock, raw, caplog):
    """It is said, and the books start anew."""
    path = tmp_path / "j"
    path.write_bytes(raw)
    with caplog.at_level(logging.WARNING):
        assert journal(path, clock).load() is None
    assert f"the journal {path} cannot be read and is not used" in caplog.text


def test_half_a_journal(tmp_path, clock, state):
    """A file that was cut is none, wherever it was cut."""
    path = tmp_path / "j"
    journal(path, clock).save("h", state, PROMISES)
    raw = path.read_bytes()
    for length in range(0, len(raw), 7):
        path.write_bytes(raw[:length])
        assert journal(path, clock).load() is None


def test_a_journal_of_another_release(tmp_path, clock, caplog):
    """Another format is left alone without complaint, whatever it holds."""
    path = tmp_path / "j"
    path.write_bytes(
        msgspec.msgpack.encode({"format": 1, "boot": "this one", "t_ns": clock.monotonic_ns(), "state": "other"})
    )
    with caplog.at_level(logging.WARNING):
        assert journal(path, clock).load() is None
    assert not caplog.records


def test_a_link_is_not_followed(tmp_path, clock, state):
    """Somebody else's file stays as it is, though a link lies where the journal is written."""
    other = tmp_path / "precious"
    other.write_text("mine")
    path = tmp_path / "j"
    path.with_name("j.new").symlink_to(other)
    assert not journal(path, clock).save("h", state, [])
    assert other.read_text() == "mine"


def test_its_directory_is_gone(tmp_path, clock, state, caplog):
    """Metering goes on; it is said once that it cannot be written, counted each time, and said when it works again."""
    home = tmp_path / "run"
    one = journal(home / "j", clock)
    with caplog.at_level(logging.INFO):
        assert [one.save("h", state, []) for _ in range(3)] == [False] * 3
        home.mkdir()
        assert one.save("h", state, [])
    assert one.failures == 3
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert f"the journal {home / 'j'} cannot be written (No such file or directory)" in said[0]
    assert "its books start anew" in said[0]
    assert "is written again" in said[1]


def test_a_write_that_fails_takes_the_old_page_away(tmp_path, clock, state, monkeypatch):
    """Books that go on from an old page would give joules twice: better none than a wrong one."""
    path = tmp_path / "j"
    one = journal(path, clock)
    assert one.save("h", state, [])

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "replace", full)
    assert not one.save("h", state, [])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 kB."""
    at = tmp_path / "small"
    at.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(at)], check=False, capture_output=True, text=True
    )
    if done.returncode != 0:
        pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
    yield at
    subprocess.run(["umount", str(at)], check=True)


def test_a_full_disk(small_disk, clock, state, caplog):
    """The disk fills up: it is said, no page and no half of one is left; with room again it is written again."""
    path = small_disk / "j"
    one = journal(path, clock)
    assert one.save("h", state, [])
    hog = small_disk / "hog"
    with hog.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)
    with caplog.at_level(logging.WARNING):
        assert not one.save("h", state, [Promise("g", str(n), [SHARE]) for n in range(1000)])
    assert "cannot be written (No space left on device)" in caplog.text
    assert [entry.name for entry in small_disk.iterdir()] == ["hog"]
    hog.unlink()
    assert one.save("h", state, PROMISES)
    assert journal(path, clock).load().promises == PROMISES


def test_nothing_is_left_behind(tmp_path, clock, state):
    """A hub that nobody needs any more takes its journal away, and may do so twice."""
    path = tmp_path / "j"
    one = journal(path, clock)
    one.save("h", state, [])
    path.with_name("j.new").write_bytes(b"half")
    one.remove()
    one.remove()
    assert list(tmp_path.iterdir()) == []


def test_this_start_of_the_machine_has_a_name(tmp_path):
    """The kernel names it; where it does not, it has none."""
    (tmp_path / "sys/kernel/random").mkdir(parents=True)
    (tmp_path / "sys/kernel/random/boot_id").write_text("12-34\n")
    assert boot_id(str(tmp_path)) == "12-34"
    assert boot_id(str(tmp_path / "none")) == ""
    assert Journal(None)._now() <= time.monotonic_ns()
