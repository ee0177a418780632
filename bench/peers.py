"""What peers' own code makes of a shared GPU, beside this meter, on the same simulated traces.

Zeus and CodeCarbon as they are published run on a fake NVML library whose counter shows the trace's readings at the trace's
times: a Zeus window, and a CodeCarbon task, per request, begun when the request is opened and ended when it is closed. This meter
replays the same trace. All figures are simulated. Prints a table and writes it as Markdown, JSON and a picture.

    make accuracy-peers        or        .venv/rivals/bin/python bench/peers.py [--out DIR] [--picture FILE]
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from melodi_otel.testing.nvml import FakeGpu, FakeNvml, build_fake_nvml
from melodi_otel.testing.serving import SCENARIOS, Simulated, simulate
from melodi_otel.trace.replay import replay

LOADS = ("load 0.1", "load 0.5", "load 2", "load 8")
SECONDS = 150.0
WARM_S = 60.0
WH = 3600.0
_PLACE = "MELODI_BENCH_PEERS"
"""Where the fake library lies."""


@dataclass
class Row:
    """One method on one trace: relative errors in percent; ``sum``: joules of all requests it measured over what the board used
    while any of them ran, counted from the first one's begin to the last one's end.
    """

    scenario: str
    mean_batch: float
    method: str
    requests: int
    measured: int
    median: float
    p95: float
    sum: float


class Clock:
    """The trace's time, in the place of the host's while peers run; a microsecond goes by whenever it is asked for."""

    def __init__(self) -> None:
        self.t = 0.0
        self._asked = 0

    def __call__(self) -> float:
        self._asked += 1
        return 1_700_000_000.0 + self.t + 1e-6 * self._asked


def events(run: Simulated) -> list[dict[str, Any]]:
    """Readings, begins and ends in the order of time."""
    found = [msgspec.json.decode(line) for line in run.lines]
    return sorted((one for one in found if one["kind"] in ("sample", "open", "close")), key=lambda one: one["t"])


def watch(
    run: Simulated,
    fake: FakeNvml,
    clock: Clock,
    begin: Callable[[str], None],
    end: Callable[[str], float | None],
) -> dict[str, float]:
    """J by request as a peer tells them; those that it does not measure are absent."""
    found: dict[str, float] = {}
    for event in events(run):
        fake.advance(max(0.0, event["t"] - clock.t))
        clock.t = max(clock.t, event["t"])
        if event["kind"] == "sample":
            fake.shows(0, event["joules"])
        elif event["kind"] == "open":
            begin(event["id"])
        else:
            joules = end(event["id"])
            if joules is not None:
                found[event["id"]] = joules
    return found


def by_zeus(run: Simulated, fake: FakeNvml, clock: Clock) -> dict[str, float]:
    """A window per request."""
    from zeus.monitor import ZeusMonitor

    monitor = ZeusMonitor(gpu_indices=[0], cpu_indices=[])

    def end(name: str) -> float:
        return float(monitor.end_window(name, sync_execution=False).gpu_energy[0])

    return watch(run, fake, clock, lambda name: monitor.begin_window(name, sync_execution=False), end)


def by_codecarbon(run: Simulated, fake: FakeNvml, clock: Clock) -> dict[str, float]:
    """A task per request; while one is under way it takes no other."""
    from codecarbon import OfflineEmissionsTracker

    tracker = OfflineEmissionsTracker(
        country_iso_code="DEU", save_to_file=False, log_level="critical", gpu_ids=[0], allow_multiple_runs=True
    )

    def end(name: str) -> float | None:
        if name not in tracker._tasks or tracker._active_task != name:
            return None
        data = tracker.stop_task(name)
        return None if data is None else float(data.gpu_energy) * 1000.0 * WH

    told = watch(run, fake, clock, tracker.start_task, end)
    if not any(type(hardware).__name__ == "GPU" for hardware in tracker._hardware):
        raise SystemExit("CodeCarbon does not see the board of the fake NVML library: its figures would mean nothing")
    return told


def by_us(run: Simulated) -> dict[str, float]:
    """This meter, on the steps and readings of the trace."""
    return {
        line["id"]: line["joules"]
        for line in replay(run.lines)
        if line["kind"] == "share" and line["joules"] is not None and (line["id"], line["device"]) in run.truth
    }


def row(scenario: str, run: Simulated, method: str, told: dict[str, float]) -> Row:
    """Its errors."""
    every = {name: truth for (name, _), truth in run.truth.items()}
    truths = {name: truth for name, truth in every.items() if truth.start - run.first >= WARM_S}
    errors = [100.0 * abs(told[name] - truth.joules) / truth.joules for name, truth in truths.items() if name in told]
    median, p95 = np.percentile(errors, [50, 95]) if errors else (float("nan"), float("nan"))
    board = next(iter(run.boards.values()))
    since, until = min(truth.start for truth in every.values()), max(truth.end for truth in every.values())
    used = float(np.diff(board.energy(np.array([since, until])))[0])
    whole = sum(told[name] for name in every if name in told)
    return Row(scenario, run.mean_batch, method, len(truths), len(errors), float(median), float(p95), whole / used)


def picture(rows: list[Row], path: Path) -> None:
    """Median error by load, a line per method, on a logarithmic scale."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8.0, 4.6), dpi=130)
    for method in dict.fromkeys(one.method for one in rows):
        mine = [one for one in rows if one.method == method and one.measured]
        label = f"{method} ({sum(one.measured for one in mine)} of {sum(one.requests for one in mine)} requests)"
        axes.plot([one.mean_batch for one in mine], [one.median for one in mine], marker="o", label=label)
        axes.fill_between(
            [one.mean_batch for one in mine], [one.median for one in mine], [one.p95 for one in mine], alpha=0.15
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="requests in a batch (mean)",
        ylabel="error of a request's joules, %\n(line: median, band: up to the 95th percentile)",
        title="Joules of single requests on a shared GPU (simulated)",
    )
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = [
        "| scenario | mean batch | method | measured | error, median / p95, % | sum of requests / board |",
        "|---|---|---|---|---|---|",
    ]
    for one in rows:
        form = ",.0f" if one.p95 >= 100.0 else ".2f"
        lines.append(
            f"| {one.scenario} | {one.mean_batch:.1f} | {one.method} | {one.measured} of {one.requests} "
            f"| {one.median:{form}} / {one.p95:{form}} | {one.sum:.2f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="folder for peers.md and peers.json")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    options = parser.parse_args()
    if _PLACE not in os.environ:
        # Peers load the driver's library by its name, from where the loader looks when a program begins.
        with tempfile.TemporaryDirectory() as directory:
            build_fake_nvml(Path(directory))
            # CodeCarbon looks for a board only where this command answers.
            command = Path(directory) / "nvidia-smi"
            command.write_text("#!/bin/sh\n")
            command.chmod(0o755)
            path = os.pathsep.join((directory, os.environ.get("PATH", os.defpath)))
            environ = {**os.environ, _PLACE: directory, "LD_LIBRARY_PATH": directory, "PATH": path}
            return subprocess.run([sys.executable, *sys.argv], env=environ, check=False).returncode
    place = Path(os.environ[_PLACE])
    logging.disable(logging.CRITICAL)
    rows: list[Row] = []
    clock = Clock()
    board = FakeGpu("GPU-00000000-fa4e-4000-8000-000000000000", watts=0.0)
    with FakeNvml(place, [board], library=place / "libnvidia-ml.so.1") as fake:
        real = time.time, time.perf_counter, time.monotonic
        for scenario in LOADS:
            run = simulate(
                SCENARIOS[scenario], seed=options.seed, seconds=max(SECONDS, 600.0 if scenario == "load 0.1" else 0.0)
            )
            rows.append(row(scenario, run, "melodi_otel, step", by_us(run)))
            for name, way in (
                (f"Zeus {version('zeus')}", by_zeus),
                (f"CodeCarbon {version('codecarbon')}", by_codecarbon),
            ):
                fake.advance(10.0)
                clock.t = 0.0
                time.time = time.perf_counter = time.monotonic = clock  # type: ignore[assignment]
                try:
                    told = way(run, fake, clock)
                finally:
                    time.time, time.perf_counter, time.monotonic = real
                rows.append(row(scenario, run, name, told))
        text = table(rows)
        print(text)
        print(f"\nAll figures are simulated, seed {options.seed}.")
        if options.out is not None:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "peers.md").write_text(text + "\n")
            (options.out / "peers.json").write_text(json.dumps([asdict(one) for one in rows], indent=1) + "\n")
        if options.picture is not None:
            picture(rows, options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
