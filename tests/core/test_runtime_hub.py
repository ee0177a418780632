"""A runtime whose meter is a hub: the same spans and results, no figure of the machine, nothing left behind, moves both ways."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider

import melodi_otel
from melodi_otel import program as root
from melodi_otel.config import Config
from melodi_otel.hub.choice import Choice
from melodi_otel.hub.sockets import listen
from melodi_otel.hub_process import HubProcess
from melodi_otel.instrumentation.seam import Begin, End
from melodi_otel.publishing import Publisher
from melodi_otel.runtime import Runtime
from melodi_otel.testing.powercap import FakePowercap
from melodi_otel.testing.telemetry import CapturedSpans, points

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="hubs need Unix sockets")


class Machine:
    """A machine with one package, and a hub in a thread of this process."""

    def __init__(self, place: Path, tree: FakePowercap) -> None:
        self.tree = tree
        self.path = place / "agent.sock"
        (place / "run").mkdir(mode=0o700)
        self.environ = {"XDG_RUNTIME_DIR": str(place / "run")}
        self.hub: HubProcess | None = None
        self.runtimes: list[Runtime] = []

    def config(self, **changes: Any) -> Config:
        """Of programs and hub alike."""
        given: dict[str, Any] = {"sysfs_root": str(self.tree.root), "sources": ("rapl",), "metrics_addr": "off"}
        return Config(**{**given, **changes})

    def serve(self, denied: bool = False, **changes: Any) -> HubProcess:
        """An agent from now on; ``denied``: it may not read a meter that is there."""
        name = f"melodi-otel/test-{secrets.token_hex(4)}"
        self.hub = HubProcess(
            self.config(**changes), {}, listen(self.path, mode=0o600), mode="agent", publisher=Publisher(name, "agent")
        )
        if denied:
            self.hub.station.denied = lambda: True  # type: ignore[method-assign]
        self.hub.start()
        return self.hub

    def stop(self) -> None:
        """The agent ends."""
        if self.hub is not None:
            self.path.unlink(missing_ok=True)  # whoever is quick does not find it while it ends
            self.hub.close()
            self.hub = None

    def choice(self, setting: str = "auto") -> Choice:
        """How a program finds it."""
        return Choice(setting, self.environ, agent=self.path, arguments=[])

    def runtime(self, setting: str = "auto", **given: Any) -> Runtime:
        """A program that has begun to meter."""
        made = Runtime(self.config(hub=setting), environ={}, choice=self.choice(setting), **given)
        self.runtimes.append(made)
        made.start()
        assert made.wait_found(10.0)
        return made

    def close(self) -> None:
        """Nothing stays."""
        for runtime in self.runtimes:
            runtime.shutdown()
        self.stop()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """One package, nobody meters it."""
    place = Path(tempfile.mkdtemp(prefix="hub", dir="/tmp"))  # a socket's path is short
    tree = FakePowercap(tmp_path / "sys")
    tree.package(0, watts=50.0)
    made = Machine(place, tree)
    yield made
    made.close()
    shutil.rmtree(place)


def work(seconds: float) -> None:
    """Compute: who only waits has no part in what others on this machine use meanwhile."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        sum(range(1000))


def request(runtime: Runtime, seconds: float = 0.0, tokens: int = 5, *, working: bool = False) -> None:
    """A call that takes this long, waiting or computing."""
    call = runtime.calls.begin(Begin("chat", "transformers", "m", runtime.calls.now_ns(), prompt_tokens=3))
    with call.active():
        if working:
            work(seconds)
        else:
            assert not threading.Event().wait(seconds)
    call.end(End(runtime.calls.now_ns(), tokens, "stop", ("stop",)))


def until(true: Callable[[], Any], seconds: float = 20.0) -> None:
    """Wait for another thread."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def in_child(said: Callable[[], str]) -> str:
    """What a forked child says."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, said().encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(write)
    found = os.read(read, 4096).decode()
    os.close(read)
    return found


