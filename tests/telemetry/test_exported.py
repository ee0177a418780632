"""What became of spans at our own exporters is counted."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SpanExporter

from melodi_otel.telemetry.exporters import Counted, span_processors
from melodi_otel.testing.telemetry import OtlpReceiver


@pytest.fixture
def refusing() -> Iterator[str]:
    """A receiver that refuses everything for good."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_error(400)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


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


def test_a_receiver_refuses_them(refusing: str, caplog: pytest.LogCaptureFixture) -> None:
    assert send(refusing, 3) == {"sent": 0, "failed": 3}


def test_an_exporter_that_raises_is_told_of_and_raises() -> None:
    class Broken(SpanExporter):
        def export(self, spans):
            raise OSError("no")

    told: Counter[str] = Counter()
    with pytest.raises(OSError, match="no"):
        Counted(Broken(), lambda spans, outcome: told.update({outcome: spans})).export([object()])  # type: ignore[list-item]
    assert told == {"sent": 0, "failed": 1}
