"""The dashboards as files: what every panel has, that nothing overlaps, and that every series exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from melodi_otel.deploy import files
from melodi_otel.deploy.dashboards import dashboards
from melodi_otel.deploy.settings import Settings, chosen
from melodi_otel.semconv import SPAN_ATTRIBUTES
from melodi_otel.semconv_metrics import METRICS, label_name, prometheus_name

DEPLOY = Path(__file__).parents[2] / "deploy"
NAMES = sorted(dashboards(Settings()))
UNITS = {
    "watt",
    "kwatth",
    "watth",
    "joule",
    "s",
    "bytes",
    "percentunit",
    "none",
    "count:tok/s",
    "count:rounds/s",
    "reqps",
    "massg",
}


def content(name: str) -> dict[str, Any]:
    return json.loads((DEPLOY / files.DASHBOARDS / f"{name}.json").read_text())


def panels(name: str) -> list[dict[str, Any]]:
    return [panel for panel in content(name)["panels"] if panel["type"] != "row"]


@pytest.mark.parametrize("name", NAMES)
def test_every_panel_says_what_it_is(name: str) -> None:
    """Title, description that ends in its metric, unit, words for nothing, a data source that can be picked."""
    for panel in panels(name):
        assert panel["title"]
        if panel["type"] == "text":
            continue
        assert re.search(r"Metric: `[\w:]+`$", panel["description"]), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS
        assert panel["fieldConfig"]["defaults"]["noValue"]
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["type"] in {"stat", "timeseries", "bargauge", "table"}
        assert panel["targets"]


@pytest.mark.parametrize("name", NAMES)
def test_panels_lie_on_the_grid(name: str) -> None:
    """Ids differ; no panel overlaps another or leaves the 24 columns."""
    every = content(name)["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    taken: set[tuple[int, int]] = set()
    for panel in every:
        grid = panel["gridPos"]
        assert 0 <= grid["x"] <= 24 - grid["w"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


@pytest.mark.parametrize("name", NAMES)
def test_queries_read_series_that_exist(name: str) -> None:
    """Names and labels are those of the contract; rates are over an interval that fits the scrapes."""
    known = {"up"}
    for metric in METRICS.values():
        full = prometheus_name(metric)
        known |= {full, *(full.removesuffix("_bucket") + end for end in ("_sum", "_count"))}
    labels = {label_name(attribute) for metric in METRICS.values() for attribute in metric.required + metric.optional}
    labels |= {"le", "job", "instance", "cluster", "host_id", "$by", "who"}
    for panel in panels(name):
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for listed in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
                assert set(listed.split(", ")) <= labels, listed
            for matched in re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression):
                assert matched in labels
            plain = re.sub(r"\b(?:by|on|group_left) \([^)]*\)|\{[^}]*\}|\[[^\]]*\]|\"[^\"]*\"", " ", expression)
            read = {word for word in re.findall(r"\b[a-zA-Z]\w*", plain) if "_" in word or word == "up"}
            assert read - {"histogram_quantile", "label_replace", "label_join"} <= known, expression
            for window in re.findall(r"rate\([^\[]*\[([^\]]*)\]", expression):
                assert window in {"$__rate_interval", "1h"}


@pytest.mark.parametrize("name", NAMES)
def test_drop_downs_follow_the_time(name: str) -> None:
    """Values are asked anew when the range changes; All means everything, hosts without that label too."""
    variables = {variable["name"]: variable for variable in content(name)["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for variable in variables.values():
        if variable["type"] == "query":
            assert variable["refresh"] == 2
            assert variable["allValue"] == ".*"


@pytest.mark.parametrize("name", NAMES)
def test_any_label_can_be_filtered_by(name: str) -> None:
    """Scope, quality and a site's own labels have no drop-down: Grafana's ad-hoc filters reach them."""
    (filters,) = [one for one in content(name)["templating"]["list"] if one["type"] == "adhoc"]
    assert filters["datasource"]["uid"] == "${datasource}"


def test_the_share_that_may_be_over_budget_is_the_settings() -> None:
    """A burn rate of 1 is what was chosen, in the panels as in the alerts."""
    made = files.files(chosen(["slo_over_budget=0.2"]))
    (panel,) = [
        one
        for one in json.loads(made[f"{files.DASHBOARDS}/models.json"])["panels"]
        if one["title"].startswith("Burn rate")
    ]
    assert panel["targets"][0]["expr"].endswith("/ 0.2")
    assert "0.05" not in made[f"{files.DASHBOARDS}/models.json"]


def test_dashboards_lead_to_each_other_and_show_alerts() -> None:
    for name in NAMES:
        made = content(name)
        assert made["uid"] == f"melodi-otel-{name}"
        (link,) = made["links"]
        assert (link["tags"], link["keepTime"], link["includeVars"]) == (["melodi_otel"], True, True)
        assert any("ALERTS" in str(annotation.get("expr")) for annotation in made["annotations"]["list"])


def test_provisioning_fits_grafana() -> None:
    """The keys that Grafana's provisioning knows, and an interval that is the scrape's."""
    source = yaml.safe_load((DEPLOY / files.DATA_SOURCE).read_text())
    assert source["apiVersion"] == 1
    (prometheus,) = source["datasources"]
    assert prometheus.keys() == {"name", "type", "uid", "access", "url", "jsonData"}
    assert prometheus["jsonData"]["timeInterval"] == Settings().span(Settings().scrape_interval_s)
    (provider,) = yaml.safe_load((DEPLOY / files.PROVIDER).read_text())["providers"]
    assert provider["type"] == "file"
    assert provider["options"]["path"]


def test_nothing_of_spans_is_asked_of_prometheus() -> None:
    """Attributes of spans alone are no labels."""
    alone = {label_name(attribute.name) for attribute in SPAN_ATTRIBUTES if attribute.type == "double"}
    metrics = {prometheus_name(metric) for metric in METRICS.values()}
    for name in NAMES:
        text = json.dumps(content(name))
        assert not [word for word in alone if re.search(rf"\b{word}\b", text) and word not in metrics]
