"""OTLP exporters of our own providers."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
from opentelemetry.sdk.metrics import MeterProvider

from melodi_otel.telemetry.exporters import metric_readers


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing forks here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_has_connections_of_its_own() -> None:
    """Both in one stream would be neither's."""
    peers: set[int] = set()
    requests = []

    def serve(connection: socket.socket, port: int) -> None:
        with connection, connection.makefile("rb") as stream:
            while line := stream.readline():
                size = 0
                while header := stream.readline().strip():
                    name, _, value = header.partition(b":")
                    size = int(value) if name.lower() == b"content-length" else size
                stream.read(size)
                peers.add(port)
                requests.append(line)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    def accept() -> None:
        while True:
            try:
                connection, (_, port) = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection, port), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        accepting = threading.Thread(target=accept, daemon=True)
        accepting.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
        [reader] = metric_readers(environ)
        provider = MeterProvider([reader], shutdown_on_exit=False)
        provider.get_meter("m").create_counter("c").add(1)
        assert provider.force_flush()
        pid = os.fork()
        if pid == 0:
            provider.get_meter("m").create_counter("c").add(1)
            provider.force_flush()
            os._exit(0)
        os.waitpid(pid, 0)
        assert provider.force_flush()
        end = time.monotonic() + 10
        while len(requests) < 3 and time.monotonic() < end:
            time.sleep(0.01)
        provider.shutdown()
        assert len(requests) >= 3
        assert len(peers) == 2
        listener.shutdown(socket.SHUT_RDWR)
    accepting.join(5)
