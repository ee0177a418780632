from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider

from melodi_otel.attribution.meter import Key, Share
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.attribution.summary import summarize
from melodi_otel.devices import Device
from melodi_otel.telemetry.deferral import Deferral, Entry
from melodi_otel.telemetry.spans import DeferringProcessor
from melodi_otel.testing.clock import ManualClock
from melodi_otel.testing.telemetry import CapturedSpans

DEVICES = {
    "GPU-1": Device("GPU-1", "gpu", "nvml.energy_counter", "A card"),
    "intel-rapl:0": Device("intel-rapl:0", "cpu", "rapl.package"),
    "psys": Device("psys", "host", "rapl.psys"),
}


def make_share(joules: float | None = 30.0, device: str = "GPU-1", request: str = "r1", **changes: Any) -> Share:
    """A share of 2/3 dynamic and 1/3 static joules, from 10 s to 12 s."""
    known: dict[str, Any] = {
        "dynamic": None if joules is None else joules * 2 / 3,
        "static": None if joules is None else joules / 3,
        "prefill": None,
        "decode": None,
        "uncertainty": None if joules is None else 0.5,
        "method": "exclusive",
        "quality": "measured" if joules is not None else "unavailable",
        "coverage": 1.0,
        "concurrency": 1.0,
        "final_ns": 13_000_000_000,
        **changes,
    }
    return Share(Key("g", request), device, 10_000_000_000, 12_000_000_000, joules, **known)


def make_record(**changes: Any) -> RequestRecord:
    """A sampled chat of 12 and 11 tokens that took 3 s and 30 J."""
    known: dict[str, Any] = {
        "key": Key("g", "r1"),
        "name": "chat m",
        "kind": "request",
        "operation": "chat",
        "provider": "transformers",
        "model": "m",
        "start_ns": 0,
        "end_ns": 3_000_000_000,
        "start_wall_ns": 0,
        "first_token_ns": 1_000_000_000,
        "prompt_tokens": 12,
        "cached_tokens": None,
        "output_tokens": 11,
        "outcome": "stop",
        "error_type": None,
        "finish_reasons": ("stop",),
        "energy": summarize([make_share(30.0)], DEVICES),
        "trace_id": 0xABC,
        "span_id": 0xDEF,
        "sampled": True,
        "labels": {"tenant": "t1"},
        **changes,
    }
    return RequestRecord(**known)


class FakeMeter:
    """Records what is said; its futures are resolved by hand."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.futures: dict[Key, Future[list[Share]]] = {}
        self.immediate: list[Share] | None = None

    def open(self, key: Key, t_ns: int, **more: Any) -> None:
        self.calls.append(("open", (key, t_ns), more))

    def bind(self, key: Key, child_id: str) -> None:
        self.calls.append(("bind", (key, child_id), {}))

    def close(self, key: Key, t_ns: int, output_tokens: int | None, outcome: str, **more: Any) -> Future[list[Share]]:
        self.calls.append(("close", (key, t_ns, output_tokens, outcome), more))
        future = self.futures[key] = Future[list[Share]]()
        if self.immediate is not None:
            future.set_result(self.immediate)
        return future

    def said(self, what: str) -> list[tuple[Any, dict[str, Any]]]:
        return [(args, more) for name, args, more in self.calls if name == what]


class Knowing:
    """Knows what others' spans wait for: all of them, or those of one name."""

    def __init__(self, entry: Entry, name: str | None = None) -> None:
        self.entry, self.name = entry, name
        self.seen: list[str] = []

    def started(self, span: ReadableSpan) -> None:
        self.seen.append(span.name)

    def ended(self, span: ReadableSpan) -> Entry | None:
        return self.entry if self.name in (None, span.name) else None

    def own_ended(self, span_id: int) -> None: ...

    def forked(self) -> None: ...


class Rig:
    """A provider whose only processor defers in front of `captured`, pumped by hand."""

    def __init__(self, *, wait_s: float = 2.0, limit: int = 100, threaded: bool = False) -> None:
        self.clock = ManualClock()
        self.wait_s = wait_s
        self.deferral = Deferral(
            self.clock, wait_s=lambda: self.wait_s, limit=limit, devices=lambda: DEVICES, why=lambda: "no_source"
        )
        self.captured = CapturedSpans()
        self.processor = DeferringProcessor(self.captured, self.deferral, threaded=threaded)
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(self.processor)
        self.tracer = self.provider.get_tracer("test")
        self.meter = FakeMeter()


@pytest.fixture
def kit() -> SimpleNamespace:
    """The helpers of this room: `share`, `record`, `Rig`, `FakeMeter`, `Knowing`, `devices`."""
    return SimpleNamespace(
        share=make_share, record=make_record, Rig=Rig, FakeMeter=FakeMeter, Knowing=Knowing, devices=DEVICES
    )


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    yield made
    made.wait_s = 0.0
    made.provider.shutdown()


@pytest.fixture
def set_global() -> Iterator[Callable[[Any, str, Any], None]]:
    """Set a global of the API as an application would; undone before anybody looks for what a test left behind."""
    patch = pytest.MonkeyPatch()
    yield patch.setattr
    patch.undo()
