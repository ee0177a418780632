from __future__ import annotations

import json
import logging
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

import melodi_otel
from melodi_otel.cli import agent as command
from melodi_otel.cli.agent import Options, Priorities, serve
from melodi_otel.cli.app import app
from melodi_otel.errors import ConfigError, HubBusy, HubError
from melodi_otel.hub.sockets import attempt, listen

ROOT = Path(melodi_otel.__file__).parent.parent
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root")
pytestmark = pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="no Unix sockets")


class Stand:
    """Stands in for the work of the agent, and remembers what it was given."""

    made = []
    endpoint_url = "http://127.0.0.1:9464/metrics"

    def __init__(self, config, environ, listener, *, mode, journal):
        self.config, self.environ, self.listener, self.mode, self.journal = config, environ, listener, mode, journal
        self.log = []
        self.while_waiting = lambda: None
        Stand.made.append(self)

    def start(self):
        self.log.append("start")

    def wait(self):
        self.while_waiting()

    def request_stop(self):
        self.log.append("stop")

    def reload(self, config):
        self.log.append(config)
        return []

    def close(self, timeout):
        self.log.append("close")

    def ready(self):
        return None


@pytest.fixture
def place(monkeypatch):
    monkeypatch.setattr(Stand, "made", [])
    path = Path(tempfile.mkdtemp(prefix="hub", dir="/tmp"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def serving(place):
    """Serves in this process, which therefore keeps its privileges; the stand-in it made."""

    def run(environ=None, **options):
        options = {"socket": place / "s", "keep_capabilities": True, "socket_group": str_group()} | options
        assert serve(Options(**options), {} if environ is None else environ, Stand) == 0
        return Stand.made[-1]

    return run


def str_group():
    import grp

    return grp.getgrgid(os.getegid()).gr_name


def test_what_the_work_is_given(serving, place):
    """The socket that listens, the settings, the mode, and a journal beside the socket; at the end the socket is gone."""
    work = serving({"MELODI_PUE": "1.2", "MELODI_SOURCES": "rapl"})
    assert (work.mode, work.journal) == ("agent", place / "s.journal")
    assert (work.config.pue, work.config.sources) == (1.2, ("rapl",))
    assert work.log == ["start", "close"]
    assert not (place / "s").exists()
    assert serving(journal=place / "j").journal == place / "j"


def test_the_socket_is_there_before_the_work(serving, place, monkeypatch):
    """Its mode is the option's when the work is made, and programs may connect already."""
    seen = []
    made = Stand.__init__

    def making(self, config, environ, listener, **more):
        seen.append((stat.S_IMODE((place / "s").lstat().st_mode), attempt(place / "s").state))
        made(self, config, environ, listener, **more)

    monkeypatch.setattr(Stand, "__init__", making)
    serving(socket_mode="0600")
    assert seen == [(0o600, "ok")]


@pytest.mark.parametrize(
    ("option", "environ", "address"),
    [
        (None, {}, None),
        (None, {"MELODI_METRICS_ADDR": "h:1"}, "h:1"),
        (None, {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "0.0.0.0:9464"),
        (None, {"KUBERNETES_SERVICE_HOST": "fd00::1"}, "[::]:9464"),
        (None, {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "MELODI_METRICS_ADDR": "off"}, "off"),
        ("off", {"MELODI_METRICS_ADDR": "h:1"}, "off"),
        ("127.0.0.1:0", {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, "127.0.0.1:0"),
    ],
)
def test_where_metrics_are_served(serving, option, environ, address):
    """The option, else the variable, else all interfaces in a pod, else the hub's own default."""
    assert serving(environ, metrics_addr=option).config.metrics_addr == address


def test_a_pod_says_where_it_serves(serving, caplog):
    """All interfaces is never silent."""
    with caplog.at_level(logging.INFO, "melodi_otel"):
        serving({"KUBERNETES_SERVICE_HOST": "10.0.0.1"})
    assert "this is a pod: metrics are served on 0.0.0.0:9464 (--metrics-addr changes that)" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"socket_mode": "rw"}, "--socket-mode 'rw' cannot be used: allowed is an octal mode from 0600 to 0777"),
        ({"socket_mode": "0440"}, "--socket-mode '0440' cannot be used"),
        ({"socket_mode": "07777"}, "--socket-mode '07777' cannot be used"),
        ({"metrics_addr": "9464"}, "--metrics-addr '9464' cannot be used: allowed is HOST:PORT or off"),
        ({"user": "nobody"}, "--user and --keep-capabilities cannot be used together"),
        ({"user": "no-such-user", "keep_capabilities": False}, "there is no such user; to make one: useradd --system"),
        ({"user": "root", "keep_capabilities": False}, "as root it would give nothing up"),
        ({"env_file": Path("/none")}, "--env-file /none cannot be read"),
    ],
)
def test_options_that_cannot_be_used(serving, place, options, words):
    """Each is named with what is allowed, before anything is made."""
    with pytest.raises(ConfigError, match=re.escape(words)):
        serving(**options)
    assert list(place.iterdir()) == []


