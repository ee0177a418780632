"""Showback and Health: sums that equal the meter, and whether they can be trusted."""

from __future__ import annotations

from melodi_otel import semconv_metrics as metrics
from melodi_otel.deploy import promql as q
from melodi_otel.deploy.panels import Dashboard, Panel, Query, Variable
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
    sum_of,
    unattributed,
)


def _who(expression: str) -> str:
    """The same by the label ``who``, which panels can name."""
    return f'label_join({expression}, "who", "", "$by")'


def _column(heading: str, expression: str) -> str:
    """What ends in the column of this heading."""
    return f'label_replace({_who(expression)}, "what", "{heading}", "", "")'


def showback() -> Dashboard:
    """Who used how much, with a sum that equals the meter."""
    direct = f"{sum_of(increase(q.ATTRIBUTED, MODEL), '$by')}"
    estimated = sum_of(increase(q.ATTRIBUTED, f'{MODEL},{q.QUALITY}!~"measured|interpolated"'), "$by")
    requests = sum_of(increase(q.REQUESTS, MODEL), "$by")
    unattributed = q.once(increase(q.UNATTRIBUTED, HOST), q.HW_TYPE, q.BUCKET, q.HOLDER_SERVICE, q.HOLDER_MODEL)
    meter = f"sum({q.once(increase(q.HW_ENERGY, HOST))})"
    site = f"scalar(max({PUE}{{{HOST}}}) or vector(1))"
    factor = f"sum({of_requests(HOST)} + sum({unattributed})) / {of_requests(HOST)}"
    carbon = f"{direct} / {KWH} * {site} * scalar(max({INTENSITY}{{{HOST}}}))"
    money = f"{direct} / {KWH} * {site} * scalar(max({PRICE}{{{HOST}}}))"
    # One query: a column for each value of ``what``, whatever the label is called that they are by.
    columns = " or ".join((
        _column("Direct", f"{direct} / {KWH}"),
        _column("Fully loaded", f"{direct} / {KWH} * scalar({factor})"),
        _column("Per request", f"{direct} / {requests} / 3600"),
        _column("CO2e", carbon),
        _column("Money", money),
        _column("Estimated", f"({estimated} or 0 * {direct}) / {direct}"),
    ))  # fmt: skip
    sums = (
        Panel(
            "stat",
            "The meter",
            "All joules that the devices' meters counted in this range.",
            [Query(f"{meter} / {KWH}", instant=True)],
            "kwatth",
            4,
            4,
            metric=q.HW_ENERGY,
            decimals=4,
        ),
        Panel(
            "stat",
            "Requests",
            "What of it requests used.",
            [Query(f"{of_requests(HOST)} / {KWH}", instant=True)],
            "kwatth",
            4,
            4,
            metric=q.ATTRIBUTED,
            decimals=4,
        ),
        Panel(
            "stat",
            "Nobody",
            "Idle, tail, loading, others' and unsampled energy.",
            [Query(f"sum({unattributed}) / {KWH}", instant=True)],
            "kwatth",
            4,
            4,
            metric=q.UNATTRIBUTED,
            decimals=4,
        ),
        Panel(
            "stat",
            "Imbalance",
            "Requests + nobody - meter: 0 but for what is on its way.",
            [Query(f"abs({of_requests(HOST)} + sum({unattributed}) - {meter}) / {meter}", instant=True)],
            "percentunit",
            4,
            4,
            [(0.02, "orange")],
            metric=q.RESIDUAL,
        ),
        Panel(
            "stat",
            "Carbon",
            "Of all joules, by the intensity and PUE that the meters publish.",
            [Query(f"{meter} / {KWH} * {site} * scalar(max({INTENSITY}{{{HOST}}}))", instant=True)],
            "massg",
            4,
            4,
            metric=INTENSITY,
            nothing="MELODI_CARBON_INTENSITY is not set",
        ),
        Panel(
            "stat",
            "Money",
            "Of all joules, by the price and PUE that the meters publish, in the currency they are set in.",
            [Query(f"{meter} / {KWH} * {site} * scalar(max({PRICE}{{{HOST}}}))", instant=True)],
            "none",
            4,
            4,
            metric=PRICE,
            decimals=4,
            nothing="MELODI_ENERGY_PRICE is not set",
        ),
    )
    who = (
        Panel(
            "table",
            "By $by",
            "Direct: the joules of their requests. Fully loaded: with what nobody used, shared in proportion. Estimated: the"
            " part of direct that no sensor stands behind.",
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
                "Estimated": "percentunit",
            },
        ),
        Panel(
            "timeseries",
            "Power by $by",
            "",
            [Query(_who(sum_of(rate(q.ATTRIBUTED, MODEL), "$by")), "{{who}}")],
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
                    f"{sum_of(unattributed, q.BUCKET, q.HOLDER_MODEL)} / {KWH}",
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
    booked = f"{sum_of(rate(q.ATTRIBUTED, HOST), *q.DEVICE)} + {sum_of(unattributed(), *q.DEVICE)}"
    books = (
        Panel(
            "stat",
            "Publishers per device",
            "More than one: two meters publish the same device.",
            [Query(f"max(count {q.by(*q.DEVICE)} ({q.HW_ENERGY}{{{HOST}}}))")],
            "none",
            6,
            5,
            [(2.0, "orange")],
            metric=q.HW_ENERGY,
        ),
        Panel(
            "stat",
            "Meters that answer",
            "Part of the devices' meters.",
            [Query(f"avg({q.SOURCE_UP}{{{HOST}}})")],
            "percentunit",
            6,
            5,
            metric=q.SOURCE_UP,
        ),
        Panel(
            "stat",
            "Oldest reading",
            "",
            [Query(f"max({q.SAMPLE_AGE}{{{HOST}}})")],
            "s",
            6,
            5,
            [(5.0, "yellow"), (300.0, "orange")],
            metric=q.SAMPLE_AGE,
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
            [Query(f"histogram_quantile(0.99, {sum_of(rate(q.SAMPLER, HOST), 'le', 'instance')})", target)],
            "s",
            8,
            metric=q.SAMPLER,
        ),
        Panel(
            "timeseries",
            "Spans that wait for their joules",
            "",
            [Query(sum_of(f"{DEFERRED}{{{HOST}}}", "instance"), target)],
            "none",
            8,
            metric=DEFERRED,
        ),
        Panel(
            "timeseries",
            "Rounds of readings",
            "",
            [Query(sum_of(rate(q.part(metrics.SAMPLER_DURATION, "count"), HOST), "instance"), target)],
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
