"""Captured telemetry: spans and metrics in memory, and an OTLP receiver on the loopback.

A return value of an exporter proves nothing (``MeterProvider.force_flush`` is True after a refused connection), so what was
sent is asserted where it arrives: at :class:`OtlpReceiver`, which speaks gRPC and HTTP, with gzip and chunked bodies.
"""

from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Final, NamedTuple, Self

import grpc
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_pb
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2_grpc as metrics_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_pb
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as trace_grpc
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor


class CapturedSpans(SpanProcessor):
    """A processor that keeps what it gets, in order. Give it as the one to be wrapped, or to a provider."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.ended: Final[list[ReadableSpan]] = []
        self.started = 0
        self.flushes = 0
        self.shutdowns = 0

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        self.started += 1

    def on_end(self, span: ReadableSpan) -> None:
        with self._changed:
            self.ended.append(span)
            self._changed.notify_all()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        self.flushes += 1
        return True

    def shutdown(self) -> None:
        self.shutdowns += 1

    def wait_for(self, number: int, timeout_s: float = 10.0) -> list[ReadableSpan]:
        """The first ``number`` spans, as soon as they are there.

        Raises:
            TimeoutError: they did not come.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.ended) >= number, timeout_s):
                raise TimeoutError(f"{len(self.ended)} of {number} spans came in {timeout_s:g} s")
            return self.ended[:number]

    def attributes(self, name: str) -> dict[str, Any]:
        """Attributes of the last span called ``name``."""
        found = [span for span in self.ended if span.name == name]
        return dict(found[-1].attributes or {})


class Point(NamedTuple):
    """One data point: its metric, attributes, value (the sum of a histogram) and the SDK's own record."""

    name: str
    attributes: dict[str, Any]
    value: float
    data: Any


def points(reader: InMemoryMetricReader, name: str | None = None) -> list[Point]:
    """Collect now; all data points, or those of the metric ``name``."""
    return [point for point in _points(reader) if name is None or point.name == name]


def _points(reader: InMemoryMetricReader) -> Iterator[Point]:
    data = reader.get_metrics_data()
    for resource in data.resource_metrics if data is not None else ():
        for scope in resource.scope_metrics:
            for metric in scope.metrics:
                for point in metric.data.data_points:
                    value = getattr(point, "value", getattr(point, "sum", 0.0))
                    yield Point(metric.name, dict(point.attributes or {}), float(value), point)


class OtlpReceiver:
    """Receives OTLP traces and metrics on the loopback, by gRPC and HTTP.

    Use it as a context manager; ``grpc_endpoint`` and ``http_endpoint`` are what ``OTEL_EXPORTER_OTLP_ENDPOINT`` wants.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._spans: list[tuple[Any, Any]] = []
        self._metrics: list[tuple[Any, Any]] = []
        self._grpc = grpc.server(ThreadPoolExecutor(max_workers=2))
        services: Any = (trace_grpc, metrics_grpc)  # generated code without types
        services[0].add_TraceServiceServicer_to_server(_Traces(self._traces), self._grpc)
        services[1].add_MetricsServiceServicer_to_server(_Metrics(self._metric), self._grpc)
        port = self._grpc.add_insecure_port("127.0.0.1:0")
        self.grpc_endpoint: Final = f"http://127.0.0.1:{port}"
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self._posted))
        self._http.daemon_threads = True
        self.http_endpoint: Final = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._grpc.start()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop receiving; what was received stays."""
        self._grpc.stop(grace=0.5).wait()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join(timeout=5.0)

    def spans(
        self, number: int = 0, timeout_s: float = 20.0, where: Callable[[Any], bool] = lambda _: True
    ) -> list[Any]:
        """All spans (protobuf) so far of which ``where`` is true, after waiting for at least ``number`` of those.

        Raises:
            TimeoutError: they did not come.
        """
        return self._await(self._spans, number, timeout_s, where)

    def metrics(self, number: int = 0, timeout_s: float = 20.0) -> list[Any]:
        """All metrics (protobuf) so far, after waiting for at least ``number`` of them."""
        return self._await(self._metrics, number, timeout_s)

    def services(self, name: str, since_ns: int = 0) -> set[str | None]:
        """``service.name`` of every resource that collected points of the metric ``name``, since ``since_ns`` (wall)."""
        found: set[str | None] = set()
        with self._changed:
            for resource, metric in self._metrics:
                kind = metric.WhichOneof("data") if metric.name == name else None
                points = () if kind is None else getattr(metric, kind).data_points
                if any(point.time_unix_nano >= since_ns for point in points):
                    found.add(plain(resource.attributes).get("service.name"))
        return found

    def resources(self) -> list[dict[str, Any]]:
        """Attributes of the resources of everything received."""
        with self._changed:
            return [plain(resource.attributes) for resource, _ in [*self._spans, *self._metrics]]

    def _await(
        self,
        kept: list[tuple[Any, Any]],
        number: int,
        timeout_s: float,
        where: Callable[[Any], bool] = lambda _: True,
    ) -> list[Any]:
        found: list[Any] = []

        def enough() -> bool:
            found[:] = [item for _, item in kept if where(item)]
            return len(found) >= number

        with self._changed:
            if not self._changed.wait_for(enough, timeout_s):
                raise TimeoutError(f"{len(found)} of {number} came in {timeout_s:g} s")
            return found

    def _traces(self, request: Any) -> None:
        found = [(r.resource, span) for r in request.resource_spans for s in r.scope_spans for span in s.spans]
        with self._changed:
            self._spans += found
            self._changed.notify_all()

    def _metric(self, request: Any) -> None:
        found = [
            (r.resource, metric) for r in request.resource_metrics for s in r.scope_metrics for metric in s.metrics
        ]
        with self._changed:
            self._metrics += found
            self._changed.notify_all()

    def _posted(self, path: str, body: bytes) -> bool:
        if path == "/v1/traces":
            self._traces(trace_pb.ExportTraceServiceRequest.FromString(body))
        elif path == "/v1/metrics":
            self._metric(metrics_pb.ExportMetricsServiceRequest.FromString(body))
        else:
            return False
        return True


def plain(attributes: Iterable[Any]) -> dict[str, Any]:
    """OTLP's key-value list as a dictionary of Python values."""
    return {pair.key: _plain(pair.value) for pair in attributes}


def _plain(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_plain(one) for one in value.array_value.values]
    return None if kind is None else getattr(value, kind)


class _Traces(trace_grpc.TraceServiceServicer):
    def __init__(self, received: Callable[[Any], None]) -> None:
        self._received = received

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the service's own name
        self._received(request)
        return trace_pb.ExportTraceServiceResponse()


class _Metrics(metrics_grpc.MetricsServiceServicer):
    def __init__(self, received: Callable[[Any], None]) -> None:
        self._received = received

    def Export(self, request: Any, context: Any) -> Any:  # noqa: N802 - the service's own name
        self._received(request)
        return metrics_pb.ExportMetricsServiceResponse()


def _handler(received: Callable[[str, bytes], bool]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self._body()
            if self.headers.get("Content-Encoding", "").lower() == "gzip":
                body = gzip.decompress(body)
            self.send_response(200 if received(self.path, body) else 404)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _body(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length", "0")))
            parts: list[bytes] = []
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's own name
            """Tests print what matters."""

    return Handler
