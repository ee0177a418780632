"""Requests become activities, spans and records; each is closed once, whatever happens."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import NoOpTracer, SpanKind, StatusCode

from melodi_otel.attribution.meter import Key, current
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.instrumentation.seam import Begin, End
from melodi_otel.telemetry.requests import RequestCalls


class Observed:
    def __init__(self) -> None:
        self.records: list[RequestRecord] = []

    def finished(self, record: RequestRecord) -> None:
        self.records.append(record)


@pytest.fixture
def observed() -> Observed:
    return Observed()


def calls_of(rig: Any, *observers: Any, **more: Any) -> RequestCalls:
    more.setdefault("tracer", lambda: rig.tracer)
    return RequestCalls(rig.meter, "g", rig.clock, deferral=rig.deferral, observers=observers, service="svc", **more)


def begin_at(rig: Any, **more: Any) -> Begin:
    return Begin("chat", "transformers", "m", rig.clock.monotonic_ns(), **more)


def test_span_and_record(rig: Any, kit: Any, observed: Observed) -> None:
    """A request gives one span with names, counts and joules, and one record that says the same."""
    calls = calls_of(rig, observed)
    call = calls.begin(begin_at(rig, prompt_tokens=12, attributes={"gen_ai.request.max_tokens": 64}))
    start = rig.clock.monotonic_ns()
    rig.clock.advance(2.0)
    call.end(
        End(
            rig.clock.monotonic_ns(),
            output_tokens=10,
            outcome="length",
            finish_reasons=["length"],
            first_token_ns=start + 500_000_000,
            cached_tokens=4,
        )
    )
    rig.meter.futures[call.key].set_result([kit.share(30.0)])
    rig.processor.pump()
    span = rig.captured.ended[0]
    assert span.name == "chat m"
    assert span.kind is SpanKind.INTERNAL
    assert span.start_time == 1_700_000_000_000_000_000
    assert span.end_time - span.start_time == 2_000_000_000
    assert span.status.status_code is StatusCode.UNSET
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "transformers",
        "gen_ai.request.model": "m",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.output_tokens": 10,
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.response.time_to_first_chunk": 0.5,
        "melodi.energy.total": 30.0,
        "melodi.energy.per_output_token": 3.0,
    }
    assert expected.items() <= dict(span.attributes).items()
    (record,) = observed.records
    assert record.energy.total == 30.0
    assert (record.prompt_tokens, record.cached_tokens, record.output_tokens) == (12, 4, 10)
    assert record.duration_s == 2.0
    assert record.time_to_first_token_s == 0.5
    assert record.trace_id == span.context.trace_id
    assert record.span_id == span.context.span_id
    assert record.sampled


def test_meter_is_told(rig: Any) -> None:
    """The meter hears times, tokens, devices and whose request it is, under full names."""
    calls = calls_of(rig, namespace="ns")
    call = calls.begin(begin_at(rig, devices=("GPU-1",), thread=7))
    call.bind("row-1")
    call.end(End(rig.clock.monotonic_ns(), output_tokens=3, prompt_tokens=9))
    ((key, t_ns), more) = rig.meter.said("open")[0]
    assert key.group == "g"
    assert t_ns == 1_000_000_000_000
    assert more["labels"] == {
        "gen_ai.provider.name": "transformers",
        "gen_ai.operation.name": "chat",
        "service.name": "svc",
        "service.namespace": "ns",
    }
    assert more["devices"] == ("GPU-1",)
    assert more["thread"] == 7
    assert rig.meter.said("bind")[0][0] == (key, "row-1")
    ((_, _, tokens, outcome), more) = rig.meter.said("close")[0]
    assert (tokens, outcome, more["prompt_tokens"]) == (3, "stop", 9)


def test_ends_once(rig: Any, observed: Observed) -> None:
    """A second end does nothing."""
    calls = calls_of(rig, observed)
    call = calls.begin(begin_at(rig))
    call.end(End(rig.clock.monotonic_ns()))
    call.end(End(rig.clock.monotonic_ns()))
    rig.meter.futures[call.key].set_result([])
    rig.processor.pump()
    assert len(rig.meter.said("close")) == len(rig.captured.ended) == len(observed.records) == 1


def test_nested(rig: Any, kit: Any) -> None:
    """An inner call's parent is the outer one; the inner span owns the total, the outer one carries the rollup."""
    calls = calls_of(rig)
    outer = calls.begin(begin_at(rig))
    with outer.active():
        inner = calls.begin(begin_at(rig))
        with inner.active():
            assert current.get() == inner.key
        assert current.get() == outer.key
        inner.end(End(rig.clock.monotonic_ns()))
    assert current.get() is None
    outer.end(End(rig.clock.monotonic_ns()))
    rig.meter.futures[inner.key].set_result([kit.share(20.0, rollup=20.0)])
    rig.meter.futures[outer.key].set_result([kit.share(1.0, rollup=21.0)])
    rig.processor.pump()
    first, second = rig.captured.ended
    assert first.parent.span_id == second.context.span_id
    assert first.attributes["melodi.energy.total"] == 20.0
    assert "melodi.energy.rollup" not in first.attributes
    assert second.attributes["melodi.energy.rollup"] == 21.0
    assert "melodi.energy.total" not in second.attributes
    assert rig.meter.said("open")[1][1]["parent"] == outer.key


