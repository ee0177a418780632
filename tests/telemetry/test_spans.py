"""Spans wait for their joules: bounded in time and number, rebuilt, never lost."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import Future
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanLimits, SpanProcessor, TracerProvider
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from melodi_otel.attribution.meter import Share
from melodi_otel.attribution.summary import unavailable
from melodi_otel.clock import SystemClock
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.deferral import Deferral, Entry, energy_attributes
from melodi_otel.telemetry.parking import Parking
from melodi_otel.telemetry.spans import DeferringProcessor, enriched
from melodi_otel.testing.clock import ManualClock
from melodi_otel.testing.telemetry import CapturedSpans


def end_waiting(rig: Any, name: str = "chat m", *, owner: bool = True, **attributes: Any) -> Future[list[Share]]:
    span = rig.tracer.start_span(name, attributes=attributes)
    future: Future[list[Share]] = Future()
    span_id = span.get_span_context().span_id
    rig.deferral.register(span_id, Entry(future, owner))
    span.end()
    rig.deferral.forget(span_id)
    return future


def test_other_spans_pass_at_once(rig: Any) -> None:
    """A span without a future reaches the next processor at once, as the very object that ended."""
    span = rig.tracer.start_span("GET /")
    span.end()
    assert [s.name for s in rig.captured.ended] == ["GET /"]
    assert not isinstance(rig.captured.ended[0], type(enriched(rig.captured.ended[0], {})))


def test_waits_for_joules(rig: Any, kit: Any) -> None:
    """A span is forwarded when its shares are there, with its own attributes and the joules."""
    future = end_waiting(rig, **{"gen_ai.usage.output_tokens": 10})
    rig.processor.pump()
    assert rig.captured.ended == []
    assert rig.deferral.counts().deferred == 1
    future.set_result([kit.share(30.0), kit.share(6.0, "intel-rapl:0")])
    rig.processor.pump()
    found = rig.captured.attributes("chat m")
    assert found["gen_ai.usage.output_tokens"] == 10
    assert found["melodi.energy.total"] == 36.0
    assert found["melodi.energy.gpu"] == 30.0
    assert found["melodi.energy.cpu"] == 6.0
    assert "melodi.energy.memory" not in found
    assert found["melodi.energy.per_output_token"] == 3.6
    assert found["melodi.energy.scope"] == "gpu+cpu"
    assert found["melodi.energy.source"] == ("nvml.energy_counter", "rapl.package")
    assert found["melodi.energy.quality"] == "measured"
    assert found["melodi.energy.schema"] == 1
    assert rig.deferral.counts().deferred == 0
    assert rig.deferral.counts().settled["measured"] == 1


def test_late(rig: Any, kit: Any) -> None:
    """After the bound a span goes without joules and says so; joules that come later change nothing."""
    future = end_waiting(rig)
    assert rig.processor.pump() == 2.0
    rig.clock.advance(1.999)
    rig.processor.pump()
    assert rig.captured.ended == []
    rig.clock.advance(0.001)
    assert rig.processor.pump() is None
    found = rig.captured.attributes("chat m")
    assert found == {"melodi.energy.quality": "unavailable", "melodi.energy.reason": "late", "melodi.energy.schema": 1}
    future.set_result([kit.share()])
    rig.processor.pump()
    assert len(rig.captured.ended) == 1
    assert rig.deferral.counts().settled["late"] == 1


@pytest.mark.parametrize(("slept", "more"), [(0.04, []), (0.6, [1.0]), (30.0, [1.0])])
def test_a_program_that_stood_still(kit: Any, slept: float, more: list[float]) -> None:
    """After a stop of everything a span waits for half its bound more, once; a thread merely a bit late is no stop."""
    delivered: list[str] = []
    clock = ManualClock()
    parking: Parking[str] = Parking(
        Deferral(clock, wait_s=lambda: 2.0),
        lambda item, _, energy: delivered.append(f"{item} {energy.reason}"),
        Complaints("test"),
        threaded=False,
    )
    parking.park("span", Entry(Future()))
    found: list[float] = []
    wait_s: float | None = 2.0
    while wait_s:
        due_ns = clock.monotonic_ns() + round(wait_s * 1e9)
        clock.advance(wait_s + slept)
        parking.overslept(due_ns)
        wait_s = parking.pump()
        found += [] if wait_s is None else [wait_s]
    assert found == more
    assert delivered == ["span late"]
    parking.release()


def test_overflow(kit: Any) -> None:
    """Beyond the limit the oldest span goes at once and says so."""
    rig = kit.Rig(limit=2)
    futures = [end_waiting(rig, f"s{i}") for i in range(3)]
    rig.processor.pump()
    assert [s.name for s in rig.captured.ended] == ["s0"]
    assert rig.captured.attributes("s0")["melodi.energy.reason"] == "overflow"
    for future in futures:
        future.set_result([kit.share()])
    rig.processor.pump()
    assert [s.name for s in rig.captured.ended] == ["s0", "s1", "s2"]
    rig.provider.shutdown()


def test_force_flush_waits_bounded(rig: Any, kit: Any) -> None:
    """A flush forwards what is parked, without joules where they do not come in time, then flushes the next one."""
    rig.wait_s = 0.05
    future = end_waiting(rig, "known")
    end_waiting(rig, "unknown")
    future.set_result([kit.share()])
    assert rig.provider.force_flush(5000)
    assert {s.name for s in rig.captured.ended} == {"known", "unknown"}
    assert rig.captured.attributes("known")["melodi.energy.total"] == 30.0
    assert rig.captured.attributes("unknown")["melodi.energy.reason"] == "late"
    assert rig.captured.flushes == 1
    assert rig.deferral.counts().settled["flush"] == 1


def test_force_flush_waits_for_joules(rig: Any, kit: Any) -> None:
    """Joules that come while a flush waits still go on the span."""
    future = end_waiting(rig)
    timer = threading.Timer(0.01, future.set_result, ([kit.share()],))
    timer.start()
    assert rig.provider.force_flush(30_000)
    timer.join()
    assert rig.captured.attributes("chat m")["melodi.energy.total"] == 30.0


def test_shutdown(rig: Any) -> None:
    """A shutdown forwards what is parked with its reason, shuts the next one down once, and holds nothing any more."""
    rig.wait_s = 0.01
    end_waiting(rig, "last")
    rig.processor.shutdown()
    rig.processor.shutdown()
    assert rig.captured.attributes("last")["melodi.energy.reason"] == "shutdown"
    end_waiting(rig, "after")
    assert [s.name for s in rig.captured.ended] == ["last", "after"]
    assert rig.deferral.counts().deferred == 0


def test_own_thread_forwards(kit: Any) -> None:
    """Unpumped, a daemon thread forwards a span as soon as its joules are there, and one whose bound is over."""
    deferral = Deferral(SystemClock(), wait_s=lambda: 0.05)
    captured = CapturedSpans()
    provider = TracerProvider(shutdown_on_exit=False)
    processor = DeferringProcessor(captured, deferral)
    provider.add_span_processor(processor)
    tracer = provider.get_tracer("test")
    for name, shares in (("known", [kit.share()]), ("never", None)):
        span = tracer.start_span(name)
        future: Future[list[Share]] = Future()
        deferral.register(span.get_span_context().span_id, Entry(future))
        span.end()
        if shares is not None:
            future.set_result(shares)
    spans = {s.name: s.attributes or {} for s in captured.wait_for(2)}
    assert spans["known"]["melodi.energy.total"] == 30.0
    assert spans["never"]["melodi.energy.reason"] == "late"
    provider.shutdown()


def test_rebuilt_span_is_the_same(rig: Any, kit: Any) -> None:
    """Everything but the joules survives: events, links, dropped counts, scope, resource, status, kind, parent, times."""
    provider = TracerProvider(
        resource=Resource({"service.name": "s"}),
        span_limits=SpanLimits(max_events=1, max_links=1, max_span_attributes=2),
        shutdown_on_exit=False,
    )
    provider.add_span_processor(rig.processor)
    plain = CapturedSpans()
    provider.add_span_processor(plain)
    tracer = provider.get_tracer("lib", "1.2", "https://schema", {"scope": "x"})
    links = [Link(SpanContext(i, i, False, TraceFlags(1)), {"i": i}) for i in (7, 8)]
    with tracer.start_as_current_span("outer"):
        span = tracer.start_span("chat m", kind=SpanKind.SERVER, links=links, attributes={"a": 1, "b": 2, "c": 3})
        span.add_event("one", {"k": 1})
        span.add_event("two", {"k": 2})
        span.set_status(Status(StatusCode.ERROR, "bad"))
        future: Future[list[Share]] = Future()
        rig.deferral.register(span.get_span_context().span_id, Entry(future))
        span.end(end_time=span.start_time + 5)  # type: ignore[attr-defined]
    future.set_result([kit.share()])
    rig.processor.pump()
    ours = next(s for s in rig.captured.ended if s.name == "chat m")
    theirs = next(s for s in plain.ended if s.name == "chat m")
    fields = (
        *("name", "context", "parent", "kind", "start_time", "end_time", "status", "events", "links", "resource"),
        *("instrumentation_scope", "dropped_attributes", "dropped_events", "dropped_links"),
    )
    for field in fields:
        assert getattr(ours, field) == getattr(theirs, field), field
    assert (ours.dropped_attributes, ours.dropped_events, ours.dropped_links) == (1, 1, 1)
    added = {k for k in ours.attributes or {} if not k.startswith("melodi.")}
    assert added == set(theirs.attributes or {})
    assert "melodi.energy.total" not in (theirs.attributes or {})


def test_encodes_alike(rig: Any, kit: Any) -> None:
    """On the wire the rebuilt span differs from the original by the added attributes alone."""
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans

    plain = CapturedSpans()
    rig.provider.add_span_processor(plain)
    end_waiting(rig, **{"gen_ai.operation.name": "chat", "xs": ("a", "b")}).set_result([kit.share()])
    rig.processor.pump()
    ours = encode_spans([rig.captured.ended[0]]).resource_spans[0].scope_spans[0].spans[0]
    theirs = encode_spans([plain.ended[0]]).resource_spans[0].scope_spans[0].spans[0]
    kept = [a for a in ours.attributes if not a.key.startswith("melodi.energy.")]
    del ours.attributes[:]
    ours.attributes.extend(kept)
    assert ours.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)


def test_spans_of_others(rig: Any, kit: Any) -> None:
    """Spans of others wait too where somebody knows their shares."""
    future: Future[list[Share]] = Future()
    rig.deferral.watch(knowing := kit.Knowing(Entry(future), "llm_request"))
    rig.tracer.start_span("llm_request").end()
    rig.tracer.start_span("other").end()
    assert knowing.seen == ["llm_request", "other"]
    assert [s.name for s in rig.captured.ended] == ["other"]
    future.set_result([kit.share()])
    rig.processor.pump()
    assert rig.captured.attributes("llm_request")["melodi.energy.total"] == 30.0


class Raising(SpanProcessor):
    def on_start(self, span: Any, parent_context: Any = None) -> None:
        raise RuntimeError("on_start")

    def on_end(self, span: ReadableSpan) -> None:
        raise RuntimeError("on_end")

    def shutdown(self) -> None:
        raise RuntimeError("shutdown")

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        raise RuntimeError("flush")


def test_exceptions_of_the_next_stay_inside(caplog: pytest.LogCaptureFixture, kit: Any) -> None:
    """A next processor that raises is logged once per hook and never reaches the application."""
    rig = kit.Rig()
    processor = DeferringProcessor(Raising(), rig.deferral, threaded=False)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    tracer = provider.get_tracer("t")
    tracer.start_span("a").end()
    tracer.start_span("b").end()
    assert not provider.force_flush(10)
    provider.shutdown()
    assert len([r for r in caplog.records if "on_end failed" in r.message]) == 1
    assert len([r for r in caplog.records if "on_start failed" in r.message]) == 1


def test_failing_lookup_lets_pass(rig: Any, caplog: pytest.LogCaptureFixture) -> None:
    """An error of ours while looking a span up lets the span pass."""

    class Broken:
        def started(self, span: ReadableSpan) -> None:
            raise RuntimeError("started")

        def ended(self, span: ReadableSpan) -> Entry | None:
            raise RuntimeError("ended")

        def own_ended(self, span_id: int) -> None: ...

        def forked(self) -> None: ...

    rig.deferral.watch(Broken())
    rig.tracer.start_span("a").end()
    assert [s.name for s in rig.captured.ended] == ["a"]


def test_cancelled_future(rig: Any) -> None:
    """A future that was cancelled gives a span without joules, not a lost one."""
    future = end_waiting(rig)
    future.cancel()
    rig.processor.pump()
    assert rig.captured.attributes("chat m")["melodi.energy.quality"] == "unavailable"


def test_blocked_exporter_is_bounded(kit: Any) -> None:
    """While the next processor blocks, no more than the limit of ready spans are kept behind it."""
    rig = kit.Rig(limit=3)
    futures = [end_waiting(rig, f"s{i}") for i in range(3)]
    for future in futures:
        future.set_result([kit.share()])
    end_waiting(rig, "s3").set_result([kit.share()])
    rig.processor.pump()
    assert [s.name for s in rig.captured.ended] == ["s1", "s2", "s3"]
    assert rig.deferral.counts().settled["dropped"] == 1
    rig.provider.shutdown()


def test_on_ending_is_forwarded(rig: Any) -> None:
    """Where the SDK announces the end of a span, the next processor hears it; before that nobody does."""
    heard: list[str] = []
    rig.captured._on_ending = lambda span: heard.append(span.name)  # type: ignore[method-assign]
    rig.tracer.start_span("a").end()
    assert heard == (["a"] if hasattr(SpanProcessor, "_on_ending") else [])


def test_rollup_instead_of_total(kit: Any) -> None:
    """A span that encloses the owners of joules carries rollup, and neither total nor its parts."""
    rig = kit.Rig()
    future = end_waiting(rig, owner=False)
    future.set_result([kit.share(0.0, rollup=42.0)])
    rig.processor.pump()
    found = rig.captured.attributes("chat m")
    assert found["melodi.energy.rollup"] == 42.0
    assert not {"melodi.energy.total", "melodi.energy.gpu", "melodi.energy.dynamic"} & set(found)
    rig.provider.shutdown()


def test_unknown_is_absent() -> None:
    """Attributes of an unknown energy are its quality, reason and schema; no 0 stands for unknown."""
    assert energy_attributes(unavailable("no_source"), 5) == {
        "melodi.energy.quality": "unavailable",
        "melodi.energy.reason": "no_source",
        "melodi.energy.schema": 1,
    }


FORK = """
import os, sys, time
from concurrent.futures import Future
from opentelemetry.sdk.trace import TracerProvider
from melodi_otel.clock import SystemClock
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.deferral import Deferral, Entry
from melodi_otel.telemetry.spans import DeferringProcessor
from melodi_otel.testing.telemetry import CapturedSpans

