"""A collector for spans, a store for traces, and all of it together as a compose file.

Neither a collector nor Tempo can be started in this project's tests; what is written here follows their documentation, and
tests check that it is whole: every component that a pipeline names is there, every file that is mounted exists.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from melodi_otel import semconv
from melodi_otel.deploy.settings import Settings

COLLECTOR: Final = "otelcol/collector.yml"
BALANCER: Final = "otelcol/balancer.yml"
TEMPO: Final = "tempo/tempo.yml"
COMPOSE: Final = "compose.yaml"
COMPOSE_PROMETHEUS: Final = "compose/prometheus.yml"
COMPOSE_ALERTMANAGER: Final = "compose/alertmanager.yml"
COMPOSE_SOURCES: Final = "compose/datasources.yml"

_IMAGES: Final = {
    "prometheus": "prom/prometheus:v3.5.0",
    "alertmanager": "prom/alertmanager:v0.28.1",
    "grafana": "grafana/grafana:12.1.1",
    "tempo": "grafana/tempo:2.8.2",
    "collector": "otel/opentelemetry-collector-contrib:0.134.0",
}
_CHECKOUT: Final = "${CHECKOUT:-..}"
_RECEIVERS: Final[Mapping[str, Any]] = {
    "otlp": {"protocols": {"grpc": {"endpoint": "0.0.0.0:4317"}, "http": {"endpoint": "0.0.0.0:4318"}}}
}
_LIMITER: Final[Mapping[str, Any]] = {
    "memory_limiter": {"check_interval": "1s", "limit_percentage": 80, "spike_limit_percentage": 20}
}


def collector(settings: Settings) -> Mapping[str, Any]:
    """OTLP in; spans to Tempo, expensive and failed ones all of them, of the others a part; metrics to Prometheus.

    A trace is decided upon once it is ``decision_wait`` old: spans come up to the span wait (10 s) later than they end.
    """
    expensive = f'attributes["{semconv.TOTAL}"] != nil and attributes["{semconv.TOTAL}"] > '
    return {
        "receivers": _RECEIVERS,
        "processors": {
            **_LIMITER,
            "tail_sampling": {
                "decision_wait": "30s",
                "num_traces": 50000,
                "policies": [
                    {
                        "name": "expensive requests",
                        "type": "ottl_condition",
                        "ottl_condition": {"error_mode": "ignore", "span": [f"{expensive}{settings.keep_above_j:.1f}"]},
                    },
                    {
                        "name": "failed requests",
                        "type": "status_code",
                        "status_code": {"status_codes": ["ERROR"]},
                    },
                    {
                        "name": "a part of the others",
                        "type": "probabilistic",
                        "probabilistic": {"sampling_percentage": settings.keep_percent},
                    },
                ],
            },
            "batch": {"send_batch_size": 8192, "timeout": "5s"},
        },
        "exporters": {
            "otlp/tempo": {"endpoint": "tempo:4317", "tls": {"insecure": True}},
            "otlphttp/prometheus": {"endpoint": "http://prometheus:9090/api/v1/otlp", "tls": {"insecure": True}},
        },
        "extensions": {"health_check": {"endpoint": "0.0.0.0:13133"}},
        "service": {
            "extensions": ["health_check"],
            "pipelines": {
                "traces": {
                    "receivers": ["otlp"],
                    "processors": ["memory_limiter", "tail_sampling", "batch"],
                    "exporters": ["otlp/tempo"],
                },
                "metrics": {
                    "receivers": ["otlp"],
                    "processors": ["memory_limiter", "batch"],
                    "exporters": ["otlphttp/prometheus"],
                },
            },
        },
    }


def balancer() -> Mapping[str, Any]:
    """In front of several collectors: all spans of a trace go to the same one, or tail sampling would see parts of it."""
    return {
        "receivers": _RECEIVERS,
        "processors": _LIMITER,
        "exporters": {
            "loadbalancing": {
                "routing_key": "traceID",
                "protocol": {"otlp": {"tls": {"insecure": True}}},
                "resolver": {"dns": {"hostname": "collector-headless", "port": "4317"}},
            }
        },
        "service": {
            "pipelines": {
                "traces": {"receivers": ["otlp"], "processors": ["memory_limiter"], "exporters": ["loadbalancing"]}
            }
        },
    }


def tempo() -> Mapping[str, Any]:
    """One Tempo that keeps two days on its own disk."""
    return {
        "server": {"http_listen_port": 3200},
        "distributor": {"receivers": {"otlp": {"protocols": {"grpc": {"endpoint": "0.0.0.0:4317"}}}}},
        "compactor": {"compaction": {"block_retention": "48h"}},
        "storage": {
            "trace": {"backend": "local", "local": {"path": "/var/tempo/blocks"}, "wal": {"path": "/var/tempo/wal"}}
        },
    }


def tempo_source(url: str) -> Mapping[str, Any]:
    """Grafana's data source of traces; exemplars of the dashboards lead to its uid."""
    return {"name": "Tempo", "type": "tempo", "uid": "tempo", "access": "proxy", "url": url}


