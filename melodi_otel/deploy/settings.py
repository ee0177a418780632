"""What can be chosen about the deployed files, with defaults that fit a server in production."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Final

from melodi_otel.errors import ConfigError

RUNBOOKS: Final = "runbooks"


@dataclass(frozen=True, slots=True)
class Settings:
    """Choices of one deployment.

    Attributes:
        job: regular expression of the scrape jobs that read melodi_otel's endpoints.
        scrape_interval_s: seconds between two scrapes; rates are taken over at least four of them.
        runbooks: where the pages of the alerts are: a folder of the files (NAME.md), or the address of a site (NAME/).
        slo_over_budget: part of the requests that may use more than their budget before it is told; budgets themselves are
            MELODI_ENERGY_BUDGET of the meters, and without them these alerts say nothing.
        regression: J per 1,000 tokens against the same hour a week before, as a factor, above which it is told.
        idle_kwh: kWh per day that an idle model may hold a device for before it is told.
        idle_part: part of what a holder's devices used that has to be idle for that.
        balance: part of the measured joules by which the books may be off.
        sample_age_s: seconds without a sample of a device after which its sensor is stale.
        sampler_s: seconds that 99 of 100 rounds of readings may take.
        unresolved: part of the spans that may end without joules.
        keep_above_j: J of a request from which the collector keeps its trace, whatever else it drops.
        keep_percent: percent of the other traces that the collector keeps.
        trial: times shorter than in production are all windows and waits, to try the alerts out: 120 makes an hour 30 s.
    """

    job: str = ".*melodi.*"
    scrape_interval_s: float = 15.0
    runbooks: str = RUNBOOKS
    slo_over_budget: float = 0.05
    regression: float = 1.25
    idle_kwh: float = 1.0
    idle_part: float = 0.8
    balance: float = 0.02
    sample_age_s: float = 300.0
    sampler_s: float = 0.5
    unresolved: float = 0.05
    keep_above_j: float = 500.0
    keep_percent: float = 5.0
    trial: float = 1.0

    def span(self, seconds: float) -> str:
        """A duration for Prometheus, shorter by :attr:`trial`: ``1h``, ``2d``, ``30s``, ``500ms``."""
        ms = round(1e3 * seconds / self.trial)
        for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000)):
            if ms >= size and ms % size == 0:
                return f"{ms // size}{unit}"
        return f"{max(1, ms)}ms"

    def page(self, alert: str) -> str:
        """Where the page of an alert is."""
        base = self.runbooks.rstrip("/")
        return f"{base}/{alert}/" if base.startswith(("http://", "https://")) else f"{base}/{alert}.md"

    @property
    def short_s(self) -> float:
        """The window of what is looked at now: five minutes, or four scrapes where that is more."""
        return max(300.0, 4.0 * self.scrape_interval_s * self.trial)


_RANGES: Final = {
    "scrape_interval_s": (0.1, 3600.0),
    "slo_over_budget": (1e-6, 1.0),
    "regression": (1.0, 1e3),
    "idle_kwh": (0.0, 1e9),
    "idle_part": (0.0, 1.0),
    "balance": (1e-9, 1.0),
    "sample_age_s": (1.0, 1e9),
    "sampler_s": (1e-6, 1e3),
    "unresolved": (0.0, 1.0),
    "keep_above_j": (0.0, 1e9),
    "keep_percent": (0.0, 100.0),
    "trial": (1.0, 1e6),
}


def chosen(pairs: Iterable[str], base: Settings | None = None) -> Settings:
    """Settings out of ``NAME=VALUE`` texts.

    Raises:
        ConfigError: a name is unknown, or a value cannot be used; the message names both and what is allowed.
    """
    known = {field.name: field.type for field in fields(Settings)}
    found: dict[str, str | float] = {}
    for pair in pairs:
        name, equals, raw = pair.partition("=")
        if not equals or name not in known:
            raise ConfigError(f"--set {pair}: allowed is NAME=VALUE with one of {', '.join(known)}")
        if name not in _RANGES:
            found[name] = raw
            continue
        low, high = _RANGES[name]
        try:
            value = float(raw)
        except ValueError:
            value = float("nan")
        if not low <= value <= high:
            raise ConfigError(f"--set {pair}: allowed is a number from {low:g} to {high:g}")
        found[name] = value
    return replace(base or Settings(), **found)  # type: ignore[arg-type]
