"""What dashboards ask for: selections by drop-downs, rates, sums, and a device once before any sum, whoever publishes it."""

from __future__ import annotations

from typing import Final

from melodi_otel import semconv_metrics as metrics
from melodi_otel.deploy import promql as q
from melodi_otel.deploy.panels import Variable
from melodi_otel.semconv_metrics import prometheus_name

KWH: Final = "3.6e6"
RATE: Final = "$__rate_interval"
HOST: Final = f'{q.CLUSTER}=~"$cluster",job=~"$job",{q.HOST}=~"$host"'
"""What is picked of hosts; :data:`MODEL`: and of models."""
MODEL: Final = f'{HOST},{q.MODEL}=~"$model"'
OUTPUT: Final = f'{q.TOKEN_TYPE}="output"'

HW_POWER: Final = prometheus_name(metrics.HW_POWER)
MEMORY: Final = prometheus_name(metrics.HW_GPU_MEMORY)
IN_FLIGHT: Final = prometheus_name(metrics.IN_FLIGHT)
ACTIVE: Final = prometheus_name(metrics.REQUESTS_ACTIVE)
DEFERRED: Final = prometheus_name(metrics.SPAN_DEFERRED)
INTENSITY: Final = prometheus_name(metrics.CARBON_INTENSITY)
PUE: Final = prometheus_name(metrics.PUE)
PRICE: Final = prometheus_name(metrics.PRICE)

CLUSTER: Final = Variable("cluster", "Cluster", q.HW_ENERGY, q.CLUSTER)
JOB: Final = Variable("job", "Job", q.HW_ENERGY, "job")
HOSTS: Final = Variable("host", "Host", q.HW_ENERGY, q.HOST)
MODELS: Final = Variable("model", "Model", q.ATTRIBUTED, q.MODEL)


def rate(metric: str, which: str, window: str = RATE) -> str:
    """Per second."""
    return f"rate({metric}{{{which}}}[{window}])"


def increase(metric: str, which: str) -> str:
    """In the range that is picked."""
    return f"increase({metric}{{{which}}}[$__range])"


def sum_of(expression: str, *labels: str) -> str:
    """By labels, or of everything."""
    return f"sum {q.by(*labels)} ({expression})" if labels else f"sum({expression})"


def of_requests(which: str = MODEL) -> str:
    """J of requests in the range that is picked."""
    return f"sum({increase(q.ATTRIBUTED, which)})"


def per_ktok(window: str = RATE) -> str:
    """J per 1,000 output tokens of each model; nothing where there were no tokens."""
    joules = sum_of(rate(q.ATTRIBUTED, MODEL, window), q.MODEL)
    return f"1000 * {joules} / ({sum_of(rate(q.TOKENS, f'{MODEL},{OUTPUT}', window), q.MODEL)} > 0)"


def quantile(share: float, metric: str, *labels: str) -> str:
    """Of a histogram of requests."""
    return f"histogram_quantile({share}, {sum_of(rate(metric, MODEL), 'le', *labels)})"


def unattributed(which: str = HOST) -> str:
    """W that no request uses, each device once."""
    return q.once(rate(q.UNATTRIBUTED, which), q.HW_TYPE, q.BUCKET, q.HOLDER_SERVICE, q.HOLDER_MODEL)
