from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from melodi_otel.cli import doctor_hub
from melodi_otel.cli.app import app
from melodi_otel.cli.doctor import destinations, examine, installed, verdict
from melodi_otel.config import Config
from melodi_otel.hub.presence import Hub, Presence
from melodi_otel.hub.refusals import Refusal as Refused
from melodi_otel.hub.sockets import listen
from melodi_otel.identity import Identity
from melodi_otel.identity.kubernetes import VARIABLES
from melodi_otel.sources.base import Discovery, Refusal


def invoke(*words, **env):
    return CliRunner().invoke(app, ["doctor", *words], env={key: str(value) for key, value in env.items()})


def test_a_machine_that_measures(runtime):
    """Exit 0, the sentence, the device, and the reason of what is not used; nothing was started."""
    result = invoke()
    assert result.exit_code == 0
    assert result.stdout.splitlines()[0] == "Each request is told its share of the measured joules of 1 CPU package."
    assert "intel-rapl:0" in result.stdout
    assert "nvml [library_missing]: no NVML" in result.stdout
    assert runtime.made[0].log == ["shutdown"]


def test_json_is_the_same_report(runtime):
    """--json is one object with verdict, sources, refusals, variables, destinations, libraries."""
    result = invoke("--json", MELODI_SOURCES="rapl", MELODI_TYPO="1")
    report = json.loads(result.stdout)
    assert report["exit_code"] == result.exit_code == 0
    assert report["sources"][0]["devices"][0]["id"] == "intel-rapl:0"
    assert report["refusals"][0]["state"] == "library_missing"
    assert report["variables"] == {"set": {"MELODI_HUB": "local", "MELODI_SOURCES": "rapl"}, "unknown": ["MELODI_TYPO"]}
    assert set(report["destinations"]) == {"spans", "metrics", "scrape"}
    assert set(report["libraries"]) == {
        "torch",
        "transformers",
        "vllm",
        "pynvml",
        "amdsmi",
        "zeus_apple_silicon",
        "pandas",
    }


def test_the_identity(runtime, monkeypatch):
    """Whose energy it is, where that was found, and what to do about it, as text and as JSON."""
    for variable in VARIABLES["k8s.node.name"]:
        monkeypatch.delenv(variable, raising=False)
    told = {"MELODI_HOST_ID": "h1", "KUBERNETES_SERVICE_HOST": "10.0.0.1", "POD_NAME": "p1"}
    out = invoke(**told).stdout.splitlines()
    assert "  host.id: h1 (MELODI_HOST_ID)" in out
    assert "  k8s.pod.name: p1 (POD_NAME)" in out
    assert "  k8s.node.name is not known: hand it over as NODE_NAME by the downward API" in out
    report = json.loads(invoke("--json", **told).stdout)
    assert report["identity"]["host.id"] == {"value": "h1", "from": "MELODI_HOST_ID"}
    assert [note for note in report["identity_notes"] if "k8s.node.name" in note]


def test_the_endpoint_by_https():
    """Where a certificate is set the scrape address is https."""
    config = Config(metrics_addr="127.0.0.1:9464", metrics_tls_cert="x")
    assert destinations(config, {})["scrape"] == "https://127.0.0.1:9464/metrics"


def test_only_refusals(runtime, kit, monkeypatch):
    """Exit 3 and the exact fix where nothing measures."""
    monkeypatch.setattr(runtime, "found", Discovery((), (kit.DENIED,)))
    result = invoke()
    assert result.exit_code == 3
    assert "Nothing is measured: rapl is there, but it may not be read." in result.stdout
    assert "to repair: chmod -R a+r /sys/class/powercap/*" in result.stdout


def test_only_estimated(runtime, kit, monkeypatch):
    """Exit 4 where joules are only estimated: nobody takes them for measured."""
    monkeypatch.setattr(runtime, "found", Discovery((kit.Meter("estimate", kit.GUESS),)))
    result = invoke()
    assert result.exit_code == 4
    assert "estimated from the load of the CPU" in result.stdout


