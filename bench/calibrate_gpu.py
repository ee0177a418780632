"""Calibrate an NVIDIA GPU's meter: what NVML costs, how its counter moves, and what a batch saves.

    python bench/calibrate_gpu.py --out gpu.json

Prints a Markdown table for every GPU that is visible and writes the same figures as JSON. The NVML half needs
nvidia-ml-py only; the half that puts a load on the GPU also needs torch with CUDA and is left out, with its reason, where
that is missing. Exit code 2: there is no GPU to calibrate.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from melodi_otel.clock import SystemClock
from melodi_otel.config import Config
from melodi_otel.errors import MelodiError, Refused
from melodi_otel.sources import nvml_library as lib
from melodi_otel.sources.base import Settings
from melodi_otel.sources.nvml import open_nvml

MISSING_CALL = "not supported"


class Time(Protocol):
    """What polling needs of a clock."""

    def monotonic_ns(self) -> int: ...
    def sleep(self, seconds: float) -> None: ...


class HostTime:
    def monotonic_ns(self) -> int:
        return time.monotonic_ns()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass
class Row:
    """One figure: what, how much, in which unit, and how it spreads (5th and 95th percentile)."""

    what: str
    value: float | None
    unit: str
    p5: float | None = None
    p95: float | None = None
    note: str = ""


@dataclass
class Card:
    """What was found out about one GPU."""

    device: str
    name: str | None
    driver: str | None
    rows: list[Row] = field(default_factory=list)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def spread(what: str, values: Sequence[float], unit: str, note: str = "") -> Row:
    if not values:
        return Row(what, None, unit, note=note or "never seen")
    return Row(what, statistics.median(values), unit, quantile(values, 0.05), quantile(values, 0.95), note)


def call_cost(what: str, call: Callable[[], object], failure: type[Exception], number: int, clock: Time) -> Row:
    """Microseconds of one call, ``number`` times after one that warms it up."""
    costs: list[float] = []
    try:
        call()
        for _ in range(number):
            start = clock.monotonic_ns()
            call()
            costs.append((clock.monotonic_ns() - start) / 1000)
    except failure as error:
        return Row(f"cost of {what}", None, "µs", note=f"{MISSING_CALL}: {error}")
    return spread(f"cost of {what}", costs, "µs")


@dataclass(frozen=True)
class Steps:
    """How a sensor moved while it was polled: seconds between changes and the size of the changes."""

    periods_s: list[float]
    sizes: list[float]
    times_s: list[float]


def poll_steps(read: Callable[[], float], seconds: float, hz: float, clock: Time) -> Steps:
    """Poll ``read`` and note every change; a change is dated when it was first seen."""
    start = clock.monotonic_ns()
    end = start + round(seconds * 1e9)
    last = read()
    changed: list[tuple[int, float]] = []
    while (now := clock.monotonic_ns()) < end:
        value = read()
        if value != last:
            changed.append((now, value - last))
            last = value
        clock.sleep(1 / hz)
    times = [(t_ns - start) / 1e9 for t_ns, _ in changed]
    periods = [later - earlier for earlier, later in itertools.pairwise(times)]
    # The first change began before polling did, so its size is cut off.
    return Steps(periods, [size for _, size in changed[1:]], times)


def polling(api: lib.NvmlApi, handle: object, seconds: float, hz: float, clock: Time) -> list[Row]:
    """Update period and step of the counter and of both gauges."""
    rows: list[Row] = []
    for what, number in (
        ("counter", lib.TOTAL_ENERGY),
        ("instant gauge", lib.POWER_INSTANT),
        ("average gauge", lib.POWER_AVERAGE),
    ):
        read = _reader(api, handle, number)
        try:
            read()
        except (api.NVMLError, LookupError) as error:
            rows.append(Row(f"{what}: update period", None, "ms", note=f"{MISSING_CALL}: {error}"))
            continue
        steps = poll_steps(read, seconds, hz, clock)
        note = f"polled at {hz:g} Hz for {seconds:g} s"
        rows.append(spread(f"{what}: update period", [period * 1000 for period in steps.periods_s], "ms", note))
        if number == lib.TOTAL_ENERGY:
            rows.append(spread("counter: step", steps.sizes, "mJ", note))
    return rows


def _reader(api: lib.NvmlApi, handle: object, number: int) -> Callable[[], float]:
    member = "ullVal" if number == lib.TOTAL_ENERGY else "uiVal"

    def read() -> float:
        answer = api.nvmlDeviceGetFieldValues(handle, ((number, lib.SCOPE_GPU),))[0]
        if answer.nvmlReturn != 0:
            if number == lib.TOTAL_ENERGY:
                return api.nvmlDeviceGetTotalEnergyConsumption(handle)
            raise LookupError(f"field {number} answers error {answer.nvmlReturn}")
        return getattr(answer.value, member)

    return read


def costs(api: lib.NvmlApi, handle: object, number: int, clock: Time) -> list[Row]:
    one = ((lib.TOTAL_ENERGY, lib.SCOPE_GPU),)
    gauges = ((lib.POWER_INSTANT, lib.SCOPE_GPU), (lib.POWER_AVERAGE, lib.SCOPE_GPU))
    three = (*one, *gauges)
    calls: tuple[tuple[str, Callable[[], object], int], ...] = (
        ("total energy", lambda: api.nvmlDeviceGetTotalEnergyConsumption(handle), number),
        ("field values, 1 field", lambda: api.nvmlDeviceGetFieldValues(handle, one), number),
        ("field values, both gauges", lambda: api.nvmlDeviceGetFieldValues(handle, gauges), number),
        ("field values, 3 fields", lambda: api.nvmlDeviceGetFieldValues(handle, three), number),
        ("power usage", lambda: api.nvmlDeviceGetPowerUsage(handle), number),
        ("power history", lambda: cast(Any, api).nvmlDeviceGetSamples(handle, 0, 0), max(1, number // 10)),
        ("utilisation", lambda: api.nvmlDeviceGetUtilizationRates(handle), number),
        ("memory", lambda: api.nvmlDeviceGetMemoryInfo(handle), number),
        ("compute processes", lambda: api.nvmlDeviceGetComputeRunningProcesses(handle), max(1, number // 10)),
    )
    return [call_cost(what, call, api.NVMLError, times, clock) for what, call, times in calls]


def mean_watts(read_mj: Callable[[], float], seconds: float, clock: Time) -> float:
    """Mean power between two moves of the counter that lie ``seconds`` apart."""
    first_mj, first_ns = _at_a_move(read_mj, clock)
    clock.sleep(seconds)
    last_mj, last_ns = _at_a_move(read_mj, clock)
    return (last_mj - first_mj) / 1000 / ((last_ns - first_ns) / 1e9)


def _at_a_move(read_mj: Callable[[], float], clock: Time, patience_s: float = 2.0) -> tuple[float, int]:
    before = read_mj()
    give_up = clock.monotonic_ns() + round(patience_s * 1e9)
    while clock.monotonic_ns() < give_up:
        now_mj = read_mj()
        if now_mj != before:
            return now_mj, clock.monotonic_ns()
        clock.sleep(0.0005)
    raise LookupError(f"the energy counter did not move for {patience_s:g} s")


def counter_delay(points: Sequence[tuple[float, float]], t_step_s: float) -> float | None:
    """Delay in s of a counter against a load that starts at ``t_step_s``.

    ``points`` are (time, joules) at the moves of the counter. The lines through the idle and through the loaded moves
    cross where the counter saw the load begin. None: too few points, or no step in them.
    """
    idle = [point for point in points if point[0] < t_step_s]
    loaded = [point for point in points if point[0] > t_step_s + 1.0]
    if len(idle) < 3 or len(loaded) < 3:
        return None
    (a_idle, b_idle), (a_load, b_load) = _line(idle), _line(loaded)
    if b_load <= b_idle * 1.2:
        return None
    return (a_idle - a_load) / (b_load - b_idle) - t_step_s


def _line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    fit = statistics.linear_regression([t for t, _ in points], [y for _, y in points])
    return fit.intercept, fit.slope


def with_load(api: lib.NvmlApi, handle: object, uuid: str, seconds: float, clock: Time) -> list[Row]:
    """The half that needs torch: idle with a context, the counter's delay, solo against batched decode."""
    try:
        import torch
    except ImportError:
        return [Row("load half", None, "", note="torch is not installed")]
    if not torch.cuda.is_available():
        return [Row("load half", None, "", note="torch sees no CUDA device")]
    index = _torch_index(torch, uuid)
    if index is None:
        return [Row("load half", None, "", note="torch does not see this GPU")]
    read_mj = _reader(api, handle, lib.TOTAL_ENERGY)
    device = torch.device("cuda", index)
    weight = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    torch.cuda.synchronize(device)
    clock.sleep(2.0)
    rows = [Row("idle power with a CUDA context", mean_watts(read_mj, seconds, clock), "W")]
    rows.append(_delay_row(torch, weight, device, read_mj, clock))
    per_token: dict[int, float] = {}
    for batch in (1, 8, 32):
        per_token[batch] = _decode_like(torch, device, batch, read_mj, seconds, clock)
        rows.append(Row(f"decode-like matmul, batch {batch}", per_token[batch] * 1000, "mJ/token"))
    rows.append(Row("batch 32 against solo, per token", per_token[1] / per_token[32], "times less"))
    return rows


