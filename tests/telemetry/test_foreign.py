"""Joules on spans that are not ours: one total per request in a trace, rollups around and beside it."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import pytest
from opentelemetry.context import Context
from opentelemetry.trace import Span, StatusCode, set_span_in_context

from melodi_otel.attribution.meter import Key, Late, Share
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.instrumentation.seam import Begin, End
from melodi_otel.telemetry.foreign import ForeignSpans
from melodi_otel.telemetry.requests import RequestCalls
from melodi_otel.telemetry.spans import DeferringProcessor
from melodi_otel.testing.telemetry import CapturedSpans

CHAT = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "m"}
LOCAL = {**CHAT, "server.address": "127.0.0.1"}
PIPELINE = {"gen_ai.system": "llama", "gen_ai.request.model": "m", "llm.request.type": "completion"}


class Scene:
    """A provider behind a deferring processor, requests of ours on it, and spans of others."""

    def __init__(self, rig: Any, kit: Any, **options: Any) -> None:
        self.rig, self.kit = rig, kit
        self.records: list[RequestRecord] = []
        self.unseen: list[tuple[int, int]] = []
        rig.meter.unseen = lambda t_ns, change: self.unseen.append((t_ns, change))
        self.calls = RequestCalls(
            rig.meter, "g", rig.clock, lambda: rig.provider.get_tracer("melodi_otel"), rig.deferral, [self]
        )
        self.foreign = ForeignSpans(
            rig.meter, "g", self.calls.lineage, self.calls.reports, self.monotonic_ns, **options
        )
        rig.deferral.watch(self.foreign)

    def monotonic_ns(self, wall_ns: int) -> int:
        return wall_ns - self.rig.clock.wall_ns() + self.rig.clock.monotonic_ns()

    def finished(self, record: RequestRecord) -> None:
        self.records.append(record)

    def span(self, name: str, parent: Span | None = None, *, scope: str = "theirs", **attributes: Any) -> Span:
        context = set_span_in_context(parent) if parent is not None else Context()
        return self.rig.provider.get_tracer(scope).start_span(
            name, context, attributes=attributes, start_time=self.rig.clock.wall_ns()
        )

    def end(self, span: Span, **attributes: Any) -> None:
        span.set_attributes(attributes)
        span.end(self.rig.clock.wall_ns())

    def request(self, parent: Span | None, joules: float | None, seconds: float = 1.0) -> None:
        """A request of ours inside `parent`, which settles at once."""
        from opentelemetry import context as otel

        token = otel.attach(set_span_in_context(parent) if parent is not None else Context())
        call = self.calls.begin(Begin("text_completion", "transformers", "m", self.rig.clock.monotonic_ns()))
        otel.detach(token)
        self.rig.clock.advance(seconds)
        call.end(End(self.rig.clock.monotonic_ns(), output_tokens=10))
        self.settle(call.key, joules)

    def settle(self, key: Key, joules: float | None) -> None:
        shares = [self.kit.share(joules, request=key.request)] if joules != 0 else []
        self.rig.meter.futures[key].set_result(shares)

    def settle_last(self, joules: float | None) -> None:
        self.settle(list(self.rig.meter.futures)[-1], joules)

    def attributes(self, name: str) -> dict[str, Any]:
        self.rig.processor.pump()
        return self.rig.captured.attributes(name)


@pytest.fixture
def scene(rig: Any, kit: Any) -> Scene:
    made = Scene(rig, kit)
    yield made  # type: ignore[misc]
    made.calls.close()


def lates(scene: Scene) -> list[Late]:
    return [more["late"] for _, more in scene.rig.meter.said("open") if more.get("late")]


# --- spans around our requests ----------------------------------------------------------------------------------------


def test_a_span_around_our_request_carries_the_rollup(scene: Scene) -> None:
    """Another's pipeline span around our request: ours has total, theirs rollup, and no total."""
    theirs = scene.span("pipeline.call")
    scene.request(theirs, 30.0)
    scene.end(theirs, **PIPELINE)
    assert scene.attributes("text_completion m")["melodi.energy.total"] == 30.0
    found = scene.attributes("pipeline.call")
    assert found["melodi.energy.rollup"] == 30.0
    assert "melodi.energy.total" not in found
    assert found["melodi.energy.quality"] == "measured"


