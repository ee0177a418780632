"""How right are the joules of a request? Simulated servers whose joules are known, replayed by the code that runs live.

The simulator (``melodi_otel.testing.serving``) has a truth of another form than what the meter fits: a roofline with noise, a
power cap, drift, and sensors that are late. Every tier and four simple ways to divide see the same traces. All figures are
simulated. Prints the table, writes it as Markdown and JSON, and ends with 1 where a target of the design is missed.

    python bench/accuracy.py [--smoke] [--only "load 2"] [--seed 1] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from melodi_otel.testing.serving import SCENARIOS, Simulated, simulate
from melodi_otel.trace.replay import replay

WARM_S = 60.0
"""Figures are of requests that begin so long after the first one, except for the cold start."""
STEP, SLICE = (2.0, 8.0), (3.5, 11.0)
TARGETS: dict[tuple[str, str], tuple[float | None, float]] = {
    **{(f"load {rate}", "step"): STEP for rate in ("0.1", "0.5", "2", "5", "8", "8, long answers")},
    **{(f"load {rate}", "slice"): SLICE for rate in ("0.1", "0.5", "2", "5", "8", "8, long answers")},
    ("drift", "step"): (2.5, 9.0),
    ("cap", "step"): (2.5, 9.0),
    ("tensor parallel", "step"): STEP,
    ("two engines", "step"): (3.0, 10.0),
    ("moe known", "step"): STEP,
    ("moe unknown", "step"): (4.0, 25.0),
    ("gauge 1 s", "step"): (2.5, 8.0),
    ("poll 1 s", "step"): (3.5, 11.0),
    ("intruder", "step"): (None, 18.0),
    ("short", "step"): (5.0, 25.0),
    ("cold start, at once", "step"): (5.0, 22.0),
    ("cold start, after 2 s", "step"): (4.0, 13.0),
    ("cold start, after 20 s", "step"): (2.5, 9.0),
}
"""Median and 95th percentile of the relative error of a request, in percent (design, section 6)."""
BUSY_BATCH = 3.0
"""Mean batch of two requests a second, from which on the stated uncertainty has to be tight, too."""
WEAKER = ("slice", "phase", "window", "equal")
SMOKE = ("load 2", "load 8", "two engines", "intruder", "cold start", "short")


@dataclass
class Row:
    """One scenario by one method. Errors and sigmas in percent, seconds in s."""

    scenario: str
    method: str
    mean_batch: float
    requests: int
    median: float
    p95: float
    within_1: float | None = None
    within_2: float | None = None
    sigma_to_error: float | None = None
    final_p99_s: float | None = None
    imbalance: float | None = None
    qualities: dict[str, int] = field(default_factory=dict[str, int])
    note: str = ""
    missed: str = ""


def error_row(run: Simulated, scenario: str, method: str, errors: Iterable[float]) -> Row:
    """A row of nothing but errors (relative)."""
    found = np.abs(np.array(list(errors)))
    if not len(found):
        return Row(scenario, method, run.mean_batch, 0, float("nan"), float("nan"))
    middle, high = 100.0 * np.percentile(found, [50, 95])
    return Row(scenario, method, run.mean_batch, len(found), float(middle), float(high))


def tier_rows(name: str, run: Simulated, method: str) -> list[Row]:
    """What the meter makes of the trace with evidence of this tier at most."""
    shares: list[dict[str, Any]] = []
    books: list[dict[str, Any]] = []
    for line in replay(run.lines, method=None if method == "step" else method):  # type: ignore[arg-type]
        (shares if line["kind"] == "share" else books).append(line)
    windows: dict[str, Callable[[float], bool]] = {name: lambda since: since >= WARM_S}
    if name == "cold start":
        windows = {
            "cold start, at once": lambda since: since < 2.0,
            "cold start, after 2 s": lambda since: 2.0 <= since < 20.0,
            "cold start, after 20 s": lambda since: since >= 20.0,
        }
    rows: list[Row] = []
    for label, inside in windows.items():
        errors: list[float] = []
        whole: list[float] = []
        sigmas: list[float] = []
        finals: list[float] = []
        qualities: dict[str, int] = {}
        for share in shares:
            truth = run.truth.get((share["id"], share["device"]))
            if truth is None or share["joules"] is None or not inside(truth.start - run.first):
                continue
            errors.append((share["joules"] - truth.joules) / truth.joules)
            if share["quality"] != "partial":
                # Of those the sigma is of what was measured, and the coverage says how much that is.
                sigmas.append((share["uncertainty"] or 0.0) / truth.joules)
                whole.append(errors[-1])
            finals.append(share["t_final"] - truth.end)
            qualities[share["quality"]] = qualities.get(share["quality"], 0) + 1
        row = error_row(run, label, method, errors)
        rows.append(row)
        if not errors:
            continue
        if whole:
            off, sigma = np.abs(np.array(whole)), np.array(sigmas)
            row.within_1, row.within_2 = (
                100.0 * float(np.mean(off <= sigma)),
                100.0 * float(np.mean(off <= 2.0 * sigma)),
            )
            row.sigma_to_error = float(np.median(sigma) / max(1e-9, float(np.median(off))))
        row.final_p99_s = float(np.percentile(finals, 99))
        row.qualities = qualities
        row.imbalance = max(
            abs(
                book["measured"]
                - sum(value for key, value in book.items() if key not in ("kind", "device", "measured"))
            )
            / book["measured"]
            for book in books
        )
        if name == "intruder":
            used = sum(bucket["intruder"] for bucket in run.buckets.values())
            told = sum(book["foreign"] for book in books) / used
            row.note = f"{100.0 * told:.0f} % of its energy in `foreign`"
            row.missed += "" if told >= 0.6 else "foreign "
        if name == "two engines":
            off_total = engine_totals(run, shares)
            row.note = f"engines' totals off by {100.0 * off_total:.2f} %"
            row.missed += "" if off_total <= 0.01 or method != "step" else "totals "
        if name in ("moe unknown", "contention") and qualities.get("measured", 0) > 0.1 * len(errors):
            row.missed += "quality "
        judge(row, name)
    return rows


def engine_totals(run: Simulated, shares: list[dict[str, Any]]) -> float:
    """The largest relative error of the joules of an engine's requests."""
    told: dict[tuple[str, str], float] = {}
    used: dict[tuple[str, str], float] = {}
    for share in shares:
        truth = run.truth.get((share["id"], share["device"]))
        if truth is not None and share["joules"] is not None and truth.start - run.first >= WARM_S:
            at = (truth.engine, share["device"])
            told[at] = told.get(at, 0.0) + share["joules"]
            used[at] = used.get(at, 0.0) + truth.joules
    return max(abs(told[at] - joules) / joules for at, joules in used.items())


