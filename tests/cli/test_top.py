from __future__ import annotations

import io
import json
import os
import re
import socket

import pytest
from prometheus_client import CollectorRegistry
from rich.console import Console
from typer.testing import CliRunner

from melodi_otel.cli import top as command
from melodi_otel.cli.app import app
from melodi_otel.cli.top_places import Access, NoStatus, Place, by_http, first, http_places
from melodi_otel.cli.top_view import amount, span, view
from melodi_otel.telemetry.guard import Guard
from melodi_otel.telemetry.http import serve
from melodi_otel.testing.clock import ManualClock

GPU = {
    "id": "GPU-1",
    "type": "gpu",
    "name": "NVIDIA H100 80GB HBM3",
    "index": 0,
    "watts": 312.5,
    "joules": 1_234_567.0,
    "sample_age_seconds": 0.2,
    "up": True,
    "estimated": False,
}
CPU = {**GPU, "id": "intel-rapl:0", "type": "cpu", "name": None, "index": None, "watts": None, "joules": None}
REQUEST = {
    "name": "chat m",
    "model": "m",
    "service": "web",
    "operation": "chat",
    "age_seconds": 3.25,
    "joules": 50.0,
    "output_tokens": 20,
    "quality": "measured",
}
BOOK = {
    "device": "GPU-1",
    "measured_joules": 100.0,
    "attributed_joules": 50.0,
    "in_flight_joules": 0.0,
    "idle_joules": 25.0,
    "tail_joules": 0.0,
    "loading_joules": 0.0,
    "foreign_joules": 26.0,
    "unsampled_joules": 0.0,
    "residual_joules": -1.0,
    "imbalance_ratio": 0.0,
}
STATUS = {
    "schema": 1,
    "host_id": "h1",
    "version": "9.9",
    "mode": "agent",
    "time_unix_seconds": 1000.0,
    "uptime_seconds": 3725.0,
    "devices": [GPU, CPU],
    "requests_open": 1,
    "requests": [REQUEST],
    "models": [
        {
            "model": "m",
            "requests": 7,
            "output_tokens": 1000,
            "joules": 2500.0,
            "joules_per_output_token": 2.5,
            "estimated": False,
        }
    ],
    "books": [BOOK],
    "health": {
        "refusals": [{"source": "rapl", "state": "permission_denied", "reason": "root only", "fix": "chmod a+r x"}],
        "sampler": {"rounds": 1200, "failures": 0, "seconds": 1.0, "cpu_seconds": 3.725, "joules": None},
        "hub": None,
        "publisher": True,
        "spans_waiting": 2,
    },
}


def text(status, width=120, **more):
    screen = Console(file=io.StringIO(), width=width, no_color=True)
    screen.print(view(status, width, **more))
    return screen.file.getvalue()


@pytest.fixture
def endpoint():
    made = serve("127.0.0.1:0", CollectorRegistry(), status=lambda: STATUS)
    yield made
    made.close()


def invoke(*words, stdin="", **env):
    return CliRunner().invoke(app, ["top", *words], input=stdin, env=env)


def free_port():
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        return holder.getsockname()[1]


# --- the command ------------------------------------------------------------------------------------------------------


def test_once_json_is_the_status(endpoint):
    """--once --json prints what the meter tells, one object and nothing else."""
    result = invoke("--once", "--json", "--url", f"http://127.0.0.1:{endpoint.port}")
    assert result.exit_code == 0
    assert json.loads(result.stdout) == STATUS


def test_a_pipe_gets_it_once(endpoint):
    """Without a terminal it shows the status once and ends, without control characters."""
    result = invoke(MELODI_METRICS_ADDR=f"127.0.0.1:{endpoint.port}")
    assert result.exit_code == 0
    assert "NVIDIA H100 80GB HBM3" in result.stdout
    assert "\x1b" not in result.stdout


def test_nothing_answers(monkeypatch):
    """Exit 1, where was looked, and what to start."""
    port = free_port()
    result = invoke("--once", MELODI_METRICS_ADDR=f"127.0.0.1:{port}")
    assert result.exit_code == 1
    assert f"nothing answers at http://127.0.0.1:{port}" in result.stderr
    assert "MELODI_METRICS_ADDR=127.0.0.1:9464 melodi-otel run -- " in result.stderr
    assert result.stdout == ""


def test_a_bad_url():
    """What is no URL of a meter is refused with one that is."""
    result = invoke("--url", "ftp://x")
    assert result.exit_code == 1
    assert "'ftp://x' is no URL of a meter" in result.stderr


