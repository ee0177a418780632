"""What a hub costs: messages a second on one core, the way from a reading to the joules, the journal, the client, being idle.

A hub's server with a ledger of three devices runs in a process of its own; its meters are moved by hand, ten times a second.
Comparisons are made in one run with the sides taking turns, and all is repeated; the table shows the median and the quartiles.
Nothing here asserts: the targets of the design stand beside the figures.

    python bench/hub.py [--rounds 7] [--out hub.json]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Decode, EngineId, Joined, Key, Share
from melodi_otel.devices import Device
from melodi_otel.hub import wire
from melodi_otel.hub.client import HubClient
from melodi_otel.hub.journal import Journal
from melodi_otel.hub.server import Host, Server
from melodi_otel.hub.sockets import connect, listen, peer
from melodi_otel.testing.powercap import FakePowercap

DEVICES = (
    Device("GPU-0", "gpu", idle_watts=60.0),
    Device("cpu", "cpu", idle_watts=20.0),
    Device("dram", "memory", idle_watts=2.0),
)
RUNNING = 256
Rows = list[tuple[str, list[float], str]]


class Hub:
    """A server in this process, with counters that are moved by hand."""

    def __init__(self, place: Path) -> None:
        self.ledger = Ledger(host_devices=("cpu", "dram"))
        for device in DEVICES:
            self.ledger.device(device)
        self.reads: deque[int] = deque(maxlen=1000)
        self.read()
        self.path = place / "hub.sock"
        self.listener = listen(self.path, mode=0o600)
        self.journal = Journal(place / "journal")
        host = Host(
            "shared", "0", "bench", lambda: DEVICES, lambda: False, lambda: 5.0, lambda: None, self.status,
            lambda _session, _told: None, lambda _group, _pid: None, lambda _group, _pid: None, lambda: None,
        )  # fmt: skip
        self.server = Server(self.listener, self.ledger, host, self.journal, peer=_peer)

    def read(self) -> None:
        now_ns = time.monotonic_ns()
        for device in DEVICES:
            self.ledger.counter(device.id, now_ns, now_ns / 1e7)
        self.reads.append(now_ns)

    def status(self) -> dict[str, Any]:
        """What the bench asks a hub in a process of its own."""
        took = sum(session.messages for session in self.server._sessions)
        refused = dict(self.server.refusals.counts)
        return {"cpu_s": time.process_time(), "messages": took, "refused": refused, "reads": list(self.reads)}

    def close(self) -> None:
        self.server.stop(5.0)
        self.listener.close()


def _peer(sock: socket.socket) -> tuple[int, int | None]:
    found = peer(sock)
    return (0, None) if found is None else (found.pid, found.uid)


def serve(place: Path) -> None:
    """The hub's process: reads ten times a second until its standard input ends."""
    hub = Hub(place)
    hub.server.start()
    over = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    print("ready", flush=True)
    while not over.wait(0.1):
        hub.read()
        hub.server.moved()
    hub.close()


