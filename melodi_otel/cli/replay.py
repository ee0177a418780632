"""``melodi-otel replay TRACE…``: the shares and books of a recorded trace, by the code that runs live."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import IO, Any

import typer

from melodi_otel.attribution.books import BUCKETS
from melodi_otel.errors import MissingDependency, TraceError

EXAMPLE = "Example: melodi-otel replay trace.jsonl --out shares.jsonl --policy dynamic"


class Policy(StrEnum):
    """Who pays idle power while requests run."""

    busy_shared = "busy_shared"
    dynamic = "dynamic"


class Method(StrEnum):
    """The best evidence that may be used."""

    step = "step"
    slice = "slice"
    phase = "phase"
    window = "window"
    equal = "equal"


def replay(
    trace: list[str] = typer.Argument(
        ...,
        metavar="TRACE.jsonl…",
        help="Its files in any order, or their directory, packed or not; - is standard input.",
    ),
    out: str = typer.Option("-", "--out", "-o", metavar="SHARES.jsonl", help="Where shares go; - is standard output."),
    policy: Policy = typer.Option(Policy.busy_shared, help="Who pays idle power while requests run."),
    method: Method | None = typer.Option(
        None, help="Pretend that only this evidence exists; default: the best there is."
    ),
) -> None:
    """Attribute a recorded trace, in one file or several: one `share` line per request and device, one `books` line per device.

    A table of the books goes to standard error. Exit codes: 0 done (warnings are counted), 1 the trace cannot be used,
    2 wrong usage. An output file appears only when it is complete.
    """
    from melodi_otel.results.terminal import console
    from melodi_otel.trace.read import in_order, lines_of
    from melodi_otel.trace.replay import Report
    from melodi_otel.trace.replay import replay as attribute

    screen, report = console(stderr=True), Report()
    try:
        files = in_order(sys.stdin.buffer if name == "-" else name for name in trace)
        with _watched(_size(files), screen) as watch, _output(out) as write:
            rows = attribute(lines_of(files, watch), policy.value, method.value if method else None, report)
            tally = copy(rows, write)
            if report.broken and not report.lines:
                number, why = report.first_broken[0]
                raise TraceError(f"{' '.join(trace)}, line {number}: {why}; expected a trace, one JSON object a line")
    except (OSError, TraceError, MissingDependency) as error:
        print(f"melodi-otel: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    for number, why in report.first_broken[:5]:
        screen.print(f"line {number} is left out: {why}", markup=False)
    for what, times in report.unknown.items():
        screen.print(f"unknown {what} is left out ({times} times)", markup=False)
    if tally.books:
        screen.print(tally.table())
    warnings = report.broken + len(report.unknown)
    screen.print(
        f"{tally.requests} requests, {tally.shares} shares, {report.lines} lines, "
        f"{warnings} {'warning' if warnings == 1 else 'warnings'}"
    )


@dataclass(slots=True)
class Tally:
    """What went through, for the person who watches."""

    shares: int = 0
    ids: set[str] = field(default_factory=set[str])
    books: list[Mapping[str, Any]] = field(default_factory=list[Mapping[str, Any]])

    @property
    def requests(self) -> int:
        """How many different requests got a share."""
        return len(self.ids)

    def add(self, row: Mapping[str, Any]) -> None:
        """Count one line of the output."""
        if row.get("kind") == "share":
            self.shares += 1
            self.ids.add(str(row.get("id")))
        elif row.get("kind") == "books":
            self.books.append(row)

    def table(self) -> Any:
        """The books."""
        from melodi_otel.results.table import number
        from melodi_otel.results.terminal import Table, escape

        columns = ("measured", "attributed", "in_flight", *BUCKETS, "residual")
        table = Table(title="The books, in joules", title_justify="left", header_style="bold")
        table.add_column("device", overflow="fold")
        for column in columns:
            table.add_column(column.replace("_", " "), justify="right", no_wrap=True)
        for row in self.books:
            table.add_row(escape(str(row.get("device"))), *(number(row.get(column)) for column in columns))
        return table


def copy(rows: Iterable[Mapping[str, Any]], write: IO[str]) -> Tally:
    """Write every row as one JSON object a line, and count."""
    tally = Tally()
    for row in rows:
        write.write(json.dumps(row, allow_nan=False) + "\n")
        tally.add(row)
    return tally


def _size(files: Iterable[Path | IO[bytes]]) -> int | None:
    """Bytes of all of them; None where one is a stream."""
    total = 0
    for file in files:
        if not isinstance(file, Path):
            return None
        total += file.stat().st_size
    return total


@contextmanager
def _watched(size: int | None, screen: Any) -> Generator[Callable[[int], None], None, None]:
    from melodi_otel.results.terminal import progress

    with progress(screen) as bar:
        task = bar.add_task("replaying", total=size)
        yield lambda read: bar.advance(task, read)


@contextmanager
def _output(name: str) -> Generator[IO[str], None, None]:
    if name == "-":
        yield sys.stdout
        sys.stdout.flush()
        return
    target = Path(name)
    if target.exists() and not target.is_file():
        # A device or a pipe is written as it is: a rename would replace it.
        with target.open("w", encoding="utf-8") as stream:
            yield stream
        return
    # A reader never finds half a file.
    descriptor, part = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            yield stream
        Path(part).chmod(0o666 & ~_umask())
        Path(part).replace(target)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
