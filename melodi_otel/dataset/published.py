"""MELODI's published files, row by row: what they measured in our units, and what is wrong with them.

A file has 20 columns of measurements, 57 of prompt features that are not read here, and leftovers of merges (``index``,
``Unnamed: 0`` and the like). Energy is kWh there and J here, durations are ns there and s here. What is missing stays missing.
"""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from melodi_otel.dataset.paper import J_PER_KWH
from melodi_otel.errors import DataSetError

COLUMNS: Final = (
    "model_name",
    "created_at",
    "total_duration",
    "load_duration",
    "prompt_duration",
    "response_duration",
    "prompt_token_length",
    "response_token_length",
    "prompt",
    "response",
    "energy_consumption_monitoring",
    "energy_consumption_llm_cpu",
    "energy_consumption_llm_gpu",
    "energy_consumption_llm_total",
    "energy_consumption_llm",
    "type",
    "clock_duration",
    "start_time",
    "end_time",
    "index",
)
"""Columns of measurements, by the names of the published files."""
NEEDED: Final = ("model_name", "response_token_length", "energy_consumption_llm_total")
"""Without these there is nothing to say about energy."""
RUNAWAY_TOKENS: Final = 50_000
"""A response that is longer than any context of the models at hand has run away: the published maximum is 285,702."""
CLOCK_S: Final = 1e-6
"""Stamps are whole microseconds: end - start and clock_duration differ by no more."""
_FIELD: Final = 64 << 20  # a response of 300,000 tokens is longer than the csv module's own 128 KiB
_SPAN: Final = re.compile(r"(?:(-?\d+) days? )?\+?(\d+):(\d\d):(\d\d(?:\.\d+)?)")


@dataclass(frozen=True, slots=True)
class Row:
    """One response. J, s, tokens; None: not there, or not a number.

    Attributes:
        file, line: where it stands; the line is its first.
        model: as it was asked for.
        prompt, response: the texts.
        prompt_tokens, response_tokens: tokens.
        total_s, load_s, prompt_s, response_s: durations that the server told.
        clock_s: from request to answer.
        cpu_j, gpu_j, joules, monitoring_j: energy of CPU, GPU, both, and of the measuring tool, which is in none of them.
        task: the prompt's type.
        start, end: with their time zone.
    """

    file: str
    line: int
    model: str
    prompt: str
    response: str
    prompt_tokens: int | None
    response_tokens: int | None
    total_s: float | None
    load_s: float | None
    prompt_s: float | None
    response_s: float | None
    clock_s: float | None
    cpu_j: float | None
    gpu_j: float | None
    joules: float | None
    monitoring_j: float | None
    task: str
    start: datetime | None
    end: datetime | None

    @property
    def joules_per_token(self) -> float | None:
        """J per response token; None where either is missing or not above 0."""
        if not self.joules or not self.response_tokens or self.joules < 0.0 or self.response_tokens < 0:
            return None
        return self.joules / self.response_tokens


@dataclass(frozen=True, slots=True)
class Defect:
    """Something that is wrong with a file or a row.

    Attributes:
        file, line: where; line None: the whole file.
        kind: one of a few words, to count by.
        why: the rest of the sentence.
        lost: whether the row cannot be used at all.
    """

    file: str
    line: int | None
    kind: str
    why: str
    lost: bool = False

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.kind}: {self.why}"


def read(path: Path) -> Iterator[Row | Defect]:
    """The rows of one file and what is wrong with them, as they come; memory does not grow with the file.

    Raises:
        DataSetError: it cannot be read, is empty, or lacks a column that is needed; the message names file and column.
    """
    csv.field_size_limit(_FIELD)
    name = path.name
    try:
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            rows = csv.reader(file)
            heads = next(rows, None)
            if not heads:
                raise DataSetError(f"{path} is empty: expected are the columns {', '.join(NEEDED)} and others")
            missing = [column for column in NEEDED if column not in heads]
            if missing:
                raise DataSetError(f"{path}, line 1: no column {', '.join(missing)}; there are {', '.join(heads[:30])}")
            if len(set(heads)) < len(heads):
                yield Defect(name, 1, "columns twice", ", ".join(sorted({h for h in heads if heads.count(h) > 1})))
            yield from _rows(rows, name, heads)
    except OSError as error:
        raise DataSetError(f"{path} cannot be read: {error.strerror}") from error