@contextlib.contextmanager
def another(place: Path) -> Generator[Path]:
    """A hub in a process of its own; its socket."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", str(place)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield place / "hub.sock"
    finally:
        process.stdin.close()
        process.wait(10)


class Raw:
    """A connection that sends frames made beforehand."""

    def __init__(self, path: Path, name: str) -> None:
        self.sock = connect(path, 30.0)
        self.frames = wire.Frames(wire.ToProgram)
        self.number = 0
        self.inbox: list[Any] = []
        self.say([wire.Hello(wire.VERSION, "0", name, "g", True, None, None, False, [])])
        self.hear(wire.Welcome)

    def say(self, messages: list[Any]) -> None:
        for frame in wire.encode_all(self.number, messages):
            self.sock.sendall(frame)
            self.number += 1

    def hear(self, kind: type[Any]) -> Any:
        while True:
            while self.inbox:
                message = self.inbox.pop(0)
                if isinstance(message, wire.Settled):
                    self.say([wire.Got(message.number)])
                if isinstance(message, kind):
                    return message
            data = self.sock.recv(1 << 18)
            assert data, "the hub hung up"
            self.inbox += self.frames.feed(data)

    def status(self) -> dict[str, Any]:
        self.say([wire.StatusAsked(1)])
        found: dict[str, Any] = json.loads(self.hear(wire.StatusAnswered).text)
        return found


def opened(request: str, engine: int = 1, *, probed: bool = False) -> wire.Opened:
    now_ns = time.monotonic_ns()
    labels = {"gen_ai.provider.name": "vllm", "service.name": "bench"}
    return wire.Opened(request, now_ns, engine, ["GPU-0"], "m", 100, 0, labels, None, False, probed, None)


def closed(request: str) -> wire.Closed:
    return wire.Closed(request, time.monotonic_ns(), 40, "stop", None, None, None)


def capacity(path: Path, rounds: int) -> Rows:
    """Messages per second of the hub's CPU, the settling and telling of what they ask for included."""
    mixed: list[float] = []
    alone: list[float] = []
    steps: list[float] = []
    for number in range(rounds):
        program = Raw(path, f"mixed{number}")
        before = program.status()
        start_ns = time.monotonic_ns()
        for turn in range(200):  # 20,000 messages a second for two seconds: 20 requests come and go in each 10 ms
            time.sleep(max(0.0, (start_ns + turn * 10_000_000 - time.monotonic_ns()) / 1e9))
            now_ns = time.monotonic_ns()
            batch: list[Any] = [opened(f"r{turn}-{n}") for n in range(20)]
            for back in range(8):
                batch += [
                    wire.Progressed(f"r{turn - back}-{n}", now_ns, 5 * back, None, 100, 0)
                    for n in range(20)
                    if turn >= back
                ]
            batch += [closed(f"r{turn - 9}-{n}") for n in range(20) if turn >= 9]
            program.say(batch)
        time.sleep(0.5)  # what it took to take them, and to settle them
        after = program.status()
        assert not after["refused"], after
        mixed.append((after["messages"] - before["messages"]) / (after["cpu_s"] - before["cpu_s"]))
        # Of the same rate only progress, of a few requests: what a message costs by itself.
        program.say([opened(f"p{n}") for n in range(10)])
        before = program.status()
        start_ns = time.monotonic_ns()
        for turn in range(200):
            time.sleep(max(0.0, (start_ns + turn * 10_000_000 - time.monotonic_ns()) / 1e9))
            now_ns = time.monotonic_ns()
            program.say([wire.Progressed(f"p{n % 10}", now_ns + n, turn, None, 100, 0) for n in range(200)])
        after = program.status()
        alone.append((after["messages"] - before["messages"]) / (after["cpu_s"] - before["cpu_s"]))
        program.sock.close()
        stepping = Raw(path, f"steps{number}")
        stepping.say([opened(f"s{n}") for n in range(RUNNING)])
        before = stepping.status()
        many = 300
        for n in range(many):
            joined = [Joined(f"s{m}", 100) for m in range(RUNNING)] if n == 0 else [Joined(f"s{n % RUNNING}", 100)]
            left = [] if n == 0 else [f"s{n % RUNNING}"]
            t1_ns = time.monotonic_ns()
            stepping.say(
                [wire.Stepped(1, 0, n, t1_ns - 10_000, t1_ns, ["GPU-0"], Decode(RUNNING, 0), [], [], joined, left)]
            )
            time.sleep(0.01)
        time.sleep(0.3)
        after = stepping.status()
        steps.append(1e6 * (after["cpu_s"] - before["cpu_s"]) / many)
        stepping.sock.close()
        time.sleep(1.0)
    return [
        ("opens, progress and closes (1 : 8 : 1) a second, on one core (target ≥ 20,000)", mixed, "1/s"),
        ("progress of 10 requests a second, on one core: messages by themselves", alone, "1/s"),
        ("step of 256 sequences, 100 a second, all of the hub's work for it", steps, "µs"),
    ]


