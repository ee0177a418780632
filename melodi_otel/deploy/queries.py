"""What dashboards ask for: selections by drop-downs, rates, sums, and a device once before any sum, whoever publishes it."""

from __future__ import annotations

from collections.abc import Callable
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


def rate(metric: str, which: str) -> str:
    """Per second."""
    return q.rate(metric, RATE, which)


def increase(metric: str, which: str) -> str:
    """In the range that is picked."""
    return f"increase({metric}{{{which}}}[$__range])"


def of_requests(which: str = MODEL) -> str:
    """J of requests in the range that is picked."""
    return f"sum({increase(q.ATTRIBUTED, which)})"


def quantile(share: float, metric: str, *labels: str) -> str:
    """Of a histogram of requests."""
    return f"histogram_quantile({share}, {q.sum_of(rate(metric, MODEL), 'le', *labels)})"


def unattributed(of: Callable[[str, str], str] = rate, which: str = HOST) -> str:
    """What no request uses, each device once: W by :func:`rate`, J of the picked range by :func:`increase`."""
    return q.once(of(q.UNATTRIBUTED, which), q.HW_TYPE, q.BUCKET, q.HOLDER_SERVICE, q.HOLDER_MODEL)
