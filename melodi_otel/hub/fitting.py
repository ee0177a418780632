"""What the wire takes: names, counts and times of a program brought within its limits before they are sent.

A hub refuses a frame that breaks them, and with it the whole program: one long model name, or a count that is no count, must
not cost a server its joules. What cannot be brought within them is left out.
"""

from __future__ import annotations

import hashlib
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, Final

import msgspec

from melodi_otel.attribution.meter import Joined, Prefill
from melodi_otel.hub import wire

LONGEST: Final = 1024
"""Characters of a name; see ``wire.Text``."""
_MOST: Final = 1 << 48
_LAST_NS: Final = (1 << 62) - 1
_KEPT: Final = 960
_GREETING: Final = 900_000
"""Bytes of ids in a greeting: it has to fit one frame of 1 MiB."""
_FEW_ROWS: Final = 200
"""Rows of a step that fit a frame however long their ids are."""
_ROW: Final = 32
"""Bytes of a row at most, beside the letters of its id, of four bytes each at most."""
_encoder: Final = msgspec.msgpack.Encoder()


def text(value: str | None) -> str | None:
    """Words for people, cut."""
    if value is None or (len(value) <= LONGEST and value.isascii()):
        return value
    return _plain(value)[:LONGEST]


def name(value: str) -> str:
    """An id: one that is too long keeps its beginning and gets a digest, so that two of them stay two."""
    if len(value) <= LONGEST and value.isascii():
        return value
    plain = _plain(value)
    if len(plain) <= LONGEST:
        return plain
    return f"{plain[:_KEPT]}~{hashlib.sha256(plain.encode()).hexdigest()[:32]}"


def names(values: Sequence[str] | None) -> list[str] | None:
    """Ids, or None."""
    return None if values is None else [name(value) for value in values]


def labels(values: Mapping[str, str] | None) -> dict[str, str]:
    """Labels with names and values cut."""
    return {text(key) or "": text(value) or "" for key, value in (values or {}).items()}


def count(value: Any) -> int | None:
    """A number of things; None where it is none (negative, no integer, not known)."""
    if type(value) is int:
        return value if 0 <= value <= _MOST else None
    try:
        found = int(operator.index(value))  # True would be told as no number
    except TypeError:
        return None
    return found if 0 <= found <= _MOST else None


def time(value: int) -> int:
    """Monotonic ns."""
    return value if 0 <= value <= _LAST_NS else min(max(value, 0), _LAST_NS)


def time_if(value: int | None) -> int | None:
    """Monotonic ns, or None."""
    return None if value is None else time(value)


def number(value: Any) -> float | None:
    """A finite figure, or None."""
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def prefills(rows: Iterable[Prefill]) -> list[Prefill]:
    """Rows of a step that can be told."""
    # Nearly always all of them, as they are: with drafts every sequence of every step is one.
    rows = list(rows)
    for told, tokens, context in rows:
        if (
            type(tokens) is not int
            or type(context) is not int
            or not 0 <= tokens <= _MOST
            or not 0 <= context <= _MOST
            or len(told) > LONGEST
            or not told.isascii()
        ):
            break
    else:
        return rows
    found: list[Prefill] = []
    for row in rows:
        tokens, context = count(row.tokens), count(row.context)
        if tokens is not None and context is not None:
            found.append(Prefill(name(row.id), tokens, context))
    return found


def joins(rows: Iterable[Joined]) -> list[Joined]:
    """Members of a decode set that can be told."""
    found: list[Joined] = []
    for row in rows:
        context = count(row.context)
        if context is not None:
            found.append(Joined(name(row.id), context))
    return found


def fits(ids: Iterable[str]) -> list[str]:
    """As many ids, from the first on, as one greeting holds."""
    found: list[str] = []
    size = 0
    for each in ids:
        size += 4 * len(each) + 8 if not each.isascii() else len(each) + 8
        if size > _GREETING:
            break
        found.append(each)
    return found


def _plain(value: str) -> str:
    # Half a character (from a header that was no UTF-8) can be said to nobody.
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


def frame(told: wire.Stepped) -> bool:
    """Whether a step fits one frame; one that does not would be left out without a word."""
    rows = len(told.prefill) + len(told.computed) + len(told.joined) + len(told.left)
    if rows <= _FEW_ROWS:
        return True
    named = chain(told.prefill, told.computed, told.joined)
    longest = max(max((len(row[0]) for row in named), default=0), max(map(len, told.left), default=0))
    if rows * (4 * longest + _ROW) < wire.FRAME_LIMIT - 64:
        return True
    return len(_encoder.encode(told)) < wire.FRAME_LIMIT - 64
