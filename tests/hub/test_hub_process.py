from __future__ import annotations

import json
import logging
import os
import time
import urllib.request
from dataclasses import replace

import pytest

from melodi_otel.attribution.meter import Key
from melodi_otel.config import Config
from melodi_otel.hub import wire
from melodi_otel.hub.asking import read_status
from melodi_otel.hub.client import HubClient
from melodi_otel.hub.sockets import connect, listen
from melodi_otel.hub_process import HubProcess, main
from melodi_otel.publishing import Publisher
from melodi_otel.testing.powercap import FakePowercap
from melodi_otel.testing.telemetry import OtlpReceiver

S = 1_000_000_000


@pytest.fixture
def tree(tmp_path):
    made = FakePowercap(tmp_path / "sys")
    made.package(0, watts=50.0)
    return made


@pytest.fixture
def build(place, tree):
    """Makes hubs on a fake package; all are closed."""
    made = []

    def make(mode="shared", *, environ=None, linger_s=60.0, start=True, **settings):
        settings = {"sysfs_root": str(tree.root), "sources": ("rapl",), "metrics_addr": "127.0.0.1:0", **settings}
        hub = HubProcess(
            Config(**settings),
            environ or {},
            listen(place / "hub.sock", mode=0o600),
            mode=mode,
            journal=place / "hub.sock.journal",
            linger_s=linger_s,
            publisher=Publisher(f"melodi-otel/test-{os.getpid()}-{len(made)}", mode),
        )
        made.append(hub)
        if start:
            hub.start()
        return hub

    yield make
    for hub in made:
        hub.close()


@pytest.fixture
def member(place):
    made = []

    def join(name="n", service="shop", namespace="prod"):
        client = HubClient(
            lambda: connect(place / "hub.sock", 5.0),
            wire.Hello(wire.VERSION, "0.3", name, "g", True, service, namespace, False, []),
            welcomed=lambda _welcome, _resumed: None,
            lost=lambda _client, _why: None,
            wait_s=lambda: 5.0,
        )
        client.start()
        assert client.known.wait(10)
        made.append(client)
        return client

    yield join
    for client in made:
        client.hang_up(5.0)


def page(hub):
    with urllib.request.urlopen(hub.endpoint_url, timeout=10) as answer:
        return answer.read().decode()


def series(text, name):
    return [line for line in text.splitlines() if line.startswith(name + "{")]


def shown(client, request="r", joules=12.5):
    """The observation of a finished request, and an answer that comes after it."""
    client._put(
        wire.Observed(
            request,
            "chat",
            "vllm",
            "m",
            S,
            3 * S,
            2 * S,
            10,
            5,
            "stop",
            None,
            True,
            joules,
            "cpu",
            "measured",
            b"",
            b"",
            {},
        )
    )
    client.between("none", 0, 1)


def test_requests_on_its_page_have_their_service(build, member):
    """Counted and as a histogram, with service and namespace of the program that told of them."""
    hub = build()
    shown(member())
    shown(member("o", service="bank", namespace=None), joules=None)
    text = page(hub)
    counted = series(text, "melodi_requests_total")
    assert len(counted) == 2
    (mine,) = [line for line in counted if 'service_name="shop"' in line]
    assert 'service_namespace="prod"' in mine
    assert 'gen_ai_request_model="m"' in mine
    assert mine.endswith(" 1.0")
    (energy,) = series(text, "melodi_request_energy_joules_sum")
    assert 'service_name="shop"' in energy
    assert 'service_namespace="prod"' in energy
    assert energy.endswith(" 12.5")
    assert series(text, "gen_ai_client_operation_duration_seconds_sum")


def test_a_recording_hub_writes_as_it_settles(build, member, tmp_path):
    """A trace is on disk after every settling, not only when a buffer is full or the hub ends."""
    trace = tmp_path / "trace.jsonl"
    hub = build(record=str(trace))
    (device,) = hub.station.devices
    hub.station.ledger.counter(device, time.monotonic_ns() + S, 1e6)
    hub.server.moved()
    member().between("none", 0, 1)  # answered after what came before it
    assert "1000000.0" in trace.read_text()


def test_otlp_counts_requests_and_nothing_of_single_ones(build, member):
    """Their histograms go out from the programs themselves; the hub's OTLP has the number of requests and the machine."""
    with OtlpReceiver() as server:
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": server.http_endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
        hub = build(environ=environ)
        shown(member())
        hub._meters.force_flush(10.0)
        names = {point.name for point in server.metrics(1)}
        hub.close()
    assert {"melodi.requests", "hw.energy"} <= names
    assert not names & {"melodi.request.energy", "gen_ai.client.operation.duration", "gen_ai.client.token.usage"}


def settings_on(hub):
    """What the page shows of the settings, by the names without units."""
    names = ("melodi_carbon_intensity", "melodi_energy_pue", "melodi_energy_price", "melodi_energy_budget")
    lines = page(hub).splitlines()
    return {name: float(line.split()[-1]) for line in lines for name in names if line.startswith(name)}


def test_a_reload_changes_what_is_published(build):
    """Gauges of the settings follow, those that are unset vanish, and it is said what changed."""
    hub = build(carbon_intensity=400.0)
    assert settings_on(hub)["melodi_carbon_intensity"] == 400.0
    said = hub.reload(replace(hub.config, carbon_intensity=None, pue=1.5, energy_price=0.3))
    assert said == ["carbon_intensity = None", "pue = 1.5", "energy_price = 0.3"]
    assert settings_on(hub) == {"melodi_energy_pue": 1.5, "melodi_energy_price": 0.3}
    assert hub.reload(hub.config) == []


