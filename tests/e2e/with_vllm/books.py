"""What a server's spans and its hub's books say of the same requests, side by side with the counters."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from melodi_otel.testing.telemetry import plain
from tests.e2e.with_vllm.rig import NAME, PACKAGE, VllmServer, gpu

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

    def ours(span: Any) -> bool:
        return span.name != "llm_request" and "melodi.energy.quality" in plain(span.attributes)

    spans = server.receiver.spans(number, seconds, ours)
    return [Told(plain(span.attributes), span.name, span.trace_id.hex(), span.parent_span_id.hex()) for span in spans]


@dataclass(slots=True)
class Mark:
    """What the counters showed when they stood still, and what the hub had measured by then (J, by device)."""

    counted: dict[str, float]
    measured: dict[str, float]


def mark(server: VllmServer) -> Mark:
    """Let the meters stand still until the hub has read that, then go on: from here on nothing escapes it."""
    counted = server.meters.still()
    before: list[dict[str, float]] = []

    def same() -> bool:
        time.sleep(1.5)  # a resting hub reads once a second
        now = {book["device"]: book["measured_joules"] for book in _books(server)}
        stands = bool(before) and before[-1] == now and now.keys() >= counted.keys()
        before.append(now)
        return stands

    server.place.until("the hub has read meters that stand still", same)
    server.meters.go()

    def found_again() -> bool:
        # No real GPU stands still: it takes the hub a moment to find the phase of its counter again.
        now = {book["device"]: book["measured_joules"] for book in _books(server)}
        return all(now[name] - before[-1][name] > 100.0 for name in counted)

    server.place.until("the hub follows the meters again", found_again)
    return Mark(counted, before[-1])


def check_balance(server: VllmServer, spans: list[Told], since: Mark, gpus: int = 1) -> dict[str, dict[str, float]]:
    """Stop the meters: the requests' spans and the buckets sum to what each device's counter has counted, to 1e-9.

    Returns:
        Per device ``requests``, ``counter`` since the mark, and every bucket (J); ``after their end`` is what an engine computed
        for requests whose client had left, which is nobody's.
    """
    counted = {name: joules - since.counted[name] for name, joules in server.meters.still().items()}

    def caught_up() -> Any:
        books = {book["device"]: book for book in _books(server)}
        now = {name: books[name]["measured_joules"] - since.measured[name] for name in counted}
        read = all(now[name] == pytest.approx(joules, abs=1e-6) for name, joules in counted.items())
        return books if read and not any(book["in_flight_joules"] for book in books.values()) else None

    books = server.place.until("the hub has read all that was counted", caught_up)
    figures: dict[str, dict[str, float]] = {}
    for name, joules in counted.items():
        buckets = {bucket: books[name][f"{bucket}_joules"] for bucket in (*BUCKETS, "residual")}
        mine = _attributed(server, name)
        rest = books[name]["attributed_joules"] - mine
        figures[name] = {"requests": mine, "after their end": rest, "counter": joules, **buckets}
        everything = books[name]["attributed_joules"] + sum(buckets.values())
        assert everything == pytest.approx(since.measured[name] + joules, rel=1e-9)
    without = [
        (span.of("melodi.energy.quality"), span.of("melodi.energy.reason"))
        for span in spans
        if span.of("melodi.energy.total") is None
    ]
    assert not without, without
    in_spans = {kind: sum(span.of(attribute) or 0.0 for span in spans) for kind, attribute in ATTRIBUTE.items()}
    assert in_spans["cpu"] == pytest.approx(figures[PACKAGE]["requests"], rel=1e-9)
    on_gpus = sum(figures[gpu(number)]["requests"] for number in range(gpus))
    assert in_spans["gpu"] == pytest.approx(on_gpus, rel=1e-9)
    return figures


def _attributed(server: VllmServer, device: str) -> float:
    """J of a device that are requests' of the server's model, as the hub's page has them."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(server.page())
        for sample in family.samples
        if sample.name == "melodi_energy_attributed_joules_total"
        and sample.labels["hw_id"] == device
        and sample.labels.get("gen_ai_request_model") == NAME
    )


def _books(server: VllmServer) -> list[dict[str, Any]]:
    return json.loads(server.page("/status.json"))["books"]
