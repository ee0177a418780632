"""Collector and store of traces: whole, as far as that can be seen without running them."""

from __future__ import annotations

from typing import Any

import pytest

from melodi_otel import semconv
from melodi_otel.deploy import stack
from melodi_otel.deploy.settings import Settings, chosen


@pytest.mark.parametrize("made", [stack.collector(Settings()), stack.balancer()], ids=["collector", "balancer"])
def test_pipelines_and_components_are_the_same(made: Any) -> None:
    """Everything that a pipeline names is there, and nothing is there that no pipeline names."""
    for kind in ("receivers", "processors", "exporters"):
        named = {name for pipeline in made["service"]["pipelines"].values() for name in pipeline[kind]}
        assert named == set(made[kind])
    assert set(made["service"].get("extensions", ())) == set(made.get("extensions", ()))


def test_memory_is_limited_first_and_batches_come_last() -> None:
    for pipeline in stack.collector(Settings())["service"]["pipelines"].values():
        assert pipeline["processors"][0] == "memory_limiter"
        assert pipeline["processors"][-1] == "batch"


def test_expensive_requests_are_kept() -> None:
    """By the attribute that is on spans, above the figure that was chosen."""
    made = stack.collector(chosen(["keep_above_j=20", "keep_percent=1"]))
    expensive, _, others = made["processors"]["tail_sampling"]["policies"]
    assert expensive["ottl_condition"]["span"] == [
        f'attributes["{semconv.TOTAL}"] != nil and attributes["{semconv.TOTAL}"] > 20.0'
    ]
    assert others["probabilistic"] == {"sampling_percentage": 1.0}


def test_a_trace_is_older_than_the_longest_wait_of_a_span() -> None:
    """Else it would be decided upon before its joules are there."""
    sampling = stack.collector(Settings())["processors"]["tail_sampling"]
    assert int(sampling["decision_wait"].removesuffix("s")) > 2 * 10
