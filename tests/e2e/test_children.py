"""Children of a metered program: metered too, exported once, no fight about ports, nothing counted twice."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from melodi_otel.testing.telemetry import OtlpReceiver, plain

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
PROGRAM = Path(__file__).with_name("children.py")
KINDS = ["spawn", "subprocess", *(["fork", "forkserver", "os.fork"] if hasattr(os, "fork") else [])]
STARTED = ["spawn", "subprocess", "forkserver"]
Run = Callable[[list[str], dict[str, str]], subprocess.CompletedProcess[str]]
RUN = [sys.executable, "-m", "melodi_otel.cli.app", "run"]


def tokens_of(receiver: OtlpReceiver, number: int) -> list[int]:
    found = [plain(span.attributes) for span in receiver.spans(number)]
    assert all("melodi.energy.quality" in attributes for attributes in found)
    assert all(a["melodi.energy.total"] > 0 for a in found if a["gen_ai.usage.output_tokens"] != 16)
    return sorted(attributes["gen_ai.usage.output_tokens"] for attributes in found)


@pytest.mark.parametrize(
    ("how", "kind"), [*(("opentelemetry-instrument", kind) for kind in KINDS), ("melodi-otel run", KINDS[-1])]
)
def test_every_request_is_one_span(
    kind: str,
    how: str,
    need: Callable[..., None],
    receiver: OtlpReceiver,
    environment: Callable[..., dict[str, str]],
    zero_code: list[str],
    run: Run,
    free_port: Callable[[], int],
) -> None:
    """Requests of parent and child are one span each, with joules; the page is the parent's, and the child warns of nothing."""
    need("torch", "transformers")
    words = zero_code if how.startswith("open") else [*RUN, "--"]
    env = environment(receiver, MELODI_CONSOLE="0", MELODI_METRICS_ADDR=f"127.0.0.1:{free_port()}")
    done = run([*words, sys.executable, str(PROGRAM), kind], env)
    # Old versions of the tool leave the programs that a program starts alone: nobody instruments those children.
    alone = how.startswith("open") and kind in STARTED and not inherited(run, zero_code, env)
    expected = [8, 24] if alone else [8, 16, 24]
    assert tokens_of(receiver, len(expected)) == expected
    assert "page 2.0" in done.stdout
    assert "cannot be served" not in done.stderr


def inherited(run: Run, zero_code: list[str], env: dict[str, str]) -> bool:
    """Whether what is started by a program under ``opentelemetry-instrument`` is under it too."""
    code = (
        "import os; print(any('auto_instrumentation' in path for path in os.environ['PYTHONPATH'].split(os.pathsep)))"
    )
    return "True" in run([*zero_code, sys.executable, "-c", code], env).stdout


def test_where_opentelemetry_gives_up_the_meter_does_not(
    need: Callable[..., None], environment: Callable[..., dict[str, str]], zero_code: list[str], receiver: OtlpReceiver
) -> None:
    """OpenTelemetry's own set-up fails in this program; with ``melodi-otel run`` behind it, its request is metered."""
    need("torch", "transformers")
    env = environment(receiver, OTEL_METRICS_EXPORTER="no_such_exporter", MELODI_CONSOLE="0")
    words = [*zero_code, *RUN, "--", sys.executable, str(PROGRAM), "child"]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "Failed to auto initialize" in done.stderr
    (span,) = receiver.spans(1)
    assert plain(span.attributes)["melodi.energy.total"] > 0
