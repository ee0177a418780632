"""The accuracy that the design asks for, on simulated servers whose joules are known: the short form of ``bench/accuracy.py``."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def bench(bench_module: Callable[[str], ModuleType]) -> ModuleType:
    return bench_module("accuracy")


@pytest.mark.parametrize(
    "name",
    ["load 0.5", "load 2", "load 8", "cold start", "two engines", "moe known", "moe unknown", "intruder", "gauge 1 s"],
)
def test_every_target_is_met(bench: ModuleType, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """Errors by step and by slice, balance, time to the final figure, and quality where the method does not hold."""
    rows = bench.scenario_rows((name, 1, None))
    with capsys.disabled():
        print("\n" + bench.table([row for row in rows if row.method in ("step", "slice")]), end="")
    judged = [row for row in rows if (row.scenario, row.method) in bench.TARGETS]
    assert judged, "no row of this scenario has a target"
    assert [(row.scenario, row.method, row.missed) for row in rows if row.missed] == []


@pytest.mark.parametrize("name", ["load 2", "load 8", "two engines"])
def test_stated_uncertainty_is_true(bench: ModuleType, name: str) -> None:
    """At least 65 % of the requests lie within 1 sigma, 95 % within 2."""
    (row,) = [row for row in bench.scenario_rows((name, 1, None)) if row.method == "step"]
    assert row.within_1 >= 65.0
    assert row.within_2 >= 95.0
