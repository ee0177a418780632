from __future__ import annotations

import logging
import os
import signal
import threading

import pytest

from melodi_otel.config import Config
from melodi_otel.errors import ConfigError, HubError
from melodi_otel.hub.daemon import Daemon


class Work:
    """A hub without meters: it waits until it is asked to stop."""

    endpoint_url = "http://127.0.0.1:9464/metrics"

    def __init__(self):
        self.log = []
        self.why = None
        self.stopped = threading.Event()
        self.while_waiting = lambda: None
        self.on_close = lambda: None

    def start(self):
        self.log.append("start")

    def wait(self):
        self.while_waiting()
        assert self.stopped.wait(30)

    def request_stop(self):
        self.log.append("stop")
        self.stopped.set()

    def reload(self, config):
        self.log.append(config)
        return ["pue is 1.2"]

    def close(self, timeout):
        self.log.append(f"close {timeout:g}")
        self.on_close()

    def ready(self):
        if isinstance(self.why, Exception):
            raise self.why
        return self.why


class Manager:
    watchdog_s = None

    def __init__(self):
        self.log = []

    def __getattr__(self, name):
        return lambda *words: self.log.append((name, *words))


@pytest.fixture
def work():
    return Work()


@pytest.fixture
def manager():
    return Manager()


@pytest.fixture
def daemon(work, manager):
    """Without a pulse of its own accord: a test beats."""
    return Daemon(work, manager, lambda: (Config(pue=1.2), ()), "about", leave=work.log.append, close_s=10.0)


STATUS = "about, metrics at http://127.0.0.1:9464/metrics"


def signals():
    return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it(daemon, work, manager, number):
    """Started, stopped, closed within 10 s, exit code 0; the handlers are as before."""
    before = signals()
    work.while_waiting = lambda: os.kill(os.getpid(), number)
    assert daemon.run() == 0
    assert work.log == ["start", "stop", "close 10"]
    assert manager.log[-1] == ("stopping", "settling what is under way")
    assert signals() == before


def test_a_second_signal_ends_it_at_once(daemon, work):
    """While it settles, another signal leaves with that signal's code."""
    work.while_waiting = lambda: [os.kill(os.getpid(), signal.SIGTERM) for _ in range(2)]
    daemon.run()
    assert work.log.count(143) == 1


def test_a_signal_calls_nothing_of_the_hub(daemon, work):
    """Not in the handler, where a lock that the main thread holds would never be free."""
    threads = []
    work.request_stop = lambda: (threads.append(threading.current_thread().name), work.stopped.set())
    work.while_waiting = lambda: os.kill(os.getpid(), signal.SIGTERM)
    assert daemon.run() == 0
    assert threads == ["melodi-otel-stop"]


def test_a_reload_that_hangs_does_not_keep_it(daemon, work, manager):
    """A signal stops it although the pulse is stuck; what hangs is left behind after its time."""
    hang, hung = threading.Event(), threading.Event()
    work.reload = lambda config: (hung.set(), hang.wait(30), [])[2]
    daemon._close_s = 0.05

    def stop():
        os.kill(os.getpid(), signal.SIGHUP)
        assert hung.wait(30)
        os.kill(os.getpid(), signal.SIGTERM)

    work.while_waiting = stop
    try:
        assert daemon.run() == 0
    finally:
        hang.set()


def test_a_signal_while_it_starts(daemon, work):
    """It is not lost: the hub stops as soon as it waits."""
    started = work.start
    work.start = lambda: (started(), os.kill(os.getpid(), signal.SIGTERM))
    assert daemon.run() == 0
    assert work.log == ["start", "stop", "close 10"]


def test_it_ends_in_time(work, manager, caplog):
    """A close that hangs is given up: exit code 1, and the log says what is lost."""
    hang = threading.Event()
    work.on_close = hang.wait
    work.stopped.set()
    daemon = Daemon(work, manager, lambda: (Config(), ()), leave=work.log.append, close_s=0.01)
    try:
        assert daemon.run() == 1
        assert work.log[-1] == 1
        assert "did not end within 0.01 s; joules that were not settled are lost" in caplog.text
    finally:
        hang.set()


def test_a_close_that_fails(daemon, work, caplog):
    """The reason is in the log; what could be done was done."""

    def fail():
        raise OSError("disk full")

    work.on_close = fail
    work.stopped.set()
    assert daemon.run() == 0
    assert "it did not end well: disk full" in caplog.text


def test_a_start_that_fails(daemon, work, manager):
    """The error is the caller's, what was opened is closed, and nobody was told that it is ready."""
    before = signals()

    def fail():
        raise HubError("no")

    work.start = fail
    with pytest.raises(HubError, match="no"):
        daemon.run()
    assert (work.log, manager.log) == (["close 10"], [])
    assert signals() == before


def test_ready_is_told_once(daemon, work, manager):
    """Not before it works; afterwards only what changes, and that it is alive."""
    work.why = "meters are looked for"
    daemon.beat()
    daemon.beat()
    work.why = None
    daemon.beat()
    daemon.beat()
    work.why = "no reading for 5 s"
    daemon.beat()
    work.why = None
    daemon.beat()
    assert manager.log == [
        ("status", "not ready: meters are looked for"),
        ("alive",),
        ("alive",),
        ("ready", STATUS),
        ("alive",),
        ("alive",),
        ("status", "not ready: no reading for 5 s"),
        ("alive",),
        ("status", STATUS),
        ("alive",),
    ]


def test_a_hub_that_cannot_say_how_it_is(daemon, work, manager, caplog):
    """It is not said to be alive, so the manager starts it again; the log has the reason once."""
    work.why = RuntimeError("books broken")
    daemon.beat()
    daemon.beat()
    assert manager.log == []
    assert caplog.text.count("the hub cannot say how it is") == 1


def test_without_a_page(daemon, work, manager):
    """Said as it is."""
    work.endpoint_url = None
    daemon.beat()
    assert manager.log[0] == ("ready", "about, no metrics page")


def test_reload(work, manager, caplog):
    """New settings are taken over, what changed is said, and what waits for a restart."""
    daemon = Daemon(work, manager, lambda: (Config(pue=1.2), ("MELODI_SAMPLE_HZ",)), "about")
    with caplog.at_level(logging.INFO, "melodi_otel"):
        daemon.reload()
    assert work.log == [Config(pue=1.2)]
    assert manager.log == [("reloading",), ("ready", STATUS)]
    assert [record.getMessage() for record in caplog.records] == [
        "reloaded: pue is 1.2",
        "these take effect after a restart: MELODI_SAMPLE_HZ",
    ]


def test_a_reload_of_bad_settings(work, manager, caplog):
    """They change nothing, and the hub goes on."""

    def bad():
        raise ConfigError("MELODI_PUE='x' cannot be used")

    Daemon(work, manager, bad).reload()
    assert work.log == []
    assert [name for name, *_ in manager.log] == ["reloading", "ready"]
    assert "not reloaded, the settings stay as they were: MELODI_PUE='x' cannot be used" in caplog.text


def test_sighup_reloads(daemon, work):
    """Not in the signal handler, which may interrupt anything, but on the pulse's thread."""
    reloaded = threading.Event()
    threads = []
    work.reload = lambda config: (threads.append(threading.current_thread().name), reloaded.set(), [])[2]

    def hang_up():
        os.kill(os.getpid(), signal.SIGHUP)
        assert reloaded.wait(30)
        work.stopped.set()

    work.while_waiting = hang_up
    assert daemon.run() == 0
    assert threads == ["melodi-otel-pulse"]
