"""The last finished requests of this process, for ``last()``, ``recent()`` and the summary at the end."""

from __future__ import annotations

import threading
from collections import deque

from melodi_otel.attribution.meter import Key
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.results.table import Results

DEFAULT_LIMIT = 1000


class Store:
    """A bounded memory of finished requests; an :class:`~melodi_otel.attribution.record.Observer`.

    Written by the settle thread, read by anybody.

    Args:
        limit: how many requests are kept; the oldest go first.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._records: deque[RequestRecord] = deque(maxlen=limit)
        self._lock = threading.Lock()
        self._total = 0

    def finished(self, record: RequestRecord) -> None:
        """Keep ``record``."""
        with self._lock:
            self._records.append(record)
            self._total += 1

    @property
    def total(self) -> int:
        """How many requests have finished since the start, forgotten ones included."""
        return self._total

    def __len__(self) -> int:
        return len(self._records)

    def last(self, kind: str | None = None) -> RequestRecord | None:
        """The request that became final last (of ``kind``: ``request`` or ``measure``), or None."""
        with self._lock:
            return next((record for record in reversed(self._records) if kind in (None, record.kind)), None)

    def recent(self, n: int | None = None) -> Results:
        """The last ``n`` requests (None: all that are kept) in the order in which they became final."""
        with self._lock:
            records = list(self._records)
        return Results(records if n is None else records[max(0, len(records) - n) :])

    def nested(self, key: Key) -> list[RequestRecord]:
        """All kept requests inside the activity ``key``, at any depth."""
        with self._lock:
            records = list(self._records)
        inside = {key}
        # A nested request is usually final before the one around it, but nothing promises that: repeat until it is stable.
        while True:
            found = {record.key for record in records if record.parent in inside} - inside
            if not found:
                return [record for record in records if record.key in inside and record.key != key]
            inside |= found

    def forked(self) -> None:
        """In a forked child: the records are the parent's, and its lock may be held by a thread that is not here."""
        self._lock = threading.Lock()
        self._records = deque(maxlen=self._records.maxlen)
        self._total = 0

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._records.clear()
