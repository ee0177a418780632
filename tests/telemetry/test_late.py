"""A provider that is not the SDK's: our own spans end late, with their joules and the time at which they really ended."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler, TraceIdRatioBased

from melodi_otel.attribution.record import RequestRecord
from melodi_otel.clock import Clock
from melodi_otel.instrumentation.seam import Begin, End
from melodi_otel.telemetry.late import LateEnds
from melodi_otel.telemetry.requests import RequestCalls


class ForeignSpan(trace.NonRecordingSpan):
    """A span of some vendor: takes attributes until it is ended."""

    def __init__(self, name: str) -> None:
        super().__init__(trace.SpanContext(1, 2, is_remote=False))
        self.name = name
        self.attributes: dict[str, Any] = {}
        self.ended: list[int | None] = []

    def is_recording(self) -> bool:
        return not self.ended

    def set_attributes(self, attributes: Any) -> None:
        if not self.ended:
            self.attributes.update(attributes)

    def end(self, end_time: int | None = None) -> None:
        self.ended.append(end_time)


class ForeignTracer(trace.NoOpTracer):
    """Its tracer, which keeps what it made."""

    def __init__(self) -> None:
        self.spans: list[ForeignSpan] = []

    def start_span(self, name: str, *args: Any, **kwargs: Any) -> trace.Span:
        self.spans.append(ForeignSpan(name))
        return self.spans[-1]


@pytest.fixture
def late(rig: Any) -> Iterator[LateEnds]:
    made = LateEnds(rig.deferral, threaded=False)
    yield made
    rig.wait_s = 0.0
    made.release()


def calls(rig: Any, tracer: trace.Tracer, late: LateEnds | None, observed: list[RequestRecord]) -> RequestCalls:
    class Observer:
        def finished(self, record: RequestRecord) -> None:
            observed.append(record)

    return RequestCalls(rig.meter, "g", rig.clock, lambda: tracer, rig.deferral, [Observer()], late=lambda: late)


def one_request(rig: Any, made: RequestCalls) -> None:
    clock: Clock = rig.clock
    call = made.begin(Begin("chat", "transformers", "m", clock.monotonic_ns(), prompt_tokens=3))
    rig.clock.advance(2.0)
    call.end(End(clock.monotonic_ns(), 10, "stop"))


def test_ends_with_its_joules(rig: Any, kit: Any, late: LateEnds) -> None:
    """The span stays open until its joules are there, and then ends as of the end of the request."""
    tracer, observed = ForeignTracer(), []
    one_request(rig, calls(rig, tracer, late, observed))
    ended_ns = rig.clock.wall_ns()
    (span,) = tracer.spans
    late.pump()
    assert span.ended == []
    assert rig.deferral.counts().deferred == 1
    rig.clock.advance(0.5)
    (future,) = rig.meter.futures.values()
    future.set_result([kit.share()])
    late.pump()
    assert span.ended == [ended_ns]
    assert span.attributes["melodi.energy.total"] == 30.0
    assert span.attributes["melodi.energy.per_output_token"] == 3.0
    assert span.attributes["gen_ai.usage.output_tokens"] == 10
    assert rig.deferral.counts().settled["measured"] == 1
    assert [record.output_tokens for record in observed] == [10]


def test_late_is_bounded(rig: Any, late: LateEnds) -> None:
    """After the bound of every span it ends without joules and says so, once."""
    tracer = ForeignTracer()
    one_request(rig, calls(rig, tracer, late, []))
    rig.clock.advance(2.0)
    late.pump()
    (span,) = tracer.spans
    assert span.attributes["melodi.energy.reason"] == "late"
    assert len(span.ended) == 1
    late.release()
    assert len(span.ended) == 1


def test_flush_and_release(rig: Any, late: LateEnds) -> None:
    """A flush ends what is held; after the release spans end at once, without waiting."""
    rig.wait_s = 0.01
    tracer = ForeignTracer()
    made = calls(rig, tracer, late, [])
    one_request(rig, made)
    assert late.flush(1.0)
    late.release()
    one_request(rig, made)
    assert [len(span.ended) for span in tracer.spans] == [1, 1]
    assert "melodi.energy.quality" not in tracer.spans[1].attributes


def test_a_span_that_fails(rig: Any, kit: Any, late: LateEnds) -> None:
    """A span that raises on attributes is ended all the same, and the request never hears of it."""

    class Broken(ForeignSpan):
        def set_attributes(self, attributes: Any) -> None:
            raise RuntimeError("no")

    tracer = ForeignTracer()
    tracer.start_span = lambda name, *a, **k: tracer.spans.append(Broken(name)) or tracer.spans[-1]  # type: ignore[method-assign]
    one_request(rig, calls(rig, tracer, late, []))
    (future,) = rig.meter.futures.values()
    future.set_result([kit.share()])
    late.pump()
    assert len(tracer.spans[0].ended) == 1


EXIT = """
import sys
from concurrent.futures import Future
from melodi_otel.clock import SystemClock
from melodi_otel.telemetry.deferral import Deferral, Entry
from melodi_otel.telemetry.late import LateEnds
from opentelemetry import trace

class Span(trace.NonRecordingSpan):
    def set_attributes(self, attributes): print(attributes["melodi.energy.quality"], flush=True)
    def end(self, end_time=None): print("ended", end_time, flush=True)

late = LateEnds(Deferral(SystemClock(), wait_s=lambda: 0.2))
late.hold(Span(trace.INVALID_SPAN_CONTEXT), 7, Entry(Future()), None)
if "fork" in sys.argv:
    import os
    if os.fork() == 0:
        sys.exit(0)
    os.wait()
    print("parent")
"""


@pytest.mark.parametrize("words", [[], *([["fork"]] if hasattr(os, "fork") else [])])
def test_never_lost(words: list[str]) -> None:
    """A program that ends ends its spans; a forked child does not end those of its parent."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", EXIT, *words],
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [*(["parent"] if words else []), "unavailable", "ended", "7"]


def samplers() -> dict[str, Sampler]:
    found: dict[str, Sampler] = {
        "ratio 0": TraceIdRatioBased(0.0),
        "parent based, off": ParentBased(ALWAYS_OFF),
        "on": ALWAYS_ON,
    }
    try:
        from opentelemetry.sdk.trace import sampling

        found["record only"] = sampling.AlwaysRecordSampler(ALWAYS_OFF)
    except AttributeError:
        pass
    return found


@pytest.mark.parametrize("name", samplers())
def test_head_sampling_hides_no_request(rig: Any, kit: Any, name: str) -> None:
    """Whatever the sampler decides the request is metered and observed; a span that is only recorded has its joules too."""
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider(sampler=samplers()[name], shutdown_on_exit=False)
    provider.add_span_processor(rig.processor)
    observed: list[RequestRecord] = []
    rig.meter.immediate = [kit.share()]
    made = calls(rig, provider.get_tracer("t"), None, observed)
    one_request(rig, made)
    assert made.drain()
    made.close()
    rig.processor.pump()
    assert [record.energy.total for record in observed] == [30.0]
    assert [record.sampled for record in observed] == [name == "on"]
    recorded = [span.attributes["melodi.energy.total"] for span in rig.captured.ended]
    assert recorded == ([30.0] if name in ("on", "record only") else [])
