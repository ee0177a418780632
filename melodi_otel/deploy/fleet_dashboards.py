"""Overview, Models, Hosts and GPUs: where the joules go."""

from __future__ import annotations

from melodi_otel.deploy import promql as q
from melodi_otel.deploy.panels import Dashboard, Panel, Query, stat
from melodi_otel.deploy.queries import (
    ACTIVE,
    CLUSTER,
    HOST,
    HOSTS,
    HW_POWER,
    JOB,
    KWH,
    MEMORY,
    MODEL,
    MODELS,
    RATE,
    increase,
    of_requests,
    quantile,
    rate,
    unattributed,
)


def overview() -> Dashboard:
    """Where the joules go, over the whole fleet."""
    power = f"sum({q.once(rate(q.HW_ENERGY, HOST))})"
    energy = f"sum({q.once(increase(q.HW_ENERGY, HOST))}) / {KWH}"
    idle = f"sum({unattributed(increase)})"
    ktok = f"1000 * {of_requests()} / sum({increase(q.TOKENS, f'{MODEL},{q.OUTPUT}')})"
    first = (
        stat("Power", "All metered devices, from their counters.", power, "watt", q.HW_ENERGY, course=True),
        stat("Energy", "What the meters counted.", energy, "kwatth", q.HW_ENERGY, decimals=3),
        stat(
            "J / 1k tokens",
            "Output tokens; all joules of requests, idle power while they ran included.",
            ktok,
            "joule",
            q.ATTRIBUTED,
        ),
        stat("Request, p50", "", quantile(0.5, q.REQUEST_ENERGY), "joule", q.REQUEST_ENERGY, course=True),
        stat("Request, p95", "", quantile(0.95, q.REQUEST_ENERGY), "joule", q.REQUEST_ENERGY, course=True),
        stat(
            "Nobody's",
            "Part of the joules that no request used: idle, tail, loading, others, not sampled.",
            f"{idle} / ({idle} + {of_requests(HOST)})",
            "percentunit",
            q.UNATTRIBUTED,
            thresholds=[(0.5, "yellow"), (0.8, "orange")],
        ),
    )
    where = (
        Panel(
            "timeseries",
            "Where the power goes",
            "What requests used, and what nobody did, by why.",
            [
                Query(f"sum({rate(q.ATTRIBUTED, HOST)})", "requests"),
                Query(q.sum_of(unattributed(), q.BUCKET), f"{{{{{q.BUCKET}}}}}"),
            ],
            "watt",
            12,
            9,
            stack=True,
            metric=q.UNATTRIBUTED,
        ),
        Panel(
            "timeseries",
            "Power by host",
            "Each device once.",
            [Query(q.sum_of(q.once(rate(q.HW_ENERGY, HOST)), q.HOST), f"{{{{{q.HOST}}}}}")],
            "watt",
            12,
            9,
            stack=True,
            metric=q.HW_ENERGY,
        ),
    )
    models = (
        Panel(
            "bargauge",
            "Energy by model",
            "Joules of their requests in this range.",
            [Query(f"{q.sum_of(increase(q.ATTRIBUTED, MODEL), q.MODEL)} / {KWH}", f"{{{{{q.MODEL}}}}}", instant=True)],
            "kwatth",
            24,
            5,
            metric=q.ATTRIBUTED,
            decimals=3,
        ),
        Panel(
            "timeseries",
            "J per 1,000 output tokens by model",
            "",
            [Query(q.per_ktok(RATE, q.MODEL, which=MODEL), f"{{{{{q.MODEL}}}}}")],
            "joule",
            12,
            8,
            metric=q.ATTRIBUTED,
        ),
        Panel(
            "timeseries",
            "A request's energy, p95 by model",
            "",
            [Query(quantile(0.95, q.REQUEST_ENERGY, q.MODEL), f"{{{{{q.MODEL}}}}}", exemplars=True)],
            "joule",
            12,
            8,
            metric=q.REQUEST_ENERGY,
        ),
    )
    return Dashboard(
        "melodi-otel-overview",
        "melodi_otel / Overview",
        "Where the joules of the fleet go.",
        (CLUSTER, JOB, HOSTS, MODELS),
        (("", first), ("Where it goes", where), ("Models", models)),
    )


