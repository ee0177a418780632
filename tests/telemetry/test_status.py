"""The status record: what it holds, what it leaves out, and what finished requests add up to."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from melodi_otel.attribution.books import Books, Snapshot, Who
from melodi_otel.attribution.meter import Key
from melodi_otel.attribution.summary import unavailable
from melodi_otel.sampler import Cost
from melodi_otel.sources.base import Discovery, Refusal
from melodi_otel.status import HubStatus, ModelTotals, OpenRequest, Reporter, StatusViews, not_ready
from melodi_otel.telemetry.metrics import Hardware
from melodi_otel.testing.clock import ManualClock

BOOK = Books("GPU-1", 100.0, 60.0, 5.0, 20.0, 4.0, 3.0, 2.0, 7.0, -1.0)


def report(kit: SimpleNamespace, clock: ManualClock | None = None, **views: Any) -> dict[str, Any]:
    """The JSON, read back."""
    known: dict[str, Any] = {
        "snapshot": lambda: Snapshot(0, {}, {}, {}, {}),
        "devices": lambda: kit.devices,
        **views,
    }
    reporter = Reporter(StatusViews(**known), clock or ManualClock(), version="9.9", host_id="h1")
    return json.loads(json.dumps(reporter.json(), allow_nan=False))


def test_devices(kit: SimpleNamespace) -> None:
    """Each device with its watts, joules and the age of its reading; null where that is not known, never 0."""
    hardware = Hardware(
        watts={"GPU-1": 250.0},
        sample_age_s={"GPU-1": 0.25},
        up={("nvml", "GPU-1"): True, ("rapl", "intel-rapl:0"): False, ("amd", None): False},
    )
    books = {"GPU-1": BOOK, "intel-rapl:0": Books("intel-rapl:0")}
    found = report(kit, hardware=lambda: hardware, snapshot=lambda: Snapshot(0, books, {}, {}, {}))["devices"]
    assert found[0] == {
        "id": "GPU-1",
        "type": "gpu",
        "name": "A card",
        "index": None,
        "watts": 250.0,
        "joules": 100.0,
        "sample_age_seconds": 0.25,
        "up": True,
        "estimated": False,
    }
    silent = [found[1][name] for name in ("watts", "joules", "sample_age_seconds", "up")]
    assert silent == [None, None, None, False]
    assert found[2]["up"] is None


def test_a_device_that_used_nothing_yet(kit: SimpleNamespace) -> None:
    """A device that was read and used nothing has 0 J: that is known."""
    hardware = Hardware(sample_age_s={"GPU-1": 0.1})
    snapshot = Snapshot(0, {"GPU-1": Books("GPU-1")}, {}, {}, {})
    assert report(kit, hardware=lambda: hardware, snapshot=lambda: snapshot)["devices"][0]["joules"] == 0.0


def test_books(kit: SimpleNamespace) -> None:
    """A book has every bucket in J, the signed residual, and sums to what was measured."""
    (book,) = report(kit, snapshot=lambda: Snapshot(0, {"GPU-1": BOOK}, {}, {}, {}))["books"]
    assert book == {
        "device": "GPU-1",
        "measured_joules": 100.0,
        "attributed_joules": 60.0,
        "in_flight_joules": 5.0,
        "idle_joules": 20.0,
        "tail_joules": 4.0,
        "loading_joules": 3.0,
        "foreign_joules": 2.0,
        "unsampled_joules": 7.0,
        "residual_joules": -1.0,
        "imbalance_ratio": 0.0,
    }


def test_open_requests(kit: SimpleNamespace) -> None:
    """Joules so far are summed over devices, the thirstiest request first, those without joules last."""
    clock = ManualClock(monotonic_s=15.0)
    a, b, c = (Key("g", name) for name in "abc")
    accrued = {
        a: [kit.share(4.0), kit.share(1.0, "intel-rapl:0"), kit.share(50.0, "psys")],
        b: [kit.share(9.0, quality="interpolated")],
    }
    known = [OpenRequest(a, "chat m", "m", "web", "chat", 12_500_000_000, 7), OpenRequest(c, model="m")]
    found = report(kit, clock, accrued=lambda: accrued, requests=lambda: known)
    unnamed = dict.fromkeys(("name", "model", "service", "operation", "output_tokens"))
    assert found["requests"] == [
        {**unnamed, "age_seconds": 5.0, "joules": 9.0, "quality": "interpolated"},
        {
            "name": "chat m",
            "model": "m",
            "service": "web",
            "operation": "chat",
            "age_seconds": 2.5,
            "joules": 5.0,
            "output_tokens": 7,
            "quality": "measured",
        },
        {**unnamed, "model": "m", "age_seconds": None, "joules": None, "quality": None},
    ]
    assert found["requests_open"] == 3


def test_many_open_requests(kit: SimpleNamespace) -> None:
    """At most 100 are listed, all are counted; also those that only the ledger knows."""
    known = [OpenRequest(Key("g", str(n)), start_ns=0) for n in range(150)]
    found = report(kit, requests=lambda: known)
    assert (len(found["requests"]), found["requests_open"]) == (100, 150)
    snapshot = Snapshot(0, {}, {}, {}, {Who("m"): 2, Who("n"): 3})
    assert report(kit, snapshot=lambda: snapshot)["requests_open"] == 5


def test_health(kit: SimpleNamespace) -> None:
    """Refusals with reason and fix, what sampling cost, the hub, the publisher and the spans that wait."""
    found = report(
        kit,
        refusals=lambda: [Refusal("rapl", "permission_denied", "root only", "chmod")],
        cost=lambda: Cost(10, 1, 0.5, 0.25, None),
        hub=lambda: HubStatus(3, 1),
        publisher=lambda: True,
        spans_waiting=lambda: 2,
    )["health"]
    assert found == {
        "refusals": [{"source": "rapl", "state": "permission_denied", "reason": "root only", "fix": "chmod"}],
        "sampler": {"rounds": 10, "failures": 1, "seconds": 0.5, "cpu_seconds": 0.25, "joules": None},
        "hub": {"connections": 3, "refused_messages": 1},
        "publisher": True,
        "spans_waiting": 2,
    }


def test_nothing_known(kit: SimpleNamespace) -> None:
    """A meter that has just begun tells who and when it is; everything else is empty or null."""
    clock = ManualClock(monotonic_s=5.0, wall_s=1000.0)
    reporter = Reporter(
        StatusViews(lambda: Snapshot(0, {}, {}, {}, {}), dict), clock, version="9.9", mode="agent", host_id=None
    )
    clock.advance(2.5)
    assert json.loads(json.dumps(reporter.json())) == {
        "schema": 1,
        "host_id": None,
        "version": "9.9",
        "mode": "agent",
        "time_unix_seconds": 1002.5,
        "uptime_seconds": 2.5,
        "devices": [],
        "requests_open": 0,
        "requests": [],
        "models": [],
        "books": [],
        "health": {"refusals": [], "sampler": None, "hub": None, "publisher": None, "spans_waiting": None},
    }


def test_no_number_that_json_does_not_have(kit: SimpleNamespace) -> None:
    """What is not finite is not known."""
    hardware = Hardware(watts={"GPU-1": float("nan")}, sample_age_s={"GPU-1": float("inf")})
    found = report(kit, hardware=lambda: hardware)["devices"][0]
    assert (found["watts"], found["sample_age_seconds"]) == (None, None)


def test_totals_of_a_model(kit: SimpleNamespace) -> None:
    """Requests, tokens and joules add up; J per token is over the requests of which both are known."""
    totals = ModelTotals()
    totals.finished(kit.record())  # 30 J, 11 tokens
    totals.finished(kit.record(output_tokens=None))
    totals.finished(kit.record(energy=unavailable("no_source"), output_tokens=1000))
    totals.finished(kit.record(kind="measure"))
    (line,) = totals.models()
    assert (line.model, line.requests, line.output_tokens, line.joules) == ("m", 3, 1011, 60.0)
    assert line.joules_per_output_token == 30.0 / 11
    assert not line.estimated


def test_a_model_of_which_nothing_is_known(kit: SimpleNamespace) -> None:
    """Tokens and joules that no request told are null, not 0."""
    totals = ModelTotals()
    totals.finished(kit.record(model=None, energy=unavailable("no_source"), output_tokens=None))
    (line,) = totals.models()
    assert (line.model, line.requests) == (None, 1)
    assert (line.output_tokens, line.joules, line.joules_per_output_token) == (None, None, None)


def test_estimated_joules_say_so(kit: SimpleNamespace) -> None:
    """One request whose joules are estimated marks its model's."""
    from melodi_otel.attribution.summary import summarize

    totals = ModelTotals()
    totals.finished(kit.record())
    totals.finished(kit.record(energy=summarize([kit.share(1.0, quality="estimated")], kit.devices)))
    assert [line.estimated for line in totals.models()] == [True]


