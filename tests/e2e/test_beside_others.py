"""Beside Logfire, Traceloop and OpenLIT, set up before or after us: our spans go their way, with joules, once."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
PROGRAM = Path(__file__).with_name("beside_others.py")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("tool", ["logfire", "traceloop", "openlit"])
def test_spans_go_their_way(
    tool: str, when: str, peers_python: str, environment: Callable[..., dict[str, str]]
) -> None:
    """Each generate() is one span with joules below the application's; after uninstrument() there is none of ours."""
    env = environment(TRACELOOP_TELEMETRY="false", OTEL_METRICS_EXPORTER="none", TRACELOOP_METRICS_ENABLED="false")
    words = [peers_python, str(PROGRAM), tool, when]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    said = [line.removeprefix("span ") for line in done.stdout.splitlines() if line.startswith("span ")]
    rounds = ["first", "second"] if tool == "logfire" else ["first"]
    expected = ["unmetered False False", *(f"{name} False False" for name in rounds)]
    expected += ["text_completion True True" for _ in rounds]
    assert sorted(said) == sorted(expected)
