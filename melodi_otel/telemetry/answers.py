"""Joules inside a model's answer, and the page that has the final figure.

An answer leaves before its joules are known. So it carries what is known so far, marked ``"final": false``, and an id under
which ``/melodi/requests/ID`` has the final figure a moment later. The id is random and told to nobody else: it is what
keeps one caller's figures from another. Of each user as many answers are remembered as :data:`LIMIT`, the oldest go first.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from melodi_otel.attribution.meter import Quality
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.attribution.summary import QUALITIES
from melodi_otel.forks import in_child

LIMIT: Final = 10_000
"""Answers of one user whose figures are remembered."""
_PARTS: Final = 10_000
"""Requests of one answer that are added up; of an answer with more nobody can tell the sum."""


@dataclass(frozen=True, slots=True)
class Part:
    """What one request adds to an answer: J and their 1 sigma (None: not known), what they cover, how good they are."""

    joules: float | None
    uncertainty: float | None
    scope: str | None
    quality: Quality


def figure(answer: str, parts: Sequence[Part], *, final: bool) -> dict[str, Any]:
    """What an answer of these requests says of its energy; what is not known of every one of them is left out.

    ``joules`` and ``uncertainty`` (1 sigma) in J, ``scope``: the kinds of devices in them, ``quality``: the worst.
    """
    found: dict[str, Any] = {"id": answer}
    total = _all(part.joules for part in parts)
    if total is not None:
        found["joules"] = math.fsum(total)
        sigmas = _all(part.uncertainty for part in parts)
        if sigmas is not None:
            found["uncertainty"] = math.sqrt(math.fsum(sigma * sigma for sigma in sigmas))
        scopes = {part.scope for part in parts}
        if len(scopes) == 1 and (scope := scopes.pop()) is not None:
            found["scope"] = scope
    if parts:
        found["quality"] = QUALITIES[max(QUALITIES.index(part.quality) for part in parts)]
    found["final"] = final
    return found


def _all(values: Iterable[float | None]) -> list[float] | None:
    listed = list(values)
    known = [value for value in listed if value is not None]
    return known if known and len(known) == len(listed) else None


@dataclass(slots=True)
class _Answer:
    promised: int = 0
    parts: list[Part] = field(default_factory=list[Part])


class Answers:
    """The figures of the newest answers, by their ids; an ``Observer`` of finished requests.

    Args:
        limit: answers of one user that are remembered.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._forked()
        in_child(self._forked)

    def _forked(self) -> None:
        self._lock = threading.Lock()
        self._known: dict[int | None, OrderedDict[str, _Answer]] = {}  # by user: nobody makes others' forgotten

    def promised(self, answer: str, user: int | None = None) -> None:
        """One more request of ``user`` belongs to this answer."""
        with self._lock:
            mine = self._known.setdefault(user, OrderedDict())
            mine.setdefault(answer, _Answer()).promised += 1
            while len(mine) > self._limit:
                mine.popitem(last=False)

    def finished(self, record: RequestRecord, user: int | None = None) -> None:
        """A request's joules are final, or known to be unavailable."""
        if record.answer is None:
            return
        energy = record.energy
        with self._lock:
            mine = self._known.get(user)
            known = None if mine is None else mine.get(record.answer)
            if known is not None and len(known.parts) < _PARTS:
                known.parts.append(Part(energy.total, energy.uncertainty, energy.scope, energy.quality))

    def get(self, answer: str) -> dict[str, Any] | None:
        """What is known of an answer, see :func:`figure`; None: there is no such answer, or it is forgotten."""
        with self._lock:
            known = next((mine[answer] for mine in self._known.values() if answer in mine), None)
            if known is None:
                return None
            promised, parts = known.promised, tuple(known.parts)
        if len(parts) < promised or promised > _PARTS:
            return {"id": answer, "final": False}
        return figure(answer, parts, final=True)