def test_an_agent_sums_the_requests_in_it(scene: Scene) -> None:
    """Two requests, one of them under a span of the application's own: the agent's rollup is their sum."""
    agent = scene.span("invoke_agent a", **{"gen_ai.operation.name": "invoke_agent"})
    step = scene.span("step", agent)
    scene.request(step, 30.0)
    scene.end(step)
    scene.request(agent, 12.5)
    scene.end(agent)
    assert scene.attributes("invoke_agent a")["melodi.energy.rollup"] == 42.5
    assert not [name for name in scene.attributes("step") if name.startswith("melodi.")]


def test_sum_over_a_trace_counts_once(scene: Scene) -> None:
    """Two instrumentations around one request: one total in the trace, and it is the request's."""
    outer = scene.span("outer", scope="opentelemetry.instrumentation.transformers")
    inner = scene.span("chat m", outer, scope="openlit.instrumentation.transformers")
    scene.request(inner, 30.0)
    scene.end(inner, **CHAT)
    scene.end(outer, **PIPELINE)
    scene.rig.processor.pump()
    totals = [
        s.attributes["melodi.energy.total"] for s in scene.rig.captured.ended if "melodi.energy.total" in s.attributes
    ]
    assert totals == [30.0]
    assert [scene.attributes(name)["melodi.energy.rollup"] for name in ("outer", "chat m")] == [30.0, 30.0]


def test_a_part_that_is_not_known_makes_the_rollup_partial(scene: Scene) -> None:
    """One of two requests has no joules: the sum of the other is partial, and says why."""
    agent = scene.span("a", **{"gen_ai.operation.name": "invoke_agent"})
    scene.request(agent, 30.0)
    scene.request(agent, None)
    scene.end(agent)
    found = scene.attributes("a")
    assert (found["melodi.energy.rollup"], found["melodi.energy.quality"]) == (30.0, "partial")


def test_a_span_around_waits_for_the_last_request(scene: Scene) -> None:
    """A request that is still under way when the span around it ends is waited for."""
    agent = scene.span("a", **{"gen_ai.operation.name": "invoke_agent"})
    inner = scene.span("chat m", agent, **LOCAL)
    scene.rig.clock.advance(1.0)
    scene.end(inner)
    scene.end(agent)
    scene.rig.processor.pump()
    assert scene.rig.captured.ended == []
    scene.settle_last(7.0)
    assert scene.attributes("a")["melodi.energy.rollup"] == 7.0


def test_an_agent_without_requests_is_as_it_was(scene: Scene) -> None:
    """Nothing inside, nothing added, nothing waited for."""
    scene.end(scene.span("a", **{"gen_ai.operation.name": "invoke_agent"}))
    assert scene.attributes("a") == {"gen_ai.operation.name": "invoke_agent"}


# --- spans beside our requests ------------------------------------------------------------------------------------------


def test_the_same_request_told_twice(scene: Scene) -> None:
    """vLLM's back-dated span beside ours: the same joules, as rollup."""
    server = scene.span("POST")
    start = scene.rig.clock.wall_ns()
    scene.request(server, 30.0, seconds=2.5)
    late = scene.rig.provider.get_tracer("vllm.llm_engine").start_span(
        "llm_request", set_span_in_context(server), start_time=start + 1_000_000
    )
    scene.end(late, **{"gen_ai.request.id": "r", "gen_ai.usage.completion_tokens": 10})
    found = scene.attributes("llm_request")
    assert found["melodi.energy.rollup"] == 30.0
    assert "melodi.energy.total" not in found


def test_two_spans_of_one_instrumentation_are_two_requests(scene: Scene) -> None:
    """Parallel calls of one client overlap, and each is a request of its own."""
    server = scene.span("POST")
    spans = [scene.span(f"chat {n}", server, **LOCAL) for n in "ab"]
    scene.rig.clock.advance(1.0)
    for joules, span in enumerate(spans, 1):
        scene.end(span)
        scene.settle_last(float(joules))
    assert [scene.attributes(f"chat {n}").get("melodi.energy.total") for n in "ab"] == [1.0, 2.0]


# --- spans that are the request -----------------------------------------------------------------------------------------


