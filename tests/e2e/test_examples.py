"""The examples run as they stand."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]
EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.py"))


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_example(example: Path, need: Callable[..., None]) -> None:
    """It ends well and prints joules."""
    need("torch", "fastapi")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MELODI_", "OTEL_"))}
    env |= {"MELODI_SOURCES": "estimate", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(example)], env=env, capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "J" in done.stdout
