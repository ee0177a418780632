"""What metering costs: added to a request, per generated token, per engine step, per second of sampling.

Each comparison is made in one run with the two sides taking turns, and repeated; the table shows the median of the rounds and
the spread between their quartiles, because a busy machine moves every absolute figure. Times are CPU times of the thread that
pays, without the garbage collector. Nothing here asserts: the targets of the design stand beside the figures.

    python bench/cost.py [--rounds 15] [--out cost.json]
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Decode, EngineId, Joined, Key
from melodi_otel.config import Config
from melodi_otel.devices import Device
from melodi_otel.instrumentation.seam import Begin, End
from melodi_otel.runtime import Runtime
from melodi_otel.testing.nvml import FakeGpu, FakeNvml
from melodi_otel.testing.powercap import FakePowercap
from melodi_otel.trace.read import lines_of
from melodi_otel.trace.record import Recorder
from melodi_otel.trace.replay import replay

REQUESTS = 400
STEPS = 400
RUNNING = 256


class Nowhere(SpanExporter):
    """Takes spans and drops them."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def provider() -> TracerProvider:
    """A provider as a server has it: batches."""
    made = TracerProvider()
    made.add_span_processor(BatchSpanProcessor(Nowhere()))
    return made


ATTRIBUTES: dict[str, Any] = {
    "gen_ai.request.max_tokens": 512,
    "gen_ai.request.temperature": 0.7,
    "gen_ai.request.top_p": 0.9,
    "gen_ai.request.top_k": 50.0,
    "gen_ai.request.seed": 1,
    "gen_ai.request.choice.count": 2,
    "gen_ai.request.stream": True,
    "gen_ai.output.type": "text",
}


def timed(work: Callable[[], None], count: int) -> float:
    """Microseconds of this thread per call.

    CPU time, so that neither other programs nor our own threads are counted as the request's, and without the cyclic garbage
    collector, whose rare full runs (100 ms in a process with a large heap) hit whichever side is running then.
    """
    gc.collect()
    gc.disable()
    try:
        start = time.thread_time_ns()
        for _ in range(count):
            work()
        return (time.thread_time_ns() - start) / count / 1e3
    finally:
        gc.enable()


