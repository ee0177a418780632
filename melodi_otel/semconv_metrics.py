"""Names, as data: every metric of the contract, and what it is called when Prometheus scrapes it.

Units are J, W, s, By, g, 1 and ``{x}`` only: those read the same through every road to Prometheus. A scraped name is built
by the rule that OTLP receivers use, so a dashboard works on either road.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from melodi_otel import semconv as names

Kind = Literal["counter", "updowncounter", "gauge", "histogram"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        name: the full name.
        kind: the OpenTelemetry instrument.
        unit: UCUM unit.
        description: one sentence for people; it becomes ``# HELP``.
        required: attributes on every series.
        optional: attributes that stand where they are known.
        bounds: upper bounds of a histogram's buckets, in ``unit``.
        labelled: True where the labels of ``MELODI_METRIC_LABELS`` are carried too.
        publisher: True where only the host's one publisher may emit it.
    """

    name: str
    kind: Kind
    unit: str
    description: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    bounds: tuple[float, ...] | None = None
    labelled: bool = False
    publisher: bool = False


def _decades(low: int, high: int) -> tuple[float, ...]:
    """1-2-5 bounds from 10**low to 10**high, both included, as the floats a person would write."""
    steps = [float(f"{digit}e{power}") for power in range(low, high) for digit in (1, 2, 5)]
    return (*steps, float(f"1e{high}"))


_DURATIONS: Final = tuple(float(f"{0.01 * 2**k:.2f}") for k in range(14))
_DEVICE: Final = (names.HW_ID, names.HW_TYPE)
_WHO: Final = (names.GEN_AI_REQUEST_MODEL, names.GEN_AI_PROVIDER, names.SERVICE_NAME, names.SERVICE_NAMESPACE)
_CALL: Final = (names.GEN_AI_OPERATION, names.GEN_AI_PROVIDER)

