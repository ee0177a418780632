"""Programs of Prometheus that read what is deployed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"


def program(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run promtool or amtool; where it is missing CI fails and others skip."""
    if shutil.which(name) is None:
        reason = f"{name} is not installed; on Debian: apt-get install prometheus prometheus-alertmanager"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return subprocess.run(
        [name, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False, cwd=DEPLOY
    )
