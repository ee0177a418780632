"""Names as Prometheus has them, and the expressions that rules and dashboards are built of.

Every metric comes out of :mod:`melodi_otel.semconv_metrics`, so a name that does not exist cannot be written. Both roads to
Prometheus, scraping and OTLP, give these names.
"""

from __future__ import annotations

from typing import Final

from melodi_otel import semconv as names
from melodi_otel import semconv_metrics as metrics
from melodi_otel.semconv_metrics import Metric, label_name, prometheus_name

HW_ENERGY: Final = prometheus_name(metrics.HW_ENERGY)
GPU_UTILIZATION: Final = prometheus_name(metrics.HW_GPU_UTILIZATION)
ATTRIBUTED: Final = prometheus_name(metrics.ATTRIBUTED)
UNATTRIBUTED: Final = prometheus_name(metrics.UNATTRIBUTED)
RESIDUAL: Final = prometheus_name(metrics.RESIDUAL)
REQUESTS: Final = prometheus_name(metrics.REQUESTS)
OVER_BUDGET: Final = prometheus_name(metrics.OVER_BUDGET)
BUDGET: Final = prometheus_name(metrics.BUDGET)
SAMPLE_AGE: Final = prometheus_name(metrics.SAMPLE_AGE)
SOURCE_UP: Final = prometheus_name(metrics.SOURCE_UP)
SPAN_SETTLED: Final = prometheus_name(metrics.SPAN_SETTLED)
SAMPLER: Final = prometheus_name(metrics.SAMPLER_DURATION)
REQUEST_ENERGY: Final = prometheus_name(metrics.REQUEST_ENERGY)


def part(metric: Metric, which: str) -> str:
    """A histogram's ``sum`` or ``count``."""
    return prometheus_name(metric).removesuffix("_bucket") + f"_{which}"


TOKENS: Final = part(metrics.TOKEN_USAGE, "sum")

MODEL: Final = label_name(names.GEN_AI_REQUEST_MODEL)
SERVICE: Final = label_name(names.SERVICE_NAME)
NAMESPACE: Final = label_name(names.SERVICE_NAMESPACE)
QUALITY: Final = label_name(names.QUALITY)
TOKEN_TYPE: Final = label_name(names.GEN_AI_TOKEN_TYPE)
BUCKET: Final = label_name(names.BUCKET)
HOLDER_SERVICE: Final = label_name(names.HOLDER_SERVICE)
HOLDER_MODEL: Final = label_name(names.HOLDER_MODEL)
HW_ID: Final = label_name(names.HW_ID)
HW_TYPE: Final = label_name(names.HW_TYPE)
HW_NAME: Final = label_name(names.HW_NAME)
HOST: Final = label_name(names.HOST_ID)
METER: Final = label_name(names.METER_SOURCE)
SPAN_OUTCOME: Final = label_name(names.SPAN_OUTCOME)
PHASE: Final = label_name(names.PHASE)
OUTCOME: Final = label_name(names.REQUEST_OUTCOME)

CLUSTER: Final = "cluster"
"""The label that tells clusters apart where one Prometheus knows several; absent elsewhere."""
DEVICE: Final = (CLUSTER, HOST, HW_ID)
SCRAPED: Final = ("instance", "job", "pod", "container", "endpoint", "service", "namespace", "node")
"""Labels of the target, which say nothing of whose joules they are."""


def by(*labels: str) -> str:
    """``by (a, b)``."""
    return f"by ({', '.join(labels)})"


def without(*labels: str) -> str:
    """``without (a, b)``."""
    return f"without ({', '.join(labels)})"


def rate(metric: str, window: str, which: str = "") -> str:
    """Per second, of the series that ``which`` picks."""
    return f"rate({metric}{{{which}}}[{window}])" if which else f"rate({metric}[{window}])"


def sum_of(expression: str, *labels: str) -> str:
    """By labels, or of everything."""
    return f"sum {by(*labels)} ({expression})" if labels else f"sum({expression})"


def also(*selectors: str) -> str:
    """All of these selectors; empty ones pick everything."""
    return ",".join(selector for selector in selectors if selector)


OUTPUT: Final = f'{TOKEN_TYPE}="output"'


def per_ktok(window: str, *labels: str, which: str = "") -> str:
    """J per 1,000 output tokens; nothing where there were no tokens."""
    joules = sum_of(rate(ATTRIBUTED, window, which), *labels)
    return f"1000 * {joules} / ({sum_of(rate(TOKENS, window, also(which, OUTPUT)), *labels)} > 0)"


def share_over_budget(window: str, *labels: str, which: str = "") -> str:
    """Part of the requests that used more than their model's budget; those whose joules are not known do not count."""
    over = sum_of(rate(OVER_BUDGET, window, which), *labels)
    judged = sum_of(rate(REQUESTS, window, also(which, f'{QUALITY}!="unavailable"')), *labels)
    return f"{over} / ({judged} > 0)"


def once(expression: str, *labels: str) -> str:
    """A device's series once, whoever publishes it: two publishers never make a device use twice."""
    return f"max {by(*DEVICE, *labels)} ({expression})"
