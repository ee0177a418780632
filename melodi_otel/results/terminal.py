"""What a person sees in a terminal. The command line takes its console from here; besides this file only ``top`` imports rich."""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from typing import IO, Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from melodi_otel.attribution.books import BUCKETS, Books, Snapshot
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.devices import Device
from melodi_otel.results.table import HEADINGS, cells, number

__all__ = [
    "Console",
    "Group",
    "Progress",
    "RenderableType",
    "Table",
    "Text",
    "books_table",
    "console",
    "escape",
    "not_measured",
    "plain",
    "print_summary",
    "progress",
    "requests_table",
    "summary",
]

PLAIN_WIDTH = 160
_NAMES = {"gpu": "the GPU", "cpu": "the CPU package", "memory": "memory (DRAM)"}
_NEVER = "disks, fans, network cards and power-supply losses"


def console(file: IO[str] | None = None, *, stderr: bool = False) -> Console:
    """A console on ``file``, else on standard output (or standard error).

    A log file or pipe has no width of its own: it gets enough for every column.
    """
    stream = file or (sys.stderr if stderr else sys.stdout)
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(file=stream, width=width, soft_wrap=False, highlight=False)


def plain(renderable: RenderableType, width: int = PLAIN_WIDTH) -> str:
    """``renderable`` as text without colours."""
    out = Console(file=io.StringIO(), width=width, no_color=True, highlight=False)
    with out.capture() as captured:
        out.print(renderable)
    return captured.get().rstrip("\n")


def progress(to: Console) -> Progress:
    """A progress bar that leaves nothing behind; silent where nobody watches."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=to,
        transient=True,
        refresh_per_second=4,  # drawing costs energy that the meter counts
        disable=not to.is_terminal,
    )


def requests_table(records: Sequence[RequestRecord], title: str | None = None) -> Table:
    """One row per request, see :func:`melodi_otel.results.table.cells`."""
    table = Table(title=title, title_justify="left", header_style="bold")
    for heading in HEADINGS:
        text = heading in ("request", "method", "quality")
        # The name gives way first: a figure that is cut is worse than a name that is.
        table.add_column(heading, justify="left" if text else "right", no_wrap=heading != "request", overflow="fold")
    for record in records:
        table.add_row(*(escape(cell) for cell in cells(record)))
    return table


def books_table(books: Mapping[str, Books], devices: Mapping[str, Device] | None = None) -> Table:
    """Where every measured joule went, one column per device; the last row is what does not add up, J per measured J."""
    table = Table(header_style="bold", box=None, padding=(0, 1))
    table.add_column("where every\njoule went", no_wrap=True)
    for device in books:
        known = (devices or {}).get(device)
        label = f"{device}\n{known.name}" if known and known.name and known.name != device else device
        table.add_column(escape(label), justify="right", overflow="fold")
    rows = {"requests": "attributed", "in flight": "in_flight", **{bucket: bucket for bucket in BUCKETS}}
    for heading, name in {**rows, "residual": "residual"}.items():
        table.add_row(heading, *(number(getattr(book, name)) for book in books.values()))
    table.add_row("= measured", *(number(book.measured) for book in books.values()), style="bold")
    table.add_row("imbalance", *(f"{abs(book.imbalance()):.0e}" for book in books.values()))
    return table


def not_measured(devices: Mapping[str, Device] | None) -> str:
    """One sentence on what the figures do not contain."""
    present = {device.type for device in (devices or {}).values()}
    absent = [name for kind, name in _NAMES.items() if kind not in present]
    if not present & set(_NAMES):
        return "Nothing is measured: no meter was found (melodi-otel doctor says why)."
    return f"Not measured: {', '.join([*absent, _NEVER])}."


def summary(
    records: Sequence[RequestRecord],
    snapshot: Snapshot | None = None,
    devices: Mapping[str, Device] | None = None,
    *,
    limit: int = 20,
) -> RenderableType:
    """What ``instrument(console=True)`` prints when the program ends.

    Args:
        records: finished requests; the last ``limit`` are shown, and how many came before.
        snapshot: the books, where there is a ledger.
        devices: by ``hw.id``, for their names and for the line on what is not measured.
        limit: the most rows.
    """
    parts: list[Any] = []
    shown = list(records)[-limit:]
    if shown:
        parts.append(requests_table(shown, title="Energy per request"))
    if len(records) > len(shown):
        parts.append(Text(f"… and {len(records) - len(shown)} earlier ones"))
    if not records:
        parts.append(Text("No request was measured."))
    if snapshot is not None and snapshot.books:
        parts.append(books_table(snapshot.books, devices))
    if any(device.estimated for device in (devices or {}).values()):
        parts.append(Text("Estimated from the load of the CPU, not measured by a sensor."))
    if devices is not None:
        parts.append(Text(not_measured(devices)))
    return Group(*parts)


def print_summary(
    records: Sequence[RequestRecord],
    snapshot: Snapshot | None = None,
    devices: Mapping[str, Device] | None = None,
    file: IO[str] | None = None,
) -> None:
    """Print :func:`summary` to ``file`` (default: standard error, so that a program's own output stays clean)."""
    console(file, stderr=True).print(summary(records, snapshot, devices))
