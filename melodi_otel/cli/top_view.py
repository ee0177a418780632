"""A status as ``melodi-otel top`` shows it, for any width of terminal.

It reads the JSON and takes every field as one that may be absent, so that an older or newer meter is shown too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, cast

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from melodi_otel.units import watt_hours

UNKNOWN: Final = "–"
_PARTS: Final = {
    "attributed": ("requests", "green", "█"),
    "in_flight": ("in flight", "bright_green", "▓"),
    "idle": ("idle", "bright_black", "░"),
    "tail": ("tail", "blue", "▒"),
    "loading": ("loading", "yellow", "▚"),
    "foreign": ("foreign", "magenta", "╳"),
    "unsampled": ("unsampled", "red", "?"),
    "residual": ("residual", "white", "~"),
}
_TYPES: Final = {"gpu": "GPU", "cpu": "CPU", "memory": "memory", "host": "machine"}
_QUALITY: Final = {"measured": "green", "interpolated": "cyan", "estimated": "yellow", "partial": "yellow"}
WIDEST: Final = 130
"""Columns that are used at most: a row that is longer is hard to follow."""
_WIDE, _MIDDLE, _NARROW = 110, 80, 60
_BAR: Final = {_WIDE: 48, _MIDDLE: 30, 0: 16}

Row = Mapping[str, Any]


def view(
    status: Row, width: int, *, rows: int | None = None, compact: bool = False, where: str = "", stale: str = ""
) -> RenderableType:
    """The whole view.

    Args:
        status: what ``/status.json`` holds.
        width: columns of the terminal.
        rows: the most lines of requests; None: all.
        compact: devices of a kind together, few models, one bar: for a low terminal.
        where: the place that gave it.
        stale: why these figures are old; empty: they are not.
    """
    parts: list[RenderableType] = [_head(status, where, stale), _sums(status, width), Text()]
    devices = _rows(status, "devices")
    parts += [_devices(_alike(devices) if compact else devices, width), Text()]
    parts += [_requests(status, width, rows), Text()]
    models, books = _rows(status, "models"), _rows(status, "books")
    if models:
        parts += [_models(models[:3] if compact else models, width), Text()]
    if books:
        parts += [_books([_together(books, devices)] if compact else books, devices, width), Text()]
    parts.append(_health(status, width))
    return Group(*parts)


def amount(value: float | None, unit: str, *, rough: bool = False) -> str:
    """A figure with its unit, about four digits; a dash where it is not known, ``≈`` where it is no sensor's."""
    if value is None:
        return UNKNOWN
    size, prefix = abs(value), ""
    for start, name, scale in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e4, "k", 1e3)):
        if size >= start * 0.9995:
            value, prefix = value / scale, name
            break
    else:
        if 0 < size < 0.1:
            value, prefix = value * 1e3, "m"
    digits = 0 if abs(value) >= 1000 or value == 0 else 1 if abs(value) >= 100 else 2
    return f"{'≈ ' if rough else ''}{value:,.{digits}f} {prefix}{unit}"


def span(seconds: float | None) -> str:
    """A time for people."""
    if seconds is None:
        return UNKNOWN
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _rows(status: Row, name: str) -> Sequence[Row]:
    found: Any = status.get(name)
    return cast("Sequence[Row]", found) if isinstance(found, list | tuple) else ()


def _part(status: Row, name: str) -> Row:
    found: Any = status.get(name)
    return cast("Row", found) if isinstance(found, Mapping) else {}


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"


def _sum(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) if there else None


def _head(status: Row, where: str, stale: str) -> Text:
    mode = {"local": "one process", "shared": "shared hub", "agent": "agent"}.get(status.get("mode", ""), "")
    host = status.get("host_id")
    about = [f"host {host}" if host else "", mode, f"up {span(status.get('uptime_seconds'))}", where]
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append("melodi_otel", style="bold green")
    line.append(f" {status.get('version') or ''}  ", style="bold")
    line.append(" · ".join(part for part in about if part), style="dim")
    if stale:
        line.append(f"\n{stale}", style="bold red")
    return line


def _sums(status: Row, width: int) -> Text:
    devices = [device for device in _rows(status, "devices") if device.get("type") != "host"]
    ids = {device.get("id") for device in devices}
    rough = any(device.get("estimated") for device in devices)
    books = [book for book in _rows(status, "books") if book.get("device") in ids]
    watts = [device.get("watts") for device in devices]
    shown = [value for value in watts if value is not None]
    joules = _sum([device.get("joules") for device in devices])
    measured = _sum([book.get("measured_joules") for book in books])
    given = _sum([book.get(f"{part}_joules") for book in books for part in ("attributed", "in_flight")])
    pairs = [
        m for m in _rows(status, "models") if m.get("joules_per_output_token") is not None and m.get("output_tokens")
    ]
    tokens = sum(m["output_tokens"] for m in pairs)
    each = sum(m["joules_per_output_token"] * m["output_tokens"] for m in pairs) / tokens if tokens else None
    facts = [
        (
            amount(_sum(watts), "W", rough=rough),
            "now" if len(shown) == len(watts) else f"now, {len(shown)} of {len(watts)} devices",
        ),
        (amount(joules, "J", rough=rough), "since the start" + (f" ({watt_hours(joules):,.1f} Wh)" if joules else "")),
        (f"{100 * (given or 0) / measured:.1f} %" if measured else UNKNOWN, "to requests"),
        (_count(status.get("requests_open")), "open"),
        (amount(each, "J", rough=any(m.get("estimated") for m in pairs)), "per output token"),
    ]
    return _flow([Text.assemble((figure, "bold"), (f" {meaning}", "dim")) for figure, meaning in facts], width)


