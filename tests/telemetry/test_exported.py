"""What became of spans at our own exporters is counted."""

from __future__ import annotations

from collections import Counter

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter

from melodi_otel.telemetry.exporters import Counted, span_processors
from melodi_otel.testing.http import PostServer
from melodi_otel.testing.telemetry import OtlpReceiver


def send(endpoint: str, number: int) -> Counter[str]:
    """Let our exporter of this endpoint have so many spans; what was told."""
    told: Counter[str] = Counter()
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
    (processor,) = span_processors(environ, lambda spans, outcome: told.update({outcome: spans}))
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(processor)
    for _ in range(number):
        provider.get_tracer("t").start_span("s").end()
    provider.force_flush()
    provider.shutdown()
    return told


def test_a_receiver_takes_them() -> None:
    with OtlpReceiver() as receiver:
        assert send(receiver.http_endpoint, 3) == {"sent": 3, "failed": 0}
        assert len(receiver.spans(3)) == 3


def test_a_receiver_refuses_them(caplog: pytest.LogCaptureFixture) -> None:
    with PostServer(lambda _: (400, b"")) as receiver:
        assert send(receiver.url, 3) == {"sent": 0, "failed": 3}


def test_an_exporter_that_raises_is_told_of_and_raises() -> None:
    class Broken(SpanExporter):
        def export(self, spans):
            raise OSError("no")

    told: Counter[str] = Counter()
    with pytest.raises(OSError, match="no"):
        Counted(Broken(), lambda spans, outcome: told.update({outcome: spans})).export([object()])  # type: ignore[list-item]
    assert told == {"sent": 0, "failed": 1}