def test_models_are_bounded(kit: SimpleNamespace) -> None:
    """Models beyond the limit are counted together, so that names that never end fill no memory; none is lost."""
    totals = ModelTotals(limit=3)
    for n in range(10):
        totals.finished(kit.record(model=f"m{n}"))
    lines = totals.models()
    assert sorted(str(line.model) for line in lines) == ["m0", "m1", "m2", "other"]
    assert lines[0].model == "other"
    assert (lines[0].requests, lines[0].joules) == (7, 210.0)
    assert sum(line.requests for line in lines) == 10


def test_a_fork_counts_its_own(kit: SimpleNamespace) -> None:
    """A child begins with nothing."""
    totals = ModelTotals()
    totals.finished(kit.record())
    totals.forked()
    assert totals.models() == ()


class Meter:
    def __init__(self, name: str, *devices: Any) -> None:
        self.name, self.devices = name, devices

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("ages", "found", "reason"),
    [
        ({"GPU-1": 0.1, "intel-rapl:0": 0.1}, True, None),
        ({"GPU-1": 0.1}, True, "no reading yet from rapl"),
        ({}, True, "no reading yet from nvml, rapl"),
        ({"GPU-1": 0.1, "intel-rapl:0": 0.1}, False, "the meters are still being looked for"),
    ],
)
def test_ready(kit: SimpleNamespace, ages: dict[str, float], found: bool, reason: str | None) -> None:
    """Ready is who has one reading of each source; else the reason names the silent ones."""
    sources = (Meter("nvml", kit.devices["GPU-1"]), Meter("rapl", kit.devices["intel-rapl:0"]))
    assert not_ready(Discovery(sources), Hardware(sample_age_s=ages), found=found) == reason


def test_without_a_meter_it_is_not_ready() -> None:
    """Where nothing measures the reason says why, in one line."""
    refusals = (Refusal("rapl", "permission_denied", "root\nonly"), Refusal("nvml", "library_missing", "no NVML"))
    assert not_ready(Discovery((), refusals), Hardware()) == "no energy meter: rapl: root only; nvml: no NVML"
