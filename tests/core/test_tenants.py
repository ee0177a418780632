"""Forged and hashed labels in a whole meter: how many series, whose joules, what is remembered, what is told to whom."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.common._internal.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common._internal.trace_encoder import encode_spans
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from melodi_otel.attribution.labels import Digest
from melodi_otel.config import Config
from melodi_otel.instrumentation.asgi import LabelMiddleware
from melodi_otel.instrumentation.seam import Begin, End
from melodi_otel.runtime import Runtime
from melodi_otel.semconv_metrics import METRICS
from melodi_otel.testing.clock import ManualClock
from melodi_otel.testing.powercap import FakePowercap
from melodi_otel.testing.telemetry import CapturedSpans, points
from melodi_otel.trace.record import Recorder

DEVICE = "intel-rapl:0"
LABELLED = {metric.name for metric in METRICS.values() if metric.labelled}
PAGE = {
    "melodi_energy_attributed_joules": "melodi.energy.attributed",
    "melodi_requests": "melodi.requests",
    "melodi_requests_active": "melodi.requests.active",
}


class Site:
    """A meter that is driven by hand, an application's own providers, and a server behind the middleware.

    A hundred requests are served at a time; each batch takes a second, in which 50 J are used.
    """

    def __init__(self, root: Path, **config: Any) -> None:
        self.clock = ManualClock()
        self.joules = 0.0
        self.reader, self.spans = InMemoryMetricReader(), CapturedSpans()
        self._metrics = MeterProvider([self.reader], shutdown_on_exit=False)
        self._traces = TracerProvider(shutdown_on_exit=False)
        self._traces.add_span_processor(self.spans)
        settings = {"labels": "tenant=header:x-tenant-id", "metric_labels": ("tenant",), "span_wait": 0.0, **config}
        self.runtime = Runtime(
            Config(hub="local", sysfs_root=str(root), sources=("rapl",), metrics_addr="127.0.0.1:0", **settings),
            clock=self.clock,
            environ={},
            tracer_provider=self._traces,
            meter_provider=self._metrics,
        )
        self.runtime._meters.instruments()
        self.app = LabelMiddleware(self._serve, ["x-tenant-id"], user=True)
        self._left = 0
        self.read()

    def read(self) -> None:
        """A reading of the meter, and what follows from it."""
        now = self.clock.monotonic_ns()
        self.runtime.ledger.counter(DEVICE, now, self.joules)
        self.runtime.ledger.settle(now)

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        calls = self.runtime.calls
        call = calls.begin(Begin("chat", "transformers", "m", self.clock.monotonic_ns(), prompt_tokens=3))
        self.during()
        self._left -= 1
        if not self._left:  # the last of its batch: time passes for all of them
            self.clock.advance(1.0)
            self.joules += 50.0
            self.read()
            self.most_active()
        await asyncio.sleep(0)
        call.end(End(self.clock.monotonic_ns(), 5, "stop", ("stop",)))

    during: Callable[[], None] = staticmethod(lambda: None)
    most_active: Callable[[], None] = staticmethod(lambda: None)

    def serve(self, tenants: Iterable[bytes]) -> None:
        """Serve one request for each, a hundred at a time."""
        waiting = list(tenants)
        while waiting:
            batch, waiting = waiting[:100], waiting[100:]
            self._left = len(batch)

            async def all_of_it(batch: list[bytes] = batch) -> None:
                scopes = [{"type": "http", "headers": [(b"x-tenant-id", tenant)]} for tenant in batch]
                await asyncio.gather(*(self.app(scope, None, None) for scope in scopes))  # type: ignore[arg-type]

            asyncio.run(all_of_it())
            self.clock.advance(0.1)
            self.joules += 2.0
            self.read()
        assert self.runtime.calls.drain(30.0)

    def page(self) -> str:
        assert self.runtime._scrape is not None
        return generate_latest(self.runtime._scrape.registry).decode()

    def series(self) -> dict[str, dict[str, list[dict[str, float]]]]:
        """By road and metric, the (tenant -> value) of every series that carries the label."""
        found: dict[str, dict[str, list[Any]]] = {"page": defaultdict(list), "otlp": defaultdict(list)}
        for point in points(self.reader):
            if point.name in LABELLED:
                found["otlp"][point.name].append((point.attributes["tenant"], point.value))
        for family in text_string_to_metric_families(self.page()):
            if family.name in PAGE:
                rows = found["page"][PAGE[family.name]]
                rows += [(s.labels["tenant"], s.value) for s in family.samples if not s.name.endswith("_created")]
        return found

    def close(self) -> None:
        self.runtime.calls.close()
        self.runtime._tracers.unwrap()
        self.runtime._meters.close()
        self.runtime._publisher.close()
        assert self.runtime._scrape is not None
        self.runtime._scrape.close()
        self._metrics.shutdown()
        self._traces.shutdown()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    made: list[Site] = []

    def make(**config: Any) -> Site:
        tree = FakePowercap(tmp_path / "sys")
        tree.package(0, watts=50.0)
        made.append(Site(tree.root, **config))
        return made[-1]

    yield make
    for one in made:
        one.close()


def forged(number: int) -> bytes:
    return b"forged-%d" % number


def remembered() -> set[str]:
    """Every forged name that a container of this process still holds."""
    gc.collect()
    found: set[str] = set()
    for held in gc.get_objects():
        kind = type(held)
        items = (
            (*held.keys(), *held.values()) if kind is dict else held if kind in (list, tuple, set, frozenset) else ()
        )
        found.update(item for item in tuple(items) if type(item) is str and item.startswith("forged-"))
    return found


def test_ten_thousand_forged_tenants(site: Callable[..., Site]) -> None:
    """10,000 forged headers are 101 tenants on every family that carries labels, on the page and by OTLP; the sums hold;
    nothing but the last thousand results remembers the others.
    """
    made = site()
    most: dict[str, int] = {}

    def count() -> None:
        for road, metrics in made.series().items():
            active = {tenant for tenant, n in metrics["melodi.requests.active"] if n}
            most[road] = max(most.get(road, 0), len(active))

    made.most_active = count
    made.serve(map(forged, range(100)))
    made.serve([*map(forged, range(50)), *map(forged, range(100, 150))])  # known and unknown at the same time
    made.most_active = lambda: None
    assert most == {"page": 100, "otlp": 100}
    made.serve(map(forged, range(150, 10_000)))
    books = made.runtime.snapshot().books[DEVICE]
    assert books.attributed > 0.9 * books.measured
    assert abs(books.imbalance()) <= 1e-9
    expected = {forged(number).decode() for number in range(100)} | {"other"}
    for road, metrics in made.series().items():
        assert {name for name in metrics if metrics[name]} >= {"melodi.energy.attributed", "melodi.requests"}, road
        for name, rows in metrics.items():
            assert {tenant for tenant, _ in rows} <= expected, (road, name)
        for name in ("melodi.energy.attributed", "melodi.requests"):
            assert {tenant for tenant, _ in metrics[name]} == expected, (road, name)
        assert len(metrics["melodi.requests"]) == 101
        assert len(metrics["melodi.energy.attributed"]) == 101 * len(_phases(made))
        total = math.fsum(value for _, value in metrics["melodi.energy.attributed"])
        assert total == pytest.approx(books.attributed + books.in_flight, rel=1e-9)
        requests = Counter[str]()
        for tenant, value in metrics["melodi.requests"]:
            requests[tenant] += int(value)
        assert requests.total() == 10_050
        assert requests["other"] == 9_900
        assert requests["forged-0"] == 2
    kept = {str(record.labels["tenant"]) for record in made.runtime.store.recent()}
    assert len(kept) == 1000
    made.spans.ended.clear()  # the application's exporter, which would have sent them by now
    assert remembered() - kept <= expected


def _phases(made: Site) -> set[tuple[str, str]]:
    return {(phase, quality) for _, _, phase, quality in made.runtime.snapshot().attributed}


def test_joules_go_to_their_tenant(site: Callable[..., Site]) -> None:
    """What metrics say of a tenant is the sum of its requests' own joules, to 1e-9."""
    made = site()
    made.serve([b"a", b"b", b"a", b"c"] * 50)
    told: dict[str, float] = defaultdict(float)
    for record in made.runtime.store.recent():
        assert record.joules is not None
        told[record.labels["tenant"]] += record.joules
    for metrics in made.series().values():
        counted: dict[str, float] = defaultdict(float)
        for tenant, value in metrics["melodi.energy.attributed"]:
            counted[tenant] += value
        assert counted == pytest.approx(told, rel=1e-9)