def test_a_disabled_agent(serving):
    """MELODI_DISABLED and an agent contradict each other."""
    with pytest.raises(ConfigError, match="MELODI_DISABLED is set"):
        serving({"MELODI_DISABLED": "1"})


def test_the_file_wins_over_the_environment(serving, place):
    """Its variables count, and reach the exporters of this process too."""
    (place / "env").write_text("MELODI_PUE=1.3\nOTEL_EXPORTER_OTLP_ENDPOINT=http://c:4318\n")
    environ = {"MELODI_PUE": "1.2"}
    work = serving(environ, env_file=place / "env")
    assert work.config.pue == work.config.from_env(work.environ).pue == 1.3
    assert environ == {"MELODI_PUE": "1.3", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}


def test_reload_reads_the_file_again(place, monkeypatch, caplog):
    """SIGHUP: what may change does, what may not is named, a line that is gone gives the environment its word again."""
    (place / "env").write_text("MELODI_PUE=1.3\nMELODI_SAMPLE_HZ=5\n")
    options = Options(socket=place / "s", keep_capabilities=True, env_file=place / "env", metrics_addr="off")
    settings = command._Settings(options, {"MELODI_PUE": "1.2"})
    (place / "env").write_text("MELODI_ENERGY_PRICE=0.3\nOTEL_EXPORTER_OTLP_HEADERS=secret\n")
    config, restart = settings.reread()
    assert (config.pue, config.energy_price, config.sample_hz, config.metrics_addr) == (1.2, 0.3, 5.0, "off")
    assert restart == ("MELODI_SAMPLE_HZ", "OTEL_EXPORTER_OTLP_HEADERS")
    assert settings.environ == {
        "MELODI_PUE": "1.2",
        "MELODI_ENERGY_PRICE": "0.3",
        "OTEL_EXPORTER_OTLP_HEADERS": "secret",
    }


def test_a_bad_file_changes_nothing(place):
    """Neither the settings nor the environment that the work sees."""
    (place / "env").write_text("MELODI_PUE=1.3\n")
    settings = command._Settings(Options(env_file=place / "env"), {})
    (place / "env").write_text("MELODI_PUE=0\n")
    with pytest.raises(ConfigError, match="MELODI_PUE='0' cannot be used"):
        settings.reread()
    assert (settings.config.pue, settings.environ) == (1.3, {"MELODI_PUE": "1.3"})


def test_without_a_group(serving, place, monkeypatch, caplog):
    """No group melodi: the log says who may connect, and the command that lets others in."""
    import grp

    monkeypatch.setattr(grp, "getgrnam", lambda name: (_ for _ in ()).throw(KeyError(name)))
    serving(socket_group=None)
    assert re.search(r"there is no group melodi, so only (root|user \S+ and root) may connect", caplog.text)
    assert "groupadd --system melodi" in caplog.text
    caplog.clear()
    serving(socket_group=None, socket_mode="0666")
    assert "no group" not in caplog.text


@as_root
def test_the_group_melodi_is_the_default(serving, place, monkeypatch):
    """Where it exists the socket is its."""
    import grp

    real = grp.getgrnam
    monkeypatch.setattr(
        grp, "getgrnam", lambda name: grp.struct_group(("melodi", "x", 65534, [])) if name == "melodi" else real(name)
    )
    seen = []
    monkeypatch.setattr(Stand, "start", lambda self: seen.append((place / "s").lstat().st_gid))
    serving(socket_group=None)
    assert seen == [65534]


def test_the_command_when_the_socket_is_taken(place):
    """Exit 3 and the pid of the other agent."""
    with listen(place / "s", mode=0o600):
        code = "import sys; from melodi_otel.cli.app import main; sys.argv[0] = 'melodi-otel'; main()"
        words = (
            "agent",
            "--socket",
            place / "s",
            "--socket-mode",
            "600",
            "--keep-capabilities",
            "--metrics-addr",
            "off",
        )
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, words)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 3
    assert f"melodi-otel: the socket {place}/s is taken: process {os.getpid()} is the hub there" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (HubBusy("b"), 3),
        (HubError("p", state="bad_path"), 2),
        (HubError("d", state="not_dropped"), 1),
        (ConfigError("c"), 2),
    ],
)
def test_exit_codes(monkeypatch, error, code):
    """Each kind of failure has its code, and its message goes to standard error."""

    def fail(*_):
        raise error

    monkeypatch.setattr(command, "serve", fail)
    result = CliRunner().invoke(app, ["agent"])
    assert result.exit_code == code
    assert f"melodi-otel: {error}" in result.stderr