def _flow(items: Sequence[Text], width: int, between: str = "   ") -> Text:
    """Items one after another, on as many lines as they need; none is broken that fits on a line."""
    flow, used = Text(), 0
    for item in items:
        if used and used + len(between) + item.cell_len > width:
            flow.append("\n")
            used = 0
        if used:
            flow.append(between, style="dim")
            used += len(between)
        flow.append_text(item)
        used += item.cell_len
    return flow


def _table(title: str, *columns: str) -> Table:
    """A table whose first column gives way; ``>`` before a heading puts it to the right."""
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="", expand=True)
    for number, column in enumerate((title, *columns)):
        right = column.startswith(">")
        table.add_column(
            column.lstrip(">"),
            justify="right" if right else "left",
            no_wrap=True,
            overflow="ellipsis",
            ratio=1 if number == 0 else None,
            header_style="bold" if number == 0 else "dim",
        )
    return table


def _label(device: Row) -> Text:
    kind = _TYPES.get(device.get("type", ""), str(device.get("type") or ""))
    index, name = device.get("index"), device.get("name")
    text = Text(f"{kind} {index}" if index is not None else kind)
    text.append(f"  {name or ''}{'  ' if name else ''}")
    text.append(str(device.get("id") or "") if index is None else "", style="dim")
    return text


