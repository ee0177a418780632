"""What metering costs a vLLM server: the hook in an engine's step, and two servers side by side, with and without.

``hook``: a scheduler that only says what it was told to say, bare and watched by turns, with 256 requests running; told to the
outbox of a hub's client, which nothing empties meanwhile but the clock. Beside it what the hub's ledger does with such a step.

``serve``: two real servers on this machine, the same but for ``MELODI_DISABLED=1``, that are asked by turns while the other one
stands still; CPU seconds of each process by /proc. An engine core polls while it waits: only its time under load says something.
Nothing here asserts: the targets of the design stand beside the figures.

    python bench/vllm.py [hook|serve] [--rounds 9] [--out vllm.json]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from scipy.stats import bootstrap

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import EngineId, Key
from melodi_otel.devices import Device
from melodi_otel.hub.outbox import Outbox
from melodi_otel.instrumentation.vllm.complaints import Complaints
from melodi_otel.instrumentation.vllm.scheduler import WatchedScheduler
from melodi_otel.testing.vllm_scheduler import FakeScheduler

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))  # for the tests' servers and clients
RUNNING = 256
STEPS = 200
ENGINE = EngineId("g", 1000)
OFTEN = ("OTEL_BSP_SCHEDULE_DELAY", "OTEL_METRIC_EXPORT_INTERVAL", "MELODI_SPAN_WAIT")
"""What tests set so that they need not wait."""
Rows = list[tuple[str, list[float], str]]
Plan = dict[str, tuple[int, int]]


# --- the hook ----------------------------------------------------------------------------------------------------------


def decode(turn: int) -> Plan:
    """Every request computes one token."""
    return {f"r{n}": (1, 0) for n in range(RUNNING)}


def drafts(turn: int) -> Plan:
    """Every request verifies three drafts."""
    return {f"r{n}": (4, 3) for n in range(RUNNING)}


def churn(turn: int) -> Plan:
    """Four requests are new in each step, and four that had been there are not any more."""
    names = range(4 * turn, 4 * turn + RUNNING)
    return {f"r{n}": (10 if n >= 4 * turn + RUNNING - 4 else 1, 0) for n in names}


class Side:
    """A scheduler with 256 requests whose prompts are computed, stepping one plan."""

    def __init__(self, plan: Callable[[int], Plan]) -> None:
        self._plan = plan
        self.scheduler = FakeScheduler()
        self.took: list[float] = []
        for n in range(RUNNING):
            self.scheduler.admit(f"r{n}", 100)
        self.step({f"r{n}": (100, 0) for n in range(RUNNING)})
        self.took.clear()

    def turn(self, number: int) -> None:
        if self._plan is churn:
            for n in range(4 * number, 4 * number + RUNNING):
                if f"r{n}" not in self.scheduler.requests:
                    self.scheduler.admit(f"r{n}", 10)
            for n in range(4 * (number - 1), 4 * number):
                if f"r{n}" in self.scheduler.requests:
                    self.scheduler.finish(f"r{n}")
        self.step(self._plan(number))

    def step(self, rows: Plan) -> None:
        """Only the two calls that vLLM makes are timed."""
        scheduler = self.scheduler
        output = scheduler.plan(rows)[0]
        scheduler.given = [output]
        start = time.perf_counter_ns()
        scheduler.schedule()
        scheduler.update_from_output(output, None)
        self.took.append((time.perf_counter_ns() - start) / 1e3)
        scheduler.computed(rows, dict.fromkeys(rows, 3))


def hook(rounds: int) -> Rows:
    """Watched less bare, step by step by turns; and the ledger's work for the same steps."""
    rows: Rows = []
    kinds: dict[str, tuple[Callable[[int], Plan], int, int]] = {
        "256 requests, a token each": (decode, 50, 20),
        "256 requests, three drafts each": (drafts, 150, 120),
        "256 requests, four new and four gone": (churn, 50, 20),
    }
    for name, (plan, most, most_hub) in kinds.items():
        added: list[float] = []
        late: list[float] = []
        hub: list[float] = []
        for _ in range(rounds):
            box = Outbox("g", time.monotonic_ns)
            bare, watched = Side(plan), Side(plan)
            WatchedScheduler(
                watched.scheduler,
                ENGINE,
                lambda box=box: box,
                lanes=1,
                now_ns=time.monotonic_ns,
                complaints=Complaints(),
            )
            gc.collect()
            gc.disable()
            try:
                for number in range(STEPS):
                    for side in (bare, watched) if number % 2 else (watched, bare):
                        side.turn(number)
            finally:
                gc.enable()
            # The first one tells the whole set.
            took, took_bare = watched.took[1:], bare.took[1:]
            added.append(statistics.median(took) - statistics.median(took_bare))
            late.append(statistics.quantiles(took, n=100)[98] - statistics.quantiles(took_bare, n=100)[98])
            hub.append(in_the_ledger(box))
        rows += [
            (f"{name}: hook, median (target ≤ {most})", added, "µs"),
            (f"{name}: hook, p99", late, "µs"),
            (f"{name}: ledger (target ≤ {most_hub})", hub, "µs"),
        ]
    return rows


