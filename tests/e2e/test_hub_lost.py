"""Hubs that die or freeze, workers that die, programs that end at once: every span arrives, and no joule is told twice."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import pytest

from melodi_otel.testing.telemetry import OtlpReceiver, plain

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(180),
    pytest.mark.skipif(sys.platform != "linux", reason="powercap and hubs are Linux's here"),
]

PACKAGE = "intel-rapl:0"
NAMES = ("w0", "w1", "w2", "w3")


def metered(span: Any) -> bool:
    return "melodi.energy.quality" in plain(span.attributes)


def agreed(spans: list[Any], told: list[dict[str, Any]]) -> tuple[float, int]:
    """J of all requests as their programs were told, and how many spans went without because these came too late for them.

    Every other span says exactly what its program was told.
    """
    rows = {row["span"]: row for program in told for row in program["rows"]}
    assert len(rows) == len(spans)
    late = 0
    for span in spans:
        row, attributes = rows[span.span_id.hex()], plain(span.attributes)
        if attributes.get("melodi.energy.reason") == "late":
            assert "melodi.energy.total" not in attributes
            late += 1
        else:
            assert attributes.get("melodi.energy.total") == row["total"]
            assert attributes["melodi.energy.quality"] == row["quality"]
    return sum(row["total"] or 0.0 for row in rows.values()), late


def said(spans: list[Any]) -> dict[tuple[str, str | None], int]:
    """How many spans say (quality, reason)."""
    found: dict[tuple[str, str | None], int] = {}
    for span in spans:
        attributes = plain(span.attributes)
        which = attributes["melodi.energy.quality"], attributes.get("melodi.energy.reason")
        found[which] = found.get(which, 0) + 1
    return found


def workers(place: Any, receiver: OtlpReceiver, requests: int, seconds: float) -> list[Any]:
    """Four programs that share a hub and begin together, while the package uses 50 W."""
    env = place.environ(receiver)
    go = str(place.path / "go")
    started = [place.program(env, name, requests=requests, parallel=4, seconds=seconds, go=go) for name in NAMES]
    place.ready(*NAMES)
    assert not any(place.told(name)["local"] for name in NAMES)
    return started


@pytest.fixture
def package(hub_place: Any) -> Any:
    return hub_place.tree.package(0, watts=50.0)


def test_a_killed_hub(hub_place: Any, package: Any, receiver: OtlpReceiver, capsys: pytest.CaptureFixture[str]) -> None:
    """kill -9 in the middle of 200 requests: another hub goes on with its books; the time between is unsampled."""
    started = workers(hub_place, receiver, 50, 0.5)
    first = hub_place.hub()
    before = package.energy_uj
    with hub_place.tree.live():
        (hub_place.path / "go").touch()
        receiver.spans(40, 60.0, metered)
        assert hub_place.journal()["devices"][PACKAGE]["in_flight"] > 0
        os.kill(first, signal.SIGKILL)
        hub_place.until("another hub serves", lambda: hub_place.pid() not in (0, first))
        told = [hub_place.finish(worker, name) for worker, name in zip(started, NAMES, strict=True)]
        spans = receiver.spans(200, 30.0, metered)
    book = hub_place.settled()[PACKAGE]
    assert len(spans) == 200
    assert not any(program["local"] for program in told)
    # Nothing twice, nothing lost: what stands on spans is what the books of both hubs, which are one, attributed.
    joules, late = agreed(spans, told)
    # A program that gave up waiting for a request says `late` where the hub has its joules: they are in the books as such.
    assert joules == pytest.approx(book["usable"], rel=1e-9)
    assert book["counted"] == pytest.approx(book["measured"], rel=1e-9)
    assert book["measured"] <= (package.energy_uj - before) / 1e6 + 1e-6
    assert book["in"]["unsampled"] > 0
    found = said(spans)
    assert found["measured", None] > 0
    assert {reason for _, reason in found} <= {None, "no_samples", "late"}
    assert late < 100
    with capsys.disabled():
        print(f"\n  killed: {found}, requests {joules:.6f} J = settled {book['settled']:.6f} J", end="")
        print(f", {book['in']}, measured {book['measured']:.6f} J", end="")


def test_a_frozen_hub(hub_place: Any, package: Any, receiver: OtlpReceiver, capsys: pytest.CaptureFixture[str]) -> None:
    """SIGSTOP until spans have gone without joules, then SIGCONT: those are `late`, all others have theirs."""
    started = workers(hub_place, receiver, 50, 0.7)
    hub = hub_place.hub()
    with hub_place.tree.live():
        (hub_place.path / "go").touch()
        receiver.spans(30, 60.0, metered)
        os.kill(hub, signal.SIGSTOP)
        try:
            for name in NAMES:
                hub_place.until(f"{name} notices", lambda name=name: "the hub does not answer" in hub_place.said(name))
            receiver.spans(1, 60.0, lambda span: plain(span.attributes).get("melodi.energy.quality") == "unavailable")
        finally:
            os.kill(hub, signal.SIGCONT)
        told = [hub_place.finish(worker, name) for worker, name in zip(started, NAMES, strict=True)]
        spans = receiver.spans(200, 30.0, metered)
    book = hub_place.settled()[PACKAGE]
    assert len(spans) == 200
    assert hub_place.pid() == hub
    joules, late = agreed(spans, told)
    assert joules == pytest.approx(book["usable"], rel=1e-9)
    assert book["counted"] == pytest.approx(book["measured"], rel=1e-9)
    found = said(spans)
    assert found.pop(("unavailable", "late")) == late > 0
    assert {quality for quality, _ in found} <= {"measured", "interpolated"}
    assert late + sum(found.values()) == 200
    with capsys.disabled():
        print(f"\n  frozen: late {late}, {found}, requests {joules:.6f} J = usable {book['usable']:.6f} J", end="")
        print(f" of settled {book['settled']:.6f} J", end="")


def test_workers_end_as_they_like(hub_place: Any, package: Any, receiver: OtlpReceiver) -> None:
    """One is killed with requests open, one ends by os._exit, one right after its last request: the others do not notice."""
    env = hub_place.environ(receiver)
    go, dead = str(hub_place.path / "go"), str(hub_place.path / "dead")
    killed = hub_place.program(env | {"OTEL_SERVICE_NAME": "killed"}, "w0", requests=4, parallel=4, seconds=600)
    gone = hub_place.program(env, "w1", requests=4, seconds=0.3, go=go, end="_exit")
    quick = hub_place.program(env | {"OTEL_SERVICE_NAME": "quick"}, "w2", requests=1, seconds=0.4, go=go, settle=False)
    last = hub_place.program(env, "w3", requests=4, parallel=2, seconds=0.4, go=go, more=dead, again=3)
    hub_place.ready(*NAMES)
    with hub_place.tree.live():
        hub_place.until("four requests are open in the one to be killed", lambda: hub_place.opened() == 4)
        (hub_place.path / "go").touch()
        hub_place.until("the others have some as well", lambda: hub_place.opened() > 4)
        killed.kill()
        hub_place.finish(gone, "w1")
        hub_place.finish(quick, "w2")
        (hub_place.path / "dead").touch()
        rows = hub_place.finish(last, "w3")["rows"]
        spans = receiver.spans(8, 30.0, metered)
        book = hub_place.settled()[PACKAGE]
    assert len(rows) == 7
    assert {row["quality"] for row in rows} <= {"measured", "interpolated"}
    assert book["counted"] == pytest.approx(book["measured"], rel=1e-9)
    by_service: dict[str, float] = {}
    for part in book["attributed"]:
        service = part["who"][2]
        by_service[service] = by_service.get(service, 0.0) + part["joules"]
    # What the killed one used until then is in the books under its name; the quick one waited for its joules, bounded.
    assert by_service["killed"] > 0
    assert by_service["quick"] > 0
    assert by_service["chat"] >= sum(row["total"] for row in rows)
    assert len(spans) >= 8


def test_interrupting_a_terminal(hub_place: Any, package: Any) -> None:
    """Ctrl-C goes to the process group of the terminal; the hub is in none of its programs' groups or sessions."""
    env = hub_place.environ()
    words = {"requests": 4, "seconds": 600, "parallel": 4}
    program = hub_place.program(env, "w0", before=["setsid", "--wait"], **words)
    hub_place.ready("w0")
    hub = hub_place.hub()
    pid = hub_place.told("w0")["pid"]
    group = os.getpgid(pid)
    assert os.getpgid(hub) not in (group, os.getpgid(0))
    assert os.getsid(hub) not in (os.getsid(pid), os.getsid(0))
    with hub_place.tree.live():
        hub_place.until("requests are open", lambda: hub_place.opened())
        os.killpg(group, signal.SIGINT)
        # Threads of a pool end a Python program only when they do; a second one leaves at once.
        hub_place.until("it has ended", lambda: program.poll() is not None or os.killpg(group, signal.SIGKILL) or False)
        hub_place.until("its requests are closed", lambda: not hub_place.opened())
    assert hub_place.pid() == hub