def test_a_bad_value(runtime):
    """Exit 2 and the variable, its value and what is allowed."""
    result = invoke(MELODI_PUE="0.1")
    assert result.exit_code == 2
    assert "MELODI_PUE='0.1' cannot be used" in result.stderr
    assert "a number from 1" in result.stderr


@pytest.mark.parametrize(
    ("devices", "words"),
    [
        (["gpu"], "1 GPU"),
        (["gpu", "gpu", "cpu", "cpu", "memory", "memory"], "2 GPUs, 2 CPU packages and memory"),
        (["cpu", "memory"], "1 CPU package and memory"),
    ],
)
def test_the_sentence_counts_devices(kit, devices, words):
    """The sentence names what is measured."""
    from dataclasses import replace

    source = kit.Meter("x", *(replace(kit.RAPL, id=str(n), type=kind) for n, kind in enumerate(devices)))
    assert verdict(Config(), Discovery((source,))).endswith(f"joules of {words}.")


def test_the_sentence_when_disabled_or_without_any_meter():
    """Disabled, or no meter at all: the variable that decides it is named."""
    assert "MELODI_DISABLED" in verdict(Config(disabled=True), Discovery())
    none = verdict(Config(), Discovery((), (Refusal("rapl", "no_device", "no powercap"),)))
    assert "MELODI_SOURCES=estimate" in none


@pytest.mark.parametrize(
    ("environ", "spans"),
    [
        ({}, "nowhere"),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318"}, "http://c:4318 (OTEL_EXPORTER_OTLP_ENDPOINT)"),
        (
            {"OTEL_EXPORTER_OTLP_ENDPOINT": "a", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "b"},
            "b (OTEL_EXPORTER_OTLP_TRACES",
        ),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "a"}, "off (OTEL_TRACES_EXPORTER=none)"),
        ({"OTEL_TRACES_EXPORTER": "console"}, "console (OTEL_TRACES_EXPORTER)"),
        ({"OTEL_SDK_DISABLED": "true"}, "off (OTEL_SDK_DISABLED)"),
    ],
)
def test_where_spans_go(environ, spans):
    """The destination is told with the variable that decides it."""
    assert destinations(Config(), environ)["spans"].startswith(spans)


def test_where_metrics_are_scraped():
    """Off by default, off by wish, or the address."""
    assert destinations(Config(), {})["scrape"].startswith("off; MELODI_METRICS_ADDR=")
    assert destinations(Config(metrics_addr="off"), {})["scrape"] == "off (MELODI_METRICS_ADDR)"
    assert destinations(Config(metrics_addr="h:1"), {})["scrape"] == "http://h:1/metrics"


def test_libraries_are_found_without_importing():
    """A missing library is None, one that is there has its version."""
    assert installed("no_such_module_at_all") is None
    assert installed("typer")


def test_text_with_brackets_is_shown_as_it_is(runtime, kit, monkeypatch):
    """A reason or a fix with [brackets] loses nothing."""
    refusal = Refusal("x", "refused", "see [the log]", 'pip install "melodi-otel[nvidia]"')
    monkeypatch.setattr(runtime, "found", Discovery((), (refusal,)))
    out = invoke().stdout
    assert "see [the log]" in out
    assert 'pip install "melodi-otel[nvidia]"' in out


def test_report_is_json_able(kit):
    """Every part of the report survives JSON."""
    found = Identity({"melodi.gpu.model": ("A", "B")}, {"melodi.gpu.model": "meters"}, ("a note",))
    discovery = Discovery((kit.Meter("rapl", kit.RAPL),), (kit.DENIED,))
    report = examine(Config(), discovery, {}, find=lambda name: None, identity=found)
    assert report["identity"] == {"melodi.gpu.model": {"value": ["A", "B"], "from": "meters"}}
    assert json.loads(json.dumps(report)) == report


def test_a_secret_is_not_shown(runtime, monkeypatch):
    """The key of the hash is said to be set, and never what it is."""
    monkeypatch.setenv("MELODI_LABEL_HASH_KEY", "s3cret")
    for words in (["doctor"], ["doctor", "--json"]):
        result = CliRunner().invoke(app, words)
        assert "(set, not shown)" in result.stdout
        assert "s3cret" not in result.stdout + result.stderr