def test_listed_tenants_stay_themselves(site: Callable[..., Site]) -> None:
    """With MELODI_LABEL_VALUES the listed tenants are counted by name however many forged ones came before them."""
    made = site(label_limit=10, label_values=(("tenant", ("acme", "globex")),))
    made.serve([*map(forged, range(200)), b"acme", b"globex"])
    for metrics in made.series().values():
        for rows in metrics.values():
            assert {tenant for tenant, _ in rows} <= {"acme", "globex", "other"}
        assert dict(metrics["melodi.requests"]) == {"acme": 1, "globex": 1, "other": 200}


@pytest.mark.parametrize("key", [None, "a secret of ours"])
def test_hashed_values_are_told_to_nobody(
    site: Callable[..., Site], tmp_path: Path, caplog: pytest.LogCaptureFixture, key: str | None
) -> None:
    """With hashing on, raw value and key are in no span, metric, exemplar, result, trace line or log record of ours."""
    raw, email = "initech-gmbh", "jane@example.org"
    with caplog.at_level(logging.DEBUG):
        made = site(
            labels="tenant=header:x-tenant-id,who=header:x-user",
            metric_labels=("tenant", "who"),
            label_hash=True,
            label_hash_key=key,
        )
        made.app = LabelMiddleware(made._serve, ["x-tenant-id", "x-user"])
        recorder = Recorder(tmp_path / "t.jsonl")
        made.runtime.ledger.tap(recorder.tap)
        made._left = 1
        scope = {"type": "http", "headers": [(b"x-tenant-id", raw.encode()), (b"x-user", email.encode())]}
        asyncio.run(made.app(scope, None, None))  # type: ignore[arg-type]
        made.clock.advance(1.0)
        made.read()
        assert made.runtime.calls.drain(10.0)
        recorder.close()
    span = made.spans.wait_for(1)[0]
    data = made.reader.get_metrics_data()
    assert data is not None
    told = {
        "span": repr(encode_spans([span])),
        "otlp": repr(encode_metrics(data)),
        "page": made.page(),
        "results": repr(made.runtime.store.recent().to_dicts()),
        "trace": (tmp_path / "t.jsonl").read_text(),
        "log": "\n".join(record.getMessage() for record in caplog.records),
        "configuration": repr(made.runtime.config),
    }
    digest = Digest(key)
    for where in ("span", "otlp", "page", "results"):
        assert digest(raw) in told[where], where
        assert digest(email) in told[where], where
    assert '"kind":"open"' in told["trace"]
    for where, text in told.items():
        assert raw not in text, where
        assert email not in text, where
        assert key is None or key not in text, where


def test_values_that_would_break_a_line(site: Callable[..., Site]) -> None:
    """Quotes, line ends, escapes and undecodable bytes come out as labels that every road can carry."""
    made = site()
    made.serve([b'a"b\\c', b"a\nmelodi_requests_total 5", b"\xff\xfe", b"\x1b[31m", b"{}", "ä\u202e".encode()])
    expected = {'a"b\\c', "a_melodi_requests_total 5", "ÿþ", "_[31m", "{}", "ä_"}
    for metrics in made.series().values():
        assert {tenant for tenant, _ in metrics["melodi.requests"]} == expected
    encode_spans(made.spans.wait_for(6))