def in_the_ledger(box: Outbox) -> float:
    """Microseconds of the ledger per step that was told to this outbox."""
    ledger = Ledger()
    ledger.device(Device("GPU-0", "gpu", idle_watts=60.0))
    now_ns = time.monotonic_ns()
    ledger.counter("GPU-0", now_ns, 0.0)
    ledger.engine(ENGINE, now_ns, "ready", devices=["GPU-0"], parameters=8e9, kv_bytes_per_token=131072.0)
    steps = list(box._outbox)
    names = {row.id for step in steps for row in (*step.prefill, *step.computed)}
    names |= {row.id for step in steps for row in step.joined}
    for name in names:
        ledger.open(Key("g", name), now_ns, engine=ENGINE, model="m")
    gc.collect()
    gc.disable()
    try:
        start = time.thread_time_ns()
        for step in steps:
            ledger.step(
                ENGINE, step.lane, step.seq, step.t0_ns, step.t1_ns, None, decode=step.decode, prefill=step.prefill,
                computed=step.computed, joined=step.joined, left=step.left,
            )  # fmt: skip
        ledger.settle(time.monotonic_ns())
        ledger.counter("GPU-0", time.monotonic_ns(), 10.0)
        ledger.settle(time.monotonic_ns())
        return (time.thread_time_ns() - start) / len(steps) / 1e3
    finally:
        gc.enable()


