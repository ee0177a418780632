"""Steps in delta form made whole, plainly: what every id computed in each of them. The truth beside cleverer readers."""

from __future__ import annotations

from collections.abc import Sequence

from melodi_otel.attribution.engines import Work
from melodi_otel.attribution.meter import Decode, Joined, Prefill


class WholeSteps:
    """One lane's decode set: id -> context before the next step."""

    __slots__ = ("members", "seq")

    def __init__(self) -> None:
        self.seq: int | None = None
        self.members: dict[str, int] = {}

    def follow(self, seq: int) -> bool:
        """Take the number of the next step; False: deltas in between are lost, and with them the decode set."""
        whole = self.seq is None or seq == self.seq + 1
        if not whole:
            self.members.clear()
        self.seq = seq
        return whole

    def advance(
        self,
        decode: Decode,
        prefill: Sequence[Prefill],
        computed: Sequence[Prefill],
        joined: Sequence[Joined],
        left: Sequence[str],
    ) -> list[Work]:
        """Apply a step in delta form and return its full work."""
        for gone in left:
            self.members.pop(gone, None)
        for member in joined:
            self.members[member.id] = member.context
        work = [Work(row.id, row.tokens, 0, row.context) for row in prefill]
        for row in computed:
            self.members.pop(row.id, None)
            work.append(Work(row.id, 0, row.tokens, row.context))
        if decode.n:
            for member, context in self.members.items():
                work.append(Work(member, 0, 1, context))
                self.members[member] = context + 1
        return work
