"""A real H100 that served by continuous batching, recorded: the meter's division against that by the driver's power history."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def bench(bench_module: Callable[[str], ModuleType]) -> ModuleType:
    return bench_module("gpu_witness")


def test_requests_agree_with_a_witness(bench: ModuleType) -> None:
    """Within the design's 2 / 8 % (median / p95) of steps at each of three rates, and as sure as it says."""
    rows = [row for row in bench.rows(bench.load(bench.RECORDING)) if row.way == "step"]
    assert [row.rate for row in rows] == [0.5, 2.0, 6.0]
    for row in rows:
        assert row.median <= 2.0, row
        assert row.p95 <= 8.0, row
    number = sum(row.requests for row in rows)
    assert sum(row.within_1 * row.requests for row in rows) / number >= 65.0
    assert sum(row.within_2 * row.requests for row in rows) / number >= 95.0


def test_the_witness_knows_what_steps_cost(bench: ModuleType) -> None:
    """It explains nine tenths of what steps differ by, at a delay inside of what it tried: else it could not judge anybody."""
    _, delay_s, r_squared = bench.witness(bench.load(bench.RECORDING))
    assert r_squared > 0.9
    assert 0.0 < delay_s < 0.1
