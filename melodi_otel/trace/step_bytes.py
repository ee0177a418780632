"""Step lines as bytes: the decode set of a lane is a template that only needs the contexts of this step.

A step of 256 sequences says 256 times the same but for one number, and there may be a hundred steps a second: objects for every
row, and a general encoder behind them, would cost several per cent of a core.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from melodi_otel.attribution.meter import Decode, Joined, Prefill
from melodi_otel.trace import lines as form
from melodi_otel.units import seconds


class StepBytes:
    """One lane's decode set, and the lines of its steps.

    Args:
        engine: its name in the trace.
        lane: its number.
        all_devices: what the trace names for the devices of a step.
    """

    __slots__ = ("_all", "_bases", "_lane", "_members", "_name", "_seq", "_steps", "_tails", "_template")

    def __init__(
        self,
        engine: str,
        lane: int,
        all_devices: Callable[[tuple[str, ...] | None], list[str] | None],
    ) -> None:
        self._name: Final = engine
        self._lane: Final = lane
        self._all: Final = all_devices
        self._seq: int | None = None
        self._steps = 0
        # Context before the next step, less the decode steps so far: it stays the same while the member is there.
        self._members: dict[str, int] = {}
        self._template: bytes | None = b""
        self._bases: list[int] = []
        self._tails: dict[tuple[str, ...] | None, bytes] = {}

    @property
    def members(self) -> int:
        """How many sequences are in the decode set."""
        return len(self._members)

    def follow(self, seq: int) -> None:
        """Take the number of the next step; where deltas in between are lost, so is the decode set."""
        if self._seq is not None and seq != self._seq + 1:
            self._members.clear()
            self._template = None
        self._seq = seq

    def line(
        self,
        t0_ns: int,
        t1_ns: int,
        devices: tuple[str, ...] | None,
        decode: Decode,
        prefill: Sequence[Prefill],
        computed: Sequence[Prefill],
        joined: Sequence[Joined],
        left: Sequence[str],
    ) -> bytes:
        """Apply a step in delta form and return its line; empty: nobody computed anything."""
        members, now = self._members, self._steps
        if joined or left or computed:
            self._template = None
            for gone in left:
                members.pop(gone, None)
            for member in joined:
                members[member.id] = member.context - now
        rows = {row.id: (row.tokens, 0, row.context + row.tokens) for row in prefill}
        for row in computed:
            members.pop(row.id, None)
            rows[row.id] = (0, row.tokens, row.context + row.tokens)
        if not decode.n or not members:
            work = _rows(rows)
        else:
            self._steps = now = now + 1
            if any(name in members for name in rows):
                # In the decode set and with a row of its own: an id stands in the object once, and decodes.
                rows.update((name, (0, 1, base + now)) for name, base in members.items())
                work = _rows(rows)
            else:
                work = [*_rows(rows), self._decoding(now)]
        if not work:
            return b""
        times = (form.encode_value(seconds(t0_ns)), form.encode_value(seconds(t1_ns)))
        return b'{"kind":"step","t0":%b,"t1":%b,"work":{%b}%b' % (*times, b",".join(work), self._tail(devices))

    def _decoding(self, now: int) -> bytes:
        if self._template is None:
            heads = [form.encode_value(name).replace(b"%", b"%%") for name in self._members]
            self._template = b",".join([head + b":[0,1,%d]" for head in heads])
            self._bases = list(self._members.values())
        return self._template % tuple([base + now for base in self._bases])

    def _tail(self, devices: tuple[str, ...] | None) -> bytes:
        tail = self._tails.get(devices)
        if tail is None:
            listed = self._all(devices)
            named = b"" if listed is None else b',"devices":' + form.encode_value(listed)
            tail = b',"engine":%b%b,"lane":%d}\n' % (form.encode_value(self._name), named, self._lane)
            self._tails = {devices: tail}
        return tail


def _rows(rows: dict[str, tuple[int, int, int]]) -> list[bytes]:
    return [b"%b:[%d,%d,%d]" % (form.encode_value(name), *parts) for name, parts in rows.items()]
