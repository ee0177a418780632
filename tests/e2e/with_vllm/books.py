"""What a server's spans and its hub's books say of the same requests, side by side with the counters."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from melodi_otel.testing.telemetry import plain
from tests.e2e.with_vllm.rig import PACKAGE, VllmServer, gpu

BUCKETS = ("idle", "tail", "loading", "foreign", "unsampled")
ATTRIBUTE = {"gpu": "melodi.energy.gpu", "cpu": "melodi.energy.cpu"}


@dataclass(slots=True)
class Told:
    """One span of a request: its attributes, and its place in the trace."""

    attributes: dict[str, Any]
    name: str
    trace: str
    parent: str
    scope: str = ""

    def of(self, name: str) -> Any:
        """An attribute, or None."""
        return self.attributes.get(name)


def told(server: VllmServer, number: int, seconds: float = 60.0) -> list[Told]:
    """The spans of this project's requests, once at least ``number`` have come."""
    spans = server.receiver.spans(number, seconds, lambda span: "melodi.energy.quality" in plain(span.attributes))
    return [Told(plain(span.attributes), span.name, span.trace_id.hex(), span.parent_span_id.hex()) for span in spans]


def check_balance(server: VllmServer, spans: list[Told], gpus: int = 1) -> dict[str, dict[str, float]]:
    """Stop the meters: on every device the requests' spans and the buckets sum to what its counter has counted, to 1e-9.

    Returns:
        Per device ``requests``, ``counter`` and every bucket (J).
    """
    counted = server.meters.still()

    def caught_up() -> Any:
        books = {book["device"]: book for book in json.loads(server.place.fetch("/status.json"))["books"]}
        read = all(books[name]["measured_joules"] == pytest.approx(j, abs=1e-6) for name, j in counted.items())
        return books if read and not any(book["in_flight_joules"] for book in books.values()) else None

    books = server.place.until("the hub has read all that was counted", caught_up)
    figures: dict[str, dict[str, float]] = {}
    for name, joules in counted.items():
        buckets = {bucket: books[name][f"{bucket}_joules"] for bucket in (*BUCKETS, "residual")}
        figures[name] = {"requests": books[name]["attributed_joules"], "counter": joules, **buckets}
        assert books[name]["attributed_joules"] + sum(buckets.values()) == pytest.approx(joules, rel=1e-9)
    in_spans = {kind: sum(span.of(attribute) or 0.0 for span in spans) for kind, attribute in ATTRIBUTE.items()}
    assert in_spans["cpu"] == pytest.approx(figures[PACKAGE]["requests"], rel=1e-9)
    on_gpus = sum(figures[gpu(number)]["requests"] for number in range(gpus))
    assert in_spans["gpu"] == pytest.approx(on_gpus, rel=1e-9)
    return figures
