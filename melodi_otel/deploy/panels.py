"""Panels as this project draws them: stat, time series, bar gauge, table and text, each with a title, a description that ends in
its metric, a unit, and words for when there is nothing.

Grafana's foundation SDK builds the JSON; it is needed to write dashboards, not to ship them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from melodi_otel.errors import MissingDependency

SOURCE: Final = "${datasource}"
NOTHING: Final = "no data"


@dataclass(frozen=True, slots=True)
class Query:
    """One query: PromQL, how its series are called, and whether only its newest value is asked for."""

    expression: str
    legend: str = ""
    instant: bool = False
    exemplars: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel.

    Attributes:
        kind: ``stat``, ``timeseries``, ``bargauge``, ``table`` or ``text``.
        title: what it shows.
        description: how to read it; its metric is appended.
        queries: what it asks.
        unit: Grafana's id of the unit.
        width, height: on the grid of 24 columns.
        thresholds: (value, colour) from which on a colour holds, rising.
        stack: whether series are stacked.
        matrix: of a table: the label that names the column, and the one that names the row.
        units: of a table: heading -> unit of the column.
        text: of a text panel, Markdown.
        metric: what the description ends with.
        decimals: after the point; None: as Grafana likes.
        nothing: what stands where there is nothing.
    """

    kind: str
    title: str
    description: str = ""
    queries: Sequence[Query] = ()
    unit: str = "none"
    width: int = 12
    height: int = 8
    thresholds: Sequence[tuple[float, str]] = ()
    stack: bool = False
    matrix: tuple[str, str] = ("", "")
    units: Mapping[str, str] = field(default_factory=dict[str, str])
    text: str = ""
    metric: str = ""
    decimals: int | None = None
    nothing: str = NOTHING


def stat(
    title: str, description: str, expression: str, unit: str, metric: str, *, course: bool = False, **more: Any
) -> Panel:
    """One small figure: of the whole picked range or, with its ``course`` behind it, of now."""
    more = {"width": 4, "height": 4, **more}
    return Panel("stat", title, description, [Query(expression, instant=not course)], unit, metric=metric, **more)


@dataclass(frozen=True, slots=True)
class Variable:
    """A drop-down: the values of ``label`` on ``metric``, or a fixed list."""

    name: str
    title: str
    metric: str = ""
    label: str = ""
    values: Sequence[str] = ()
    multi: bool = True


@dataclass(frozen=True, slots=True)
class Dashboard:
    """One dashboard: its name in links, title, what it is for, drop-downs, and rows of panels by their headings."""

    uid: str
    title: str
    description: str
    variables: Sequence[Variable]
    rows: Sequence[tuple[str, Sequence[Panel]]]
    span: str = "now-1h"


