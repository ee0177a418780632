"""The deployed files, as text by their place below ``deploy/``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from melodi_otel.deploy import alerts, panels, recording
from melodi_otel.deploy.dashboards import dashboards
from melodi_otel.deploy.settings import Settings
from melodi_otel.errors import DeployError, MissingDependency

RULES: Final = "prometheus/rules/melodi_otel.rules.yml"
ALERTS: Final = "prometheus/rules/melodi_otel.alerts.yml"
SCRAPE: Final = "prometheus/prometheus.yml"
KUBERNETES: Final = "prometheus/scrape_kubernetes.yml"
TARGETS: Final = "prometheus/targets/melodi_otel.yml"
DASHBOARDS: Final = "grafana/dashboards"
DATA_SOURCE: Final = "grafana/provisioning/datasources/melodi_otel.yml"
PROVIDER: Final = "grafana/provisioning/dashboards/melodi_otel.yml"
ALERTMANAGER: Final = "alertmanager/alertmanager.yml"

_PACKED: Final = Path(__file__).parent / "shipped"
_SOURCE: Final = Path(__file__).parents[2] / "deploy"
_HEAD: Final = (
    "# Written by melodi-otel deploy; change its settings (melodi-otel deploy --help) rather than this file.\n"
)


def shipped() -> Path:
    """The folder of all files with the default settings: in the wheel, or in a checkout.

    Raises:
        DeployError: it is nowhere.
    """
    for place in (_PACKED, _SOURCE):
        if place.is_dir():
            return place
    raise DeployError("the files that melodi-otel deploy writes are not part of this installation: install the wheel")


def pages() -> Path:
    """The folder of the alerts' pages: in the wheel, or in a checkout."""
    place = shipped() / "runbooks"
    return place if place.is_dir() else _SOURCE.parent / "docs" / "runbooks"


def files(settings: Settings) -> dict[str, str]:
    """Everything, by its place.

    Raises:
        MissingDependency: PyYAML or Grafana's foundation SDK is not installed; the message has the pip line.
    """
    return {
        RULES: document({"groups": recording.groups(settings)}),
        ALERTS: document({"groups": alerts.groups(settings)}),
        SCRAPE: document(scrape(settings)),
        KUBERNETES: document(kubernetes(settings)),
        TARGETS: document([{"targets": ["127.0.0.1:9464"], "labels": {"cluster": "laptop"}}]),
        ALERTMANAGER: document(alertmanager()),
        **{f"{DASHBOARDS}/{name}.json": panels.build(made) for name, made in dashboards().items()},
        DATA_SOURCE: document(data_source(settings)),
        PROVIDER: document(provider()),
    }


def document(content: Any) -> str:
    """YAML that a person can read: long expressions in blocks, keys in the order they were written in."""
    try:
        import yaml
    except ImportError as error:
        raise MissingDependency('files with other settings need PyYAML: pip install "melodi-otel[deploy]"') from error

    class Dumper(yaml.SafeDumper):
        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            super().increase_indent(flow, False)

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=">" if len(value) > 100 else None)

    Dumper.add_representer(str, text)
    return _HEAD + yaml.dump(content, Dumper=Dumper, sort_keys=False, width=110, allow_unicode=True)


def scrape(settings: Settings) -> Mapping[str, Any]:
    """Scrape configuration: hosts in a file that is read again when it changes, and this Prometheus' rules."""
    return {
        "global": {
            "scrape_interval": settings.span(settings.scrape_interval_s * settings.trial),
            "evaluation_interval": settings.span(max(15.0, settings.scrape_interval_s * settings.trial)),
        },
        "rule_files": ["rules/melodi_otel.*.yml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": ["127.0.0.1:9093"]}]}]},
        "scrape_configs": [
            {"job_name": "melodi_otel", "file_sd_configs": [{"files": ["targets/*.yml"]}]},
        ],
    }


def kubernetes(settings: Settings) -> Mapping[str, Any]:
    """For ``scrape_config_files`` of a Prometheus inside a cluster without the operator: one target per agent's pod."""
    pod = "__meta_kubernetes_pod"
    return {
        "scrape_configs": [
            {
                "job_name": "melodi_otel_agent",
                "scrape_interval": settings.span(settings.scrape_interval_s * settings.trial),
                "kubernetes_sd_configs": [{"role": "pod"}],
                "relabel_configs": [
                    {
                        "source_labels": [f"{pod}_label_app_kubernetes_io_name", f"{pod}_container_port_name"],
                        "regex": "melodi-otel-agent;metrics",
                        "action": "keep",
                    },
                    {"source_labels": [f"{pod}_node_name"], "target_label": "node"},
                    {"source_labels": [f"{pod}_name"], "target_label": "pod"},
                ],
            }
        ]
    }


def data_source(settings: Settings) -> Mapping[str, Any]:
    """Grafana's data source; its interval makes ``$__rate_interval`` right, and exemplars lead to traces."""
    return {
        "apiVersion": 1,
        "datasources": [
            {
                "name": "Prometheus",
                "type": "prometheus",
                "uid": "melodi-otel-prometheus",
                "access": "proxy",
                "url": "http://127.0.0.1:9090",
                "jsonData": {
                    "timeInterval": settings.span(settings.scrape_interval_s * settings.trial),
                    "exemplarTraceIdDestinations": [{"name": "trace_id", "datasourceUid": "tempo"}],
                },
            }
        ],
    }


def provider() -> Mapping[str, Any]:
    """Where Grafana finds the dashboards."""
    return {
        "apiVersion": 1,
        "providers": [
            {
                "name": "melodi_otel",
                "folder": "melodi_otel",
                "type": "file",
                "options": {"path": "/var/lib/grafana/dashboards/melodi_otel"},
            }
        ],
    }


def alertmanager() -> Mapping[str, Any]:
    """An Alertmanager that opens one ticket per model or device: nothing of energy wakes anybody."""
    return {
        "route": {
            "receiver": "tickets",
            "group_by": ["alertname", "cluster", "gen_ai_request_model", "host_id"],
            "group_wait": "1m",
            "group_interval": "15m",
            "repeat_interval": "1w",
            "routes": [{"matchers": ['severity="info"'], "receiver": "tickets", "repeat_interval": "4w"}],
        },
        "inhibit_rules": [
            {
                "source_matchers": ['alertname="MelodiAgentDown"'],
                "target_matchers": ['alertname=~"MelodiSensor.*"'],
                "equal": ["instance"],
            }
        ],
        "receivers": [
            {"name": "tickets", "webhook_configs": [{"url": "http://127.0.0.1:8080/tickets", "send_resolved": True}]}
        ],
    }