def test_a_hub_is_asked_first(monkeypatch):
    """Finders that were added come before HTTP."""
    monkeypatch.setattr(command, "FINDERS", [lambda environ: [Place("the hub", lambda: {**STATUS, "mode": "shared"})]])
    assert json.loads(invoke("--once", "--json").stdout)["mode"] == "shared"


def test_user_and_password(tmp_path):
    """--user takes the password from standard input; without it the message names the option."""
    security = pytest.importorskip("werkzeug.security")
    from melodi_otel.telemetry.passwords import Passwords

    users = tmp_path / "users"
    users.write_text("ann:" + security.generate_password_hash("right", method="pbkdf2:sha256:1"))
    made = serve("127.0.0.1:0", CollectorRegistry(), status=lambda: STATUS, guard=Guard(None, Passwords(str(users))))
    url = f"http://127.0.0.1:{made.port}"
    denied, allowed = invoke("--once", "--url", url), invoke("--once", "--url", url, "--user", "ann", stdin="right\n")
    made.close()
    assert denied.exit_code == 1
    assert "it asks for a user and a password: --user NAME" in denied.stderr
    assert allowed.exit_code == 0


def test_https(tmp_path):
    """--cafile names the CA, --cert our own certificate; what is missing is said by its option."""
    trustme = pytest.importorskip("trustme")
    from melodi_otel.telemetry.tls import Tls

    ca, both, cafile, mine = trustme.CA(), tmp_path / "tls.pem", str(tmp_path / "ca.pem"), tmp_path / "mine.pem"
    ca.cert_pem.write_to_path(cafile)
    ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(both))
    ca.issue_cert("me@example").private_key_and_cert_chain_pem.write_to_path(str(mine))
    made = serve("127.0.0.1:0", CollectorRegistry(), status=lambda: STATUS, guard=Guard(Tls(str(both), None, cafile)))
    url = ("--once", "--url", f"https://127.0.0.1:{made.port}")
    stranger, nameless = invoke(*url), invoke(*url, "--cafile", cafile)
    known = invoke(*url, "--cafile", cafile, "--cert", str(mine))
    made.close()
    assert "its certificate is not trusted" in stranger.stderr
    assert "--cafile FILE names its CA" in stranger.stderr
    assert "it asks for a client certificate: --cert FILE" in nameless.stderr
    assert (stranger.exit_code, nameless.exit_code, known.exit_code) == (1, 1, 0)


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "names"),
    [
        ({}, [f"http://127.0.0.1:{port}" for port in range(9464, 9474)]),
        ({"MELODI_METRICS_ADDR": "10.0.0.1:9000"}, ["http://10.0.0.1:9000"]),
        ({"MELODI_METRICS_ADDR": "0.0.0.0:9000"}, ["http://127.0.0.1:9000"]),
        ({"MELODI_METRICS_ADDR": "[::]:9000"}, ["http://[::1]:9000"]),
        ({"MELODI_METRICS_ADDR": "localhost:9", "MELODI_METRICS_TLS_CERT": "x"}, ["https://localhost:9"]),
        ({"MELODI_METRICS_ADDR": "off"}, []),
    ],
)
def test_where_it_looks(environ, names):
    """Where the environment says, on this machine where that is everywhere, else at the default ports."""
    assert [place.name for place in http_places(environ)] == names


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("127.0.0.1:9464", "http://127.0.0.1:9464"),
        ("http://h", "http://h:9464"),
        ("https://h", "https://h:443"),
        ("http://[::1]:9470/metrics", "http://[::1]:9470"),
        ("https://h/team/meter/", "https://h:443/team/meter"),
    ],
)
def test_urls(url, name):
    """A host is enough; any page of the endpoint stands for it, also below a path."""
    assert by_http(url).name == name


@pytest.mark.parametrize("url", ["ftp://h", "http://", "http://h:x", "http://h:70000"])
def test_bad_urls(url):
    """What cannot be asked is refused."""
    with pytest.raises(NoStatus, match="no URL of a meter"):
        by_http(url)


def test_a_password_in_a_url():
    """A password in the URL is refused, and not repeated."""
    with pytest.raises(NoStatus, match="--user NAME") as caught:
        by_http("http://ann:s3cret@h")
    assert "s3cret" not in str(caught.value)


def test_the_first_that_answers():
    """Places are asked in their order, and the first status counts."""

    def absent():
        raise NoStatus("x", absent=True)

    def broken():
        raise FileNotFoundError(2, "No such file or directory")

    places = [Place("a", absent), Place("b", broken), Place("c", lambda: {"schema": 1})]
    place, status = first(places)
    assert (place.name, status) == ("c", {"schema": 1})
    with pytest.raises(NoStatus) as caught:
        first(places[:2])
    assert "  nothing answers at a\n" in str(caught.value)
    assert "  b: No such file or directory\n" in str(caught.value)