def build(dashboard: Dashboard) -> str:
    """Its JSON.

    Raises:
        MissingDependency: the foundation SDK is not installed; the message has the pip line.
    """
    try:
        from grafana_foundation_sdk.builders import dashboard as builders
        from grafana_foundation_sdk.cog.encoder import JSONEncoder
        from grafana_foundation_sdk.models import dashboard as models
    except ImportError as error:
        raise MissingDependency(
            'dashboards with other settings need the foundation SDK: pip install "melodi-otel[deploy]"'
        ) from error
    source = models.DataSourceRef(type_val="prometheus", uid=SOURCE)
    made = (
        builders.Dashboard(dashboard.title)
        .uid(dashboard.uid)
        .description(dashboard.description)
        .tags(["melodi_otel", "energy", "llm"])
        .refresh("30s")
        .time(dashboard.span, "now")
        .timezone("browser")
        .readonly()
        .tooltip(models.DashboardCursorSync.CROSSHAIR)
        .link(
            builders.DashboardLink("melodi_otel")
            .type(models.DashboardLinkType.DASHBOARDS)
            .tags(["melodi_otel"])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
        .annotation(
            builders.AnnotationQuery()
            .name("Alerts of melodi_otel")
            .datasource(source)
            .enable(True)
            .hide(False)
            .icon_color("orange")
            .expr('ALERTS{alertstate="firing",alertname=~"Melodi.*"}')
        )
        .with_variable(builders.DatasourceVariable("datasource").label("Data source").type("prometheus"))
    )
    for variable in dashboard.variables:
        made.with_variable(_variable(variable, source))
    # Every label that a site has configured, and every one of ours that has no drop-down: Grafana puts it into each query.
    made.with_variable(builders.AdHocVariable("filters").label("Filters").datasource(source))
    identity = 0
    for heading, panels in dashboard.rows:
        if heading:
            made.with_row(builders.Row(heading))
        for panel in panels:
            identity += 1
            made.with_panel(_panel(panel, source).id(identity))
    # The SDK numbers rows itself; ids have to differ all the same.
    content = json.loads(JSONEncoder(sort_keys=True).encode(made.build()))
    for number, panel in enumerate(content["panels"], 1):
        panel["id"] = number
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _variable(variable: Variable, source: Any) -> Any:
    from grafana_foundation_sdk.builders import dashboard as builders
    from grafana_foundation_sdk.models import dashboard as models

    if variable.values:
        options = [
            models.VariableOption(selected=at == 0, text=value, value=value) for at, value in enumerate(variable.values)
        ]
        return (
            builders.CustomVariable(variable.name)
            .label(variable.title)
            .values(",".join(variable.values))
            .options(options)
            .current(options[0])
            .multi(variable.multi)
            .include_all(False)
        )
    return (
        builders.QueryVariable(variable.name)
        .label(variable.title)
        .datasource(source)
        .query(f"label_values({variable.metric}, {variable.label})")
        .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(models.VariableSort.ALPHABETICAL_ASC)
        .multi(variable.multi)
        .include_all(True)
        .all_value(".*")
        .current(models.VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(panel: Panel, source: Any) -> Any:
    from grafana_foundation_sdk.builders import bargauge, common, stat, table, text, timeseries
    from grafana_foundation_sdk.builders import dashboard as builders
    from grafana_foundation_sdk.models import common as kinds
    from grafana_foundation_sdk.models import dashboard as models

    if panel.kind == "text":
        words = text.Panel().title(panel.title).description(panel.description).content(panel.text)
        return words.span(panel.width).height(panel.height)
    made: Any = {"stat": stat, "timeseries": timeseries, "bargauge": bargauge, "table": table}[panel.kind].Panel()
    about = f"{panel.description} Metric: `{panel.metric}`" if panel.metric else panel.description
    made.title(panel.title).description(about).datasource(source).unit(panel.unit).no_value(panel.nothing)
    made.span(panel.width).height(panel.height)
    if panel.decimals is not None:
        made.decimals(panel.decimals)
    steps = [models.Threshold(value=None, color="green" if panel.thresholds else "blue")]
    steps += [models.Threshold(value=value, color=colour) for value, colour in panel.thresholds]
    made.thresholds(builders.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
    for at, query in enumerate(panel.queries):
        made.with_target(_query(query, at, source, table=panel.kind == "table"))
    if panel.kind in {"stat", "bargauge"}:
        made.reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
    if panel.kind == "stat":
        made.color_mode(kinds.BigValueColorMode.VALUE).graph_mode(
            kinds.BigValueGraphMode.AREA if not panel.queries[0].instant else kinds.BigValueGraphMode.NONE
        )
    if panel.kind == "bargauge":
        made.text(common.VizTextDisplayOptions().title_size(14.0).value_size(18.0))
        made.orientation(kinds.VizOrientation.HORIZONTAL).display_mode(kinds.BarGaugeDisplayMode.BASIC)
        made.min(0.0)
    if panel.kind == "timeseries":
        legend = common.VizLegendOptions().show_legend(True).display_mode(kinds.LegendDisplayMode.TABLE)
        made.legend(legend.placement(kinds.LegendPlacement.BOTTOM).calcs(["mean", "max"]))
        made.tooltip(common.VizTooltipOptions().mode(kinds.TooltipDisplayMode.MULTI).sort(kinds.SortOrder.DESCENDING))
        made.line_width(1.5).fill_opacity(70.0 if panel.stack else 8.0).min(0.0)
        if panel.stack:
            made.stacking(common.StackingConfig().mode(kinds.StackingMode.NORMAL).group("A"))
    if panel.kind == "table":
        _table(made, panel, models)
    return made


def _query(query: Query, at: int, source: Any, *, table: bool) -> Any:
    from grafana_foundation_sdk.builders import prometheus
    from grafana_foundation_sdk.models.prometheus import PromQueryFormat

    made = prometheus.Dataquery().expr(query.expression).datasource(source).ref_id("ABCDEFGHIJKLMNOP"[at])
    if query.legend:
        made.legend_format(query.legend)
    if query.instant or table:
        made.instant()
    else:
        made.range().exemplar(query.exemplars)
    return made.format(PromQueryFormat.TABLE) if table else made


def _table(made: Any, panel: Panel, models: Any) -> None:
    column, row = panel.matrix
    options = {"columnField": column, "rowField": row, "valueField": "Value", "emptyValue": "null"}
    made.with_transformation(models.DataTransformerConfig(id_val="groupingToMatrix", options=options))
    rename = {f"{row}\\{column}": row}
    made.with_transformation(
        models.DataTransformerConfig(
            id_val="organize", options={"excludeByName": {}, "indexByName": {}, "renameByName": rename}
        )
    )
    for heading, unit in panel.units.items():
        made.override_by_name(heading, [models.DynamicConfigValue(id_val="unit", value=unit)])
