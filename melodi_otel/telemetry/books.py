"""The books as counters see them: one consistent view per collection, and counters that never fall.

A counter must not fall, but an attributed series may (a correction when a request settles, a negative share). Then the
counter stands still and what it shows too much is taken off the residual of the same device, so that attributed +
unattributed + residual = hw.energy holds in every single collection.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping
from typing import TypeVar

from melodi_otel.attribution.books import Bucket, Phase, Snapshot, Who

AttributedKey = tuple[str, Who, Phase, str]
UnattributedKey = tuple[str, Bucket, tuple[str, str] | None]
K = TypeVar("K")


class SteadyBooks:
    """One reader's view of the ledger.

    The instruments of a collection are asked one after the other; each names itself, and the first that asks a second time
    begins a new collection with a new snapshot.
    """

    def __init__(self, take: Callable[[], Snapshot]) -> None:
        self._take = take
        self._lock = threading.RLock()
        self._served: set[str] = set()
        self._snapshot: Snapshot | None = None
        self._attributed: dict[AttributedKey, float] = {}
        self._unattributed: dict[UnattributedKey, float] = {}
        self._measured: dict[str, float] = {}
        self._held: dict[str, float] = {}

    def snapshot(self, reader: str) -> Snapshot:
        """The snapshot of this collection."""
        with self._lock:
            if self._snapshot is None or reader in self._served:
                self._served.clear()
                self._advance(self._take())
            self._served.add(reader)
            assert self._snapshot is not None
            return self._snapshot

    def measured(self, reader: str) -> Mapping[str, float]:
        """J per device, never falling."""
        with self._lock:
            self.snapshot(reader)
            return dict(self._measured)

    def attributed(self, reader: str) -> Mapping[AttributedKey, float]:
        """J per attributed series, never falling."""
        with self._lock:
            self.snapshot(reader)
            return dict(self._attributed)

    def unattributed(self, reader: str) -> Mapping[UnattributedKey, float]:
        """J per unattributed series, never falling."""
        with self._lock:
            self.snapshot(reader)
            return dict(self._unattributed)

    def residual(self, reader: str) -> Mapping[str, float]:
        """J per device that close the books of the series above; may be negative."""
        with self._lock:
            snapshot = self.snapshot(reader)
            return {device: books.residual - self._held.get(device, 0.0) for device, books in snapshot.books.items()}

    def _advance(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        held: dict[str, list[float]] = {}
        for key, joules in _climb(self._attributed, snapshot.attributed).items():
            held.setdefault(key[0], []).append(joules)
        for key, joules in _climb(self._unattributed, snapshot.unattributed).items():
            held.setdefault(key[0], []).append(joules)
        for device, joules in _climb(self._measured, {d: b.measured for d, b in snapshot.books.items()}).items():
            held.setdefault(device, []).append(-joules)
        self._held = {device: math.fsum(parts) for device, parts in held.items()}


def _climb(shown: dict[K, float], now: Mapping[K, float]) -> dict[K, float]:
    """Raise ``shown`` to ``now`` where that is higher; what it shows beyond ``now``, per key."""
    beyond: dict[K, float] = {}
    for key, value in now.items():
        before = shown.get(key, 0.0)
        shown[key] = max(before, value)
        if shown[key] != value:
            beyond[key] = shown[key] - value
    for key in shown.keys() - now.keys():
        beyond[key] = shown[key]  # the ledger has merged this series into another one
    return beyond