def judge(row: Row, name: str) -> None:
    """Say which targets of the design the row misses."""
    target = TARGETS.get((row.scenario, row.method))
    if target is not None and (row.median > (target[0] or row.median) or row.p95 > target[1]):
        row.missed += "error "
    if row.imbalance is not None and row.imbalance > 1e-9:
        row.missed += "balance "
    if row.method == "step" and row.within_1 is not None and row.within_2 is not None:
        busy = row.mean_batch > BUSY_BATCH
        wide = busy and (row.within_1 > 95.0 or (row.sigma_to_error or 0.0) > 3.0)
        narrow = row.within_1 < 65.0 or row.within_2 < 95.0
        if wide or narrow:
            row.note = f"{row.note} σ {'wide' if wide else 'narrow'}".strip()
            if row.scenario.startswith("load"):
                row.missed += "sigma "
    slow = {"gauge 1 s": 1.6, "poll 1 s": 1.6, "free running": 0.6, "lost samples": 0.6}.get(name, 0.35)
    if row.method == "step" and row.final_p99_s is not None and row.final_p99_s > slow:
        row.missed += "final "


def simple_rows(name: str, run: Simulated) -> list[Row]:
    """What one gets by simple means: the joules of the whole device in a request's window, or equal parts of it."""
    device = next(iter(run.boards))
    board = run.boards[device]
    truths = [(key[0], truth) for key, truth in run.truth.items() if key[1] == device]
    if name != "cold start":
        truths = [(key, truth) for key, truth in truths if truth.start - run.first >= WARM_S]
    starts = np.array([truth.start for _, truth in truths])
    ends = np.array([truth.end for _, truth in truths])
    true = np.array([truth.joules for _, truth in truths])
    whole = board.energy(ends) - board.energy(starts)
    # MELODI reads power ten times a second from 0.5 s before to 0.5 s behind a prompt and adds up trapezoids.
    times = np.arange(0.0, board.seconds, 0.1)
    watts = board.watts(times[times > 1.0], 0.1)
    ticks = times[times > 1.0]
    trapezoids = np.concatenate([[0.0], np.cumsum((watts[1:] + watts[:-1]) / 2.0 * 0.1)])
    until, since = np.interp(ends + 0.5, ticks, trapezoids), np.interp(starts - 0.5, ticks, trapezoids)
    every = [truth for key, truth in run.truth.items() if key[1] == device]
    changes = sorted([(truth.start, 1) for truth in every] + [(truth.end, -1) for truth in every])
    edges, each, running, last = [0.0], [0.0], 0, 0.0
    total = 0.0
    for at, change in changes:
        if running:
            total += float(np.diff(board.energy(np.array([last, at])))[0]) / running
        running, last = running + change, at
        edges.append(at)
        each.append(total)
    equal = np.array(
        [each[bisect_right(edges, b) - 1] - each[bisect_right(edges, a) - 1] for a, b in zip(starts, ends, strict=True)]
    )
    tokens = np.array([run.output_tokens.get(key, 0) for key, _ in truths], dtype=float)
    per_token = true.sum() / max(1.0, tokens.sum())
    ways = {
        "whole device in its window": whole,
        "MELODI: 10 Hz, 0.5 s around": until - since,
        "equal part at every instant": equal,
        "mean J per output token": per_token * tokens,
    }
    return [error_row(run, name, way, (found - true) / true) for way, found in ways.items()]