def _torch_index(torch: Any, uuid: str) -> int | None:
    for index in range(torch.cuda.device_count()):
        named = str(getattr(torch.cuda.get_device_properties(index), "uuid", ""))
        if named and uuid.removeprefix("GPU-") == named.removeprefix("GPU-"):
            return index
    return 0 if torch.cuda.device_count() == 1 else None


def _delay_row(torch: Any, weight: Any, device: Any, read_mj: Callable[[], float], clock: Time) -> Row:
    points: list[tuple[float, float]] = []
    weight @ weight  # the first product of a process loads libraries and kernels; that wait is not the counter's
    torch.cuda.synchronize(device)
    clock.sleep(2.0)  # the clocks of the GPU step down again
    start_ns = clock.monotonic_ns()
    last = read_mj()

    def watch() -> None:
        nonlocal last
        # Dated by the start of the read: one that meets the update waits for it, on some boards for 15 ms.
        t_ns = clock.monotonic_ns()
        value = read_mj()
        if value != last:
            last = value
            points.append(((t_ns - start_ns) / 1e9, value / 1000))

    while clock.monotonic_ns() - start_ns < 2_000_000_000:
        watch()
        clock.sleep(0.001)
    t_step = (clock.monotonic_ns() - start_ns) / 1e9
    while (clock.monotonic_ns() - start_ns) / 1e9 < t_step + 3:
        for _ in range(4):
            weight @ weight
        watch()
        torch.cuda.synchronize(device)
    delay = counter_delay(points, t_step)
    return Row("counter delay against a step load", None if delay is None else delay * 1000, "ms",
               note="" if delay is not None else "no step was seen")  # fmt: skip


