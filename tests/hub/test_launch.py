"""Starting a shared hub: nobody's child, with an environment of its own, one per socket, gone when nobody needs it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from melodi_otel.hub import launch
from melodi_otel.hub.asking import read_status
from melodi_otel.hub.client import HubLost
from melodi_otel.hub.sockets import ConnectRefused, connect
from melodi_otel.testing.powercap import FakePowercap


def test_its_environment() -> None:
    """It sees the whole machine, is instrumented by nobody, records nothing, and belongs to no group of programs."""
    found = launch._environment(
        {
            "PATH": "/bin",
            "CUDA_VISIBLE_DEVICES": "1",
            "ROCR_VISIBLE_DEVICES": "1",
            "MELODI_HUB": "shared",
            "MELODI_RECORD": "t.jsonl",
            "MELODI_ENGINE_DEVICES": "GPU-1",
            "MELODI_GROUP_TOKEN": "abc-1",
            "MELODI_SPAN_WAIT": "2",
            "OTEL_SERVICE_NAME": "llama",
            "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317",
            "NOTIFY_SOCKET": "/run/notify",
            "PYTHONPATH": os.pathsep.join(
                ["/x/opentelemetry/instrumentation/auto_instrumentation", str(launch._STARTUP), "/mine"]
            ),
        }
    )
    paths = found.pop("PYTHONPATH").split(os.pathsep)
    assert paths[-1] == "/mine"
    assert set(paths[:-1]) <= {str(launch._PACKAGE.parent)}
    assert found == {
        "PATH": "/bin",
        "MELODI_SPAN_WAIT": "2",
        "OTEL_SERVICE_NAME": "melodi-otel-hub",
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4317",
    }


@pytest.mark.parametrize("executable", ["", "/usr/bin/uwsgi", None])
def test_a_program_that_is_no_python(executable: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding program is not started a second time by mistake; the reason names it."""
    monkeypatch.setattr(sys, "executable", executable)
    with pytest.raises(HubLost, match="is no Python that could run a hub"):
        launch.start(Path("/nowhere/hub.sock"), {})


def test_a_python_that_fails(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that ends at once with an error is told at once: nobody waits for its hub."""
    broken = place / "python3"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    with pytest.raises(HubLost, match="python3 ended with 3"):
        launch.start(place / "hub.sock", {"PATH": os.environ["PATH"]})


@pytest.fixture
def environ(place: Path, tmp_path: Path) -> dict[str, str]:
    """Of a hub with one package, that ends half a second after its last program."""
    tree = FakePowercap(tmp_path / "sys")
    tree.package(0, watts=50.0)
    (place / "run").mkdir(mode=0o700)
    return {
        "PATH": os.environ["PATH"],
        "MELODI_SYSFS_ROOT": str(tree.root),
        "MELODI_SOURCES": "rapl",
        "MELODI_METRICS_ADDR": "off",
        "MELODI_HUB_LINGER": "0.5",
    }


@pytest.fixture
def hub(place: Path) -> Iterator[Callable[[], int]]:
    """The pid of the hub that holds the lock in ``place``; whoever is left there is ended."""
    lock = place / "run" / "hub.sock.lock"

    def pid() -> int:
        return int(lock.read_text() or 0) if lock.exists() else 0

    yield pid
    if found := pid():
        try:
            os.kill(found, signal.SIGKILL)
        except ProcessLookupError:
            return
        until(lambda: not Path(f"/proc/{found}").exists())


def until(true: Callable[[], Any], seconds: float = 60.0) -> None:
    """Wait for another process."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def listens(path: Path) -> bool:
    """Whether somebody does."""
    try:
        connect(path, 1.0).close()
    except ConnectRefused:
        return False
    return True


@pytest.mark.e2e
def test_two_starts_leave_one_hub_and_it_goes(place: Path, environ: dict[str, str], hub: Callable[[], int]) -> None:
    """Started twice at once: one serves, is nobody's child, leads a session of its own; without programs it leaves nothing."""
    path = place / "run" / "hub.sock"
    before = set(psutil.Process().children())
    threads = [
        threading.Thread(target=launch.start, args=(path, {**environ, "MELODI_HUB_LINGER": "5"})) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(psutil.Process().children()) <= before
    until(lambda: listens(path))
    status = read_status(path)
    assert [device["id"] for device in status["devices"]] == ["intel-rapl:0"]
    pid = hub()
    # pid (comm) state ppid pgrp session
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    assert (fields[1] == str(os.getpid()), fields[3]) == (False, str(pid))
    until(lambda: not Path(f"/proc/{pid}").exists())
    assert not listens(path)
    assert sorted(found.name for found in path.parent.iterdir()) == ["hub.sock.lock", "hub.sock.log"]
    log = (path.parent / "hub.sock.log").read_text()
    assert log.count("a shared hub serves at") == 1
    assert "this hub ends" in log


@pytest.mark.e2e
def test_a_program_sees_no_unknown_child(
    place: Path, environ: dict[str, str], hub: Callable[[], int], program: Callable[..., str]
) -> None:
    """One short-lived child ends; none is left to wait for; signals that the asking thread blocks reach the hub."""
    code = """
import json, os, signal, sys
from pathlib import Path
from melodi_otel.hub import launch
ended = []
signal.signal(signal.SIGCHLD, lambda *_: ended.append(1))
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
launch.start(Path(sys.argv[1]), json.loads(sys.argv[2]))
try:
    left = os.waitpid(-1, os.WNOHANG)
except ChildProcessError:
    left = None
print(len(ended), left)
"""
    import json

    path = place / "run" / "hub.sock"
    assert program(code, path, json.dumps({**environ, "MELODI_HUB_LINGER": "60"})).split() == ["1", "None"]
    until(lambda: listens(path))
    pid = hub()
    os.kill(pid, signal.SIGTERM)
    until(lambda: not Path(f"/proc/{pid}").exists())