def test_spans_results_and_metrics(machine: Machine) -> None:
    """Joules come from the hub to span and result; the program's metrics hold its requests and nothing of the machine."""
    hub = machine.serve(span_wait=3.0)
    reader, captured = InMemoryMetricReader(), CapturedSpans()
    metrics, spans = MeterProvider([reader], shutdown_on_exit=False), TracerProvider(shutdown_on_exit=False)
    spans.add_span_processor(captured)
    with machine.tree.live():
        runtime = machine.runtime(tracer_provider=spans, meter_provider=metrics)
        assert runtime.hub is not None
        assert not runtime.discovery.sources
        assert list(runtime.devices()) == ["intel-rapl:0"]
        assert runtime.span_wait_s() == 3.0
        request(runtime, 0.4, working=True)
        assert runtime.wait_settled(10.0)
    (record,) = runtime.store.recent()
    assert record.energy.total is not None
    assert 0.0 < record.energy.total < 60.0
    captured.wait_for(1)
    assert captured.attributes("chat m")["melodi.energy.total"] == record.energy.total
    found = {point.name for point in points(reader)}
    assert {"melodi.request.energy", "gen_ai.client.token.usage"} <= found
    assert not {
        name
        for name in found
        if name.startswith(("hw.", "melodi.requests", "melodi.energy", "melodi.sampler", "melodi.so"))
    }
    until(lambda: hub.status()["models"])
    assert [model["model"] for model in hub.status()["models"]] == ["m"]
    runtime.shutdown()
    metrics.shutdown()


def test_a_block_at_a_hub(machine: Machine) -> None:
    """measure() works as it does without one, and the whole device's joules can be asked for."""
    machine.serve()
    with machine.tree.live():
        runtime = machine.runtime()
        begin = runtime.calls.now_ns()
        with runtime.measure("block") as m:
            work(0.4)
        end = runtime.calls.now_ns()
        assert m.wait(10.0)
        between = runtime.measured_between(begin, end)
    assert m.energy is not None
    assert m.energy.coverage == 1.0
    assert m.joules is not None
    whole = between["intel-rapl:0"]
    assert whole is not None
    assert 0.0 < m.joules <= whole
    assert whole == pytest.approx(50.0 * (end - begin) / 1e9, rel=0.3)


def test_reasons(machine: Machine, tmp_path: Path) -> None:
    """A hub without any meter says `no_source`, one whose meters may not be read `permission_denied`."""
    for denied, reason in ((False, "no_source"), (True, "permission_denied")):
        machine.serve(denied, sysfs_root=str(tmp_path / "nothing"))
        runtime = machine.runtime()
        request(runtime)
        assert runtime.wait_settled(10.0)
        assert [record.energy.reason for record in runtime.store.recent()] == [reason]
        runtime.shutdown()
        machine.stop()


def test_nothing_is_left(machine: Machine) -> None:
    """After shutdown neither a thread nor a descriptor of the program's is there, time after time."""
    machine.serve()

    def sockets() -> int:
        return sum(_is_socket(path) for path in Path("/proc/self/fd").iterdir())

    def once(most: int | None = None) -> tuple[set[str], int]:
        runtime = machine.runtime()
        request(runtime)
        assert runtime.force_flush(10.0)
        runtime.shutdown()
        until(
            lambda: machine.hub is not None and machine.hub.server is not None and not machine.hub.server.connected_now
        )
        threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("melodi")}
        if most is not None:
            until(lambda: sockets() <= most)  # the hub closes its end a moment after it has taken leave of the program
        return threads, sockets()

    first, second = once(), once()
    third = once(second[1])
    assert third[0] == second[0]
    assert third[1] <= second[1]
    assert (
        first[0] == second[0] == {"melodi-otel-hub", "melodi-otel-sampler"} | (second[0] & {"melodi-otel-neighbours"})
    )


