"""Continuous batching with a real ledger and a counter that moves: joules by steps, and books that balance."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest

from melodi_otel.attribution.ledger import Ledger
from melodi_otel.attribution.meter import Key
from melodi_otel.devices import Device
from melodi_otel.instrumentation.transformers import TransformersInstrumentor

GPU = Device("GPU-0", "gpu", idle_watts=40.0)
TICK_NS = 1_000_000
WATTS = 300.0


@dataclass
class Opened:
    """A call in a real ledger."""

    key: Key
    ledger: Ledger
    prompt: int
    future: Any = None
    ends: list[Any] = field(default_factory=list)

    def bind(self, child_id):
        self.ledger.bind(self.key, child_id)

    def end(self, end):
        self.ends.append(end)
        self.future = self.ledger.close(
            self.key,
            end.end_ns,
            end.output_tokens,
            end.outcome,
            first_token_ns=end.first_token_ns,
            prompt_tokens=end.prompt_tokens,
            cached_tokens=end.cached_tokens,
        )


class LedgerCalls:
    """``Calls`` with a ledger as its meter, and a clock that moves by being read."""

    group = "g"

    def __init__(self, ledger):
        self.meter = ledger
        self.made = []
        self._now = itertools.count(TICK_NS, TICK_NS)

    def now_ns(self):
        return next(self._now)

    def begin(self, begin):
        call = Opened(Key(self.group, f"r{len(self.made)}"), self.meter, begin.prompt_tokens)
        self.meter.open(
            call.key,
            begin.start_ns,
            engine=begin.engine,
            devices=begin.devices,
            model=begin.model,
            prompt_tokens=begin.prompt_tokens,
            probe=begin.probe,
        )
        self.made.append(call)
        return call


def test_sixteen_requests_balance(served, capsys):
    """16 requests in one manager: all joules by ``step``, and shares + buckets = what the counter counted, to 1e-9."""
    ledger = Ledger(engine_devices=(GPU.id,))
    ledger.device(GPU)
    calls = LedgerCalls(ledger)
    instrumentor = TransformersInstrumentor(calls)
    instrumentor.instrument()
    try:
        with served.running(tokens=32) as manager:
            for index in range(16):
                manager.add_request(list(range(10 + index, 14 + 4 * index)), max_new_tokens=12 + index % 5)
            for _ in range(16):
                assert manager.get_result(timeout=30) is not None
    finally:
        instrumentor.uninstrument()
    until = calls.now_ns() + 50 * TICK_NS
    joules = 0.0
    for t_ns, before in zip(itertools.count(0, 7 * TICK_NS), itertools.count(-7 * TICK_NS, 7 * TICK_NS), strict=False):
        joules += WATTS * max(0, t_ns - max(before, 0)) / 1e9
        ledger.counter(GPU.id, t_ns, joules)
        if t_ns > until:
            break
    ledger.flush(until + 10_000_000_000)
    book = ledger.snapshot().books[GPU.id]
    assert abs(book.imbalance()) <= 1e-9
    assert book.in_flight == 0.0
    shares = [share for call in calls.made for share in call.future.result(1)]
    assert len(shares) == 16
    assert {share.method for share in shares} == {"step"}
    assert sum(share.joules for share in shares) == pytest.approx(book.attributed, rel=1e-9)
    assert book.attributed > 0.5 * WATTS * max(call.ends[0].end_ns for call in calls.made) / 1e9
    with capsys.disabled():
        print(f"\n  16 requests {book.attributed:.3f} J of {book.measured:.3f} J measured", end="")
