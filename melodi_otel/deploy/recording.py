"""Recording rules: what dashboards and alerts ask for again and again, computed once.

Names follow ``level:metric:operation``; the window in a name is the one of production, also where :attr:`Settings.trial` makes it
shorter. Only the PromQL of Prometheus 2.42 is used, so that it runs everywhere.
"""

from __future__ import annotations

from typing import Any, Final

from melodi_otel.deploy import promql as q
from melodi_otel.deploy.settings import Settings

HOUR: Final = 3600.0
DAY: Final = 86_400.0

POWER: Final = "host_hw:hw_energy_joules:rate5m"
MODEL_POWER: Final = "model:melodi_energy_attributed_joules:rate5m"
MODEL_TOKENS: Final = "model:gen_ai_output_tokens:rate5m"
PER_KTOK: Final = "model:melodi_energy_joules_per_ktok:rate5m"
PER_KTOK_HOUR: Final = "model:melodi_energy_joules_per_ktok:rate1h"
MODEL_BUDGET: Final = "model:melodi_energy_budget_joules_per_ktok:max"
P50: Final = "model:melodi_request_energy_joules:p50_5m"
P95: Final = "model:melodi_request_energy_joules:p95_5m"
SHOWBACK: Final = "showback:melodi_energy_attributed_joules:increase1d"
SHOWBACK_IDLE: Final = "showback:melodi_energy_unattributed_joules:increase1d"
SHOWBACK_METER: Final = "showback:hw_energy_joules:increase1d"
WINDOWS: Final = {"5m": 300.0, "30m": 1800.0, "1h": HOUR, "2h": 2 * HOUR, "6h": 6 * HOUR, "1d": DAY, "3d": 3 * DAY}
"""Windows of the shares of requests over budget, by their names."""

Rule = dict[str, Any]


def over_budget(window: str) -> str:
    """Name of the share of requests over budget in this window."""
    return f"model:melodi_requests_over_budget:ratio_rate{window}"


def power(settings: Settings) -> str:
    """W of every device from its counter, once however many publish it."""
    return q.once(f"rate({q.HW_ENERGY}[{settings.span(settings.short_s)}])", q.HW_TYPE, q.HW_NAME)


def budget(settings: Settings) -> str:
    """Each model's budget: its own, else the one of all models."""
    own = f'max {q.by(q.CLUSTER, q.MODEL)} ({q.BUDGET}{{{q.MODEL}!=""}})'
    common = f'max {q.by(q.CLUSTER)} ({q.BUDGET}{{{q.MODEL}=""}})'
    models = f"sum {q.by(q.CLUSTER, q.MODEL)} ({q.TOKENS})"
    return f"{own} or ({models} * 0 + on ({q.CLUSTER}) group_left () {common})"


def quantile(share: float, settings: Settings) -> str:
    """A quantile of the joules of requests, by model."""
    rate = f"rate({q.REQUEST_ENERGY}[{settings.span(settings.short_s)}])"
    return f"histogram_quantile({share}, sum {q.by('le', q.CLUSTER, q.MODEL)} ({rate}))"


def groups(settings: Settings) -> list[dict[str, Any]]:
    """The groups of a rule file."""
    short, day = settings.span(settings.short_s), settings.span(DAY)
    every = settings.span(max(30.0, settings.scrape_interval_s * settings.trial))
    unattributed = q.once(f"increase({q.UNATTRIBUTED}[{day}])", q.HW_TYPE, q.BUCKET, q.HOLDER_SERVICE, q.HOLDER_MODEL)
    device = (*q.SCRAPED, q.HW_ID, q.HW_TYPE, q.PHASE)
    return [
        {
            "name": "melodi_otel.rules",
            "interval": every,
            "rules": [
                _rule(POWER, power(settings)),
                _rule(MODEL_POWER, f"sum {q.by(q.CLUSTER, q.MODEL)} (rate({q.ATTRIBUTED}[{short}]))"),
                _rule(
                    MODEL_TOKENS,
                    f'sum {q.by(q.CLUSTER, q.MODEL)} (rate({q.TOKENS}{{{q.TOKEN_TYPE}="output"}}[{short}]))',
                ),
                _rule(PER_KTOK, q.per_ktok(short, q.CLUSTER, q.MODEL)),
                _rule(PER_KTOK_HOUR, q.per_ktok(settings.span(HOUR), q.CLUSTER, q.MODEL)),
                _rule(MODEL_BUDGET, budget(settings)),
                _rule(P50, quantile(0.5, settings)),
                _rule(P95, quantile(0.95, settings)),
            ],
        },
        {
            "name": "melodi_otel.slo.rules",
            "interval": every,
            "rules": [
                _rule(
                    over_budget(name),
                    q.share_over_budget(settings.span(max(seconds, settings.short_s)), q.CLUSTER, q.MODEL),
                )
                for name, seconds in WINDOWS.items()
            ],
        },
        {
            "name": "melodi_otel.showback.rules",
            "interval": settings.span(300.0),
            "rules": [
                _rule(SHOWBACK, f"sum {q.without(*device)} (increase({q.ATTRIBUTED}[{day}]))"),
                _rule(
                    SHOWBACK_IDLE,
                    f"sum {q.by(q.CLUSTER, q.BUCKET, q.HOLDER_SERVICE, q.HOLDER_MODEL)} ({unattributed})",
                ),
                _rule(SHOWBACK_METER, f"sum {q.by(q.CLUSTER)} ({q.once(f'increase({q.HW_ENERGY}[{day}])')})"),
            ],
        },
    ]


def _rule(record: str, expression: str) -> Rule:
    return {"record": record, "expr": expression}
