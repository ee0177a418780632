"""A question to a hub by somebody who is none of its programs: what it shows on its status page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from melodi_otel.hub import wire
from melodi_otel.hub.sockets import connect

TIMEOUT_S: Final = 3.0


def read_status(path: Path, timeout: float = TIMEOUT_S) -> dict[str, Any]:
    """The status of the hub at the socket ``path``.

    Raises:
        ConnectRefused: nobody is there, or may not be asked; it says why.
        OSError: it does not answer in time.
        WireError: what it answers cannot be read.
    """
    frames = wire.Frames(wire.ToProgram)
    with connect(path, timeout) as sock:
        sock.sendall(wire.encode(0, [wire.StatusAsked(1)]))
        while True:
            data = sock.recv(1 << 16)
            if not data:
                raise ConnectionResetError("it hung up")
            for message in frames.feed(data):
                if isinstance(message, wire.Refused):
                    raise wire.WireError(message.text)
                if isinstance(message, wire.StatusAnswered):
                    found: dict[str, Any] = json.loads(message.text)
                    return found