def test_many_silent_places_are_one_line():
    """Ten ports where nothing listens are told as one."""

    def absent():
        raise NoStatus("x", absent=True)

    with pytest.raises(NoStatus, match=r"nothing answers at http://127.0.0.1:9464 … 9473 \(10 places\)"):
        first([Place(place.name, absent) for place in http_places({})])


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (lambda: {"no": "schema"}, None, "no status of a meter"),
        (None, None, "it has no status.json"),
    ],
)
def test_what_is_no_meter(status, body, message):
    """Another server on the port is told from a meter."""
    made = serve("127.0.0.1:0", CollectorRegistry(), status=status)
    with pytest.raises(NoStatus, match=message):
        by_http(made.url).read()
    made.close()


def test_a_ca_file_that_is_not_there():
    """A file of the command line that cannot be read is named by its option."""
    with pytest.raises(NoStatus, match="--cafile /absent cannot be used"):
        by_http("https://127.0.0.1:9", Access(cafile="/absent")).read()


# --- the view ---------------------------------------------------------------------------------------------------------


def test_the_view():
    """Devices, requests, models, books and health stand there with their figures; what is not known is a dash."""
    lines = [line.rstrip() for line in text(STATUS).splitlines()]
    assert lines[0] == "melodi_otel 9.9  host h1 · agent · up 1 h 2 min"
    assert lines[1].split("   ") == [
        "312.5 W now, 1 of 2 devices",
        "1.23 MJ since the start (342.9 Wh)",
        "50.0 % to requests",
        "1 open",
        "2.50 J per output token",
    ]
    rows = [" ".join(line.split()) for line in lines]
    assert "GPU 0 NVIDIA H100 80GB HBM3 312.5 W 1.23 MJ 0.2 s ago measured" in rows
    assert "CPU intel-rapl:0 – – 0.2 s ago measured" in rows
    assert "m web 3.2 s 50.00 J 20 2.50 J measured" in rows
    assert "m 2.50 J 2,500 J 7 1,000" in rows
    assert "Health 1,200 readings 0 failed 0.10 % of a core 2 spans wait" in rows
    assert "rapl is not used: root only" in lines
    assert "  to repair: chmod a+r x" in lines


def test_a_bar_shows_the_parts():
    """A bar is full, and its blocks are in proportion to the joules; a negative residual is none of it."""
    (bar,) = [line.split()[-3] for line in text(STATUS).splitlines() if "100.0 J" in line]
    assert (bar.count("█"), bar.count("░"), bar.count("╳"), len(bar)) == (24, 12, 12, 48)


@pytest.mark.parametrize("width", [40, 60, 79, 80, 110, 200])
def test_every_width(width):
    """No line is wider than the terminal, and watts and joules are there however narrow it is."""
    long = {**REQUEST, "model": "organisation/" + "x" * 300, "name": None}
    shown = text({**STATUS, "requests": [long] * 3}, width)
    assert max(len(line) for line in shown.splitlines()) <= width
    assert "312.5 W" in shown
    assert "50.00 J" in shown


def test_estimated_is_told_at_every_width():
    """Estimated watts and joules are marked, also where there is no column for it."""
    guess = {**GPU, "id": "cpu-estimate", "type": "cpu", "index": None, "name": "Some CPU", "estimated": True}
    for width in (50, 120):
        (row,) = [
            line
            for line in text({**STATUS, "devices": [guess]}, width).splitlines()
            if "Some CPU" in line and "W" in line
        ]
        assert "≈ 312.5 W" in row
        assert "estimated" in row


def test_no_meter():
    """Without devices it says so, and why."""
    shown = text({**STATUS, "devices": [], "books": [], "requests": [], "requests_open": 0, "models": []})
    assert "No energy meter works here" in shown
    assert "No request is open." in shown
    assert "root only" in shown


def test_another_version():
    """A status with fields that are missing or new is shown as far as it is understood."""
    assert "melodi_otel" in text({"schema": 7, "devices": [{"type": "tpu", "new": 1}], "health": None, "books": "?"})


def test_a_name_with_markup_is_text():
    """A model called like a style stays what it is called."""
    assert "[bold]m[/bold]" in text({**STATUS, "requests": [{**REQUEST, "model": "[bold]m[/bold]", "name": None}]})