def scenario_rows(task: tuple[str, int, float | None]) -> list[Row]:
    """Everything about one scenario."""
    name, seed, seconds = task
    run = simulate(SCENARIOS[name], seed=seed, seconds=seconds)
    tiers = ("step", *WEAKER) if name.startswith("load") else ("step", "slice")
    rows = [row for tier in tiers for row in tier_rows(name, run, tier)]
    return rows + (simple_rows(name, run) if name.startswith("load") else [])


def number(value: float | None, form: str = ".0f") -> str:
    """A cell."""
    return "" if value is None or math.isnan(value) else format(value, form)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| scenario | mean batch | method | n | error, median / p95, % | target | ±1 σ, % | ±2 σ, % | σ/error | final, s | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        target = TARGETS.get((row.scenario, row.method))
        bound = "" if target is None else f"{number(target[0], 'g') or '–'} / {target[1]:g}"
        error = f"{row.median:.2f} / {row.p95:.2f}" if row.p95 < 100 else f"{row.median:,.0f} / {row.p95:,.0f}"
        note = " ".join(part for part in (row.note, f"**missed: {row.missed.strip()}**" if row.missed else "") if part)
        lines.append(
            f"| {row.scenario} | {row.mean_batch:.1f} | {row.method} | {row.requests} | {error} | {bound} "
            f"| {number(row.within_1)} | {number(row.within_2)} | {number(row.sigma_to_error, '.1f')} "
            f"| {number(row.final_p99_s, '.2f')} | {note} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Run, print, write; 1 where a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--smoke", action="store_true", help="a few scenarios")
    parser.add_argument("--only", action="append", choices=list(SCENARIOS), help="this scenario; may be repeated")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, help="of arriving requests; default: what the scenario says")
    parser.add_argument("--out", type=Path, help="folder for accuracy.md and accuracy.json")
    options = parser.parse_args()
    names = options.only or (list(SMOKE) if options.smoke else list(SCENARIOS))
    start = time.monotonic()
    with ProcessPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        tasks = [(name, options.seed, options.seconds) for name in names]
        rows = [row for found in pool.map(scenario_rows, tasks) for row in found]
    text = table(rows)
    missed = [row for row in rows if row.missed]
    print(text)
    print(
        f"\nAll figures are simulated. {len(names)} scenarios, seed {options.seed}, {time.monotonic() - start:.0f} s; ",
        end="",
    )
    print(f"{len(missed)} rows miss a target." if missed else "every target is met.")
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "accuracy.md").write_text(text + "\n")
        (options.out / "accuracy.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
