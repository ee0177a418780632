"""The deployed files, as text by their place below ``deploy/``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from melodi_otel.deploy import alerts, panels, recording, stack
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
CHART: Final = "kubernetes/melodi-otel"

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
    boards = {name: panels.build(made) for name, made in dashboards(settings).items()}
    rules, tickets = document({"groups": recording.groups(settings)}), document({"groups": alerts.groups(settings)})
    return {
        RULES: rules,
        ALERTS: tickets,
        SCRAPE: document(scrape(settings)),
        KUBERNETES: document(kubernetes(settings)),
        TARGETS: document([{"targets": ["127.0.0.1:9464"], "labels": {"cluster": "laptop"}}]),
        ALERTMANAGER: document(alertmanager("http://127.0.0.1:8080/tickets")),
        **{f"{DASHBOARDS}/{name}.json": made for name, made in boards.items()},
        # A chart reads files below its own folder only.
        **{f"{CHART}/files/dashboards/{name}.json": made for name, made in boards.items()},
        f"{CHART}/files/{Path(RULES).name}": rules,
        f"{CHART}/files/{Path(ALERTS).name}": tickets,
        DATA_SOURCE: document(data_source(settings)),
        PROVIDER: document(provider()),
        stack.COLLECTOR: document(stack.collector(settings)),
        stack.BALANCER: document(stack.balancer()),
        stack.TEMPO: document(stack.tempo()),
        stack.COMPOSE: document(stack.compose()),
        stack.COMPOSE_PROMETHEUS: document(
            scrape(settings, ("agent:9464", "demo:9470", "demo:9471"), alertmanagers="alertmanager:9093")
        ),
        stack.COMPOSE_ALERTMANAGER: document(alertmanager(None)),
        stack.COMPOSE_SOURCES: document(
            data_source(settings, "http://prometheus:9090", stack.tempo_source("http://tempo:3200"))
        ),
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


def scrape(settings: Settings, targets: Sequence[str] = (), alertmanagers: str = "127.0.0.1:9093") -> Mapping[str, Any]:
    """Scrape configuration: these hosts, else those in a file that is read again when it changes, and Prometheus' rules."""
    hosts = (
        {"static_configs": [{"targets": [*targets]}]}
        if targets
        else {"file_sd_configs": [{"files": ["targets/*.yml"]}]}
    )
    return {
        "global": {
            "scrape_interval": settings.span(settings.scrape_interval_s * settings.trial),
            "evaluation_interval": settings.span(max(15.0, settings.scrape_interval_s * settings.trial)),
        },
        "rule_files": ["rules/melodi_otel.*.yml"],
        "alerting": {"alertmanagers": [{"static_configs": [{"targets": [alertmanagers]}]}]},
        "scrape_configs": [
            {"job_name": "melodi_otel", **hosts},
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


def data_source(
    settings: Settings, url: str = "http://127.0.0.1:9090", *others: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Grafana's data source; its interval makes ``$__rate_interval`` right, and exemplars lead to traces."""
    return {
        "apiVersion": 1,
        "datasources": [
            {
                "name": "Prometheus",
                "type": "prometheus",
                "uid": "melodi-otel-prometheus",
                "access": "proxy",
                "url": url,
                "jsonData": {
                    "timeInterval": settings.span(settings.scrape_interval_s * settings.trial),
                    "exemplarTraceIdDestinations": [{"name": "trace_id", "datasourceUid": "tempo"}],
                },
            },
            *others,
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


def alertmanager(url: str | None) -> Mapping[str, Any]:
    """An Alertmanager that opens one ticket per model or device: nothing of energy wakes anybody.

    ``url``: who is told; None: nobody, its page shows them.
    """
    told = {"webhook_configs": [{"url": url, "send_resolved": True}]} if url else {}
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
        "receivers": [{"name": "tickets", **told}],
    }