deferral = Deferral(SystemClock(), wait_s=lambda: 0.05)
captured = CapturedSpans()
provider = TracerProvider(shutdown_on_exit=False)
provider.add_span_processor(DeferringProcessor(captured, deferral))

def park(name):
    span = provider.get_tracer("t").start_span(name)
    future = Future()
    deferral.register(span.get_span_context().span_id, Entry(future))
    span.end()
    return future

deferral_wait, deferral._wait_s = deferral._wait_s, lambda: 30.0
parents = park("parent")
deferral._wait_s = deferral_wait
pid = os.fork()
if pid == 0:
    assert deferral.counts().deferred == 0
    park("child")
    names = [s.name for s in captured.wait_for(1)]
    provider.shutdown()
    print("child", names, [s.name for s in captured.ended], flush=True)
    os._exit(0)
os.waitpid(pid, 0)
parents.set_result([])
captured.wait_for(1)
provider.shutdown()
print("parent", [s.name for s in captured.ended], flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_fork() -> None:
    """A forked child drops what its parent parked, which the parent alone exports, and defers its own spans."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["child ['child'] ['child']", "parent ['parent']"]


EXIT = """
from concurrent.futures import Future
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from melodi_otel.clock import SystemClock
from melodi_otel.telemetry.complaints import Complaints
from melodi_otel.telemetry.deferral import Deferral, Entry
from melodi_otel.telemetry.spans import DeferringProcessor

deferral = Deferral(SystemClock(), wait_s=lambda: 0.05)
provider = TracerProvider(shutdown_on_exit=False)
provider.add_span_processor(DeferringProcessor(SimpleSpanProcessor(ConsoleSpanExporter()), deferral))
span = provider.get_tracer("t").start_span("last words")
deferral.register(span.get_span_context().span_id, Entry(Future()))
deferral._wait_s = lambda: 0.2
span.end()
"""


def test_exit() -> None:
    """A program that ends without a shutdown still exports what was parked."""
    done = subprocess.run([sys.executable, "-c", EXIT], capture_output=True, check=False, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("last words") == 1
    assert '"melodi.energy.quality": "unavailable"' in done.stdout