def test_the_hub_that_is_reachable(runtime):
    """Whose it is and where it serves, as text and as JSON; the tier that a program would use."""
    path = Path(tempfile.mkdtemp(dir="/tmp")) / "s"
    try:
        with listen(path, mode=0o600):
            path.with_name("s.metrics").write_text("http://127.0.0.1:9465/metrics")
            out = invoke(MELODI_HUB=path).stdout
            hub = json.loads(invoke("--json", MELODI_HUB=path).stdout)["hub"]
    finally:
        shutil.rmtree(path.parent)
    assert re.search(
        rf"^  the hub of MELODI_HUB, {path}: reachable \(user \S+, process {os.getpid()}\)$", out, re.MULTILINE
    )
    assert "\n    metrics page: http://127.0.0.1:9465/metrics\n" in out
    assert (hub["setting"], hub["used"], hub["publisher"].keys()) == (str(path), "named", {"held", "pid"})
    assert hub["hubs"] == [
        {
            "tier": "named",
            "socket": str(path),
            "state": "ok",
            "reason": "",
            "fix": "",
            "pid": os.getpid(),
            "uid": os.getuid(),
            "listener": hub["hubs"][0]["listener"],
            "page": "http://127.0.0.1:9465/metrics",
        }
    ]


REFUSED = Refused(
    "permission_denied", "only root and members of the group melodi may connect", "sudo usermod -aG melodi a"
)


@pytest.mark.parametrize(
    ("answer", "lines"),
    [
        (Refused("absent", "there is no socket /s"), ["the host's agent, /s: absent"]),
        (
            Refused("stale", "nobody listens", "start it"),
            ["the host's agent, /s: stale", "  nobody listens", "  to repair: start it"],
        ),
        (
            REFUSED,
            [
                "the host's agent, /s: refused",
                "  only root and members of the group melodi may connect",
                "  to repair: sudo usermod -aG melodi a",
            ],
        ),
    ],
)
def test_the_hub_that_is_not(answer, lines):
    """Absent in one line; refused and stale with the reason and the command that helps."""
    presence = Presence("auto", (Hub("agent", Path("/s"), answer),), None, None, ("a note",))
    assert list(doctor_hub.lines(doctor_hub.as_data(presence))) == [*lines, "a note"]


@pytest.mark.parametrize(
    ("held", "pid", "words"),
    [
        (True, 7, "is published by process 7"),
        (True, None, "is published by a process that cannot be seen from here"),
        (False, None, "is published by nobody now; the first meter that runs does"),
    ],
)
def test_who_publishes_the_machine(held, pid, words):
    """The publisher of hw.* where it can be seen."""
    (line,) = doctor_hub.lines(doctor_hub.as_data(Presence("local", (), held, pid)))
    assert line == f"the machine's own energy (hw.*) {words}"


def test_the_way_it_is_read_and_what_is_not_confirmed(runtime, kit, monkeypatch):
    """Which of two ways is used, why the better one is not, and that nobody has run it on the hardware yet."""
    meter = kit.Meter("rapl", kit.RAPL)
    meter.notes = ("read through powercap", "perf events are not used: this process may not open them")
    nvml = kit.Meter("nvml", kit.RAPL)
    monkeypatch.setattr(runtime, "found", Discovery((meter, nvml), (Refusal("cray", "absent", "no Cray node"),)))
    lines = invoke().stdout.splitlines()
    assert "  rapl: read through powercap" in lines
    assert "  rapl: perf events are not used: this process may not open them" in lines
    assert "  rapl: unconfirmed, not run on real hardware yet; see docs/meters.md" in lines
    assert "  not on this machine: cray" in lines
    assert not [line for line in lines if line.startswith("  nvml: ")]
    sources = {source["name"]: source for source in json.loads(invoke("--json").stdout)["sources"]}
    assert sources["rapl"]["notes"] == list(meter.notes)
    assert (sources["rapl"]["confirmed"], sources["nvml"]["confirmed"]) == (False, True)
