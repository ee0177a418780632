"""Faults of hardware and environment, seen by a whole machine on a manual clock."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def sysfs(tmp_path: Path) -> Path:
    """Where a fake ``/sys`` may be built."""
    return tmp_path / "sys"