def latency(path: Path, rounds: int) -> Rows:
    """From the reading that covers an end to the joules at the program, with 256 others open."""
    client, others, asker = member(path, "client"), member(path, "others"), Raw(path, "asker")
    tokens = [0]

    def probe() -> int:
        tokens[0] += 1
        return tokens[0]

    engine = EngineId("g", 1)
    found: dict[bool, list[list[float]]] = {False: [], True: []}
    for turn in range(rounds):
        for probed, all_of_it in found.items():
            for n in range(RUNNING):
                # Without an engine there is nothing to ask for; with one, its tokens are evidence that is waited for.
                key, on = Key("g", f"o{turn}{probed}{n}"), engine if probed else None
                others.open(
                    key, time.monotonic_ns(), engine=on, devices=["GPU-0"], model="m", probe=probe if probed else None
                )
            time.sleep(0.3)
            ends: list[tuple[int, list[int]]] = []
            futures: list[Future[list[Share]]] = []
            for number in range(150):
                key = Key("g", f"{turn}{probed}{number}")
                client.open(key, time.monotonic_ns(), devices=["GPU-0"], model="m")
                time.sleep(0.027)
                close_ns, done = time.monotonic_ns(), list[int]()
                future = client.close(key, close_ns, 5, "stop")
                future.add_done_callback(lambda _, done=done: done.append(time.monotonic_ns()))
                futures.append(future)
                ends.append((close_ns, done))
            for future in futures:
                future.result(30)
            time.sleep(0.1)
            reads = asker.status()["reads"]
            waits = [(done[0] - next(read for read in reads if read >= close_ns)) / 1e6 for close_ns, done in ends]
            all_of_it.append(waits)
            for request in list(others.opened):
                others.close(Key("g", request), time.monotonic_ns(), 5, "stop")
            time.sleep(0.5)
    for one in (client, others):
        one.hang_up(5.0)
    asker.sock.close()

    def part(probed: bool, q: int) -> list[float]:
        return [statistics.quantiles(waits, n=100)[q - 1] for waits in found[probed]]

    return [
        ("reading → joules at the program, 256 others open: median", part(False, 50), "ms"),
        ("the same: p99 (target ≤ 50)", part(False, 99), "ms"),
        ("the same, and the 256 are asked for their tokens first: median", part(True, 50), "ms"),
        ("the same, and the 256 are asked for their tokens first: p99 (target ≤ 50)", part(True, 99), "ms"),
    ]


def member(path: Path, name: str) -> HubClient:
    """A program's client, connected."""
    made = HubClient(
        lambda: connect(path, 5.0),
        wire.Hello(wire.VERSION, "0", name, "g", True, None, None, False, []),
        welcomed=lambda _welcome, _resumed: None,
        lost=lambda _client, _why: None,
        wait_s=lambda: 5.0,
    )
    made.start()
    assert made.known.wait(10)
    return made


def journal_cost(place: Path, rounds: int) -> Rows:
    """State and journal of 256 open requests on three devices."""
    hub = Hub(place / "j")
    for n in range(RUNNING):
        hub.ledger.open(
            Key("1:g:n", f"r{n}"), time.monotonic_ns(), engine=EngineId("1:g:n", 1), devices=["GPU-0"], model="m"
        )
    time.sleep(0.01)
    hub.read()
    hub.ledger.settle(time.monotonic_ns() + 10**9)
    made: list[float] = []
    written: list[float] = []
    for _ in range(rounds):
        made.append(timed(lambda: hub.ledger.state(0), 20) / 1e3)
        state = hub.ledger.state(0)
        written.append(timed(lambda state=state: hub.journal.save("h", state, []), 20) / 1e3)
    hub.listener.close()
    return [
        ("state of the books, 256 open on 3 devices", made, "ms"),
        ("writing it to the journal", written, "ms"),
    ]


