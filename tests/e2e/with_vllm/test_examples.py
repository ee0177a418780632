"""The examples of vLLM run as they stand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.with_vllm.rig import NAME, Meters, VllmServer, environ
from tests.e2e.with_vllm.test_answers import ENVIRON

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

EXAMPLES = Path(__file__).parents[3] / "examples" / "vllm"


def test_answer_energy(vllm_server: Callable[..., VllmServer], capsys: pytest.CaptureFixture[str]) -> None:
    """A client prints what the answer promised and what it came to."""
    server = vllm_server(env=ENVIRON, agent=True)
    words = [sys.executable, str(EXAMPLES / "answer_energy.py"), server.url, NAME, server.page_url()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert "'final': False" in first
    assert "'joules':" in last
    assert "'final': True" in last
    with capsys.disabled():
        print(f"\n{done.stdout}", end="")


def test_batch(
    vllm_python: Path,
    checkpoint: Path,
    nvml_library: Path,
    hub_place: Any,
    receiver: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A script, whose engine is in processes of its own, ends with a table of its prompts and their joules."""
    meters = Meters(hub_place, 1, nvml_library)
    meters.go()
    env = environ(hub_place, meters, receiver, {})
    process = hub_place.start([str(vllm_python), str(EXAMPLES / "batch.py"), str(checkpoint)], env, "batch")
    assert process.wait(300) == 0, hub_place.said("batch")
    meters.close()
    said = hub_place.said("batch")
    assert said.count(": 40 tokens") == 3 or said.count(" tokens\n") == 3
    assert "shutdown can only be called once" not in said
    table = said[said.rindex(" tokens\n") :].splitlines()[1:]
    rows = [line for line in table if "tiny" in line]
    assert len(rows) == 3
    with capsys.disabled():
        print("\n" + "\n".join(table[:12]), end="")