def test_options_reach_the_work(monkeypatch):
    """The command line is Options, field by field."""
    seen = []
    monkeypatch.setattr(command, "serve", lambda options, environ: seen.append(options) or 0)
    words = "--socket /s --socket-group g --socket-mode 600 --metrics-addr off --user u --journal /j --env-file /e"
    assert CliRunner().invoke(app, ["agent", *words.split()]).exit_code == 0
    assert CliRunner().invoke(app, ["agent", "--keep-capabilities"]).exit_code == 0
    paths = {"socket": Path("/s"), "journal": Path("/j"), "env_file": Path("/e")}
    assert seen == [
        Options(socket_group="g", socket_mode="600", metrics_addr="off", user="u", **paths),
        Options(keep_capabilities=True),
    ]


def test_the_hosts_socket_is_roots(monkeypatch):
    """Anybody else is told how to name one of his own."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(HubError, match="start it with sudo, or name a socket of your own with --socket PATH"):
        serve(Options(keep_capabilities=True), {}, Stand)


def test_priorities():
    """Every line of a record carries its priority."""
    record = logging.LogRecord("melodi_otel", logging.WARNING, "", 0, "a\nb", (), None)
    assert Priorities("%(name)s: %(message)s").format(record) == "<4>melodi_otel: a\n<4>b"


def test_the_journal_is_recognised(tmp_path, monkeypatch):
    """Only where standard error is the stream that the variable names; it may be inherited by others."""
    found = os.fstat(2)
    assert command._journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
    assert not command._journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino + 1}"})
    assert not command._journal({})


PROGRAM = """
import json, os, sys, threading
from pathlib import Path
from melodi_otel.cli.agent import Options, _lines, serve
import logging

class Work:
    endpoint_url = None
    def __init__(self, config, environ, listener, *, mode, journal):
        self.stopped, self.journal, self.listener = threading.Event(), journal, listener
    def start(self):
        self.listener.listen(100)  # as servers do, which knew nothing of the listener before
        status = dict(line.split(":", 1) for line in open("/proc/self/status"))
        self.journal.write_text("books")
        told = {name: status[name].strip() for name in ("CapEff", "CapBnd", "NoNewPrivs")}
        print(json.dumps(told | {"uid": os.geteuid(), "pid": os.getpid()}), flush=True)
    def wait(self): self.stopped.wait()
    def request_stop(self): self.stopped.set()
    def reload(self, config): print(json.dumps({"pue": config.pue}), flush=True); return ["pue"]
    def close(self, timeout): pass
    def ready(self): return None

logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
with _lines(os.environ):
    options = Options(Path(sys.argv[1]), sys.argv[2], user=sys.argv[3] or None, env_file=Path(sys.argv[4]))
    sys.exit(serve(options, os.environ, Work))
"""


@as_root
@pytest.mark.skipif(sys.platform != "linux", reason="capabilities and systemd are Linux's")
@pytest.mark.parametrize(("user", "uid"), [("", 0), ("nobody", 65534)])
def test_the_whole_life(place, user, uid):
    """Bound as root, dropped before the work starts, ready, reloaded, stopped: as systemd and programs see it."""
    manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    manager.bind(str(place / "n"))
    (place / "n").chmod(0o777)
    manager.settimeout(30)
    (place / "env").write_text("MELODI_PUE=1.1\n")
    environ = {**os.environ, "NOTIFY_SOCKET": str(place / "n"), "WATCHDOG_USEC": "60000000"}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(place / "run" / "hub.sock"), "mail", user, str(place / "env")],
        cwd=ROOT, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        told = json.loads(process.stdout.readline())
        two = f"{1 << 2 | 1 << 38:016x}"
        assert told == {"CapEff": two, "CapBnd": two, "NoNewPrivs": "1", "uid": uid, "pid": process.pid}
        assert manager.recv(4096).decode().startswith(f"READY=1\nSTATUS=programs connect to {place}/run/hub.sock")
        assert manager.recv(4096) == b"WATCHDOG=1"
        # Whoever it has become, it listened as root: every program trusts it.
        answer = attempt(place / "run" / "hub.sock")
        assert (answer.state, answer.peer.uid, answer.peer.pid) == ("ok", 0, process.pid)
        assert (place / "run" / "hub.sock.journal").stat().st_uid == uid
        (place / "env").write_text("MELODI_PUE=1.2\n")
        process.send_signal(signal.SIGHUP)
        assert json.loads(process.stdout.readline()) == {"pue": 1.2}
        assert manager.recv(4096).startswith(b"RELOADING=1\nMONOTONIC_USEC=")
        assert manager.recv(4096).startswith(b"READY=1")
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
        manager.close()
    assert process.returncode == 0, errors
    assert f"privileges: uid {uid}, gid {uid}, CAP_DAC_READ_SEARCH, CAP_PERFMON, nothing more" in errors
    assert not (place / "run" / "hub.sock").exists()