def test_a_low_terminal():
    """Compact, devices of a kind stand in one row with their sums, one that is silent apart, and one bar is for all."""
    gpus = [{**GPU, "id": f"GPU-{n}", "index": n, "watts": 100.0, "joules": 20_000.0} for n in range(4)]
    gpus[3] = {**gpus[3], "up": False}
    books = [{**BOOK, "device": f"GPU-{n}"} for n in range(4)]
    shown = text({**STATUS, "devices": gpus, "books": books}, compact=True)
    rows = [" ".join(line.split()) for line in shown.splitlines()]
    assert "GPU NVIDIA H100 80GB HBM3 3 of them 300.0 W 60.00 kJ 0.2 s ago measured" in rows
    assert "GPU 3 NVIDIA H100 80GB HBM3 100.0 W 20.00 kJ 0.2 s ago no answer" in rows
    assert [row[-7:] for row in rows if row.startswith("all devices")] == ["400.0 J"]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "–"),
        (0.0, "0 J"),
        (0.0123, "12.30 mJ"),
        (0.5, "0.50 J"),
        (123.456, "123.5 J"),
        (9994.0, "9,994 J"),
        (9999.0, "10.00 kJ"),
        (-2.5, "-2.50 J"),
        (999_600.0, "1.00 MJ"),
        (3.6e9, "3.60 GJ"),
    ],
)
def test_amounts(value, shown):
    """A figure has about four digits; unknown is a dash and zero is zero."""
    assert amount(value, "J") == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(None, "–"), (0.04, "0.0 s"), (9.96, "10 s"), (59.6, "1 min 0 s"), (3725, "1 h 2 min"), (200000, "2 d 7 h")],
)
def test_times(seconds, shown):
    """A time is told in the unit that fits it."""
    assert span(seconds) == shown


# --- live -------------------------------------------------------------------------------------------------------------


class Watching:
    """A terminal, a clock, keys that come one per look, and a meter that answers or not."""

    def __init__(self, pressed, answers, height=60):
        self.clock = ManualClock()
        self.screen = Console(
            file=io.StringIO(), force_terminal=True, width=100, height=height, no_color=True, legacy_windows=False
        )
        self.pressed, self.answers, self.looks = list(pressed), list(answers), 0

    def wait(self, seconds):
        self.clock.advance(seconds)
        return self.pressed.pop(0)

    def look(self):
        self.looks += 1
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return Place("there", dict), answer

    def run(self, status=STATUS):
        seconds = lambda: self.clock.monotonic_ns() / 1e9
        command.live(self.screen, self.look, Place("here", dict), status, 2.0, self.wait, seconds)
        return self.screen.file.getvalue()


def test_q_leaves():
    """It draws until q is pressed, and leaves the terminal's other screen and the cursor as they were."""
    watching = Watching([None, "x", "q"], [STATUS, {**STATUS, "host_id": "h2"}])
    drawn = watching.run()
    assert watching.looks == 2
    assert "host h1" in drawn
    assert "host h2" in drawn
    assert drawn.count("\x1b[?1049h") == drawn.count("\x1b[?1049l") == 1
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l")


def test_a_meter_that_ends():
    """While nothing answers the last figures stay, marked with their age; when it is back the mark goes."""
    gone = NoStatus("gone")
    drawn = Watching([None, None, None, "q"], [gone, gone, STATUS]).run()
    assert "stale: no answer for 2 s; asked again every 2 s" in drawn
    assert "stale: no answer for 4 s; asked again every 2 s" in drawn
    assert "stale" not in drawn[drawn.rindex("melodi_otel") :]


@pytest.mark.parametrize(("height", "listed"), [(24, 3), (40, 19), (60, 39)])
def test_it_fits_the_screen(height, listed):
    """Requests get the lines that the rest leaves: the last line of the view is drawn, and as many requests as fit."""
    requests = [{**REQUEST, "model": f"model-{n}", "name": None} for n in range(80)]
    status = {**STATUS, "requests": requests, "requests_open": 80}
    drawn = Watching(["q"], [], height).run(status)
    assert "to repair: chmod a+r x" in drawn
    assert len(set(re.findall(r"model-\d+", drawn))) == listed
    assert f"… and {80 - listed} more" in drawn


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="this system has no pseudo-terminals")
def test_keys_come_without_enter_and_the_terminal_is_left_as_it_was(monkeypatch):
    """A key is there as soon as it is pressed; afterwards the terminal waits for Enter again."""
    import termios

    controller, terminal = os.openpty()
    with os.fdopen(terminal, "r") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        before = termios.tcgetattr(stdin)
        with command.keys() as wait:
            assert wait(0.0) is None
            os.write(controller, b"q")
            assert wait(10.0) == "q"
            assert termios.tcgetattr(stdin)[3] & termios.ICANON == 0
        assert termios.tcgetattr(stdin) == before
    os.close(controller)