# --- two servers -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def servers(python: Path) -> Iterator[dict[str, Any]]:
    """One with, one without, healthy."""
    from melodi_otel.testing.nvml import build_fake_nvml
    from tests.e2e.conftest import HubPlace
    from tests.e2e.with_vllm.rig import Meters, VllmServer

    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = Path(folder) / "tiny"
        words = [sys.executable, "-m", "melodi_otel.testing.tiny_checkpoint", str(model)]
        subprocess.run(words, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"})
        library = build_fake_nvml(Path(folder))
        for side, env in (("without", {"MELODI_DISABLED": "1"}), ("with", {})):
            place = HubPlace()
            meters = Meters(place, 1, library)
            # Both share all cores: neither is bound to some of them. Telemetry goes out as often as it does by default.
            shared = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", **dict.fromkeys(OFTEN)}
            server = VllmServer(python, model, place, meters, (), {**env, **shared})
            stack.callback(server.close)
            server.ready()
            made[side] = server
        yield made


def cpu_s(server: Any) -> dict[str, float]:
    """CPU seconds so far of the server's front end, of its engine, workers included, and of its hub."""
    found = {"front end": 0.0, "engine": 0.0, "hub": 0.0}
    titles = server.pids() | {server.place.pid() or 0: "hub"}
    for pid, title in titles.items():
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            kind = "hub" if title == "hub" else "engine" if "VLLM::" in title else "front end"
            found[kind] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return found


@contextlib.contextmanager
def alone(server: Any, others: list[Any]) -> Iterator[None]:
    """Only this server runs: the processes of the others stand still, their hubs and meters go on."""
    for other in others:
        os.killpg(other.process.pid, signal.SIGSTOP)
    time.sleep(0.2)
    try:
        yield
    finally:
        for other in others:
            os.killpg(other.process.pid, signal.SIGCONT)
        time.sleep(0.5)  # and find that they have slept


def serve(rounds: int, requests: int, python: Path) -> Rows:
    """The same requests to each side by turns, who is first changing; figures of each, and their ratio."""
    found: dict[tuple[str, str], list[float]] = {}
    with servers(python) as both:
        from tests.e2e.with_vllm.clients import Ask, fire

        asks = [
            Ask(f"{n} the quick brown fox jumps", max_tokens=100, stream=n % 2 == 1, chat=n % 3 == 2)
            for n in range(requests)
        ]
        for turn in range(rounds + 1):
            order = ("without", "with") if turn % 2 else ("with", "without")
            for side in order:
                server = both[side]
                with alone(server, [other for other in both.values() if other is not server]):
                    before, start = cpu_s(server), time.monotonic()
                    answers = fire(server.url, asks, at_once=16)
                    seconds = time.monotonic() - start
                    after = cpu_s(server)
                if turn == 0:
                    continue  # warm
                tokens = sum(answer.tokens("completion") for answer in answers)
                firsts = [1e3 * answer.first_s for answer in answers if answer.ask.stream and answer.first_s]
                cuts = statistics.quantiles(firsts, n=100)
                for what, value in (
                    ("tokens/s", tokens / seconds),
                    ("front end, CPU s per 1,000 tokens", 1e3 * (after["front end"] - before["front end"]) / tokens),
                    ("engine, CPU s per 1,000 tokens", 1e3 * (after["engine"] - before["engine"]) / tokens),
                    ("hub, CPU s per 1,000 tokens", 1e3 * (after["hub"] - before["hub"]) / tokens),
                    ("time to first token, p50, ms", cuts[49]),
                    ("time to first token, p99, ms", cuts[98]),
                ):
                    found.setdefault((what, side), []).append(value)
    rows: Rows = []
    for what in dict.fromkeys(name for name, _ in found):
        rows += [(f"{what}: {side}", found[what, side], "") for side in ("without", "with")]
        ratios = [a / b for a, b in zip(found[what, "with"], found[what, "without"], strict=True) if b]
        target = " (target ≥ 0.99)" if what == "tokens/s" else ""
        if ratios:
            rows.append((f"{what}: with / without{target}", ratios, "×"))
    return rows


# --- all ---------------------------------------------------------------------------------------------------------------


def shown(values: list[float]) -> dict[str, float]:
    """Median, quartiles, and where the median lies with 95 % confidence (bootstrap)."""
    low, mid, high = statistics.quantiles(values, n=4)
    sure = bootstrap((values,), statistics.median, vectorized=False, method="percentile", rng=1).confidence_interval
    return {"median": mid, "q1": low, "q3": high, "low": float(sure.low), "high": float(sure.high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("hook", "serve"), nargs="?", default="hook")
    parser.add_argument("--rounds", type=int, default=9, help="how often all is repeated (at least 3)")
    parser.add_argument("--requests", type=int, default=160, help="of 100 tokens, per server and round")
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    given = parser.parse_args()
    python = Path(os.environ.get("MELODI_VLLM_PYTHON") or CHECKOUT / ".venv/vllm/bin/python")
    load = os.getloadavg()[0]
    if given.part == "hook":
        rows = hook(given.rounds)
    elif python.exists():
        rows = serve(given.rounds, given.requests, python)
    else:
        sys.exit(f"{python} is not there: `scripts/venv vllm torch` makes it")
    figures = {name: {**shown(values), "unit": unit} for name, values, unit in rows}
    print(f"{platform.machine()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, load {load:.1f} before\n")
    for name, of in figures.items():
        print(
            f"{name:<70} {of['median']:9.3f} {of['unit']:<2} quartiles {of['q1']:.3f} to {of['q3']:.3f}, "
            f"median within {of['low']:.3f} to {of['high']:.3f}"
        )
    if given.out is not None:
        given.out.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
