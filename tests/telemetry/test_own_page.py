"""Single requests on the page that a server has already, and nothing else, and nowhere twice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from opentelemetry.sdk.resources import Resource
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from melodi_otel.attribution.books import Books, Snapshot
from melodi_otel.telemetry.metrics import Views
from melodi_otel.telemetry.own_page import OwnPage
from melodi_otel.telemetry.providers import ScrapePipeline

RESOURCE = Resource({"host.id": "h1"})


@pytest.fixture
def views(kit: Any) -> Views:
    books = Books("GPU-1", measured=100.0, attributed=50.0, in_flight=10.0, idle=38.0, residual=2.0)
    return Views(lambda: Snapshot(0, {"GPU-1": books}, {}, {}, {}), lambda: kit.devices)


@pytest.fixture
def page(views: Views) -> Iterator[OwnPage]:
    made = OwnPage(views, RESOURCE)
    yield made
    made.close()


@pytest.fixture
def registry() -> CollectorRegistry:
    made = CollectorRegistry(auto_describe=True)
    Counter("vllm:n", "N.", registry=made).inc(3)
    return made


def names(registry: CollectorRegistry) -> set[str]:
    return {family.name for family in registry.collect()}


def test_requests_are_shown(page: OwnPage, registry: CollectorRegistry, kit: Any) -> None:
    """Joules, tokens and times of a finished request stand beside the server's own families."""
    page.show_on(registry)
    page.finished(kit.record())
    assert names(registry) == {
        "vllm:n",
        "melodi_request_energy_joules",
        "gen_ai_client_token_usage",
        "gen_ai_client_operation_duration_seconds",
        "gen_ai_server_time_to_first_token_seconds",
        "gen_ai_server_time_per_output_token_seconds",
    }
    assert b'melodi_request_energy_joules_sum{gen_ai_operation_name="chat"' in generate_latest(registry)


def test_nothing_before_there_is_a_page(page: OwnPage, registry: CollectorRegistry, kit: Any) -> None:
    """A request that finished before the page was there is not on it: another one has shown it."""
    assert not page.on
    page.finished(kit.record())
    page.show_on(registry)
    assert page.on
    assert names(registry) == {"vllm:n"}


def test_once(page: OwnPage, registry: CollectorRegistry, kit: Any) -> None:
    """A second page of the same program shows nothing: no series is in two places."""
    assert page.show_on(registry) is True
    second = CollectorRegistry()
    assert page.show_on(second) is False
    page.finished(kit.record())
    assert names(second) == set()


def test_families_that_are_there_already(page: OwnPage, registry: CollectorRegistry) -> None:
    """Where the server has a family of such a name, nothing is shown and nothing of it is touched."""
    Histogram("gen_ai_client_token_usage", "Theirs.", registry=registry)
    with pytest.raises(ValueError, match="Duplicated"):
        page.show_on(registry)
    assert not page.on


def test_everything_is_taken_back(page: OwnPage, registry: CollectorRegistry, kit: Any) -> None:
    """After the end the page is as it was, also where the program has cleared it itself."""
    page.show_on(registry)
    page.finished(kit.record())
    page.close()
    assert names(registry) == {"vllm:n"}
    page.close()


def test_our_page_leaves_out_what_a_program_shows(views: Views, kit: Any) -> None:
    """A request that its program shows itself is counted on our page, and its histograms are not there."""
    ours = ScrapePipeline(replace(views, page=True), RESOURCE)
    ours.instruments.finished(kit.record(rendered=True))
    assert "melodi_request_energy_joules" not in names(ours.registry)
    assert "melodi_requests" in names(ours.registry)
    ours.instruments.finished(kit.record(rendered=False))
    assert "melodi_request_energy_joules" in names(ours.registry)
    ours.close()
