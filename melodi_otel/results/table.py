"""Finished requests as rows: dictionaries for programs, a table for a terminal, a table for a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import import_module
from typing import Any, overload

from melodi_otel.attribution.record import RequestRecord
from melodi_otel.errors import MissingDependency

UNKNOWN = "–"
"""What a person sees where a figure is not known; a program sees None."""


class Results(Sequence[RequestRecord]):
    """Finished requests, in order; behaves as a list and shows itself as a table.

    Args:
        records: what it holds.
    """

    def __init__(self, records: Iterable[RequestRecord] = ()) -> None:
        self._records = list(records)

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> RequestRecord: ...
    @overload
    def __getitem__(self, index: slice) -> Results: ...
    def __getitem__(self, index: int | slice) -> RequestRecord | Results:
        if isinstance(index, slice):
            return Results(self._records[index])
        return self._records[index]

    def __iter__(self) -> Iterator[RequestRecord]:
        return iter(self._records)

    def __eq__(self, other: object) -> bool:
        return self._records == other._records if isinstance(other, Results) else NotImplemented

    __hash__ = None  # type: ignore[assignment]

    def to_dicts(self) -> list[dict[str, Any]]:
        """One flat, JSON-able dictionary per request; units stand in the names, unknown is None."""
        return [as_dict(record) for record in self._records]

    def to_pandas(self) -> Any:
        """A ``pandas.DataFrame`` with the columns of :meth:`to_dicts`.

        Raises:
            MissingDependency: pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ImportError as error:
            raise MissingDependency('to_pandas() needs pandas: pip install "melodi-otel[dataset]"') from error
        rows = self.to_dicts()
        return pandas.DataFrame(rows, columns=list(dict.fromkeys((*COLUMNS, *(name for row in rows for name in row)))))

    def __repr__(self) -> str:
        return render(self) if self._records else "no finished requests yet"

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from melodi_otel.results.terminal import requests_table

        yield requests_table(self._records)

    def _repr_html_(self) -> str:
        return html_table(self._records)


def render(results: Results) -> str:
    """The table as plain text."""
    from melodi_otel.results.terminal import plain, requests_table

    return plain(requests_table(list(results)))


def as_dict(record: RequestRecord) -> dict[str, Any]:
    """One request as a flat dictionary; see :data:`COLUMNS`."""
    energy = record.energy
    values: tuple[Any, ...] = (
        record.name,
        record.kind,
        record.operation,
        record.provider,
        record.model,
        datetime.fromtimestamp(record.start_wall_ns / 1e9, UTC).isoformat(),
        record.duration_s,
        record.time_to_first_token_s,
        record.prompt_tokens,
        record.cached_tokens,
        record.output_tokens,
        record.outcome,
        record.error_type,
        ",".join(record.finish_reasons) or None,
        energy.total,
        energy.uncertainty,
        energy.per_token(record.output_tokens),
        energy.rollup,
        energy.gpu,
        energy.cpu,
        energy.memory,
        energy.dynamic,
        energy.static,
        energy.prefill,
        energy.decode,
        energy.method,
        energy.quality,
        energy.reason,
        energy.scope,
        ",".join(energy.source) or None,
        ",".join(energy.devices) or None,
        energy.coverage,
        energy.concurrency,
        energy.exclusive,
        record.compile_warmup or None,
        f"{record.trace_id:032x}" if record.trace_id else None,
        f"{record.span_id:016x}" if record.span_id else None,
    )
    row: dict[str, Any] = dict(zip(COLUMNS, values, strict=True))
    row.update({f"label_{name}": value for name, value in record.labels.items()})
    return row


COLUMNS: tuple[str, ...] = (
    "name",
    "kind",
    "operation",
    "provider",
    "model",
    "start_time",
    "duration_seconds",
    "time_to_first_token_seconds",
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "outcome",
    "error_type",
    "finish_reasons",
    "joules",
    "uncertainty_joules",
    "joules_per_output_token",
    "rollup_joules",
    "gpu_joules",
    "cpu_joules",
    "memory_joules",
    "dynamic_joules",
    "static_joules",
    "prefill_joules",
    "decode_joules",
    "method",
    "quality",
    "reason",
    "scope",
    "source",
    "devices",
    "coverage_ratio",
    "concurrency",
    "exclusive",
    "compile_warmup",
    "trace_id",
    "span_id",
)
"""Keys of a row. ``joules`` is what the request itself used: the column sums to what all requests used.
``rollup_joules`` adds the requests nested in it."""


def number(value: float | None, digits: int = 2) -> str:
    """A figure for people: ``digits`` decimals, more where it would vanish, a dash where it is not known."""
    if value is None:
        return UNKNOWN
    # Below a nanojoule stands what floating point left over, not energy.
    if abs(value) >= 1e-9 and abs(value) < 0.5 * 10**-digits:
        return f"{value:.2g}"
    return f"{value if abs(value) >= 1e-9 else 0.0:,.{digits}f}"


def count(value: int | None) -> str:
    """A whole number for people."""
    return UNKNOWN if value is None else f"{value:,}"


def quality(record: RequestRecord) -> str:
    """The quality with the reason where there is one, and a word on a request in which torch compiled something."""
    notes = [note for note in (record.energy.reason, "compile warm-up" if record.compile_warmup else None) if note]
    return f"{record.energy.quality} ({', '.join(notes)})" if notes else record.energy.quality


_STYLE = (
    ".melodi{border-collapse:collapse;font-variant-numeric:tabular-nums}"
    ".melodi th,.melodi td{padding:.2em .7em;text-align:right;white-space:nowrap}"
    ".melodi tbody tr{border-top:1px solid rgba(128,128,128,.35)}"
    ".melodi :is(th,td):is(:first-child,:nth-last-child(-n+2)){text-align:left}"
)
"""Figures to the right, words to the left; colours are the notebook's own, light or dark."""
HEADINGS = ("request", "prompt", "output", "first token s", "seconds", "J", "± J", "J/token", "method", "quality")


def cells(record: RequestRecord) -> tuple[str, ...]:
    """One request as the cells under :data:`HEADINGS`.

    A measured block shows what it and everything nested in it used, marked with a sigma, because that is what its
    author asked for; every other row shows its own joules. The uncertainty of such a sum is not the record's to tell.
    """
    energy = record.energy
    joules, uncertainty = number(energy.total), number(energy.uncertainty)
    if record.kind == "measure" and energy.rollup is not None and energy.rollup != energy.total:
        joules, uncertainty = f"Σ {number(energy.rollup)}", UNKNOWN
    return (
        record.name if record.model is None or record.model in record.name else f"{record.name} {record.model}",
        count(record.prompt_tokens),
        count(record.output_tokens),
        number(record.time_to_first_token_s),
        number(record.duration_s),
        joules,
        uncertainty,
        number(energy.per_token(record.output_tokens), 3),
        energy.method or UNKNOWN,
        quality(record),
    )


def html_table(records: Sequence[RequestRecord]) -> str:
    """The same table for a notebook; every text is escaped."""
    if not records:
        return "<p>no finished requests yet</p>"
    head = "".join(f"<th>{escape(heading)}</th>" for heading in HEADINGS)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells(record)) + "</tr>" for record in records
    )
    return f'<style>{_STYLE}</style><table class="melodi"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