def models(slo_over_budget: float) -> Dashboard:
    """What requests and tokens of each model cost, and whether that is within its budget."""
    legend = f"{{{{{q.MODEL}}}}}"
    budget = f"max {q.by(q.MODEL)} ({q.BUDGET}{{{HOST}}})"
    over = q.share_over_budget("1h", q.MODEL, which=MODEL)
    energy = (
        Panel(
            "timeseries",
            "A request, median",
            "",
            [Query(quantile(0.5, q.REQUEST_ENERGY, q.MODEL), legend, exemplars=True)],
            "joule",
            8,
            metric=q.REQUEST_ENERGY,
        ),
        Panel(
            "timeseries",
            "A request, p95",
            "",
            [Query(quantile(0.95, q.REQUEST_ENERGY, q.MODEL), legend, exemplars=True)],
            "joule",
            8,
            metric=q.REQUEST_ENERGY,
        ),
        Panel(
            "timeseries",
            "J per 1,000 output tokens",
            "With the budgets that are set (MELODI_ENERGY_BUDGET).",
            [Query(q.per_ktok(RATE, q.MODEL, which=MODEL), legend), Query(budget, f"budget {legend}")],
            "joule",
            8,
            metric=q.ATTRIBUTED,
        ),
        Panel(
            "timeseries",
            "Prompts, decoding, idle power",
            "What the joules of requests are of.",
            [Query(q.sum_of(rate(q.ATTRIBUTED, MODEL), q.PHASE), f"{{{{{q.PHASE}}}}}")],
            "watt",
            12,
            stack=True,
            metric=q.ATTRIBUTED,
        ),
        Panel(
            "timeseries",
            "Output tokens",
            "",
            [Query(q.sum_of(rate(q.TOKENS, f"{MODEL},{q.OUTPUT}"), q.MODEL), f"{legend}")],
            "count:tok/s",
            12,
            metric=q.TOKENS,
        ),
    )
    slo = (
        Panel(
            "timeseries",
            "Requests over budget, last hour",
            "Part of the requests that used more joules per output token than their model's budget.",
            [Query(over, legend)],
            "percentunit",
            12,
            thresholds=[(slo_over_budget, "orange")],
            metric=q.OVER_BUDGET,
            nothing="no budget is set",
        ),
        Panel(
            "timeseries",
            "Burn rate, last hour",
            f"Times the share that may be over budget ({slo_over_budget:.3g}): above 1 the allowance does not last.",
            [Query(f"{over} / {slo_over_budget:.12g}", legend)],
            "none",
            12,
            thresholds=[(1.0, "yellow"), (14.4, "orange")],
            metric=q.OVER_BUDGET,
            nothing="no budget is set",
        ),
    )
    trust = (
        Panel(
            "timeseries",
            "Requests by quality",
            "How good their joules are.",
            [Query(q.sum_of(rate(q.REQUESTS, MODEL), q.QUALITY), f"{{{{{q.QUALITY}}}}}")],
            "reqps",
            8,
            stack=True,
            metric=q.REQUESTS,
        ),
        Panel(
            "timeseries",
            "Requests by outcome",
            "",
            [Query(q.sum_of(rate(q.REQUESTS, MODEL), q.OUTCOME), f"{{{{{q.OUTCOME}}}}}")],
            "reqps",
            8,
            stack=True,
            metric=q.REQUESTS,
        ),
        Panel(
            "timeseries",
            "Requests in flight",
            "",
            [Query(q.sum_of(f"{ACTIVE}{{{MODEL}}}", q.MODEL), legend)],
            "none",
            8,
            metric=ACTIVE,
        ),
    )
    return Dashboard(
        "melodi-otel-models",
        "melodi_otel / Models",
        "Energy per request and per token, budgets, quality.",
        (CLUSTER, JOB, HOSTS, MODELS),
        (("Energy", energy), ("Budgets", slo), ("How sure, how many", trust)),
    )


def hosts() -> Dashboard:
    """Devices: power, utilisation, idle power and who holds it, and how old the readings are."""
    legend = f"{{{{{q.HOST}}}}} {{{{{q.HW_ID}}}}}"
    power = (
        Panel(
            "timeseries",
            "Power by device, from its counter",
            "",
            [Query(q.once(rate(q.HW_ENERGY, HOST)), legend)],
            "watt",
            12,
            9,
            metric=q.HW_ENERGY,
        ),
        Panel(
            "timeseries",
            "Power by device, from its gauge",
            "A cross-check: the counter is what is divided among requests.",
            [Query(q.once(f"{HW_POWER}{{{HOST}}}"), legend)],
            "watt",
            12,
            9,
            metric=HW_POWER,
        ),
    )
    work = (
        Panel(
            "timeseries",
            "GPU utilisation",
            "Part of the time in which it computed, however much.",
            [Query(q.once(f"{q.GPU_UTILIZATION}{{{HOST}}}"), legend)],
            "percentunit",
            12,
            metric=q.GPU_UTILIZATION,
        ),
        Panel(
            "timeseries", "GPU memory", "", [Query(q.once(f"{MEMORY}{{{HOST}}}"), legend)], "bytes", 12, metric=MEMORY
        ),
        Panel(
            "timeseries",
            "Idle power by holder",
            "Devices on which no request runs, by the model that holds them.",
            [
                Query(
                    q.sum_of(unattributed(which=f'{HOST},{q.BUCKET}="idle"'), q.HOLDER_MODEL),
                    f"{{{{{q.HOLDER_MODEL}}}}}",
                )
            ],
            "watt",
            12,
            stack=True,
            metric=q.UNATTRIBUTED,
        ),
        Panel(
            "timeseries",
            "Age of the newest reading",
            "Above some seconds requests wait for their joules.",
            [Query(f"max {q.by(*q.DEVICE)} ({q.SAMPLE_AGE}{{{HOST}}})", legend)],
            "s",
            12,
            thresholds=[(5.0, "yellow"), (300.0, "orange")],
            metric=q.SAMPLE_AGE,
        ),
    )
    return Dashboard(
        "melodi-otel-hosts",
        "melodi_otel / Hosts and GPUs",
        "Power, use and readings of every device.",
        (CLUSTER, JOB, HOSTS),
        (("Power", power), ("Work and idleness", work)),
    )
