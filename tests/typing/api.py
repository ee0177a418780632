"""The public names as a type checker sees them; read by pyright, never run."""

from __future__ import annotations

from typing import Any, assert_type

import melodi_otel
from melodi_otel.attribution.record import RequestRecord
from melodi_otel.attribution.summary import Energy
from melodi_otel.runtime import Runtime

assert_type(melodi_otel.instrument(config=melodi_otel.Config(), console=True), Runtime | None)
with melodi_otel.measure("block") as m:
    assert_type(m, melodi_otel.Measurement)
assert_type(m.joules, float | None)
assert_type(m.watt_hours, float | None)
assert_type(m.energy, Energy | None)
assert_type(m.wait(1.0), bool)
assert_type(melodi_otel.recent(3), melodi_otel.Results)
assert_type(melodi_otel.recent()[0], RequestRecord)
assert_type(melodi_otel.recent()[0].joules, float | None)
assert_type(melodi_otel.recent()[1:], melodi_otel.Results)
assert_type(melodi_otel.recent().to_dicts(), list[dict[str, Any]])


@melodi_otel.measure("function")
def tokens(text: str, limit: int = 3) -> list[str]:
    return text.split()[:limit]


assert_type(tokens("a b", limit=1), list[str])
tokens(3)  # pyright: ignore[reportArgumentType]