def _is_socket(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return stat.S_ISSOCK(path.stat().st_mode)
    return False


def test_again_and_again(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """instrument(), uninstrument(), instrument(): each time a connection of its own, each time with joules."""
    hub = machine.serve()
    melodi_otel.uninstrument()
    config = machine.config(hub=str(machine.path))
    for number in (1, 2):
        runtime = melodi_otel.instrument(config=config)
        assert runtime is root.running()
        assert runtime is not None
        assert runtime.hub is not None
        request(runtime)
        assert runtime.wait_settled(10.0)
        assert len(runtime.store.recent()) == 1
        melodi_otel.uninstrument()
        assert hub.server is not None
        assert hub.server.connections == number


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_with_a_meter_of_its_own(machine: Machine) -> None:
    """With MELODI_HUB=local a forked child meters itself, whatever hubs there are."""
    machine.serve()
    runtime = machine.runtime("local")
    request(runtime)
    assert runtime.wait_settled(10.0)

    def child() -> str:
        request(runtime, tokens=2)
        settled = runtime.wait_settled(10.0)
        return f"{settled} {runtime.hub} {[record.output_tokens for record in runtime.store.recent()]}"

    assert in_child(child) == "True None [2]"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_goes_to_the_hub(machine: Machine) -> None:
    """With `auto` it has a connection of its own at its first request; the parent's goes on."""
    hub = machine.serve()
    runtime = machine.runtime()
    request(runtime)
    assert runtime.wait_settled(10.0)
    name = runtime._name

    def child() -> str:
        before = runtime.hub
        request(runtime, tokens=2)
        settled = runtime.wait_settled(10.0)
        tokens = [record.output_tokens for record in runtime.store.recent()]
        return f"{before} {runtime.hub is not None} {settled} {tokens} {runtime._name != name}"

    assert in_child(child) == "None True True [2] True"
    assert hub.server is not None
    assert hub.server.connections == 2
    request(runtime)
    assert runtime.wait_settled(10.0)
    assert len(runtime.store.recent()) == 2


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_before_the_start(machine: Machine) -> None:
    """A connection that was made before the fork is the parent's alone: two programs do not speak on one line."""
    hub = machine.serve()
    runtime = Runtime(machine.config(hub="auto"), environ={}, choice=machine.choice())
    machine.runtimes.append(runtime)

    def child() -> str:
        runtime.start()
        request(runtime)
        return f"{runtime.wait_found(10.0)} {runtime.hub is not None} {runtime.wait_settled(10.0)}"

    assert in_child(child) == "True True True"
    runtime.start()
    assert runtime.wait_found(10.0)
    request(runtime)
    assert runtime.wait_settled(10.0)
    assert hub.server is not None
    assert hub.server.connections == 2
    assert hub.server.refusals.counts == {}


def test_an_agent_appears_and_goes(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program with its own meter moves to an agent that appears, rests its own, and takes it up again when the agent dies;
    a request across both moves has the joules of all three books.
    """
    monkeypatch.setattr("melodi_otel.hub.choice.RETURN_S", 0.2)
    monkeypatch.setattr("melodi_otel.hub.moving.LOOK_S", 0.0)
    with machine.tree.live():
        runtime = machine.runtime()
        assert runtime.hub is None
        request(runtime)
        assert runtime.wait_settled(10.0)
        call = runtime.calls.begin(Begin("chat", "transformers", "long", runtime.calls.now_ns()))
        assert not threading.Event().wait(0.3)
        hub = machine.serve()
        until(lambda: request(runtime) is None and runtime.hub is not None)
        until(lambda: not runtime.station.started)
        request(runtime, 0.3)
        assert hub.server is not None
        assert hub.server.connected_now == 1
        machine.stop()
        until(lambda: runtime.hub is None and runtime.station.started)
        assert runtime.wait_found(10.0)
        assert not threading.Event().wait(0.5)
        call.end(End(runtime.calls.now_ns(), 9, "stop", ("stop",)))
        assert runtime.wait_settled(10.0)
    (record,) = [found for found in runtime.store.recent() if found.model == "long"]
    assert record.energy.total is not None
    assert record.energy.total > 0.0
    assert record.energy.coverage is not None
    assert 0.2 < record.energy.coverage < 1.0
    assert {share.device for share in record.shares} == {"intel-rapl:0"}
    request(runtime)
    assert runtime.wait_settled(10.0)


def test_its_own_meter_comes_back_whole(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A station that rested and is needed again reads meters that are open: none of its devices counts as lost."""
    with machine.tree.live():
        runtime = machine.runtime()
        station = runtime.station
        station.rest(lambda: False)
        assert not station.started
        read: list[int] = []
        closed = station.sampler
        monkeypatch.setattr(closed, "tick", lambda: read.append(1) or 0.0)
        station.begin()
        assert read == []
        assert station.wait_found(10.0)
        request(runtime, 0.4)
        assert runtime.wait_settled(10.0)
    (record,) = runtime.store.recent()
    assert [(share.device, share.reason) for share in record.shares] == [("intel-rapl:0", None)]


def test_a_station_needed_while_it_comes_to_rest(machine: Machine) -> None:
    """Where a hub dies while the station comes to rest, it begins again when it has: requests are settled."""
    runtime = machine.runtime()
    station = runtime.station
    needed = iter([False, True])
    station.rest(lambda: next(needed))
    assert station.started
    request(runtime)
    assert runtime.wait_settled(10.0)
    station.rest(lambda: True)
    assert station.started