def request_cost(runtime: Runtime, rounds: int) -> list[tuple[str, list[float], str]]:
    """A bare span with 16 attributes against a metered request whose span has the same."""
    bare_tracer = provider().get_tracer("bare")
    calls = runtime.calls

    def bare() -> None:
        span = bare_tracer.start_span("text_completion m", attributes={"gen_ai.operation.name": "chat", **ATTRIBUTES})
        span.set_attribute("gen_ai.provider.name", "transformers")
        span.set_attributes(
            {
                "gen_ai.request.model": "m",
                "gen_ai.usage.input_tokens": 12,
                "gen_ai.usage.output_tokens": 512,
                "gen_ai.usage.cache_read.input_tokens": 0,
                "gen_ai.response.finish_reasons": ("stop",),
                "gen_ai.response.time_to_first_chunk": 0.1,
            }
        )
        span.end()

    def metered() -> None:
        now = calls.now_ns()
        call = calls.begin(Begin("chat", "transformers", "m", now, ATTRIBUTES, prompt_tokens=12, cached_tokens=0))
        with call.active():
            pass
        call.end(End(calls.now_ns(), 512, "stop", ("stop",), first_token_ns=now))

    timed(bare, 50), timed(metered, 50)
    runtime.wait_settled()
    sides: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        # Short turns: what the machine does to one side it does to the other.
        both = [(timed(bare, REQUESTS // 8), timed(metered, REQUESTS // 8)) for _ in range(8)]
        sides[0].append(statistics.median(a for a, _ in both))
        sides[1].append(statistics.median(b for _, b in both))
        runtime.wait_settled()
    ratio = [(b - a) / a for a, b in zip(*sides, strict=True)]
    return [
        ("bare span, 16 attributes", sides[0], "µs"),
        ("metered request, same attributes", sides[1], "µs"),
        ("added, in bare spans (target ≤ 1)", ratio, "x"),
    ]


def token_cost(runtime: Runtime, rounds: int) -> list[tuple[str, list[float], str]]:
    """One tick of the step clock, and a whole generate() with and without metering, taking turns."""
    import torch
    from transformers import GenerationMixin

    from melodi_otel.testing import tiny_model

    torch.set_num_threads(1)
    model, tokenizer = tiny_model.llama(), tiny_model.tokenizer()
    inputs = tokenizer("the quick brown fox", return_tensors="pt")
    tokens = 128

    def generate() -> None:
        model.generate(**inputs, max_new_tokens=tokens, do_sample=False)

    generate()
    added: list[float] = []
    noise: list[float] = []
    for _ in range(rounds):
        off = timed(generate, 2)
        runtime.instrument_libraries()
        on = timed(generate, 2)
        runtime.uninstrument_libraries()
        again = timed(generate, 2)
        added.append((on - (off + again) / 2) / tokens)
        noise.append((again - off) / tokens)
    runtime.wait_settled()
    # The model's own time hides a microsecond, so the same call is made with a loop in the model's place that does nothing
    # but ask, as the generation loop does, whether sequences are unfinished.
    mixin = GenerationMixin
    real, long = mixin.generate, 2000
    ids = torch.zeros((1, long + 5), dtype=torch.long)
    device = ids.device

    def asking(self: Any, *_: Any, **__: Any) -> Any:
        for _ in range(long + 1):
            self._has_unfinished_sequences(False, False, device=device)
        return ids

    mixin.generate = asking
    ticks: list[float] = []
    try:
        for _ in range(rounds):
            off = timed(generate, 3)
            runtime.instrument_libraries()
            on = timed(generate, 3)
            runtime.uninstrument_libraries()
            ticks.append((on - off) / long)
    finally:
        mixin.generate = real
    runtime.wait_settled()
    return [
        ("added per generated token, model replaced by nothing (target ≤ 2)", ticks, "µs"),
        ("added per token of a real generate() of 128", added, "µs"),
        ("the same without metering, A against A: the noise of that", noise, "µs"),
    ]


def step_cost(rounds: int) -> list[tuple[str, list[float], str]]:
    """The ledger's own work per engine step of 256 decode rows, drained and settled once per 10 steps."""
    hook: list[float] = []
    close: list[float] = []
    for _ in range(rounds):
        ledger = Ledger(patience_s=None)
        ledger.device(Device("GPU-0", "gpu", idle_watts=60.0))
        engine = EngineId("g", 0)
        ledger.engine(engine, 0, model="m", devices=("GPU-0",))
        ledger.counter("GPU-0", 0, 0.0)
        names = [f"r{n}" for n in range(RUNNING)]
        for name in names:
            ledger.open(Key("g", name), 0, engine=engine, prompt_tokens=100)
        ledger.settle(0)
        joined = [Joined(name, 100) for name in names]
        told = settled = 0
        for n in range(STEPS):
            start = time.perf_counter_ns()
            ledger.step(
                engine, 0, n + 1, n * 10_000_000, (n + 1) * 10_000_000, decode=Decode(RUNNING, 0), joined=joined
            )
            told += time.perf_counter_ns() - start
            joined = []
            if n % 10 == 9:
                ledger.counter("GPU-0", (n + 1) * 10_000_000, 3.0 * (n + 1))
                start = time.perf_counter_ns()
                ledger.settle((n + 1) * 10_000_000)
                settled += time.perf_counter_ns() - start
        hook.append(told / STEPS / 1e3)
        close.append(settled / STEPS / 1e3)
    return [
        ("step of 256 rows: telling the ledger (target ≤ 50)", hook, "µs"),
        ("step of 256 rows: settling it, fit included (target ≤ 20)", close, "µs"),
    ]


def sampler_cost(seconds: float) -> list[tuple[str, list[float], str]]:
    """CPU of the sampler's thread at 10 Hz with eight GPUs and two packages with DRAM, a block being measured."""
    with tempfile.TemporaryDirectory() as directory:
        tree = FakePowercap(Path(directory) / "sys")
        for number in range(2):
            tree.dram(tree.package(number, watts=90.0), watts=5.0)
        gpus = [FakeGpu(f"GPU-{n:08x}-fa4e-4000-8000-000000000000", watts=300.0) for n in range(8)]
        fake = FakeNvml(Path(directory) / "nvml", gpus, monotonic=True)
        config = Config(sysfs_root=str(tree.root), nvml_library=str(fake.library), sources=("nvml", "rapl"))
        runtime = Runtime(config, environ={})
        runtime.start()
        found: list[float] = []
        with tree.live(0.01), runtime.measure("sampling"):
            time.sleep(2.0)
            for _ in range(5):
                before = runtime.sampler.cost.cpu_s
                time.sleep(seconds / 5)
                found.append(100 * (runtime.sampler.cost.cpu_s - before) / (seconds / 5))
        runtime.shutdown()
        fake.close()
    return [("sampler, 8 GPUs + 2 packages + DRAM, 10 Hz, of one core (target ≤ 0.5)", found, "%")]


def record_cost(rounds: int) -> list[tuple[str, list[float], str]]:
    """Recording 100 steps a second of 256 rows, flushed as it runs: percent of a core; and replaying what was recorded."""
    plain: list[float] = []
    packed: list[float] = []
    replayed: dict[int, list[float]] = {8: [], RUNNING: []}
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        for _ in range(rounds):
            packed.append(_record(place / "trace.jsonl.gz", RUNNING, STEPS))
            plain.append(_record(place / "trace.jsonl", RUNNING, STEPS))
            _record(place / "small.jsonl", 8, 20 * STEPS)
            for members, name in ((RUNNING, "trace.jsonl"), (8, "small.jsonl")):
                start = time.thread_time_ns()
                count = 0
                for count, _line in enumerate(replay(_counted(lines_of([place / name]), seen := [0])), 1):
                    pass
                assert count
                replayed[members].append(seen[0] / ((time.thread_time_ns() - start) / 1e9))
    return [
        ("recording 100 steps a second of 256 rows, of one core (target ≤ 2)", plain, "%"),
        ("the same, packed (.gz)", packed, "%"),
        (
            "replaying steps of 256 rows: rows (target ≥ 500,000)",
            [lines * RUNNING for lines in replayed[RUNNING]],
            "1/s",
        ),
        ("replaying steps of 8 rows: lines (target ≥ 20,000)", replayed[8], "1/s"),
    ]


def _record(path: Path, members: int, steps: int) -> float:
    """Percent of a core at 100 steps a second."""
    recorder, engine = Recorder(path), EngineId("g", 0)
    recorder.tap("device", (Device("GPU-0", "gpu", idle_watts=60.0),))
    joined = [Joined(f"chatcmpl-{n:016x}", 100) for n in range(members)]
    start = time.thread_time_ns()
    for n in range(steps):
        times = (n * 10_000_000, (n + 1) * 10_000_000)
        recorder.tap("step", (engine, 0, n, *times, ("GPU-0",), Decode(members, 0), (), (), joined, ()))
        joined = []
        if n % 10 == 9:
            recorder.tap("counter", ("GPU-0", times[1], 3.0 * n, None))
            recorder.flush()
    spent = (time.thread_time_ns() - start) / 1e9
    recorder.close()
    return spent / (steps / 100.0) * 100.0


def _counted(lines: Iterable[bytes], seen: list[int]) -> Iterator[bytes]:
    for line in lines:
        seen[0] += 1
        yield line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of the sampler's measurement")
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        tree = FakePowercap(Path(directory) / "sys")
        tree.package(0, watts=50.0)
        config = Config(sysfs_root=str(tree.root), sources=("rapl",))
        runtime = Runtime(config, environ={}, tracer_provider=provider())
        runtime.start()
        with tree.live(0.01):
            rows = request_cost(runtime, options.rounds) + token_cost(runtime, options.rounds)
            runtime.shutdown()
    few = max(3, options.rounds // 3)
    rows += step_cost(few) + record_cost(few) + sampler_cost(options.seconds)
    print(f"{platform.machine()}, Python {platform.python_version()}, {options.rounds} rounds, sides taking turns\n")
    print("| what | median | quartiles | unit |\n|---|---|---|---|")
    for name, values, unit in rows:
        low, _, high = statistics.quantiles(values, n=4)
        print(f"| {name} | {statistics.median(values):.3g} | {low:.3g} … {high:.3g} | {unit} |")
    if options.out:
        options.out.write_text(json.dumps({name: {"unit": unit, "values": v} for name, v, unit in rows}, indent=1))


if __name__ == "__main__":
    main()