HW_ENERGY: Final = Metric(
    "hw.energy", "counter", "J", "Energy that the device used.", _DEVICE, (names.HW_NAME,), publisher=True
)
HW_POWER: Final = Metric(
    "hw.power", "gauge", "W", "Power that the device draws.", _DEVICE, (names.HW_NAME,), publisher=True
)
HW_HOST_ENERGY: Final = Metric(
    "hw.host.energy",
    "counter",
    "J",
    "Energy that the whole host used, where a meter covers all of it; contains the devices.",
    (names.HW_ID,),
    (names.HW_NAME,),
    publisher=True,
)
HW_HOST_POWER: Final = Metric(
    "hw.host.power", "gauge", "W", "Power that the whole host draws.", (names.HW_ID,), (names.HW_NAME,), publisher=True
)
HW_GPU_UTILIZATION: Final = Metric(
    "hw.gpu.utilization",
    "gauge",
    "1",
    "Part of the time in which the GPU computed.",
    _DEVICE,
    (names.HW_NAME,),
    publisher=True,
)
HW_GPU_MEMORY: Final = Metric(
    "hw.gpu.memory.usage", "updowncounter", "By", "GPU memory in use.", _DEVICE, (names.HW_NAME,), publisher=True
)
REQUEST_ENERGY: Final = Metric(
    "melodi.request.energy",
    "histogram",
    "J",
    "Energy of one request.",
    (*_CALL, names.SCOPE, names.QUALITY),
    (names.GEN_AI_REQUEST_MODEL,),
    _decades(-1, 5),
)
ATTRIBUTED: Final = Metric(
    "melodi.energy.attributed",
    "counter",
    "J",
    "Energy that requests used, by device and phase.",
    (*_DEVICE, names.PHASE, names.QUALITY),
    _WHO,
    labelled=True,
)
UNATTRIBUTED: Final = Metric(
    "melodi.energy.unattributed",
    "counter",
    "J",
    "Energy that no request used, by where it went.",
    (*_DEVICE, names.BUCKET),
    (names.HOLDER_SERVICE, names.HOLDER_MODEL),
    publisher=True,
)
RESIDUAL: Final = Metric(
    "melodi.energy.residual",
    "updowncounter",
    "J",
    "What closes the books: attributed + unattributed + residual = hw.energy.",
    (names.HW_ID,),
    publisher=True,
)
IN_FLIGHT: Final = Metric(
    "melodi.energy.in_flight",
    "updowncounter",
    "J",
    "The part of attributed whose requests are still open.",
    (names.HW_ID,),
)
REQUESTS: Final = Metric(
    "melodi.requests",
    "counter",
    "{request}",
    "Requests that ended.",
    (names.REQUEST_OUTCOME, names.QUALITY),
    _WHO,
    labelled=True,
)
OVER_BUDGET: Final = Metric(
    "melodi.requests.over_budget",
    "counter",
    "{request}",
    "Requests that used more joules per output token than their model's budget; only where one is set.",
    (names.QUALITY,),
    _WHO,
    labelled=True,
)
REQUESTS_ACTIVE: Final = Metric(
    "melodi.requests.active", "updowncounter", "{request}", "Requests in flight.", (), _WHO, labelled=True
)
SAMPLE_AGE: Final = Metric(
    "melodi.energy.sample.age",
    "gauge",
    "s",
    "Time since the device's newest usable sample.",
    (names.HW_ID,),
    publisher=True,
)
SPAN_DEFERRED: Final = Metric("melodi.span.deferred", "updowncounter", "{span}", "Spans that wait for their joules.")
SPAN_SETTLED: Final = Metric(
    "melodi.span.settled", "counter", "{span}", "Spans that stopped waiting, by how.", (names.SPAN_OUTCOME,)
)
SPAN_EXPORTED: Final = Metric(
    "melodi.span.exported",
    "counter",
    "{span}",
    "Spans that our own exporters were handed, by whether the receiver took them; an application's exporters are its own.",
    (names.SPAN_EXPORT,),
)
SAMPLER_DURATION: Final = Metric(
    "melodi.sampler.duration",
    "histogram",
    "s",
    "Time that one round of readings took.",
    bounds=_decades(-5, 0),
    publisher=True,
)
SELF_ENERGY: Final = Metric(
    "melodi.self.energy", "counter", "J", "Energy of the meter's own work, from its CPU time.", publisher=True
)
SOURCE_UP: Final = Metric(
    "melodi.source.up",
    "gauge",
    "1",
    "1 while the meter answers for the device, else 0.",
    (names.METER_SOURCE,),
    (names.HW_ID,),
    publisher=True,
)
TOKEN_USAGE: Final = Metric(
    "gen_ai.client.token.usage",
    "histogram",
    "{token}",
    "Tokens of one request.",
    (*_CALL, names.GEN_AI_TOKEN_TYPE),
    (names.GEN_AI_REQUEST_MODEL,),
    tuple(float(4**k) for k in range(14)),
)
OPERATION_DURATION: Final = Metric(
    "gen_ai.client.operation.duration",
    "histogram",
    "s",
    "Time from the start to the end of a request.",
    _CALL,
    (names.GEN_AI_REQUEST_MODEL, names.ERROR_TYPE),
    _DURATIONS,
)
TIME_TO_FIRST_TOKEN: Final = Metric(
    "gen_ai.server.time_to_first_token",
    "histogram",
    "s",
    "Time from the start to the first token.",
    _CALL,
    (names.GEN_AI_REQUEST_MODEL,),
    (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
)
TIME_PER_OUTPUT_TOKEN: Final = Metric(
    "gen_ai.server.time_per_output_token",
    "histogram",
    "s",
    "Mean time per token after the first.",
    _CALL,
    (names.GEN_AI_REQUEST_MODEL,),
    (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
)
CARBON_INTENSITY: Final = Metric(
    "melodi.carbon.intensity",
    "gauge",
    "{gCO2e_per_kWh}",
    "Carbon intensity of the grid, as configured, in gCO2e per kWh.",
)
PUE: Final = Metric("melodi.energy.pue", "gauge", "1", "Power usage effectiveness of the site, as configured.")
PRICE: Final = Metric(
    "melodi.energy.price", "gauge", "{currency_per_kWh}", "Price of energy, as configured, in currency per kWh."
)
BUDGET: Final = Metric(
    "melodi.energy.budget",
    "gauge",
    "J",
    "Energy budget per 1,000 output tokens, as configured; without a model: of all that have none of their own.",
    (),
    (names.GEN_AI_REQUEST_MODEL,),
)
CARBON_EMISSIONS: Final = Metric(
    "melodi.carbon.emissions",
    "counter",
    "g",
    "CO2 equivalent of the energy of all devices, without PUE; only where a live intensity is known.",
    publisher=True,
)

METRICS: Final[Mapping[str, Metric]] = {
    metric.name: metric
    for metric in (
        HW_ENERGY,
        HW_POWER,
        HW_HOST_ENERGY,
        HW_HOST_POWER,
        HW_GPU_UTILIZATION,
        HW_GPU_MEMORY,
        REQUEST_ENERGY,
        ATTRIBUTED,
        UNATTRIBUTED,
        RESIDUAL,
        IN_FLIGHT,
        REQUESTS,
        OVER_BUDGET,
        REQUESTS_ACTIVE,
        SAMPLE_AGE,
        SPAN_DEFERRED,
        SPAN_SETTLED,
        SPAN_EXPORTED,
        SAMPLER_DURATION,
        SELF_ENERGY,
        SOURCE_UP,
        TOKEN_USAGE,
        OPERATION_DURATION,
        TIME_TO_FIRST_TOKEN,
        TIME_PER_OUTPUT_TOKEN,
        CARBON_INTENSITY,
        PUE,
        PRICE,
        BUDGET,
        CARBON_EMISSIONS,
    )
}
"""All of them by name. Each also carries ``host.id``: on the resource, or on every series where it is scraped."""

_UNIT_WORDS: Final = {
    "J": "joules",
    "W": "watts",
    "s": "seconds",
    "ms": "milliseconds",
    "us": "microseconds",
    "ns": "nanoseconds",
    "min": "minutes",
    "h": "hours",
    "d": "days",
    "By": "bytes",
    "KiBy": "kibibytes",
    "MiBy": "mebibytes",
    "GiBy": "gibibytes",
    "g": "grams",
    "Cel": "celsius",
    "Hz": "hertz",
    "V": "volts",
    "A": "amperes",
    "m": "meters",
    "%": "percent",
    "1": "",
}
_PER_WORDS: Final = {"s": "second", "min": "minute", "h": "hour", "d": "day"}


def scraped(name: str, unit: str, *, monotonic: bool = False, gauge: bool = False) -> tuple[str, str]:
    """Family name and unit word of any OTel metric as an OTLP receiver renders them (``_total`` not appended).

    Args:
        name: the OpenTelemetry name.
        unit: its UCUM unit; annotations in braces are dropped.
        monotonic: a counter; a ``total`` in the name is taken off, the exposition appends it again.
        gauge: a gauge; the unit ``1`` then reads ``ratio``.
    """
    words = [word for word in re.split(r"[^a-zA-Z0-9:]+", name) if word]
    if monotonic and words[-1] == "total":
        words.pop()
    main, _, per = re.sub(r"\{[^}]*\}", "", unit).partition("/")
    word = "ratio" if gauge and unit == "1" else _UNIT_WORDS.get(main, re.sub(r"[^a-zA-Z0-9]+", "_", main).strip("_"))
    if per:
        word = f"{word}_per_{_PER_WORDS.get(per, per)}".strip("_")
    if word == "ratio" and word in words:
        words.remove(word)
    if word and word in words[:-1]:
        word = ""  # it stands inside the name: receivers append nothing, and OpenMetrics knows units at the end only
    stem = "_".join([*words, word] if word and words[-1] != word else words)
    return (f"_{stem}" if stem[:1].isdigit() else stem), word


def prometheus_name(metric: Metric) -> str:
    """The scraped name: ``hw_energy_joules_total``, ``hw_gpu_utilization_ratio``, ``melodi_request_energy_joules_bucket``."""
    family, _ = scraped(metric.name, metric.unit, monotonic=metric.kind == "counter", gauge=metric.kind == "gauge")
    return family + {"counter": "_total", "histogram": "_bucket"}.get(metric.kind, "")


def label_name(attribute: str) -> str:
    """The Prometheus label of an attribute: ``hw.id`` reads ``hw_id``."""
    label = re.sub(r"[^a-zA-Z0-9_]", "_", attribute)
    return f"key_{label}" if label[:1].isdigit() else label
