from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import melodi_otel
from melodi_otel.config import BUILT_IN_SOURCES, VARIABLES
from melodi_otel.sources.discovery import UNCONFIRMED

ROOT = Path(melodi_otel.__file__).parent.parent
PAGES = sorted([*ROOT.glob("docs/*.md"), ROOT / "README.md"])


def test_tables_are_current(capsys):
    """The tables of settings, attributes and metrics say what the code says."""
    spec = importlib.util.spec_from_file_location("docs_tables", ROOT / "scripts" / "docs_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.main(check=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_named_in_the_docs_exist(page):
    """Every MELODI_* name on a page is a variable."""
    named = set(re.findall(r"MELODI_[A-Z_]*[A-Z]", page.read_text(encoding="utf-8")))
    assert named <= set(VARIABLES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    """A relative link names a file that is there."""
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_meter_has_its_row():
    """The page of meters tells of each built-in source, and which of them are unconfirmed."""
    rows = (ROOT / "docs/meters.md").read_text(encoding="utf-8").splitlines()
    for name in BUILT_IN_SOURCES:
        row = next(line for line in rows if line.startswith(f"| `{name}`"))
        assert ("unconfirmed" in row) == (name in UNCONFIRMED), name


def test_every_page_is_in_the_navigation():
    """mkdocs.yml lists each page of docs/."""
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in ROOT.glob("docs/*.md") if page.name not in navigation] == []