def compose() -> Mapping[str, Any]:
    """Agent, a simulated load, and everything that shows what they measure; Grafana on http://127.0.0.1:3000."""

    def service(image: str, *, ports: list[str], volumes: list[str], **more: Any) -> dict[str, Any]:
        published = [f"127.0.0.1:{port}" for port in ports]
        return {"image": _IMAGES[image], "ports": published, "volumes": volumes, "restart": "unless-stopped", **more}

    ours = {"build": {"context": _CHECKOUT, "dockerfile": "deploy/docker/Dockerfile"}, "image": "melodi-otel-agent"}
    return {
        "name": "melodi-otel",
        "services": {
            "agent": {
                **ours,
                "pid": "host",
                "cap_drop": ["ALL"],
                "cap_add": ["DAC_READ_SEARCH", "PERFMON"],
                "read_only": True,
                "ports": ["127.0.0.1:9464:9464"],
                "volumes": ["/sys:/host/sys:ro", "/etc/machine-id:/etc/machine-id:ro", "socket:/run/melodi-otel"],
                "restart": "unless-stopped",
            },
            "demo": {
                "build": {"context": _CHECKOUT, "dockerfile": "deploy/docker/demo.Dockerfile"},
                "command": [
                    "--servers",
                    "2",
                    "--address",
                    "0.0.0.0",  # noqa: S104  # inside of a container
                    "--port",
                    "9470",
                    "--seconds",
                    "3600",
                    "--budget",
                    "*=400",
                ],
                "restart": "unless-stopped",
            },
            "prometheus": service(
                "prometheus",
                ports=["9090:9090"],
                volumes=[
                    "./compose/prometheus.yml:/etc/prometheus/prometheus.yml:ro",
                    "./prometheus/rules:/etc/prometheus/rules:ro",
                    "prometheus:/prometheus",
                ],
                command=[
                    "--config.file=/etc/prometheus/prometheus.yml",
                    "--enable-feature=exemplar-storage",
                    "--web.enable-otlp-receiver",
                ],
            ),
            "alertmanager": service(
                "alertmanager",
                ports=["9093:9093"],
                volumes=["./compose/alertmanager.yml:/etc/alertmanager/alertmanager.yml:ro"],
            ),
            "grafana": service(
                "grafana",
                ports=["3000:3000"],
                volumes=[
                    "./compose/datasources.yml:/etc/grafana/provisioning/datasources/melodi_otel.yml:ro",
                    "./grafana/provisioning/dashboards:/etc/grafana/provisioning/dashboards:ro",
                    "./grafana/dashboards:/var/lib/grafana/dashboards/melodi_otel:ro",
                ],
                environment={"GF_AUTH_ANONYMOUS_ENABLED": "true", "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer"},
                depends_on=["prometheus", "tempo"],
            ),
            "collector": service(
                "collector",
                ports=["4317:4317", "4318:4318"],
                volumes=["./otelcol/collector.yml:/etc/otelcol-contrib/config.yaml:ro"],
                depends_on=["tempo", "prometheus"],
            ),
            "tempo": service(
                "tempo",
                ports=["3200:3200"],
                volumes=["./tempo/tempo.yml:/etc/tempo.yml:ro", "tempo:/var/tempo"],
                command=["-config.file=/etc/tempo.yml"],
            ),
        },
        "volumes": {"socket": {}, "prometheus": {}, "tempo": {}},
    }
