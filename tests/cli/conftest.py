from __future__ import annotations

import sys
import types
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import pytest

from melodi_otel.attribution.books import Books, Snapshot
from melodi_otel.attribution.meter import Key, Share
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.attribution.summary import summarize
from melodi_otel.devices import Device
from melodi_otel.results import Store
from melodi_otel.sources.base import Discovery, Refusal

RAPL = Device("intel-rapl:0", "cpu", "rapl.package", "Some CPU")
GUESS = Device("cpu-estimate", "cpu", "estimate.cpu_utilization", "Some CPU", estimated=True)
DENIED = Refusal("rapl", "permission_denied", "energy_uj cannot be read", "chmod -R a+r /sys/class/powercap/*")


class Meter:
    """A source with the given devices."""

    def __init__(self, name: str, *devices: Device) -> None:
        self.name = name
        self.devices = devices

    def close(self) -> None: ...


class FakeRuntime:
    """A runtime that finds what its class is told to find, and knows the requests that a test puts into its store."""

    found: Discovery = Discovery((Meter("rapl", RAPL),))
    made: list[FakeRuntime] = []

    def __init__(self, config: Any, **_: Any) -> None:
        self.config = config
        self.store = Store()
        self.log: list[str] = []
        self.endpoint_url = None if config.metrics_addr in (None, "off") else f"http://{config.metrics_addr}/metrics"
        self.discovery = self.found
        if config.sources == ("estimate",):
            self.discovery = Discovery((Meter("estimate", GUESS),))
        FakeRuntime.made.append(self)

    def devices(self) -> Mapping[str, Device]:
        return {d.id: d for d in self.discovery.devices}

    def start(self) -> None:
        self.log.append("start")

    def shutdown(self) -> None:
        self.log.append("shutdown")

    def instrument_libraries(self) -> None:
        self.log.append("instrument")

    def wait_settled(self, timeout: float) -> bool:
        self.log.append("settled")
        return True

    def measured_between(self, t0_ns: int, t1_ns: int) -> Mapping[str, float | None]:
        return dict.fromkeys(self.devices(), (t1_ns - t0_ns) / 1000000000.0 * 10)

    def snapshot(self) -> Snapshot:
        return Snapshot(1, {d: Books(d, measured=9.0, attributed=9.0) for d in self.devices()}, {}, {}, {})


def record(start_ns: int, end_ns: int, prompt_tokens: int, joules: float = 3.0, device: Device = RAPL) -> RequestRecord:
    key = Key("g", f"{start_ns}-{prompt_tokens}")
    share = Share(
        key,
        device.id,
        start_ns,
        end_ns,
        joules,
        joules,
        0.0,
        None,
        None,
        0.1,
        "step",
        "measured",
        1.0,
        1.0,
        end_ns,
        rollup=joules,
    )
    return RequestRecord(
        key=key,
        name="chat",
        kind="request",
        operation="chat",
        provider="transformers",
        model="m",
        start_ns=start_ns,
        end_ns=end_ns,
        start_wall_ns=0,
        first_token_ns=start_ns + 1,
        prompt_tokens=prompt_tokens,
        cached_tokens=None,
        output_tokens=5,
        outcome="stop",
        error_type=None,
        finish_reasons=("stop",),
        energy=summarize([share], {device.id: device}),
        shares=(share,),
    )


@pytest.fixture
def runtime(monkeypatch):
    """The composition root, replaced by one that needs no machine."""
    module = types.ModuleType("melodi_otel.runtime")
    module.Runtime = FakeRuntime
    monkeypatch.setitem(sys.modules, "melodi_otel.runtime", module)
    monkeypatch.setattr(FakeRuntime, "made", [])
    monkeypatch.setattr(
        FakeRuntime, "found", Discovery((Meter("rapl", RAPL),), (Refusal("nvml", "library_missing", "no NVML"),))
    )
    return FakeRuntime


@pytest.fixture
def kit():
    return SimpleNamespace(RAPL=RAPL, GUESS=GUESS, DENIED=DENIED, Meter=Meter, record=record, FakeRuntime=FakeRuntime)
