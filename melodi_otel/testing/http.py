"""A server on the loopback whose answers a test decides."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final, Self


class PostServer:
    """Answers every POST by ``answer``; a context manager.

    Args:
        answer: given the body, says status and body of the answer; called on a thread of the request, so it may wait.

    Attributes:
        url: where it listens, without a slash at the end.
        bodies: what it was sent, in the order of arrival.
    """

    def __init__(self, answer: Callable[[bytes], tuple[int, bytes]]) -> None:
        self.bodies: Final[list[bytes]] = []
        bodies = self.bodies

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                bodies.append(body)
                status, said = answer(body)
                with contextlib.suppress(OSError):  # whoever asked may have given up
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(said)))
                    self.end_headers()
                    self.wfile.write(said)

            def log_message(self, format: str, *_: object) -> None:  # noqa: A002  # its name there
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url: Final = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5.0)