def test_a_local_call_is_the_request(scene: Scene) -> None:
    """No request of ours: a client's span to a server of this host is opened from its start to its end and owns the joules."""
    span = scene.span("chat m", **LOCAL)
    start = scene.rig.clock.monotonic_ns()
    scene.rig.clock.advance(3.0)
    scene.end(span, **{"gen_ai.usage.output_tokens": 5})
    scene.settle_last(20.0)
    ((key, t_ns), more) = scene.rig.meter.said("open")[0]
    assert (t_ns, more["model"], more["late"]) == (start, "m", Late((), elsewhere=True))
    assert scene.rig.meter.said("close")[0][0] == (key, start + 3_000_000_000, 5, "stop")
    found = scene.attributes("chat m")
    assert (found["melodi.energy.total"], found["melodi.energy.per_output_token"]) == (20.0, 4.0)


def test_a_back_dated_span_is_charged_from_its_start(scene: Scene) -> None:
    """vLLM's own span alone, made when the request has finished: its interval is the one it names, not that of its making."""
    start = scene.rig.clock.monotonic_ns()
    wall = scene.rig.clock.wall_ns()
    scene.rig.clock.advance(2.5)
    span = scene.rig.provider.get_tracer("vllm.llm_engine").start_span("llm_request", Context(), start_time=wall)
    scene.end(span, **{"gen_ai.request.id": "r"})
    ((_, t_ns), more) = scene.rig.meter.said("open")[0]
    assert (t_ns, more["late"]) == (start, Late((), elsewhere=False))


def test_others_under_way_are_named(scene: Scene) -> None:
    """Open spans of the same instrumentation are beside it: the meter divides each instant among all of them."""
    first, second = scene.span("chat a", **LOCAL), scene.span("chat b", **LOCAL)
    began = scene.rig.clock.monotonic_ns()
    scene.rig.clock.advance(1.0)
    scene.end(first)
    scene.end(second)
    assert lates(scene) == [Late((began,), elsewhere=True), Late((), elsewhere=True)]


@pytest.mark.parametrize("more", [{"server.address": "api.openai.com"}, {}], ids=["remote", "no address"])
def test_a_call_to_elsewhere_has_no_joules(scene: Scene, more: Mapping[str, str]) -> None:
    """A model that runs on another host, or nobody knows where, used none of the joules that are measured here."""
    scene.end(scene.span("chat m", **CHAT, **more))
    assert scene.attributes("chat m") == {**CHAT, **more}
    assert scene.rig.meter.said("open") == []


def test_two_instrumentations_of_one_local_call(scene: Scene) -> None:
    """The innermost span owns the request, the one around it has the rollup: one total in the trace."""
    outer = scene.span("ollama.chat", scope="opentelemetry.instrumentation.ollama")
    inner = scene.span("chat m", outer, scope="openlit.instrumentation.ollama")
    scene.rig.clock.advance(1.0)
    scene.end(inner, **LOCAL)
    scene.end(outer, **{"gen_ai.system": "Ollama", "llm.request.type": "chat", "gen_ai.request.model": "m"})
    scene.settle_last(9.0)
    assert scene.attributes("chat m")["melodi.energy.total"] == 9.0
    assert scene.attributes("ollama.chat")["melodi.energy.rollup"] == 9.0
    assert "melodi.energy.total" not in scene.attributes("ollama.chat")


def test_its_record_is_observed_once(scene: Scene) -> None:
    """Metrics and results hear of it with what the span says, and that its own instrumentation counts its tokens."""
    span = scene.span("chat m", **LOCAL)
    scene.rig.clock.advance(3.0)
    scene.end(span, **{"gen_ai.usage.input_tokens": 3, "gen_ai.usage.output_tokens": 5})
    scene.settle_last(20.0)
    assert scene.calls.drain()
    (record,) = scene.records
    assert (record.operation, record.provider, record.model, record.outcome) == ("chat", "openai", "m", "stop")
    assert (record.prompt_tokens, record.output_tokens, record.duration_s) == (3, 5, 3.0)
    assert (record.joules, record.instrumented) == (20.0, False)
    assert record.span_id == span.get_span_context().span_id


def test_failed_calls_are_errors(scene: Scene) -> None:
    """A failed call used what it used until it failed."""
    span = scene.span("chat m", **LOCAL)
    span.set_status(StatusCode.ERROR)
    scene.end(span, **{"error.type": "Timeout"})
    assert scene.rig.meter.said("close")[0][0][3] == "error"