def test_parent_of_a_block(rig: Any) -> None:
    """A call inside another activity of the meter names that one as its parent."""
    calls = calls_of(rig)
    token = current.set(Key("g", "block"))
    call = calls.begin(begin_at(rig))
    current.reset(token)
    call.end(End(rig.clock.monotonic_ns()))
    assert rig.meter.said("open")[0][1]["parent"] == Key("g", "block")


@pytest.mark.parametrize(
    ("error", "outcome", "name"),
    [(ValueError("no"), "error", "ValueError"), (KeyboardInterrupt(), "abort", "KeyboardInterrupt")],
)
def test_errors(rig: Any, observed: Observed, error: BaseException, outcome: Any, name: str) -> None:
    """What the call raised is on span and record, with the error status."""
    calls = calls_of(rig, observed)
    call = calls.begin(begin_at(rig))
    call.end(End(rig.clock.monotonic_ns(), outcome=outcome, error=error))
    rig.meter.futures[call.key].set_result([])
    rig.processor.pump()
    span = rig.captured.ended[0]
    assert span.status.status_code is StatusCode.ERROR
    assert span.attributes["error.type"] == name
    assert observed.records[0].error_type == name
    assert span.attributes["melodi.energy.reason"] == "no_source"


@pytest.mark.parametrize("how", ["noop", "unsampled"])
def test_metered_without_a_span(rig: Any, kit: Any, observed: Observed, how: str) -> None:
    """Without a recording span the request is metered and observed, with its joules, without an exemplar."""
    provider = TracerProvider(sampler=ALWAYS_OFF, shutdown_on_exit=False)
    tracer = NoOpTracer() if how == "noop" else provider.get_tracer("t")
    calls = calls_of(rig, observed, tracer=lambda: tracer)
    call = calls.begin(begin_at(rig))
    with call.active():
        assert current.get() == call.key
    call.end(End(rig.clock.monotonic_ns(), output_tokens=2))
    rig.meter.futures[call.key].set_result([kit.share(8.0)])
    assert observed.records[0].energy.total == 8.0
    assert not observed.records[0].sampled


def test_observers_are_apart(rig: Any, observed: Observed, caplog: pytest.LogCaptureFixture) -> None:
    """An observer that raises is logged once and keeps nothing from the others."""

    class Broken:
        def finished(self, record: RequestRecord) -> None:
            raise RuntimeError("broken")

    calls = calls_of(rig, Broken(), observed)
    for _ in range(2):
        call = calls.begin(begin_at(rig))
        call.end(End(rig.clock.monotonic_ns()))
        rig.meter.futures[call.key].set_result([])
    assert len(observed.records) == 2
    assert len([r for r in caplog.records if "Broken" in r.message]) == 1