def _decode_like(
    torch: Any, device: Any, batch: int, read_mj: Callable[[], float], seconds: float, clock: Time
) -> float:
    """Joules per token of reading 32 weight matrices of 4096 × 4096 per step, as a decoder of 0.5e9 parameters does."""
    layers = [torch.randn(4096, 4096, device=device, dtype=torch.bfloat16) / 64 for _ in range(32)]
    hidden = torch.randn(batch, 4096, device=device, dtype=torch.bfloat16)

    def step() -> None:
        x = hidden
        for layer in layers:
            x = x @ layer
        torch.cuda.synchronize(device)

    for _ in range(20):
        step()
    before_mj, start_ns = read_mj(), clock.monotonic_ns()
    steps = 0
    while clock.monotonic_ns() - start_ns < max(seconds, 2.0) * 1e9:
        step()
        steps += 1
    # The counter's own period is the error here: 0.1 s in the seconds that were measured.
    return (read_mj() - before_mj) / 1000 / (steps * batch)


def calibrate(settings: Settings, *, seconds: float, hz: float, number: int, load: bool, clock: Time) -> list[Card]:
    """Every visible GPU.

    Raises:
        Refused: there is none.
    """
    source = open_nvml(settings)
    api = lib.open_library(settings.nvml_library)
    try:
        cards: list[Card] = []
        for device in source.devices:
            handle = api.nvmlDeviceGetHandleByUUID(device.id)
            card = Card(device.id, device.name, source.driver_version)
            card.rows += costs(api, handle, number, clock)
            card.rows += polling(api, handle, seconds, hz, clock)
            try:
                watts = mean_watts(_reader(api, handle, lib.TOTAL_ENERGY), seconds, clock)
                card.rows.append(Row("power as found, no load of ours", watts, "W"))
            except (api.NVMLError, LookupError) as error:
                card.rows.append(Row("power as found, no load of ours", None, "W", note=str(error)))
            cards.append(card)
        # Load comes last: a CUDA context, once made, stays until the program ends and would raise "as found".
        for card in cards if load else ():
            try:
                card.rows += with_load(api, api.nvmlDeviceGetHandleByUUID(card.device), card.device, seconds, clock)
            except Exception as error:
                card.rows.append(Row("load half", None, "", note=f"failed: {error}"))
        return cards
    finally:
        source.close()
        api.nvmlShutdown()


def markdown(card: Card) -> str:
    lines = [f"### {card.name or 'GPU'} ({card.device}, driver {card.driver or 'unknown'})", ""]
    lines += ["| what | median | p5 – p95 | unit | note |", "|---|---|---|---|---|"]
    for row in card.rows:
        value = "–" if row.value is None else f"{row.value:.6g}"
        band = "" if row.p5 is None or row.p95 is None else f"{row.p5:.6g} – {row.p95:.6g}"
        lines.append(f"| {row.what} | {value} | {band} | {row.unit} | {row.note} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, clock: Time | None = None) -> int:
    parser = argparse.ArgumentParser(description="Calibrate the energy meter of an NVIDIA GPU.")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds of polling per figure (default 5)")
    parser.add_argument("--hz", type=float, default=1000.0, help="polls per second (default 1000)")
    parser.add_argument("--calls", type=int, default=500, help="calls per cost figure (default 500)")
    parser.add_argument("--no-load", action="store_true", help="NVML only: put no load on the GPU")
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    chosen = parser.parse_args(arguments)
    try:
        config = Config.from_env(os.environ)
        settings = Settings(clock=SystemClock(), environ=os.environ, nvml_library=config.nvml_library)
        cards = calibrate(settings, seconds=chosen.seconds, hz=chosen.hz, number=chosen.calls, load=not chosen.no_load,
                          clock=clock or HostTime())  # fmt: skip
    except Refused as refused:
        fix = f" To change that: {refused.fix}." if refused.fix else ""
        print(f"No NVIDIA GPU can be calibrated here: {refused.reason}.{fix}", file=sys.stderr)
        return 2
    except MelodiError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n\n".join(markdown(card) for card in cards))
    if chosen.out is not None:
        chosen.out.write_text(json.dumps([asdict(card) for card in cards], indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