def test_a_reload_takes_over_all_that_it_may(build):
    """Every reloadable setting is taken over and told: idle power reaches the books, the limit the labels of metrics."""
    hub = build(metric_labels=("tenant",), labels="tenant=baggage:tenant", label_limit=1)
    (device,) = hub.station.devices
    said = hub.reload(replace(hub.config, idle_watts=((device, 7.0),), label_limit=2))
    assert said == [f"idle_watts = (({device!r}, 7.0),)", "label_limit = 2"]
    ledger = hub.station.ledger
    ledger.settle(time.monotonic_ns())
    state = ledger.state(time.monotonic_ns())
    assert [known.idle_watts for known in state.devices] == [7.0]
    assert hub.station.devices[device].idle_watts == 7.0
    shown = [hub._whose.metric.clip({"tenant": name}) for name in ("a", "b", "c")]
    assert shown == [(("tenant", "a"),), (("tenant", "b"),), (("tenant", "other"),)]


def test_status_is_the_same_wherever_it_is_asked(build, member, place):
    """On the socket and on the page: mode, devices and who is connected."""
    hub = build()
    member()
    told = read_status(place / "hub.sock")
    assert told["mode"] == "shared"
    assert json.loads(json.dumps(hub.status()))["mode"] == "shared"
    assert [device["id"] for device in told["devices"]] == list(hub.station.devices)


def test_ready(build):
    """Not before it serves and every meter has been read; not any more when it has stopped."""
    hub = build(start=False)
    assert hub.ready() == "the hub does not serve"
    hub.start()
    assert hub.ready() is None
    hub.close()
    assert hub.ready() == "the hub does not serve"


def test_the_address_lies_beside_the_socket(build, place):
    """While it serves, and not after."""
    hub = build()
    beside = place / "hub.sock.metrics"
    assert beside.read_text() == f"{hub.endpoint_url}\n"
    hub.close()
    assert not beside.exists()
    assert not (place / "hub.sock").exists()


def test_without_a_page(build, place):
    """`off`: no address, no file, and the program is told that there is none."""
    hub = build(metrics_addr="off")
    assert hub.endpoint_url is None
    assert not (place / "hub.sock.metrics").exists()


def test_closing_twice(build):
    """The second time there is nothing left to do."""
    hub = build()
    hub.close()
    hub.close()


def test_a_shared_hub_leaves_when_nobody_needs_it(build, place, member):
    """Some time after its last program; its journal goes with it, for nobody comes back."""
    hub = build(linger_s=0.05)
    member().hang_up(5.0)
    hub.wait()
    assert hub.server.connected_now == 0
    hub.close()
    assert not (place / "hub.sock.journal").exists()


def test_an_agent_stays_and_keeps_its_journal(build, place, member):
    """It waits until it is asked to stop, and its books go on in the next one."""
    hub = build("agent", linger_s=0.0)
    hub.request_stop()
    hub.wait()
    hub.close()
    page = hub._journal.load()
    assert page is not None
    assert [device.device.id for device in page.state.devices] == list(hub.station.devices)


def test_a_shared_hub_that_is_stopped_with_programs_keeps_its_journal(build, place, member):
    """They go on with the next hub, which goes on with the books and knows what they had."""
    hub = build()
    client = member()
    client.open(Key("g", "r"), hub._clock.monotonic_ns(), devices=list(hub.station.devices))
    client.between("none", 0, 1)
    measured = hub.station.ledger.snapshot().books
    hub.close()
    assert (place / "hub.sock.journal").exists()
    heir = build()
    assert set(heir.station.ledger.snapshot().books) >= set(measured)
    assert (place / "hub.sock.journal").exists()


def test_what_was_promised_is_known_to_the_next(build, place, member):
    """Final joules whose arrival nobody acknowledged are told to the program that asks the next hub for them."""
    from melodi_otel.hub.journal import Journal, Promise

    before = build("agent")
    before.close()
    page = before._journal.load()
    Journal(place / "hub.sock.journal").save("h", page.state, [Promise(f"{os.getuid()}:g:n", "r", [], False)])
    heir = build("agent")
    assert heir.server._known == {Key(f"{os.getuid()}:g:n", "r"): (False, [])}


@pytest.mark.parametrize("arguments", [[], ["hub"], ["agent", "x"], ["hub", "a", "b"]])
def test_how_it_is_called(arguments, capsys):
    """Anything else is a line on how, and the code of a wrong call."""
    assert main(arguments) == 2
    assert "usage: python -m melodi_otel.runtime hub PATH" in capsys.readouterr().err


def test_a_second_one_is_not_needed(build, place):
    """Two programs start a hub at the same time: the later one ends without a fault."""
    build()
    assert main(["hub", str(place / "hub.sock")]) == 0


def test_an_observer_that_fails(build, member, caplog):
    """One of them fails: it is logged, and the others see the request."""
    hub = build()

    class Bad:
        def finished(self, record):
            raise RuntimeError("no")

    hub._observers.insert(0, Bad())
    with caplog.at_level(logging.ERROR, logger="melodi_otel"):
        shown(member())
    assert "a finished request cannot be shown" in caplog.text
    assert series(page(hub), "melodi_requests_total")
