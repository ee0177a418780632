from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest

from melodi_otel.attribution.meter import Key, Share, current
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.attribution.summary import Energy, summarize, unavailable
from melodi_otel.devices import Device
from melodi_otel.results import Measurement, Store
from melodi_otel.testing.clock import ManualClock

CPU = Device(id="intel-rapl:0", type="cpu", source="rapl.package", name="Some CPU")
DEVICES = {CPU.id: CPU}


def share(key: Key, joules: float | None, *, rollup: float | None = None, **changes: Any) -> Share:
    values: dict[str, Any] = {
        "key": key,
        "device": CPU.id,
        "t0_ns": 0,
        "t1_ns": 1,
        "joules": joules,
        "dynamic": joules,
        "static": None if joules is None else 0.0,
        "prefill": None,
        "decode": None,
        "uncertainty": None if joules is None else 0.3,
        "method": "exclusive",
        "quality": "unavailable" if joules is None else "measured",
        "coverage": 0.0 if joules is None else 1.0,
        "concurrency": 1.0,
        "final_ns": 2,
        "rollup": joules if rollup is None else rollup,
        "reason": "no_samples" if joules is None else None,
    }
    return Share(**{**values, **changes})


def record(name: str = "chat", **changes: Any) -> RequestRecord:
    key = changes.pop("key", Key("g", name))
    energy: Energy = changes.pop("energy", None) or summarize([share(key, 3.0)], DEVICES)
    values: dict[str, Any] = {
        "key": key,
        "name": name,
        "kind": "request",
        "operation": "chat",
        "provider": "transformers",
        "model": "m",
        "start_ns": 1_000_000_000,
        "end_ns": 3_000_000_000,
        "start_wall_ns": 1_700_000_000_000_000_000,
        "first_token_ns": 1_250_000_000,
        "prompt_tokens": 10,
        "cached_tokens": None,
        "output_tokens": 6,
        "outcome": "stop",
        "error_type": None,
        "finish_reasons": ("stop",),
        "energy": energy,
    }
    return RequestRecord(**{**values, **changes})


def unknown(name: str = "lost") -> RequestRecord:
    return record(name, energy=unavailable("no_source"))


class FakeMeter:
    """A meter that remembers what it was told and settles when the test says so."""

    def __init__(self) -> None:
        self.opened: dict[Key, Key | None] = {}
        self.closed: dict[Key, tuple[int, str]] = {}
        self.futures: dict[Key, Future[list[Share]]] = {}
        self.answer: Callable[[Key], list[Share]] | None = lambda key: [share(key, 2.0)]

    def open(self, key: Key, t_ns: int, *, parent: Key | None = None, **_: Any) -> None:
        self.opened[key] = parent

    def close(self, key: Key, t_ns: int, output_tokens: int | None, outcome: str, **_: Any) -> Future[list[Share]]:
        assert key not in self.closed
        assert output_tokens is None
        self.closed[key] = (t_ns, outcome)
        future = self.futures[key] = Future[list[Share]]()
        if self.answer is not None:
            future.set_result(self.answer(key))
        return future


class Bench:
    """A meter, a clock, a store, and measurements made of them."""

    def __init__(self) -> None:
        self.meter = FakeMeter()
        self.clock = ManualClock()
        self.store = Store()

    def measure(self, name: str = "block", **changes: Any) -> Measurement:
        values: dict[str, Any] = {
            "meter": self.meter,
            "clock": self.clock,
            "devices": lambda: DEVICES,
            "group": "g",
            "observer": self.store,
            "nested": self.store.nested,
            "wait_s": 0.0,
        }
        return Measurement(name, **{**values, **changes})


@pytest.fixture
def bench() -> Bench:
    assert current.get() is None
    return Bench()


@pytest.fixture
def kit() -> SimpleNamespace:
    """Makers of shares and records."""
    return SimpleNamespace(share=share, record=record, unknown=unknown, DEVICES=DEVICES, CPU=CPU)