def timed(work: Callable[[], Any], count: int) -> float:
    """Microseconds of this thread per call, without the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        start = time.thread_time_ns()
        for _ in range(count):
            work()
        return (time.thread_time_ns() - start) / count / 1e3
    finally:
        gc.enable()


def client_cost(path: Path, rounds: int) -> Rows:
    """What the program's own thread pays, with a hub and with a ledger in the process."""
    client = member(path, "cost")
    ledger = Ledger(host_devices=("cpu", "dram"))
    for device in DEVICES:
        ledger.device(device)
    engine = EngineId("g", 1)
    count = [0]

    def request(meter: Any) -> None:
        count[0] += 1
        key = Key("g", str(count[0]))
        meter.open(key, time.monotonic_ns(), engine=engine, devices=("GPU-0",), model="m", prompt_tokens=100)
        meter.close(key, time.monotonic_ns(), 40, "stop")

    def step(meter: Any) -> None:
        count[0] += 1
        now_ns = time.monotonic_ns()
        meter.step(engine, 0, count[0], now_ns, now_ns, ("GPU-0",), decode=Decode(RUNNING, 0))

    found: dict[str, list[float]] = {}
    for _ in range(rounds):
        turns: dict[str, list[float]] = {}
        for _ in range(8):
            for name, work in (("request", request), ("step", step)):
                for side, meter in (("hub", client), ("local", ledger)):
                    turns.setdefault(f"{name} {side}", []).append(
                        timed(lambda work=work, meter=meter: work(meter), 200)
                    )
            ledger.settle(time.monotonic_ns())
            while client._outbox:
                time.sleep(0.002)
        for name, values in turns.items():
            found.setdefault(name, []).append(statistics.median(values))
    client.hang_up(5.0)
    return [
        ("open and close, told to a hub", found["request hub"], "µs"),
        ("open and close, told to a ledger in the process", found["request local"], "µs"),
        ("step, told to a hub", found["step hub"], "µs"),
        ("step, told to a ledger in the process", found["step local"], "µs"),
    ]


def idle_cost(place: Path, rounds: int, seconds: float) -> Rows:
    """CPU of a real shared hub that nobody uses: two packages with DRAM, one program connected."""
    tree = FakePowercap(place / "sys")
    for number in range(2):
        tree.dram(tree.package(number, watts=90.0), watts=5.0)
    path = place / "idle.sock"
    environ = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("MELODI_", "OTEL_"))},
        "MELODI_SYSFS_ROOT": str(tree.root),
        "MELODI_SOURCES": "rapl",
        "MELODI_METRICS_ADDR": "off",
    }
    process = subprocess.Popen([sys.executable, "-m", "melodi_otel.runtime", "hub", str(path)], env=environ)
    try:
        while not path.exists():
            time.sleep(0.05)
        time.sleep(0.5)
        program = Raw(path, "idle")
        time.sleep(4.0)  # the afterglow of the start
        found: list[float] = []
        for _ in range(rounds):
            before = _cpu_s(process.pid)
            time.sleep(seconds)
            found.append(100 * (_cpu_s(process.pid) - before) / seconds)
        program.sock.close()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    return [("a shared hub, idle, one program connected, of one core", found, "%")]


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=5.0, help="length of each measurement of the idle hub")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    parser.add_argument("--only", help="parts to measure, of: capacity latency journal client idle")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    parts = (options.only or "capacity latency journal client idle").split()
    rows: Rows = []
    place = Path(tempfile.mkdtemp(prefix="hub", dir="/tmp"))
    try:
        for name in ("a", "c/j", "d"):
            (place / name).mkdir(parents=True)
        if {"capacity", "latency", "client"} & set(parts):
            with another(place / "a") as path:
                rows += capacity(path, options.rounds) if "capacity" in parts else []
                rows += latency(path, options.rounds) if "latency" in parts else []
                rows += client_cost(path, options.rounds) if "client" in parts else []
        rows += journal_cost(place / "c", options.rounds) if "journal" in parts else []
        rows += idle_cost(place / "d", options.rounds, options.seconds) if "idle" in parts else []
    finally:
        shutil.rmtree(place)
    print(f"{platform.machine()}, Python {platform.python_version()}, {options.rounds} rounds, sides taking turns\n")
    print("| what | median | quartiles | unit |\n|---|---|---|---|")
    for name, values, unit in rows:
        low, _, high = statistics.quantiles(values, n=4)
        print(f"| {name} | {statistics.median(values):.3g} | {low:.3g} … {high:.3g} | {unit} |")
    if options.out:
        options.out.write_text(json.dumps({name: {"unit": unit, "values": v} for name, v, unit in rows}, indent=1))


if __name__ == "__main__":
    main()
