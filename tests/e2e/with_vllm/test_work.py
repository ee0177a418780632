"""Joules follow the work: a real server's recorded steps, replayed over a meter that shows just what each step should cost."""

from __future__ import annotations

import itertools
import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from scipy.stats import spearmanr

from melodi_otel.attribution.weights import Roofline
from melodi_otel.trace.replay import Replay
from tests.e2e.with_vllm.clients import fire, mixed
from tests.e2e.with_vllm.rig import VllmServer, gpu
from tests.e2e.with_vllm.test_answers import ENVIRON

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

FLOPS_PER_BYTE = 250.0
JOULES_PER_BYTE = 1e-6


class Recorded:
    """The lines of a trace: what the engine's one GPU was used for."""

    def __init__(self, lines: list[dict[str, Any]], device: str) -> None:
        self.lines = lines
        self.device = device
        self.steps = [line for line in lines if line["kind"] == "step"]
        (self.engine,) = {
            json.dumps(line): line for line in lines if line["kind"] == "engine" and line.get("parameters")
        }.values()
        self.request = {line["child"]: line["id"] for line in lines if line["kind"] == "bind"}

    def expected(self, step: dict[str, Any]) -> dict[str, float]:
        """Bytes-equivalents of each sequence of a step: two bytes a parameter shared by all, its own arithmetic and cache."""
        parameters, cache = self.engine["parameters"], self.engine["kv_bytes_per_token"]
        products = 4.0 * self.engine["layers"] * self.engine["hidden"] / FLOPS_PER_BYTE
        found: dict[str, float] = {}
        for name, (prefill, decode, after) in step["work"].items():
            before = after - prefill - decode
            found[name] = 2.0 * parameters / len(step["work"])
            found[name] += 2.0 * parameters / FLOPS_PER_BYTE * (prefill + decode) + cache * before
            found[name] += products * prefill * (before + prefill / 2.0)
        return found

    def per_request(self) -> dict[str, float]:
        """The same summed over the steps of each request."""
        sums: dict[str, float] = defaultdict(float)
        for step in self.steps:
            for name, weight in self.expected(step).items():
                sums[self.request.get(name, name)] += weight
        return sums

    def with_a_meter_of_work(self) -> Iterator[str]:
        """The trace with a counter that moves by a step's expected joules while it runs, and otherwise stands still."""
        ends = [step["t1"] for step in self.steps]
        costs = [JOULES_PER_BYTE * sum(self.expected(step).values()) for step in self.steps]
        before = [0.0, *itertools.accumulate(costs)]

        def shown(t: float) -> float:
            at = bisect_right(ends, t)
            if at == len(ends):
                return before[at]
            t0, t1 = self.steps[at]["t0"], self.steps[at]["t1"]
            return before[at] + costs[at] * min(1.0, max(0.0, (t - t0) / (t1 - t0)))

        for line in self.lines:
            if line.get("device", self.device) != self.device and line["kind"] == "sample":
                continue
            if line["kind"] in ("cpu", "foreign"):
                continue
            changed: dict[str, Any] = {}
            if line["kind"] == "device" and line["id"] == self.device:
                changed = {"idle_watts": 0.0}
            if line["kind"] == "sample":
                changed = {"joules": shown(line["t"])}
            yield json.dumps({**line, **changed})


@pytest.fixture(scope="module")
def recorded(vllm_server: Callable[..., VllmServer]) -> Recorded:
    """64 requests at once, of mixed lengths, at a server whose agent records."""
    server = vllm_server(env=ENVIRON, agent=True)
    fire(server.url, mixed(64))
    server.rest()

    def lines() -> list[dict[str, Any]]:
        text = server.trace.read_text()
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def all_there() -> Any:
        found = lines()
        kinds = [line["kind"] for line in found]
        return found if kinds.count("close") == kinds.count("open") >= 64 and kinds[-1] == "sample" else None

    return Recorded(server.place.until("the agent has recorded the last close", all_there), gpu(0))


def test_joules_follow_the_work(recorded: Recorded, capsys: pytest.CaptureFixture[str]) -> None:
    """Replayed, the joules of 64 requests have the order of their work: rank correlation at least 0.99, and no joule is lost."""
    work = recorded.per_request()
    rows = list(Replay(model=Roofline()).run(recorded.with_a_meter_of_work()))
    joules = {row["id"]: row["joules"] for row in rows if row["kind"] == "share" and row["device"] == recorded.device}
    names = sorted(work.keys() & joules.keys())
    assert len(names) >= 64
    rank = spearmanr([work[name] for name in names], [joules[name] for name in names]).statistic
    off = [abs(joules[name] / (JOULES_PER_BYTE * work[name]) - 1.0) for name in names]
    with capsys.disabled():
        print(
            f"\n  {len(names)} requests, {len(recorded.steps)} steps: rank correlation {rank:.5f}, "
            f"error median {100 * sorted(off)[len(off) // 2]:.2f} %, worst {100 * max(off):.2f} %",
            end="",
        )
    assert rank >= 0.99
    (books,) = [row for row in rows if row["kind"] == "books" and row["device"] == recorded.device]
    assert books["attributed"] == pytest.approx(sum(joules.values()), rel=1e-9)
    assert books["measured"] == pytest.approx(JOULES_PER_BYTE * sum(work.values()), rel=1e-6)
