"""Showback and Health: sums that equal the meter, and whether they can be trusted."""

from __future__ import annotations

from melodi_otel import semconv_metrics as metrics
from melodi_otel.deploy import promql as q
from melodi_otel.deploy.panels import Dashboard, Panel, Query, Variable, stat
from melodi_otel.deploy.queries import (
    CLUSTER,
    DEFERRED,
    HOST,
    HOSTS,
    IN_FLIGHT,
    INTENSITY,
    JOB,
    KWH,
    MODEL,
    MODELS,
    PRICE,
    PUE,
    increase,
    of_requests,
    rate,
    unattributed,
)


def _who(expression: str) -> str:
    """The same by the label ``who``, which panels can name."""
    return f'label_join({expression}, "who", "", "$by")'


def _column(heading: str, expression: str) -> str:
    """What ends in the column of this heading."""
    return f'label_replace({_who(expression)}, "what", "{heading}", "", "")'


def _at_the_site(joules: str, per_kwh: str) -> str:
    """What joules come to at the site, PUE included, by a figure per kWh that the meters publish."""
    site = f"scalar(max({PUE}{{{HOST}}}) or vector(1))"
    return f"{joules} / {KWH} * {site} * scalar(max({per_kwh}{{{HOST}}}))"


def _fully_loaded(direct: str, nobody: str) -> str:
    """J by ``$by`` with what no request used, so that all of them together are the meter's.

    What a model holds a device for (its idle power, its tail, its loading) is divided among those who used the model, the rest
    (nobody's, others', and what models hold that nobody used) among all, each time as their own joules are.
    """
    parts = q.sum_of(increase(q.ATTRIBUTED, MODEL), "$by", q.MODEL)
    used = f"({q.sum_of(increase(q.ATTRIBUTED, HOST), q.MODEL)} > 0)"
    held_by = f'{q.HOLDER_MODEL}!=""'
    # Not label_replace: its "$1" is a variable of Grafana's.
    named = f'label_join({unattributed(increase, q.also(HOST, held_by))}, "{q.MODEL}", "", "{q.HOLDER_MODEL}")'
    held = q.sum_of(named, q.MODEL)
    model = f"on ({q.MODEL})"
    mine = q.sum_of(f"{parts} * {model} group_left () ({held} / {model} {used})", "$by")
    rest = f"sum({nobody}) - (sum({held} and {model} {used}) or vector(0))"
    return f"({direct} + ({mine} or 0 * {direct}) + {direct} / scalar({of_requests(HOST)}) * scalar({rest}))"


def showback() -> Dashboard:
    """Who used how much, with a sum that equals the meter."""
    direct = f"{q.sum_of(increase(q.ATTRIBUTED, MODEL), '$by')}"
    estimated = q.sum_of(increase(q.ATTRIBUTED, f'{MODEL},{q.QUALITY}!~"measured|interpolated"'), "$by")
    requests = q.sum_of(increase(q.REQUESTS, MODEL), "$by")
    nobody = unattributed(increase)
    meter = f"sum({q.once(increase(q.HW_ENERGY, HOST))})"
    whole = q.sum_of(increase(q.REQUESTS, f'{MODEL},{q.QUALITY}!~"partial|unavailable"'), "$by")
    # One query: a column for each value of ``what``, whatever the label is called that they are by.
    columns = " or ".join((
        _column("Direct", f"{direct} / {KWH}"),
        _column("Fully loaded", f"{_fully_loaded(direct, nobody)} / {KWH}"),
        _column("Per request", f"{direct} / {requests} / 3600"),
        _column("CO2e", _at_the_site(direct, INTENSITY)),
        _column("Money", _at_the_site(direct, PRICE)),
        _column("Covered", f"({whole} or 0 * {requests}) / {requests}"),
        _column("Estimated", f"({estimated} or 0 * {direct}) / {direct}"),
    ))  # fmt: skip
    sums = (
        stat(
            "The meter",
            "All joules that the devices' meters counted in this range.",
            f"{meter} / {KWH}",
            "kwatth",
            q.HW_ENERGY,
            decimals=4,
        ),
        stat(
            "Requests", "What of it requests used.", f"{of_requests(HOST)} / {KWH}", "kwatth", q.ATTRIBUTED, decimals=4
        ),
        stat(
            "Nobody",
            "Idle, tail, loading, others' and unsampled energy.",
            f"sum({nobody}) / {KWH}",
            "kwatth",
            q.UNATTRIBUTED,
            decimals=4,
        ),
        stat(
            "Imbalance",
            "Requests + nobody - meter: 0 but for what is on its way.",
            f"abs({of_requests(HOST)} + sum({nobody}) - {meter}) / {meter}",
            "percentunit",
            q.RESIDUAL,
            thresholds=[(0.02, "orange")],
        ),
        stat(
            "Carbon",
            "Of all joules, by the intensity and PUE that the meters publish.",
            _at_the_site(meter, INTENSITY),
            "massg",
            INTENSITY,
            nothing="MELODI_CARBON_INTENSITY is not set",
        ),
        stat(
            "Money",
            "Of all joules, by the price and PUE that the meters publish, in the currency they are set in.",
            _at_the_site(meter, PRICE),
            "none",
            PRICE,
            decimals=4,
            nothing="MELODI_ENERGY_PRICE is not set",
        ),
    )
    who = (
        Panel(
            "table",
            "By $by",
            "Direct: the joules of their requests. Fully loaded: with what models held idle, shared by those who used the model,"
            " and the rest shared by all. Covered: the part of their requests that a meter saw whole. Estimated: the part of"
            " direct that no sensor stands behind.",
            [Query(columns, instant=True)],
            width=24,
            height=10,
            metric=q.ATTRIBUTED,
            matrix=("what", "who"),
            units={
                "Direct": "kwatth",
                "Fully loaded": "kwatth",
                "Per request": "watth",
                "CO2e": "massg",
                "Money": "none",
                "Covered": "percentunit",
                "Estimated": "percentunit",
            },
        ),
        Panel(
            "timeseries",
            "Power by $by",
            "",
            [Query(_who(q.sum_of(rate(q.ATTRIBUTED, MODEL), "$by")), "{{who}}")],
            "watt",
            12,
            9,
            stack=True,
            metric=q.ATTRIBUTED,
        ),
        Panel(
            "bargauge",
            "What nobody used, by why and holder",
            "In this range.",
            [
                Query(
                    f"{q.sum_of(nobody, q.BUCKET, q.HOLDER_MODEL)} / {KWH}",
                    f"{{{{{q.BUCKET}}}}} {{{{{q.HOLDER_MODEL}}}}}",
                    instant=True,
                )
            ],
            "kwatth",
            12,
            9,
            metric=q.UNATTRIBUTED,
            decimals=4,
        ),
        Panel(
            "text",
            "What is not in it",
            width=24,
            height=3,
            text="Fans, network, disks and the losses of power supplies are not measured. PUE stands for the site's cooling and"
            " distribution, not for the server's. Joules of requests whose quality is *partial* lack what no meter saw.",
        ),
    )
    by = Variable("by", "By", values=("tenant", "team", q.SERVICE, q.NAMESPACE, q.MODEL), multi=False)
    return Dashboard(
        "melodi-otel-showback",
        "melodi_otel / Showback",
        "kWh, CO2e and money by whom, with a sum that equals the meter.",
        (CLUSTER, JOB, HOSTS, MODELS, by),
        (("The books", sums), ("For whom", who)),
        span="now-24h",
    )


