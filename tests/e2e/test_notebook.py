"""The magic in a real IPython shell."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

SESSION = """
from IPython.core.interactiveshell import InteractiveShell
from melodi_otel.results import Results
shell = InteractiveShell.instance()
shell.run_line_magic("load_ext", "melodi_otel")
found = shell.run_cell_magic("joules", "tea", "total = sum(range(10_000_000))")
assert isinstance(found, Results), found
assert shell.user_ns["total"] == 49999995000000
html = found._repr_html_()
assert "<table" in html and "tea" in html
print(found)
"""


def test_joules_magic(need: Callable[..., None]) -> None:
    """``%load_ext melodi_otel`` and ``%%joules`` run a cell in the user's namespace and give a table with its joules."""
    need("IPython")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MELODI_", "OTEL_"))}
    env["MELODI_SOURCES"] = "estimate"
    done = subprocess.run(
        [sys.executable, "-c", SESSION], env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "estimated" in done.stdout
