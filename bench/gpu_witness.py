"""A recording of ``bench/gpu_serving.py`` divided twice: by the meter, and by the driver's power history as a witness.

    python bench/gpu_witness.py [DIR]

The witness never saw the counter: 20 ms of power each, integrated over every engine step. An ordinary least-squares fit over
the whole recording, the future included, says what a step costs (fixed part, decoded tokens, prompt tokens, tokens of context,
query-context products), at the delay where that explains most; each step's own joules are then divided by it as the design's
closed form does. It is no truth: it has the form of the meter's own model, and errors of its own. What it can show is whether the
meter, live, with a tenth as many readings and only the past, comes to the same.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from melodi_otel.trace.replay import replay

RECORDING = Path(__file__).parent / "results" / "nvidia_h100"
LONGEST_S = 0.3
"""Longer steps are those in which kernels were built."""


@dataclass
class Row:
    """How far a way of dividing is from the witness, for the requests of one rate; percent."""

    way: str
    rate: float
    mean_batch: float
    requests: int
    median: float
    p95: float
    mean: float
    within_1: float | None
    within_2: float | None


@dataclass
class Recording:
    """What was recorded; times in s, monotonic."""

    lines: list[dict[str, Any]]
    history_t: np.ndarray
    history_j: np.ndarray
    history_w: np.ndarray
    phases: list[dict[str, float]]

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["kind"] == "step"]

    def of_phase(self, phase: Mapping[str, float]) -> list[str]:
        """Requests that were made in it."""
        opened = (line for line in self.lines if line["kind"] == "open")
        return [line["id"] for line in opened if phase["begin"] <= line["t"] < phase["end"]]


def load(place: Path) -> Recording:
    """Read a directory of ``bench/gpu_serving.py``."""

    def lines(name: str) -> Iterator[Any]:
        packed = place / f"{name}.gz"
        with gzip.open(packed, "rt") if packed.exists() else (place / name).open() as file:
            for line in file:
                yield json.loads(line)

    t, watts = np.array(list(lines("history.jsonl"))).T
    joules = np.concatenate(([0.0], np.cumsum(watts[:-1] * np.diff(t))))
    phases = json.loads((place / "serving.json").read_text())["phases"]
    return Recording(list(lines("trace.jsonl")), t, joules, watts, phases)


def witness(recording: Recording) -> tuple[dict[str, float], float, float]:
    """Joules of each request by the power history; the delay that explains most, in s; and how much is explained (R²)."""
    steps = recording.steps
    t0 = np.array([step["t0"] for step in steps])
    t1 = np.array([step["t1"] for step in steps])
    first = recording.phases[0]["begin"]
    quiet = (recording.history_t > first - 2.0) & (recording.history_t < first - 0.5)
    idle_watts = float(np.median(recording.history_w[quiet]))
    features = np.array([np.sum(list(_rows(step).values()), axis=0) for step in steps])
    features[:, 0] = 1.0
    scale = features.max(axis=0)
    usual = t1 - t0 < LONGEST_S

    def explained(delay_s: float) -> tuple[float, np.ndarray, np.ndarray]:
        used = np.interp(t1 + delay_s, recording.history_t, recording.history_j)
        used -= np.interp(t0 + delay_s, recording.history_t, recording.history_j)
        dynamic = used - idle_watts * (t1 - t0)
        costs, rest = nnls(features[usual] / scale, dynamic[usual])
        spread = dynamic[usual] - dynamic[usual].mean()
        return 1.0 - rest**2 / float(spread @ spread), costs / scale, dynamic

    delay_s = max(np.arange(-0.05, 0.15, 0.005), key=lambda delay: explained(float(delay))[0])
    r_squared, costs, dynamic = explained(float(delay_s))
    parents = {line["child"]: line["id"] for line in recording.lines if line["kind"] == "bind"}
    found: dict[str, float] = {}
    for step, joules in zip(steps, dynamic, strict=True):
        rows = _rows(step)
        worth = {name: float(costs @ row) for name, row in rows.items()}
        together = sum(worth.values())
        static = idle_watts * (step["t1"] - step["t0"]) / len(rows)
        for name, part in worth.items():
            request = parents.get(name, name)
            found[request] = found.get(request, 0.0) + static + float(joules) * part / together
    return found, float(delay_s), r_squared


def _rows(step: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What each member of a step did: its part of the step, decoded, prompt, context, query-context products."""
    work = step["work"]
    return {
        name: np.array([1.0 / len(work), 1.0 if decoded else 0.0, prompt, context, prompt * (context - prompt / 2)])
        for name, (prompt, decoded, context) in work.items()
    }


def seldom(lines: list[dict[str, Any]], every_s: float) -> list[dict[str, Any]]:
    """The same recording, the counter read only so often."""
    kept: list[dict[str, Any]] = []
    last = -every_s
    for line in lines:
        if line["kind"] == "sample":
            if "joules" not in line or line["t"] - last < every_s:
                continue
            last = line["t"]
        kept.append(line)
    return kept


def divided(lines: list[dict[str, Any]], **options: Any) -> dict[str, tuple[float, float]]:
    """(J, 1 sigma) of each request as ``melodi-otel replay`` says."""
    shares = replay((json.dumps(line).encode() for line in lines), **options)
    return {share["id"]: (share["joules"], share["uncertainty"]) for share in shares if share["kind"] == "share"}


def rows(recording: Recording) -> list[Row]:
    """Every way of dividing against the witness, rate by rate."""
    true, _, _ = witness(recording)
    ways = {
        "step": divided(recording.lines),
        "step, counter read once a second": divided(seldom(recording.lines, 1.0)),
        "equal": divided(recording.lines, method="equal"),
    }
    found: list[Row] = []
    for phase in recording.phases:
        names = [
            name for name in recording.of_phase(phase) if name in true and all(name in said for said in ways.values())
        ]
        batch = [
            (len(step["work"]), step["t1"] - step["t0"])
            for step in recording.steps
            if phase["begin"] <= step["t0"] < phase["end"]
        ]
        mean_batch = sum(n * s for n, s in batch) / sum(s for _, s in batch)
        for way, said in ways.items():
            signed = [100.0 * (said[name][0] / true[name] - 1.0) for name in names]
            sigmas = [abs(said[name][0] - true[name]) / said[name][1] for name in names]
            off = sorted(map(abs, signed))
            found.append(
                Row(
                    way,
                    phase["rate"],
                    mean_batch,
                    len(names),
                    statistics.median(off),
                    off[int(0.95 * len(off))],
                    statistics.mean(signed),
                    100.0 * sum(s <= 1.0 for s in sigmas) / len(sigmas),
                    100.0 * sum(s <= 2.0 for s in sigmas) / len(sigmas),
                )
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", type=Path, nargs="?", default=RECORDING, help="what gpu_serving.py wrote")
    recording = load(parser.parse_args().place)
    _, delay_s, r_squared = witness(recording)
    print(f"witness: delay {1e3 * delay_s:.0f} ms, R² {r_squared:.3f} of {len(recording.steps)} steps\n")
    print("| requests/s | mean batch | divided by | requests | median / p95 % | mean % | ±1 σ % | ±2 σ % |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows(recording):
        print(
            f"| {row.rate:g} | {row.mean_batch:.1f} | {row.way} | {row.requests} | {row.median:.2f} / {row.p95:.2f} "
            f"| {row.mean:+.2f} | {row.within_1:.0f} | {row.within_2:.0f} |"
        )


if __name__ == "__main__":
    main()