def test_nothing_raises(rig: Any, observed: Observed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A meter and a tracer that fail cost the caller nothing; the request is observed as unavailable."""

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(rig.meter, "close", fail)
    calls = calls_of(rig, observed)
    call = calls.begin(begin_at(rig))
    call.end(End(rig.clock.monotonic_ns()))
    broken = calls_of(rig, observed, tracer=fail)
    call = broken.begin(begin_at(rig))
    with call.active():
        pass
    call.end(End(rig.clock.monotonic_ns()))
    for each in (calls, broken):
        assert each.drain()
        each.close()
    assert [r.energy.quality for r in observed.records] == ["unavailable"] * 2


def test_known_at_once(rig: Any, observed: Observed) -> None:
    """Where the joules are known at once, the record is made on another thread than the request's."""
    rig.meter.immediate = []
    seen: list[str] = []

    class Threads:
        def finished(self, record: RequestRecord) -> None:
            import threading

            seen.append(threading.current_thread().name)

    calls = calls_of(rig, Threads())
    calls.begin(begin_at(rig)).end(End(rig.clock.monotonic_ns()))
    assert calls.drain()
    calls.close()
    assert seen == ["melodi-otel-records"]


def test_left_in_another_task(rig: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A call left in another task than it was entered in changes nothing there and logs no error."""
    calls = calls_of(rig)

    async def main() -> None:
        call = calls.begin(begin_at(rig))
        active = call.active()
        active.__enter__()

        async def leave() -> None:
            active.__exit__(None, None, None)

        await asyncio.create_task(leave())
        call.end(End(rig.clock.monotonic_ns()))

    asyncio.run(main())
    assert not caplog.records
    assert trace.get_current_span().get_span_context().span_id == 0


def test_labels(rig: Any, observed: Observed) -> None:
    """Configured labels go to meter, span and record."""
    asked: list[Any] = []

    def labels(*about: Any) -> dict[str, str]:
        asked.append(about[1:])
        return {"tenant": "t1"}

    calls = calls_of(rig, observed, labels=labels)
    call = calls.begin(begin_at(rig, user="jane", adapter="fr"))
    assert asked == [("jane", "fr")]
    call.end(End(rig.clock.monotonic_ns()))
    rig.meter.futures[call.key].set_result([])
    rig.processor.pump()
    assert rig.meter.said("open")[0][1]["labels"]["tenant"] == "t1"
    assert rig.captured.ended[0].attributes["tenant"] == "t1"
    assert observed.records[0].labels == {"tenant": "t1"}


def test_labels_that_fail(rig: Any, observed: Observed, caplog: pytest.LogCaptureFixture) -> None:
    """Where labels cannot be found, the request has its span, record and joules all the same."""

    def fail(*_: Any) -> dict[str, str]:
        raise RuntimeError("no labels")

    calls = calls_of(rig, observed, labels=fail)
    call = calls.begin(begin_at(rig, user="jane"))
    call.end(End(rig.clock.monotonic_ns()))
    rig.meter.futures[call.key].set_result([])
    rig.processor.pump()
    assert [span.name for span in rig.captured.ended] == ["chat m"]
    assert "jane" not in str(dict(rig.captured.ended[0].attributes))
    assert observed.records[0].labels == {}
    assert len(caplog.records) == 1


def test_registry_stays_empty(rig: Any) -> None:
    """Nothing of a request stays in the registries after its end."""
    calls = calls_of(rig)
    for _ in range(10):
        calls.begin(begin_at(rig)).end(End(rig.clock.monotonic_ns()))
    assert not rig.deferral._entries
    assert not calls._open
