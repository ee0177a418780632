"""What every test gets: nothing of ours survives it, no test hears of the outer environment, rooms keep their budget."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest

BUDGET_MINUTES = {
    "core": 2.0,
    "sources": 2.0,
    "timeline": 1.5,
    "identity": 0.5,
    "attribution": 3.0,
    "hub": 4.0,
    "trace": 2.0,
    "dataset": 1.0,
    "deploy": 1.0,
    "results": 1.0,
    "cli": 2.0,
    "telemetry": 4.0,
    "instrumentation": 8.0,
    "typing": 1.0,
    "testing": 1.0,
    "faults": 3.0,
    "e2e": 14.0,
    "with_vllm": 12.0,
}
"""Minutes per room on two cores; they sum to less than the 63 that all tests may take.

A room is the innermost folder that has a budget of its own.
"""

TESTS = Path(__file__).parent
THREADS = ("melodi", "demo-")
_spent: defaultdict[str, float] = defaultdict(float)
_slowest: dict[str, float] = {}


@pytest.fixture(scope="session")
def _no_hubs():
    """A runtime directory in which nobody's hub is; its path is short, as a socket's has to be."""
    with tempfile.TemporaryDirectory(prefix="melodi-", dir="/tmp" if os.name == "posix" else None) as found:
        yield found


@pytest.fixture(autouse=True)
def _no_outer_configuration(monkeypatch, _no_hubs):
    """Variables of whoever runs the tests do not reach them, nor do hubs of this user."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", _no_hubs)
    for name in list(os.environ):
        if name.startswith(("MELODI_", "OTEL_")):
            monkeypatch.delenv(name)
    # A hub that a test has not asked for would outlive it.
    monkeypatch.setenv("MELODI_HUB", "local")


@pytest.fixture(autouse=True)
def _nothing_left_behind(_no_outer_configuration):
    """No thread, patch, current activity, tracer or meter provider of ours survives a test."""
    before = _ours()
    yield
    deadline = time.monotonic() + 5
    while _threads() - before["threads"] and time.monotonic() < deadline:
        for thread in _threads() - before["threads"]:
            thread.join(0.1)
    after = _ours()
    left = _threads() - before.pop("threads")
    after.pop("threads")
    assert not left, f"threads left behind: {sorted(thread.name for thread in left)}"
    changed = [name for name, value in before.items() if after.get(name, value) is not value]
    assert not changed, f"left behind: {changed}"


def _threads():
    return {thread for thread in threading.enumerate() if thread.name.startswith(THREADS)}


def _publishes():
    """Whether this process holds the name of the host's publisher: whoever keeps it takes `hw.*` from every later program."""
    try:
        lines = Path("/proc/net/unix").read_text(encoding="ascii").splitlines()
        held = {f"socket:[{line.split()[6]}]" for line in lines if line.endswith("@melodi-otel/publisher")}
        return bool(held) and any(_link(entry) in held for entry in Path("/proc/self/fd").iterdir())
    except OSError:
        return False


def _link(entry):
    try:
        return str(entry.readlink())
    except OSError:
        return ""


def _ours():
    """Everything of ours that could stay, as far as its module is loaded."""
    state = {"threads": _threads(), "the publisher's name": _publishes()}
    meter = sys.modules.get("melodi_otel.attribution.meter")
    if meter is not None:
        state["current activity"] = meter.current.get()
    for module, names in {
        "transformers.generation.utils": ("GenerationMixin.generate",),
        "starlette.routing": ("Router.__call__",),
        "transformers.generation.continuous_batching.continuous_api": (
            "ContinuousBatchingManager.add_request",
            "ContinuousBatchProcessor.update_batch",
            "RequestState.__init__",
        ),
        "opentelemetry.trace": ("_TRACER_PROVIDER", "_set_tracer_provider"),
        "opentelemetry.metrics._internal": ("_METER_PROVIDER",),
        "opentelemetry.sdk.trace": ("TracerProvider.add_span_processor", "TracerProvider.__init__"),
    }.items():
        loaded = sys.modules.get(module)
        for name in names if loaded is not None else ():
            value = loaded
            for part in name.split("."):
                value = getattr(value, "__dict__", {}).get(part)
            state[f"{module}.{name}"] = value
    return state


def pytest_runtest_logreport(report):
    """Add up what each room costs, set-up and tear-down included."""
    parts = Path(report.nodeid.split("::")[0]).parts
    folders = parts[1:-1] if parts[0] == "tests" else ()
    room = next(
        (folder for folder in reversed(folders) if folder in BUDGET_MINUTES), folders[0] if folders else "(other)"
    )
    _spent[room] += report.duration
    _slowest[report.nodeid] = _slowest.get(report.nodeid, 0.0) + report.duration


def pytest_terminal_summary(terminalreporter, config):
    """Print minutes per room against its budget, the total, and the slowest twenty."""
    if sum(_spent.values()) < 5.0:
        return
    terminalreporter.section("minutes per room")
    for room, spent in sorted(_spent.items(), key=lambda item: -item[1]):
        budget = BUDGET_MINUTES.get(room)
        over = "  OVER BUDGET" if budget is not None and spent / 60 > budget else ""
        of = "" if budget is None else f" of {budget:g}"
        terminalreporter.write_line(f"{room:16} {spent / 60:6.2f}{of}{over}")
    terminalreporter.write_line(f"{'total':16} {sum(_spent.values()) / 60:6.2f} of {sum(BUDGET_MINUTES.values()):g}")
    terminalreporter.section("slowest 20 tests")
    for nodeid, spent in sorted(_slowest.items(), key=lambda item: -item[1])[:20]:
        terminalreporter.write_line(f"{spent:7.2f} s  {nodeid}")