def _alike(devices: Sequence[Row]) -> list[Row]:
    """Devices of one name in one row; one that does not answer, or whose power is not known, keeps its own."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for device in devices:
        alone = device.get("up") is False or device.get("watts") is None
        own = device.get("id") if alone else None
        groups.setdefault((device.get("type"), device.get("name"), device.get("estimated"), own), []).append(device)
    rows: list[Row] = []
    for members in groups.values():
        ages = [device["sample_age_seconds"] for device in members if device.get("sample_age_seconds") is not None]
        summed = {what: _sum([device.get(what) for device in members]) for what in ("watts", "joules")}
        several = {
            "id": f"{len(members)} of them",
            "index": None,
            "sample_age_seconds": max(ages, default=None),
            **summed,
        }
        rows.append({**members[0], **several} if len(members) > 1 else members[0])
    return rows


def _devices(devices: Sequence[Row], width: int) -> RenderableType:
    if not devices:
        return Text("No energy meter works here, so joules are absent (below is why).", style="yellow")
    wide = width >= _MIDDLE
    table = _table("Devices", ">power", ">energy", *((">reading", "state") if wide else ()))
    for device in devices:
        rough = bool(device.get("estimated"))
        age = device.get("sample_age_seconds")
        if device.get("up") is False:
            state = Text("no answer", style="bold red")
        elif rough:
            state = Text("estimated", style="yellow")
        else:
            state = Text("measured", style="green") if age is not None else Text("no reading yet", style="dim")
        cells = [
            _label(device),
            amount(device.get("watts"), "W", rough=rough),
            amount(device.get("joules"), "J", rough=rough),
        ]
        if wide:
            cells += [f"{span(age)} ago" if age is not None else UNKNOWN, state]
        elif state.plain in ("no answer", "estimated"):
            cells[0] = Text.assemble(state, "  ", _label(device))
        table.add_row(*cells)
    return table


def _leaf(name: str) -> str:
    """Of a long path its last part: that is what tells two of them apart."""
    last = name.rstrip("/").rpartition("/")[2]
    return f"…/{last}" if len(name) > 44 and last and last != name else name


def _requests(status: Row, width: int, limit: int | None) -> RenderableType:
    listed, total = _rows(status, "requests"), status.get("requests_open")
    if not listed:
        return Text(
            "No request is open." if not total else f"{total:,} requests are open; their joules are not known yet."
        )
    middle, wide = width >= _NARROW, width >= _MIDDLE
    columns = [">age", ">energy"]
    columns += [">tokens"] if middle else []
    columns += [">per token", "quality"] if wide else []
    table = _table("Requests", *columns)
    shown = listed if limit is None else listed[: max(1, limit)]
    for request in shown:
        model, name, operation = request.get("model"), request.get("name"), request.get("operation")
        own = name if name and name != " ".join(part for part in (operation, model) if part) else None
        label = Text(own or (_leaf(model) if model else operation or "request"))
        about = [_leaf(model) if own and model and model != own else None, request.get("service")]
        label.append("".join(f"  {part}" for part in about if part), style="dim")
        rough, joules, tokens = (
            request.get("quality") == "estimated",
            request.get("joules"),
            request.get("output_tokens"),
        )
        cells: list[RenderableType] = [label, span(request.get("age_seconds")), amount(joules, "J", rough=rough)]
        if middle:
            cells.append(_count(tokens))
        if wide:
            quality = request.get("quality")
            each = joules / tokens if joules is not None and tokens else None
            cells += [
                amount(each, "J", rough=rough),
                Text(quality or UNKNOWN, style=_QUALITY.get(quality or "", "dim")),
            ]
        table.add_row(*cells)
    more = max(len(listed), total or 0) - len(shown)
    return Group(table, Text(f"… and {more:,} more", style="dim")) if more > 0 else table


def _models(models: Sequence[Row], width: int) -> RenderableType:
    middle = width >= _NARROW
    table = _table("Models", ">per token", ">energy", *((">requests", ">tokens") if middle else ()))
    for model in models:
        rough, name = bool(model.get("estimated")), model.get("model")
        cells = [
            Text(_leaf(name) if name else "model not known"),
            amount(model.get("joules_per_output_token"), "J", rough=rough),
            amount(model.get("joules"), "J", rough=rough),
        ]
        if middle:
            cells += [_count(model.get("requests")), _count(model.get("output_tokens"))]
        table.add_row(*cells)
    return table


def _books(books: Sequence[Row], devices: Sequence[Row], width: int) -> RenderableType:
    known = {device.get("id"): device for device in devices}
    size = next(size for start, size in _BAR.items() if width >= start)
    table = _table("Where every joule went", "", ">measured")
    used = [part for part in _PARTS if any((book.get(f"{part}_joules") or 0) > 0 for book in books)]
    for book in books:
        device = known.get(book.get("device"))
        label = _label(device) if device is not None else Text(str(book.get("device")))
        rough = bool(device and device.get("estimated"))
        table.add_row(label, _bar(book, used, size), amount(book.get("measured_joules"), "J", rough=rough))
    legend: list[Text] = []
    for part in used:
        name, style, block = _PARTS[part]
        total = _sum([book.get(f"{part}_joules") for book in books])
        legend.append(Text.assemble((block * 2, style), f" {name} {amount(total, 'J')}"))
    return Group(table, _flow(legend, width))


def _together(books: Sequence[Row], devices: Sequence[Row]) -> Row:
    """One book of all devices; meters of the whole machine contain the others and are left out."""
    whole = {device.get("id") for device in devices if device.get("type") == "host"}
    summed = [book for book in books if book.get("device") not in whole]
    parts = (f"{part}_joules" for part in ("measured", *_PARTS))
    return {"device": "all devices", **{part: _sum([book.get(part) for book in summed]) for part in parts}}


def _bar(book: Row, parts: Sequence[str], size: int) -> Text:
    """Blocks in proportion; the largest remainders get what rounding leaves, so that they fill the bar."""
    joules = {part: max(0.0, book.get(f"{part}_joules") or 0.0) for part in parts}
    total = sum(joules.values())
    bar = Text()
    if total <= 0:
        return bar
    exact = {part: size * value / total for part, value in joules.items()}
    blocks = {part: int(value) for part, value in exact.items()}
    left = size - sum(blocks.values())
    for part in sorted(exact, key=lambda part: blocks[part] - exact[part])[:left]:
        blocks[part] += 1
    for part, number in blocks.items():
        bar.append(_PARTS[part][2] * number, style=_PARTS[part][1])
    return bar


def _health(status: Row, width: int) -> RenderableType:
    health = _part(status, "health")
    sampler, hub = _part(health, "sampler"), _part(health, "hub")
    facts: list[tuple[str, str]] = []
    if sampler:
        failures = sampler.get("failures") or 0
        facts.append((f"{_count(sampler.get('rounds'))} readings", "dim"))
        facts.append((f"{failures:,} failed", "red" if failures else "dim"))
        if (up := status.get("uptime_seconds")) and sampler.get("cpu_seconds") is not None:
            facts.append((f"{100 * sampler['cpu_seconds'] / up:.2f} % of a core", "dim"))
    if health.get("spans_waiting") is not None:
        facts.append((f"{health['spans_waiting']:,} spans wait", "dim"))
    if hub:
        facts.append((f"{_count(hub.get('connections'))} clients", "dim"))
        if hub.get("refused_messages"):
            facts.append((f"{hub['refused_messages']:,} messages refused", "red"))
    if health.get("publisher") is False:
        facts.append(("another meter publishes this host", "dim"))
    told = [Text("Health", style="bold"), *(Text(text, style=style) for text, style in facts)]
    lines: list[RenderableType] = [_flow(told, width, "  ")]
    refusals: Sequence[Row] = health.get("refusals") or ()
    for refusal in refusals:
        lines.append(Text(f"{refusal.get('source')} is not used: {refusal.get('reason')}", style="yellow"))
        if refusal.get("fix"):
            lines.append(Text(f"  to repair: {refusal['fix']}"))
    return Group(*lines)
