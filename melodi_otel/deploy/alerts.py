"""Alert rules. Energy is never a reason to wake anybody: each of them opens a ticket (``severity``: warning or info).

The multi-window, multi-burn-rate alerts follow the Site Reliability Workbook (Google, 2018, chapter 5): a long window says that
it matters, a short one that it still lasts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from melodi_otel.deploy import promql as q
from melodi_otel.deploy import recording as r
from melodi_otel.deploy.settings import Settings

BURNS: Final = (("1h", "5m", 14.4), ("6h", "30m", 6.0), ("1d", "2h", 3.0), ("3d", "6h", 1.0))
"""(long window, short window, times the allowed share): the pairs of the workbook."""
_KWH_J: Final = 3.6e6


@dataclass(frozen=True, slots=True)
class Alert:
    """One alert rule.

    Attributes:
        name: in CamelCase, with the product before it.
        expression: true where it fires.
        wait_s: how long it has to be true, in production.
        severity: ``warning``: somebody should look this week; ``info``: good to know.
        summary: one line, without values; ``description``: what is wrong, with the value, and what to do.
        labels: beside the severity.
    """

    name: str
    expression: str
    wait_s: float
    severity: str
    summary: str
    description: str
    labels: tuple[tuple[str, str], ...] = ()


def alerts(settings: Settings) -> list[Alert]:
    """All of them."""
    span = settings.span
    short, quarter, half = (
        span(settings.short_s),
        span(max(900.0, settings.short_s)),
        span(max(1800.0, settings.short_s)),
    )
    day = span(r.DAY)
    week = span(7 * r.DAY)
    attributed = f"sum {q.by(*q.DEVICE)} (rate({q.ATTRIBUTED}[{quarter}]))"
    power = q.once(f"rate({q.HW_ENERGY}[{quarter}])")
    idle = q.once(
        f'increase({q.UNATTRIBUTED}{{{q.BUCKET}="idle",{q.HOLDER_MODEL}!=""}}[{day}])', q.HOLDER_SERVICE, q.HOLDER_MODEL
    )
    held = q.by(q.CLUSTER, q.HOLDER_SERVICE, q.HOLDER_MODEL)
    all_held = q.once(
        f'increase({q.UNATTRIBUTED}{{{q.HOLDER_MODEL}!=""}}[{day}])', q.BUCKET, q.HOLDER_SERVICE, q.HOLDER_MODEL
    )
    used = (
        f"label_replace(label_replace(sum {q.by(q.CLUSTER, q.SERVICE, q.MODEL)} (increase({q.ATTRIBUTED}[{day}])),"
        f' "{q.HOLDER_MODEL}", "$1", "{q.MODEL}", "(.*)"), "{q.HOLDER_SERVICE}", "$1", "{q.SERVICE}", "(.*)")'
    )
    everything = f"sum {held} ({all_held}) + (sum {held} ({used}) or 0 * sum {held} ({all_held}))"
    booked = " + ".join((
        f"sum {q.by(*q.DEVICE)} (increase({q.ATTRIBUTED}[{half}]))",
        f"sum {q.by(*q.DEVICE)} (increase({q.UNATTRIBUTED}[{half}]))",
        f"sum {q.by(*q.DEVICE)} (delta({q.RESIDUAL}[{half}]))",
    ))  # fmt: skip
    measured = q.once(f"increase({q.HW_ENERGY}[{half}])")
    devices = ", ".join(q.DEVICE)
    publishers = f"count {q.by(*q.DEVICE)} ({q.HW_ENERGY})"
    lost = f'{q.SPAN_SETTLED}{{{q.SPAN_OUTCOME}=~"late|overflow|dropped"}}'
    late = f"sum {q.by(q.CLUSTER, 'job', 'instance')} (rate({lost}[{half}]))"
    found = [
        Alert(
            "MelodiEnergyPerTokenOverBudget",
            f"{r.PER_KTOK_HOUR} > on ({q.CLUSTER}, {q.MODEL}) {r.MODEL_BUDGET}"
            f" and {r.PER_KTOK} > on ({q.CLUSTER}, {q.MODEL}) {r.MODEL_BUDGET}",
            600.0,
            "warning",
            "A model uses more energy per token than its budget.",
            f"{{{{ $labels.{q.MODEL} }}}} used {{{{ $value | humanize }}}} J per 1,000 output tokens"
            " in the last hour, more than its"
            " MELODI_ENERGY_BUDGET. Look whether batches have become smaller, prompts longer, or the"
            " model another one.",
        ),
    ]
    for long, short_window, factor in BURNS:
        limit = min(1.0, factor * settings.slo_over_budget)
        found.append(
            Alert(
                "MelodiRequestsOverBudget",
                f"{r.over_budget(long)} > {limit:g} and {r.over_budget(short_window)} > {limit:g}"
                if limit < 1.0
                else f"{r.over_budget(long)} >= 1 and {r.over_budget(short_window)} >= 1",
                120.0 if factor > 3.0 else 900.0,
                "warning",
                "Too many requests of a model use more energy than its budget.",
                f"{{{{ $value | humanizePercentage }}}} of the requests of"
                f" {{{{ $labels.{q.MODEL} }}}} were over their budget in the"
                f" last {long}; {settings.slo_over_budget:.0%} may be. At this rate the allowance of a month lasts"
                f" {30 / factor:.3g} days.",
                (("long", long), ("short", short_window)),
            )
        )
    found += [
        Alert(
            "MelodiEnergyPerTokenRegression",
            f"{r.PER_KTOK_HOUR} > {settings.regression:g} * ({r.PER_KTOK_HOUR} offset {week})",
            3600.0,
            "info",
            "A model uses more energy per token than in the same hour a week ago.",
            f"{{{{ $labels.{q.MODEL} }}}} uses {{{{ $value | humanize }}}} J per 1,000 output tokens,"
            f" more than {settings.regression:g}"
            " times what it used a week ago. A new version, another batch size or another mix of prompts?",
        ),
        Alert(
            "MelodiIdleWaste",
            f"sum {held} ({idle}) > {settings.idle_kwh * _KWH_J:g}"
            f" and sum {held} ({idle}) / ({everything}) > {settings.idle_part:g}",
            3600.0,
            "info",
            "A model holds devices that hardly work.",
            f"{{{{ $labels.{q.HOLDER_MODEL} }}}} ({{{{ $labels.{q.HOLDER_SERVICE} }}}}) held devices that used"
            " {{ $value | humanize }} J without a request in the last day. Share the device, scale"
            " to zero, or let it go.",
        ),
        Alert(
            "MelodiGpuBusyUnattributed",
            f"avg {q.by(*q.DEVICE)} (avg_over_time({q.GPU_UTILIZATION}[{quarter}])) > 0.5"
            f" and on ({devices}) ({attributed} or 0 * {power}) < on ({devices}) 0.1 * {power}",
            900.0,
            "warning",
            "A GPU computes and next to none of its energy belongs to a request.",
            f"{{{{ $labels.{q.HW_ID} }}}} on {{{{ $labels.{q.HOST} }}}} is busy for"
            f" {{{{ $value | humanizePercentage }}}} of the time, and less"
            " than a tenth of its joules are a request's: a program that is not metered, or one"
            " whose meter does not reach this host's.",
        ),
        Alert(
            "MelodiBooksDoNotBalance",
            f"abs(({booked}) - {measured}) > {settings.balance:g} * {measured}"
            f" and on ({devices}) ({publishers} == 1)",
            900.0,
            "warning",
            "Requests and buckets do not add up to what the meter measured.",
            f"The books of {{{{ $labels.{q.HW_ID} }}}} on {{{{ $labels.{q.HOST} }}}} are off by"
            f" {{{{ $value | humanize }}}} J in half an hour."
            " Some of its series are not scraped, or two meters share its requests.",
        ),
        Alert(
            "MelodiTwoPublishers",
            f"{publishers} > 1",
            600.0,
            "warning",
            "Two meters publish the same device.",
            f"{{{{ $value }}}} endpoints publish {{{{ $labels.{q.HW_ID} }}}} of"
            f" {{{{ $labels.{q.HOST} }}}}. Dashboards count it once, other"
            " queries may not. Containers that do not share /run/melodi-otel are the usual reason.",
        ),
        Alert(
            "MelodiSensorStale",
            f"max {q.by(*q.DEVICE)} ({q.SAMPLE_AGE}) > {settings.sample_age_s / settings.trial:g}",
            300.0,
            "warning",
            "A device's sensor gives no new readings.",
            f"The newest usable sample of {{{{ $labels.{q.HW_ID} }}}} on {{{{ $labels.{q.HOST} }}}}"
            f" is {{{{ $value | humanizeDuration }}}} old."
            " Requests since then have no joules of it.",
        ),
        Alert(
            "MelodiSensorLost",
            f"min {q.by(*q.DEVICE, q.METER)} (max_over_time({q.SOURCE_UP}[{short}])) == 0",
            600.0,
            "warning",
            "A meter does not answer.",
            f"{{{{ $labels.{q.METER} }}}} on {{{{ $labels.{q.HOST} }}}} has not answered for a while;"
            " melodi-otel doctor on that host says why.",
        ),
        Alert(
            "MelodiAgentDown",
            f'up{{job=~"{settings.job}"}} == 0',
            300.0,
            "warning",
            "An endpoint of melodi_otel cannot be scraped.",
            "{{ $labels.instance }} of {{ $labels.job }} has not answered Prometheus for five"
            " minutes; its host's energy is not known.",
        ),
        Alert(
            "MelodiSpansUnresolved",
            f"{late} / sum {q.by(q.CLUSTER, 'job', 'instance')} (rate({q.SPAN_SETTLED}[{half}])) >"
            f" {settings.unresolved:g}",
            900.0,
            "warning",
            "Spans end without their joules.",
            "{{ $value | humanizePercentage }} of the spans of {{ $labels.instance }} did not get"
            " their joules in time. The hub may be gone,"
            " frozen, or read too seldom.",
        ),
        Alert(
            "MelodiSamplerLate",
            f"histogram_quantile(0.99, sum {q.by('le', q.CLUSTER, 'job', 'instance')}"
            f" (rate({q.SAMPLER}[{quarter}]))) > {settings.sampler_s:g}",
            900.0,
            "info",
            "Reading the meters takes long.",
            "One round in a hundred takes more than {{ $value | humanizeDuration }} on {{"
            " $labels.instance }}: borders of requests are less"
            " exact, and their joules are late.",
        ),
    ]  # fmt: skip
    return found


def groups(settings: Settings) -> list[dict[str, Any]]:
    """The group of a rule file."""
    return [
        {
            "name": "melodi_otel.alerts",
            "rules": [
                {
                    "alert": alert.name,
                    "expr": alert.expression,
                    "for": settings.span(alert.wait_s),
                    "labels": {"severity": alert.severity, **dict(alert.labels)},
                    "annotations": {
                        "summary": alert.summary,
                        "description": alert.description,
                        "runbook_url": settings.page(alert.name),
                    },
                }
                for alert in alerts(settings)
            ],
        }
    ]