def defects_of(row: Row) -> Iterator[Defect]:
    """What contradicts itself in one row, by the invariants of the published files."""

    def wrong(kind: str, why: str) -> Defect:
        return Defect(row.file, row.line, kind, why)

    if row.start is not None and row.end is not None and row.clock_s is not None:
        took = (row.end - row.start).total_seconds()
        if abs(took - row.clock_s) > CLOCK_S:
            yield wrong("clock", f"end - start is {took:.6f} s, clock_duration {row.clock_s:.6f} s")
    if row.cpu_j is not None and row.gpu_j is not None and row.joules is not None:
        parts = row.cpu_j + row.gpu_j
        if not math.isclose(parts, row.joules, rel_tol=1e-9, abs_tol=1e-9):
            yield wrong("sum", f"CPU + GPU are {parts:.6g} J, the total {row.joules:.6g} J")
    if row.prompt_tokens is None:
        yield wrong("no prompt count", "prompt_token_length is missing (a cached prompt): unknown, not 0")
    if row.response_tokens is not None and row.response_tokens > RUNAWAY_TOKENS:
        yield wrong("runaway", f"{row.response_tokens} response tokens")
    if row.joules_per_token is None:
        yield wrong("no ratio", f"{row.joules} J for {row.response_tokens} response tokens")


def duplicates(paths: Iterable[Path]) -> list[tuple[Path, Path]]:
    """Files with the same bytes as an earlier one: (earlier, later)."""
    seen: dict[tuple[int, bytes], Path] = {}
    found: list[tuple[Path, Path]] = []
    for path in paths:
        digest = sha256()
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
        key = (path.stat().st_size, digest.digest())
        if key in seen:
            found.append((seen[key], path))
        seen.setdefault(key, path)
    return found


def _rows(rows: Any, name: str, heads: list[str]) -> Iterator[Row | Defect]:
    reader_line = 2
    while True:
        try:
            cells: list[str] | None = next(rows, None)
        except csv.Error as error:
            yield Defect(name, reader_line, "broken", str(error), lost=True)
            continue
        if cells is None:
            return
        line, reader_line = reader_line, rows.line_num + 1
        if not cells:
            continue
        if len(cells) != len(heads):
            yield Defect(name, line, "broken", f"{len(cells)} cells under {len(heads)} columns", lost=True)
            continue
        # The first of two columns of one name, as in the files that were merged twice.
        row = _row(name, line, dict(reversed(list(zip(heads, cells, strict=True)))))
        if "�" in row.prompt or "�" in row.response:
            yield Defect(name, line, "encoding", "bytes that are not UTF-8 in prompt or response")
        yield from defects_of(row)
        yield row


def _row(name: str, line: int, cell: Mapping[str, str]) -> Row:
    def joules(column: str) -> float | None:
        kwh = _number(cell.get(column, ""))
        return None if kwh is None else kwh * J_PER_KWH

    def seconds(column: str) -> float | None:
        ns = _number(cell.get(column, ""))
        return None if ns is None else ns / 1e9

    def tokens(column: str) -> int | None:
        count = _number(cell.get(column, ""))
        return None if count is None or count < 0 else round(count)

    return Row(
        name,
        line,
        cell.get("model_name", ""),
        cell.get("prompt", ""),
        cell.get("response", ""),
        tokens("prompt_token_length"),
        tokens("response_token_length"),
        seconds("total_duration"),
        seconds("load_duration"),
        seconds("prompt_duration"),
        seconds("response_duration"),
        _span(cell.get("clock_duration", "")),
        joules("energy_consumption_llm_cpu"),
        joules("energy_consumption_llm_gpu"),
        joules("energy_consumption_llm_total"),
        joules("energy_consumption_monitoring"),
        cell.get("type", ""),
        _time(cell.get("start_time", "")),
        _time(cell.get("end_time", "")),
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _span(text: str) -> float | None:
    """Seconds of a duration as pandas writes it, ``0 days 00:01:34.884369``."""
    if (match := _SPAN.fullmatch(text.strip())) is None:
        return None
    days, hours, minutes, seconds = match.groups()
    return int(days or 0) * 86_400 + int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError:
        return None
