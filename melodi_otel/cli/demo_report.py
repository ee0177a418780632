"""What the demo shows: each answer's energy, the books, and what naive windows would have said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from melodi_otel.attribution.record import RequestRecord
from melodi_otel.results.table import UNKNOWN, count, number, quality
from melodi_otel.results.terminal import RenderableType, Table, Text, escape

Between = Mapping[str, "float | None"]


@dataclass(slots=True)
class Answer:
    """One question, what came back, and when (monotonic ns, around the whole call)."""

    question: str
    text: str = ""
    prompt_tokens: int = 0
    output_tokens: int = 0
    start_ns: int = 0
    end_ns: int = 0
    concurrent: bool = False
    record: RequestRecord | None = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Overlap:
    """The requests that ran at the same time: what each would be charged by its own window, and what was measured."""

    windows: float
    measured: float
    requests: float

    @property
    def factor(self) -> float:
        """How many times the measured joules the windows sum to."""
        return self.windows / self.measured


def match(answers: Sequence[Answer], records: Sequence[RequestRecord]) -> None:
    """Give each answer its record: the one inside its time with the same number of prompt tokens."""
    free = [record for record in records if record.kind == "request"]
    for answer in answers:
        for record in free:
            inside = answer.start_ns <= record.start_ns and record.end_ns <= answer.end_ns
            if inside and record.prompt_tokens in (answer.prompt_tokens, None):
                answer.record = record
                free.remove(record)
                break


def overlap(answers: Sequence[Answer], between: Mapping[tuple[int, int], Between]) -> Overlap | None:
    """Compare the windows of concurrent answers with what was measured; None where the meter did not cover it.

    Args:
        answers: all answers.
        between: joules per device in each of :func:`windows`.
    """
    own, union = windows(answers)
    if union is None:
        return None
    sums = [_sum(between[window]) for window in own]
    measured = _sum(between[union])
    shares = [a.record.energy.total for a in answers if a.concurrent and a.record is not None]
    if measured is None or not measured or None in sums or None in shares or len(shares) != len(own):
        return None
    return Overlap(math.fsum(s or 0.0 for s in sums), measured, math.fsum(s or 0.0 for s in shares))


def windows(answers: Sequence[Answer]) -> tuple[list[tuple[int, int]], tuple[int, int] | None]:
    """The windows of the concurrent answers, and the one around all of them."""
    records = [a.record for a in answers if a.concurrent and a.record is not None]
    own = [(record.start_ns, record.end_ns) for record in records]
    return own, (min(t0 for t0, _ in own), max(t1 for _, t1 in own)) if own else None


def _sum(joules: Between) -> float | None:
    values = list(joules.values())
    return None if not values or None in values else math.fsum(value or 0.0 for value in values)


def answers_table(answers: Sequence[Answer]) -> RenderableType:
    """One row per answer, narrow enough for 80 columns."""
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for heading in ("#", "prompt\ntokens", "output\ntokens", "first\ntoken s", "s", "J", "± J", "J per\ntoken"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("method", no_wrap=True)
    table.add_column("quality", overflow="fold")
    for place, answer in enumerate(answers, 1):
        label = f"{place}{'*' if answer.concurrent else ''}"
        record = answer.record
        if record is None:
            unknown = [UNKNOWN] * 5
            table.add_row(
                label, count(answer.prompt_tokens), count(answer.output_tokens), *unknown, UNKNOWN, "not seen"
            )
            continue
        energy = record.energy
        table.add_row(
            label,
            count(record.prompt_tokens),
            count(record.output_tokens),
            number(record.time_to_first_token_s),
            number(record.duration_s),
            number(energy.total),
            number(energy.uncertainty),
            number(energy.per_token(record.output_tokens), 3),
            energy.method or UNKNOWN,
            escape(quality(record)),
        )
    return table


def shortly(text: str, width: int = 150) -> str:
    """``text`` on one line, cut at a word."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[:width].rsplit(" ", 1)[0] + " …"


def overlap_text(found: Overlap | None) -> Text:
    """The comparison in two sentences."""
    if found is None:
        return Text(
            "The concurrent calls could not be compared with naive windows: the meter did not cover their time."
        )
    # Idle power is known, so what the first and last reading show above it is the calls', also beyond their very ends.
    border = " (the readings around it reach a little further)" if found.requests > found.measured else ""
    return Text(
        f"* ran at the same time. Together they are told {found.requests:.2f} J; the meter counted {found.measured:.2f} J "
        f"in that time{border}. Naive windows, which charge each call for everything that was counted while it ran, would sum to "
        f"{found.windows:.2f} J: {found.factor:.2f} times what the meter counted."
    )