def health() -> Dashboard:
    """Whether the figures can be trusted."""
    target = "{{instance}}"
    booked = f"{q.sum_of(rate(q.ATTRIBUTED, HOST), *q.DEVICE)} + {q.sum_of(unattributed(), *q.DEVICE)}"
    books = (
        stat(
            "Publishers per device",
            "More than one: two meters publish the same device.",
            f"max(count {q.by(*q.DEVICE)} ({q.HW_ENERGY}{{{HOST}}}))",
            "none",
            q.HW_ENERGY,
            course=True,
            thresholds=[(2.0, "orange")],
            width=6,
            height=5,
        ),
        stat(
            "Meters that answer",
            "Part of the devices' meters.",
            f"avg({q.SOURCE_UP}{{{HOST}}})",
            "percentunit",
            q.SOURCE_UP,
            course=True,
            width=6,
            height=5,
        ),
        stat(
            "Oldest reading",
            "",
            f"max({q.SAMPLE_AGE}{{{HOST}}})",
            "s",
            q.SAMPLE_AGE,
            course=True,
            thresholds=[(5.0, "yellow"), (300.0, "orange")],
            width=6,
            height=5,
        ),
        Panel("stat", "Endpoints that answer", "", [Query('avg(up{job=~"$job"})')], "percentunit", 6, 5, metric="up"),
        Panel(
            "timeseries",
            "Books: measured, and booked",
            "Both lines are one while the books balance; a reading is on its way for some tenths of a second.",
            [
                Query(f"sum({q.once(rate(q.HW_ENERGY, HOST))})", "measured"),
                Query(f"sum({booked})", "requests + nobody"),
            ],
            "watt",
            12,
            metric=q.RESIDUAL,
        ),
        Panel(
            "timeseries",
            "Joules of open requests",
            "An *of which* of the joules of requests.",
            [Query(f"sum {q.by(q.HOST)} ({IN_FLIGHT}{{{HOST}}})", f"{{{{{q.HOST}}}}}")],
            "joule",
            12,
            metric=IN_FLIGHT,
        ),
    )
    cost = (
        Panel(
            "timeseries",
            "Sampler, p99 of a round",
            "",
            [Query(f"histogram_quantile(0.99, {q.sum_of(rate(q.SAMPLER, HOST), 'le', 'instance')})", target)],
            "s",
            8,
            metric=q.SAMPLER,
        ),
        Panel(
            "timeseries",
            "Spans that wait for their joules",
            "",
            [Query(q.sum_of(f"{DEFERRED}{{{HOST}}}", "instance"), target)],
            "none",
            8,
            metric=DEFERRED,
        ),
        Panel(
            "timeseries",
            "Rounds of readings",
            "",
            [Query(q.sum_of(rate(q.part(metrics.SAMPLER_DURATION, "count"), HOST), "instance"), target)],
            "count:rounds/s",
            8,
            metric=q.SAMPLER,
        ),
    )
    return Dashboard(
        "melodi-otel-health",
        "melodi_otel / Health",
        "Whether the figures can be trusted.",
        (CLUSTER, JOB, HOSTS),
        (("Books and meters", books), ("What metering costs", cost)),
    )
