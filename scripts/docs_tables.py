"""Write the tables of the docs from the data of the code: settings, span attributes, metrics.

python scripts/docs_tables.py          writes docs/configuration.md and docs/metrics.md
python scripts/docs_tables.py --check  says whether they are current (exit code 1: they are not)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path

from melodi_otel.config import VARIABLES, Config
from melodi_otel.semconv import REQUEST_ATTRIBUTES, RESOURCE_ATTRIBUTES, SPAN_ATTRIBUTES
from melodi_otel.semconv_metrics import METRICS

DOCS = Path(__file__).parent.parent / "docs"


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def table(headings: Iterable[str], rows: Iterable[str]) -> str:
    headings = list(headings)
    return "\n".join([row(*headings), row(*["---"] * len(headings)), *rows])


def default(field: str) -> str:
    value = getattr(Config(), field)
    if value in (None, "", ()):
        return "–"
    return {True: "`1`", False: "`0`"}.get(value, f"`{value}`") if isinstance(value, bool) else f"`{value}`"


def settings() -> str:
    rows = (row(f"`{n}`", v.help, v.allowed, default(v.field)) for n, v in VARIABLES.items())
    return table(("variable", "meaning", "allowed", "default"), rows)


def attributes(listed: Iterable[object]) -> str:
    rows = []
    for a in listed:
        values = "; one of " + ", ".join(f"`{value}`" for value in a.values) if a.values else ""
        rows.append(row(f"`{a.name}`", a.type, a.unit or "–", f"{a.brief.rstrip('.')}{values}"))
    return table(("attribute", "type", "unit", "meaning"), rows)


def metrics() -> str:
    rows = (
        row(
            f"`{m.name}`", m.kind, f"`{m.unit}`", m.description, ", ".join(f"`{a}`" for a in (*m.required, *m.optional))
        )
        for m in METRICS.values()
    )
    return table(("metric", "kind", "unit", "meaning", "attributes"), rows)


TABLES = {
    "configuration.md": {"settings": settings},
    "metrics.md": {
        "span attributes": lambda: attributes(SPAN_ATTRIBUTES),
        "request attributes": lambda: attributes(REQUEST_ATTRIBUTES),
        "resource attributes": lambda: attributes(RESOURCE_ATTRIBUTES),
        "metrics": metrics,
    },
}


def filled(text: str, tables: dict) -> str:
    for name, make in tables.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        assert pattern.search(text), f"marker {begin} is missing"
        block = f"{begin}\n\n{make()}\n\n{end}"
        text = pattern.sub(lambda _, block=block: block, text)
    return text


def main(check: bool) -> int:
    stale = 0
    for file, tables in TABLES.items():
        path = DOCS / file
        text = path.read_text(encoding="utf-8")
        new = filled(text, tables)
        if new != text:
            stale += 1
            print(f"{path.name}: {'is not current; run python scripts/docs_tables.py' if check else 'written'}")
            if not check:
                path.write_text(new, encoding="utf-8")
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(1 if main("--check" in sys.argv) else 0)