def test_work_under_way_is_told_to_the_meter(scene: Scene) -> None:
    """Once a kind of span has been a request of this host, the meter learns when others of it begin and end."""
    scene.end(scene.span("chat a", **LOCAL))
    scene.rig.clock.advance(1.0)
    span = scene.span("chat b", **LOCAL)
    began = scene.rig.clock.monotonic_ns()
    scene.rig.clock.advance(1.0)
    scene.end(span)
    assert scene.unseen == [(began, 1), (began + 1_000_000_000, -1)]


def test_two_exporters_ask_and_one_request_is_made(scene: Scene) -> None:
    """Every processor asks about the same span: one request, and every exporter gets its joules."""
    second = DeferringProcessor(captured := CapturedSpans(), scene.rig.deferral, threaded=False)
    scene.rig.provider.add_span_processor(second)
    scene.end(scene.span("chat m", **LOCAL))
    scene.settle_last(9.0)
    second.pump()
    assert (
        scene.attributes("chat m")["melodi.energy.total"] == captured.attributes("chat m")["melodi.energy.total"] == 9.0
    )
    assert len(scene.rig.meter.said("open")) == 1
    second.release()


def test_rollup_only(rig: Any, kit: Any) -> None:
    """MELODI_FOREIGN_SPANS=rollup: what encloses our requests sums them; no span becomes a request."""
    scene = Scene(rig, kit, owning=False)
    scene.end(scene.span("chat m", **LOCAL))
    theirs = scene.span("pipeline.call")
    scene.request(theirs, 30.0)
    scene.end(theirs, **PIPELINE)
    assert scene.attributes("chat m") == LOCAL
    assert scene.attributes("pipeline.call")["melodi.energy.rollup"] == 30.0
    scene.calls.close()


def test_errors_of_ours_stay_inside(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    """A meter that fails lets the span pass as it is, with one warning."""

    def broken(*_: Any, **__: Any) -> Future[list[Share]]:
        raise RuntimeError("no")

    scene.rig.meter.open = broken
    for _ in range(2):
        scene.end(scene.span("chat m", **LOCAL))
    assert scene.attributes("chat m") == LOCAL
    assert len([r for r in caplog.records if "other instrumentations' spans" in r.message]) == 1


def named(scene: Scene, name: str, joules: float) -> Any:
    """A request of ours that the engine knows by `name`, in a trace of its own."""
    begin = Begin("chat", "vllm", "m", scene.rig.clock.monotonic_ns(), {"gen_ai.response.id": name})
    call = scene.calls.begin(begin)
    scene.rig.clock.advance(1.0)
    return call, joules


def test_vllms_own_span_names_the_request(scene: Scene) -> None:
    """`llm_request` in another trace is told the joules of the request that it names, as a rollup, whoever ends first."""
    call, joules = named(scene, "cmpl-1-0", 6.0)
    other = scene.span("llm_request", scope="vllm.tracing.otel", **{"gen_ai.request.id": "cmpl-1-0"})
    scene.end(other, **{"gen_ai.usage.completion_tokens": 10})
    call.end(End(scene.rig.clock.monotonic_ns(), output_tokens=10))
    scene.settle(call.key, joules)
    found = scene.attributes("llm_request")
    assert found["melodi.energy.rollup"] == 6.0
    assert "melodi.energy.total" not in found
    assert len(scene.rig.meter.said("open")) == 1


def test_each_sequence_of_a_request_has_a_span_of_vllm(scene: Scene) -> None:
    """With n > 1 vllm has a span per sequence: each is told the joules of the one request, and none is a second one."""
    call, joules = named(scene, "cmpl-1-0", 6.0)
    for _ in range(2):
        scene.end(scene.span("llm_request", scope="vllm.tracing.otel", **{"gen_ai.request.id": "cmpl-1-0"}))
    call.end(End(scene.rig.clock.monotonic_ns(), output_tokens=10))
    scene.settle(call.key, joules)
    scene.rig.processor.pump()
    rollups = [
        (span.attributes or {}).get("melodi.energy.rollup")
        for span in scene.rig.captured.ended
        if span.name == "llm_request"
    ]
    assert rollups == [6.0, 6.0]
