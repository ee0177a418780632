"""The examples run as they stand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
NEEDS = {"fastapi_tenants": ("torch", "fastapi", "uvicorn", "httpx"), "hub_workers": ("torch", "gunicorn")}
"""What an example needs beside torch."""

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, need: Callable[..., None], hub_place: Any) -> None:
    """It ends well and prints joules."""
    need(*NEEDS.get(example.stem, ("torch",)))
    env = hub_place.environ(MELODI_SOURCES="estimate", MELODI_HUB="auto")
    del env["MELODI_SYSFS_ROOT"]
    done = subprocess.run(
        [sys.executable, str(example)], env=env, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    assert " J" in done.stdout
