"""A fleet to try dashboards and alerts on: simulated servers, metered by the real path, on a machine without a GPU.

    python examples/simulated_fleet.py --servers 3 --seconds 600

Every server is a process with a fake NVML library whose boards draw what the simulated batches need, the real sampler, ledger and
scrape endpoint, and requests of three tenants and two models. It prints the endpoints for Prometheus. Power and lengths are
invented; only the metering is real. Needs gcc, for the fake library.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import signal
import tempfile
import time
from pathlib import Path

from melodi_otel.attribution.meter import Decode, EngineId, Joined, Prefill
from melodi_otel.config import Config
from melodi_otel.instrumentation.seam import Begin, End, OpenCall
from melodi_otel.publishing import Publisher
from melodi_otel.runtime import Runtime
from melodi_otel.testing.nvml import FakeGpu, FakeNvml

MODELS = (("llama-3.1-8b", 2.0, 0.012), ("llama-3.3-70b", 0.7, 0.045))
"""(model, requests a second, seconds a step takes), one board each."""
TENANTS = ("acme", "globex", "initech")
IDLE_W, FIXED_W, SEQUENCE_W, MOST_W = 60.0, 120.0, 14.0, 520.0
STEP_S = 0.1
"""Steps are told in bursts so often: a power script has room for an hour of that."""


class Server:
    """One model on one board of a fake library."""

    def __init__(self, runtime: Runtime, fake: FakeNvml, number: int, chance: random.Random) -> None:
        self.model, self.rate, self.step_s = MODELS[number]
        self.runtime, self.fake, self.number, self.chance = runtime, fake, number, chance
        self.engine = EngineId(runtime.calls.group, number)
        self.running: dict[str, tuple[OpenCall, int, int]] = {}
        self.left: list[str] = []
        self.seq = 0
        self.next_s = 0.0
        self.watts = 0.0
        meter = runtime.calls.meter
        device = list(runtime.devices())[number]
        meter.engine(
            self.engine, runtime.calls.now_ns(), state="ready", model=self.model, devices=(device,), parameters=8e9
        )

    def turn(self, now_s: float, until_s: float) -> None:
        """Steps from ``now_s`` to ``until_s`` (monotonic), and the power they need."""
        prefill: list[Prefill] = []
        joined: list[Joined] = []
        while self.next_s <= now_s:
            prompt, output = self.chance.randint(20, 900), self.chance.randint(10, 400)
            call = self.runtime.calls.begin(
                Begin(
                    "chat", "simulated", self.model, self.runtime.calls.now_ns(), prompt_tokens=prompt,
                    engine=self.engine, user=self.chance.choice(TENANTS),
                )
            )  # fmt: skip
            self.running[call.key.request] = (call, 0, output)
            prefill.append(Prefill(call.key.request, prompt, 0))
            self.next_s = max(self.next_s, now_s) + self.chance.expovariate(self.rate)
        new = {row.id for row in prefill}
        t0 = now_s
        while t0 < until_s and self.running:
            t1 = t0 + self.step_s
            self.seq += 1
            members = len(self.running) - len(prefill)
            self.runtime.calls.meter.step(
                self.engine, 0, self.seq, round(t0 * 1e9), round(t1 * 1e9),
                decode=Decode(members, 0), prefill=prefill, joined=joined, left=self.left,
            )  # fmt: skip
            joined = [Joined(row.id, row.tokens) for row in prefill]
            prefill, self.left = [], []
            for name, (call, made, output) in list(self.running.items()):
                if name in new:
                    new.discard(name)
                    continue
                if made + 1 < output:
                    self.running[name] = (call, made + 1, output)
                    continue
                del self.running[name]
                self.left.append(name)
                call.end(End(round(t1 * 1e9), output, "stop", ("stop",)))
            t0 = t1
        watts = IDLE_W if not self.running else min(MOST_W, IDLE_W + FIXED_W + SEQUENCE_W * len(self.running))
        if abs(watts - self.watts) > 20.0:
            self.watts = watts
            self.fake.watts(self.number, watts)
            self.fake.load(self.number, utilization=min(1.0, 0.1 * len(self.running)), memory_used=40 << 30)

    def close(self) -> None:
        """Give up what still runs."""
        for call, made, _ in self.running.values():
            call.end(End(self.runtime.calls.now_ns(), made, "abort"))


def serve(number: int, address: str, port: int, seconds: float, budget: str, ready: multiprocessing.Queue[str]) -> None:
    """One host: its boards, its meter, its endpoint."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chance = random.Random(number)  # noqa: S311  # a load, no secret
    gpus = [
        FakeGpu(f"GPU-{number:04d}{board:04d}-0000-4000-8000-000000000000", watts=IDLE_W)
        for board in range(len(MODELS))
    ]
    with tempfile.TemporaryDirectory() as place:
        fake = FakeNvml(Path(place), gpus, monotonic=True)
        config = Config.from_env({
            "MELODI_NVML_LIBRARY": str(fake.library),
            "MELODI_SOURCES": "nvml",
            "MELODI_HUB": "local",
            "MELODI_HOST_ID": f"simulated-{number}",
            "MELODI_METRICS_ADDR": f"{address}:{port}",
            "MELODI_LABELS": "tenant=user",
            "MELODI_METRIC_LABELS": "tenant",
            "MELODI_CARBON_INTENSITY": "380",
            "MELODI_PUE": "1.2",
            "MELODI_ENERGY_PRICE": "0.28",
            **({"MELODI_ENERGY_BUDGET": budget} if budget else {}),
        })  # fmt: skip
        runtime = Runtime(
            config,
            environ={"MELODI_HOST_ID": f"simulated-{number}", "OTEL_SERVICE_NAME": "fleet"},
            # They share this machine and play hosts of their own.
            publisher=Publisher(f"melodi-otel/simulated-{os.getpid()}"),
        )
        runtime.start()
        runtime.wait_found(10.0)
        servers = [Server(runtime, fake, board, chance) for board in range(len(gpus))]
        ready.put(runtime.endpoint_url or "")
        begin = last = time.monotonic()
        try:
            while last - begin < seconds:
                time.sleep(STEP_S)
                now = time.monotonic()
                for server in servers:
                    server.turn(last, now)
                last = now
        except KeyboardInterrupt:
            pass
        finally:
            for server in servers:
                server.close()
            runtime.wait_settled(5.0)
            books = runtime.snapshot().books.values()
            joules = sum(book.attributed for book in books), sum(book.measured for book in books)
            print(f"simulated-{number}: {joules[0]:.0f} J of {joules[1]:.0f} J were requests'")
            runtime.shutdown()
            fake.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--servers", type=int, default=1, help="hosts with two boards each")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long, an hour at most")
    parser.add_argument("--port", type=int, default=0, help="of the first endpoint; 0: the system chooses all of them")
    parser.add_argument("--address", default="127.0.0.1", help="where the endpoints listen")
    parser.add_argument("--first", type=int, default=0, help="number of the first host")
    parser.add_argument("--budget", default="", help="MELODI_ENERGY_BUDGET of all of them")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    ready: multiprocessing.Queue[str] = context.Queue()
    hosts = [
        context.Process(
            target=serve,
            args=(
                options.first + n,
                options.address,
                options.port and options.port + n,
                min(3600.0, options.seconds),
                options.budget,
                ready,
            ),
        )
        for n in range(options.servers)
    ]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for host in hosts:
        host.start()
    try:
        for _ in hosts:
            print(ready.get(timeout=60), flush=True)
        for host in hosts:
            host.join()
    except KeyboardInterrupt:
        for host in hosts:
            host.terminate()
        for host in hosts:
            host.join()


if __name__ == "__main__":
    main()
