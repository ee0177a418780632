"""Labels of a request: every kind of source, in this process, and what happens where one cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from opentelemetry import baggage, context, trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from melodi_otel.config import Config
from melodi_otel.errors import ConfigError
from melodi_otel.instrumentation.seam import INCOMING, Incoming
from melodi_otel.telemetry.whose import LabelFinder, Whose


def finder(rules: str, resource: dict[str, Any] | None = None, **more: Any) -> LabelFinder:
    found = Whose(Config(labels=rules, **more)).finder(resource or {})
    assert found is not None
    return found


@contextmanager
def attached(made: context.Context) -> Iterator[None]:
    token = context.attach(made)
    try:
        yield
    finally:
        context.detach(token)


@pytest.fixture
def tracer() -> Iterator[trace.Tracer]:
    provider = TracerProvider(shutdown_on_exit=False)
    yield provider.get_tracer("t")
    provider.shutdown()


def test_without_rules_there_is_nothing_to_find() -> None:
    """No rule: no finder, so a request pays nothing."""
    assert Whose(Config()).finder({}) is None


def test_span_attributes(tracer: trace.Tracer) -> None:
    """Its own first attributes win, then the current span's, then the server's around it; lists are joined."""
    find = finder("a=span:a,b=span:b,c=span:http.request.header.x_tenant_id")
    server = tracer.start_span("server", attributes={"a": "3", "b": "3", "http.request.header.x_tenant_id": ["t", "u"]})
    served = context.set_value(INCOMING, Incoming({}, span=server))
    with attached(served), tracer.start_as_current_span("between", attributes={"a": "2", "b": 2}):
        assert find({"a": "1"}) == {"a": "1", "b": "2", "c": "t, u"}
        assert find({}) == {"a": "2", "b": "2", "c": "t, u"}
    server.end()


def test_spans_that_cannot_be_read() -> None:
    """A span of another make, or a remote one, has no attributes to read and does no harm."""
    remote = NonRecordingSpan(SpanContext(1, 2, is_remote=True, trace_flags=TraceFlags(1)))
    with attached(trace.set_span_in_context(remote)):
        assert finder("a=span:a,b=resource:b")({}) == {}
        assert finder("a=span:a,b=resource:b", {"b": ("x", "y")})({}) == {"b": "x, y"}


def test_user(tracer: trace.Tracer) -> None:
    """The request's own word, the body of the served request, the span, the baggage: the first that knows."""
    find = finder("user=user")
    assert find({}) == {}
    with attached(baggage.set_baggage("user.id", "from-baggage")):
        assert find({}) == {"user": "from-baggage"}
        with tracer.start_as_current_span("s", attributes={"enduser.id": "from-span"}):
            assert find({}) == {"user": "from-span"}
            with attached(context.set_value(INCOMING, Incoming({}, lambda: "from-body"))):
                assert find({}) == {"user": "from-body"}
                assert find({}, "from-call") == {"user": "from-call"}


def test_adapter() -> None:
    """The adapter is what the instrumentation says."""
    assert finder("adapter=adapter|resource:a", {"a": "base"})({}, None, "fr") == {"adapter": "fr"}
    assert finder("adapter=adapter|resource:a", {"a": "base"})({}, None, None) == {"adapter": "base"}


def test_baggage_of_any_kind() -> None:
    """Only the key that is asked for is taken, as text, whatever somebody put there."""
    with attached(baggage.set_baggage("tenant.id", 5, baggage.set_baggage("x", "y"))):
        assert finder("tenant=baggage:tenant.id")({}) == {"tenant": "5"}


def test_hashed() -> None:
    """With the switch or a key, values are hashes, and listed ones are recognised by theirs."""
    rules, listed = "t=baggage:t", {"metric_labels": ("t",), "label_values": (("t", ("acme",)),)}
    found = []
    for more in ({"label_hash": True}, {"label_hash_key": "k"}, {"label_hash": True, "label_hash_key": "k2"}):
        whose = Whose(Config(labels=rules, **listed, **more))  # type: ignore[arg-type]
        find = whose.finder({})
        assert find is not None
        with attached(baggage.set_baggage("t", "acme")):
            labels = find({})
        assert "acme" not in labels["t"]
        assert whose.metric.clip(labels) == tuple(labels.items())
        assert whose.metric.clip({"t": "acme"}) == (("t", "other"),)
        found.append(labels["t"])
    assert len(set(found)) == 3


def test_listed_values_need_their_label() -> None:
    """Listing values of a label that metrics do not carry is an error that names it."""
    with pytest.raises(
        ConfigError, match=r"MELODI_LABEL_VALUES='x=a\|b' cannot be used: x is not in MELODI_METRIC_LABELS"
    ):
        Whose(Config(labels="t=user,x=user", metric_labels=("t",), label_values=(("x", ("a", "b")),)))
