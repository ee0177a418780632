"""The decode set of a lane, kept by the program so that it can be told once more as a whole.

Steps travel as differences. A hub that is new, or that lost a step, does not know the set; what it needs then is the whole.
Contexts grow by one with every step, so a member is kept as its context when it joined and the step at which it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from melodi_otel.attribution.meter import Decode, EngineId, Joined, Prefill

LIMIT: Final = 4096
"""Lanes that are remembered: a ``generate()`` call has one of its own, and nothing says when it needs it no more."""


class LaneMirror:
    """One lane as told so far.

    Attributes:
        members: id -> (context when it joined, number of decode steps before that).
        number: the number of the newest step, as told on.
        told: whom it was told to last.
    """

    __slots__ = ("_count", "_seq", "members", "number", "told")

    def __init__(self) -> None:
        self.members: dict[str, tuple[int, int]] = {}
        self.number = 0
        self.told: object = None
        self._count = 0
        self._seq: int | None = None

    def take(
        self,
        seq: int,
        decode: Decode,
        computed: Sequence[Prefill],
        joined: Sequence[Joined],
        left: Sequence[str],
        *,
        fresh: bool,
    ) -> list[Joined] | None:
        """Follow one step; the whole decode set of it where it has to be told, else None.

        Args:
            seq, decode, computed, joined, left: of the step, see :meth:`melodi_otel.attribution.meter.Meter.step`.
            fresh: whoever hears it now has not heard the one before.
        """
        lost = self._seq is not None and seq != self._seq + 1
        if lost:
            self.members.clear()  # the caller told that steps are missing: the set is what it tells from here on
        self._seq = seq
        # A gap in the numbers is how a hub hears that the set it knows is void.
        self.number += 2 if fresh or lost else 1
        for gone in left:
            self.members.pop(gone, None)
        for member in joined:
            self.members[member.id] = (member.context, self._count)
        for row in computed:
            self.members.pop(row.id, None)
        whole = None
        if fresh:
            whole = [Joined(name, context + self._count - since) for name, (context, since) in self.members.items()]
        if decode.n:
            self._count += 1
        return whole


class Lanes:
    """The lanes of a program, by (engine, number); the one that was silent for longest is forgotten first."""

    def __init__(self) -> None:
        self._mirrors: dict[tuple[EngineId, int], LaneMirror] = {}

    def __len__(self) -> int:
        return len(self._mirrors)

    def of(self, engine: EngineId, lane: int) -> LaneMirror:
        """The mirror of this lane, which speaks now."""
        mirror = self._mirrors.pop((engine, lane), None) or LaneMirror()
        self._mirrors[engine, lane] = mirror
        if len(self._mirrors) > LIMIT:
            del self._mirrors[next(iter(self._mirrors))]
        return mirror

    def clear(self) -> None:
        """Forget all."""
        self._mirrors.clear()
