"""All dashboards."""

from __future__ import annotations

from melodi_otel.deploy.books_dashboards import health, showback
from melodi_otel.deploy.fleet_dashboards import hosts, models, overview
from melodi_otel.deploy.panels import Dashboard
from melodi_otel.deploy.settings import Settings


def dashboards(settings: Settings) -> dict[str, Dashboard]:
    """All of them, by the name of their file."""
    return {
        made.uid.removeprefix("melodi-otel-"): made
        for made in (overview(), models(settings.slo_over_budget), hosts(), showback(), health())
    }
