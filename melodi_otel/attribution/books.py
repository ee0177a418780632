"""The books: where every measured joule went, per device. Plain records that the ledger fills and every view reads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from melodi_otel.attribution.meter import Key

Bucket = Literal["idle", "tail", "loading", "foreign", "unsampled"]
BUCKETS: Final[tuple[Bucket, ...]] = ("idle", "tail", "loading", "foreign", "unsampled")
Phase = Literal["prefill", "decode", "static", "unsplit"]


class Who(NamedTuple):
    """For whom joules are counted in metrics; None = not known. A tuple, because the books look it up for every share.

    ``labels`` are the metric labels (name, value) in configured order.
    """

    model: str | None = None
    provider: str | None = None
    service: str | None = None
    namespace: str | None = None
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Present:
    """A request that is open: since when (monotonic ns), whose, and how many tokens it has so far (None: not known)."""

    key: Key
    model: str | None
    who: Who
    open_ns: int
    output_tokens: int | None


@dataclass(frozen=True, slots=True)
class Books:
    """The balance of one device since the start, in J, over closed intervals.

    ``attributed + in_flight + idle + tail + loading + foreign + unsampled + residual = measured`` to 1e-9, where
    ``attributed`` is what settled requests got and ``in_flight`` what open ones have accrued.
    """

    device: str
    measured: float = 0.0
    attributed: float = 0.0
    in_flight: float = 0.0
    idle: float = 0.0
    tail: float = 0.0
    loading: float = 0.0
    foreign: float = 0.0
    unsampled: float = 0.0
    residual: float = 0.0

    def imbalance(self) -> float:
        """Measured minus everything booked, as a part of measured (J/J); 0 for an empty book."""
        booked = math.fsum(
            (
                self.attributed,
                self.in_flight,
                self.idle,
                self.tail,
                self.loading,
                self.foreign,
                self.unsampled,
                self.residual,
            )
        )
        return (self.measured - booked) / max(abs(self.measured), 1e-9) if self.measured != booked else 0.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """An immutable view of the ledger at ``t_ns`` (monotonic).

    Attributes:
        books: per ``hw.id``.
        attributed: J by (hw.id, who, phase, quality); grows with every closed interval, open requests included.
        unattributed: J by (hw.id, bucket, holder); the holder is (service, model) where one engine holds the device.
        active: open requests by who.
    """

    t_ns: int
    books: Mapping[str, Books]
    attributed: Mapping[tuple[str, Who, Phase, str], float]
    unattributed: Mapping[tuple[str, Bucket, tuple[str, str] | None], float]
    active: Mapping[Who, int]
