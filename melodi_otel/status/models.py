"""What finished requests used, by model."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Final

from melodi_otel.attribution.record import RequestRecord
from melodi_otel.status.record import ModelStatus, finite

MODEL_LIMIT: Final = 200
OTHER: Final = "other"


@dataclass(slots=True)
class _Total:
    requests: int = 0
    tokens: int | None = None
    joules: float | None = None
    paired_tokens: int = 0
    paired_joules: float = 0.0
    estimated: bool = False


@dataclass(slots=True)
class ModelTotals:
    """What finished requests used, by model; an ``Observer``.

    Args:
        limit: models with a line of their own; later ones are counted as ``other``.
    """

    limit: int = MODEL_LIMIT
    _totals: dict[str | None, _Total] = field(default_factory=dict[str | None, _Total], repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def finished(self, record: RequestRecord) -> None:
        """Count a request; blocks of the user's code are none."""
        if record.kind != "request":
            return
        joules, tokens = record.energy.total, record.output_tokens
        with self._lock:
            known = record.model in self._totals or len(self._totals) < self.limit
            total = self._totals.setdefault(record.model if known else OTHER, _Total())
            total.requests += 1
            if tokens is not None:
                total.tokens = (total.tokens or 0) + tokens
            if joules is not None:
                total.joules = (total.joules or 0.0) + joules
                total.estimated |= record.energy.quality == "estimated"
            if tokens and joules is not None:
                total.paired_tokens += tokens
                total.paired_joules += joules

    def models(self) -> tuple[ModelStatus, ...]:
        """One line per model, those that used most first."""
        with self._lock:
            lines = [
                ModelStatus(
                    model,
                    total.requests,
                    total.tokens,
                    finite(total.joules),
                    finite(total.paired_joules / total.paired_tokens) if total.paired_tokens else None,
                    total.estimated,
                )
                for model, total in self._totals.items()
            ]
        return tuple(sorted(lines, key=lambda line: -(line.joules or 0.0)))

    def forked(self) -> None:
        """In a child: nothing is counted yet, what was is the parent's."""
        self._lock = threading.Lock()
        self._totals = {}
