"""What a program remembers of the requests that it has told a hub of."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import NamedTuple

from melodi_otel.attribution.meter import Key, Share


class Since(NamedTuple):
    """Since when a request is open here (monotonic ns), and its accelerators as far as it named them."""

    t_ns: int
    devices: Sequence[str] | None


@dataclass(slots=True)
class Pending:
    """A closed request whose joules are awaited, and when it ended (monotonic ns)."""

    key: Key
    future: Future[list[Share]]
    opened: Since
    close_ns: int


@dataclass(frozen=True, slots=True)
class Counts:
    """What the outbox lost: ``requests`` opens and closes, ``dropped`` of everything that may be dropped."""

    requests: int = 0
    dropped: int = 0
