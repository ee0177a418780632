"""What is deployed: current, accepted by the programs that read it, made of names that exist, and each alert tested."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from melodi_otel.cli.app import app
from melodi_otel.deploy import alerts, files, recording
from melodi_otel.deploy.settings import Settings, chosen
from melodi_otel.errors import ConfigError
from melodi_otel.semconv_metrics import METRICS, prometheus_name
from tests.deploy.programs import DEPLOY, program

ROOT = Path(__file__).parents[2]


def expressions() -> list[str]:
    every = [rule["expr"] for group in recording.groups(Settings()) for rule in group["rules"]]
    return every + [alert.expression for alert in alerts.alerts(Settings())]


@pytest.mark.parametrize("name", files.files(Settings()))
def test_committed_files_are_those_of_the_code(name: str) -> None:
    """``scripts/deploy_files.py`` has been run."""
    assert (DEPLOY / name).read_text() == files.files(Settings())[name]


def test_promtool_accepts_rules_and_configuration(tmp_path: Path) -> None:
    for arguments in (
        ("check", "config", "prometheus/prometheus.yml"),
        ("check", "rules", "--lint-fatal", DEPLOY / files.RULES, DEPLOY / files.ALERTS),
    ):
        done = program("promtool", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr


def test_discovery_in_a_cluster_keeps_the_agents() -> None:
    """Debian's promtool knows no Kubernetes, so the parts are looked at: pods, those of the agent, its port."""
    (job,) = yaml.safe_load((DEPLOY / files.KUBERNETES).read_text())["scrape_configs"]
    assert job["kubernetes_sd_configs"] == [{"role": "pod"}]
    keep = job["relabel_configs"][0]
    assert (keep["action"], keep["regex"]) == ("keep", "melodi-otel-agent;metrics")


def test_every_alert_fires_and_keeps_quiet() -> None:
    """``promtool test rules``: what makes each alert fire, and what beside it does not."""
    done = program(
        "promtool",
        "test",
        "rules",
        "prometheus/tests/melodi_otel_test.yml",
        "prometheus/tests/melodi_otel_days_test.yml",
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_amtool_accepts_the_alertmanagers_configuration() -> None:
    done = program("amtool", "check-config", DEPLOY / files.ALERTMANAGER)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_exists() -> None:
    """Every series that a rule reads is one of the contract's, of Prometheus itself, or of another rule."""
    known = {"up", *(rule["record"] for group in recording.groups(Settings()) for rule in group["rules"])}
    for metric in METRICS.values():
        name = prometheus_name(metric)
        known |= {name, *(name.removesuffix("_bucket") + end for end in ("_sum", "_count"))}
    read = set()
    for expression in expressions():
        text = re.sub(r'"[^"]*"', "", expression)
        text = re.sub(r"\{[^}]*\}|\[[^\]]*\]|(by|on|without|group_left)\s*\([^)]*\)", " ", text)
        read |= {word for word in re.findall(r"[a-zA-Z_:][\w:]*", text) if "_" in word or ":" in word}
    read -= {"histogram_quantile", "label_replace", "avg_over_time", "max_over_time", "group_left"}
    assert read
    assert read <= known


@pytest.mark.parametrize("name", sorted({alert.name for alert in alerts.alerts(Settings())}))
def test_every_alert_has_a_page_and_a_test(name: str) -> None:
    """It is in docs/runbooks/ with what it means and what to do, in the list of pages, and in promtool's tests."""
    page = (ROOT / "docs" / "runbooks" / f"{name}.md").read_text()
    for heading in ("## What it means", "## What it does to you", "## Look", "## Do"):
        assert heading in page
    assert f"({name}.md)" in (ROOT / "docs" / "runbooks" / "index.md").read_text()
    tests = "".join(path.read_text() for path in (DEPLOY / "prometheus" / "tests").glob("*.yml"))
    assert f'alertname="{name}",alertstate="firing"' in tests or f"alertname: {name}" in tests


def test_every_page_has_an_alert() -> None:
    named = {alert.name for alert in alerts.alerts(Settings())}
    assert {path.stem for path in (ROOT / "docs" / "runbooks").glob("Melodi*.md")} == named


def test_queries_of_the_pages_read_series_that_exist() -> None:
    known = {prometheus_name(metric).removesuffix("_bucket") for metric in METRICS.values()} | {"up"}
    known |= {rule["record"] for group in recording.groups(Settings()) for rule in group["rules"]}
    for path in (ROOT / "docs" / "runbooks").glob("Melodi*.md"):
        for query in re.findall(r"```promql\n(.*?)```", path.read_text(), flags=re.DOTALL):
            plain = re.sub(r"by \([^)]*\)|\{[^}]*\}", "", query)
            for word in re.findall(r"\b(?:melodi|hw|gen_ai|model|host_hw|showback)[\w:]*", plain):
                if word.endswith(("_total", "_seconds", "_watts", "_joules", "_ratio", "_bucket")) or ":" in word:
                    assert word.removesuffix("_bucket") in known, f"{path.name}: {word}"


def test_nobody_is_woken() -> None:
    assert {alert.severity for alert in alerts.alerts(Settings())} == {"warning", "info"}


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "trial", "text"),
    [(3600.0, 1.0, "1h"), (86_400.0, 1.0, "1d"), (300.0, 1.0, "5m"), (3600.0, 120.0, "30s"), (300.0, 600.0, "500ms")],
)
def test_durations(seconds: float, trial: float, text: str) -> None:
    assert Settings(trial=trial).span(seconds) == text


def test_windows_hold_four_scrapes() -> None:
    """A rate over less than two scrapes is nothing: with scrapes of two minutes the short window is eight."""
    rules = {
        rule["record"]: rule["expr"]
        for group in recording.groups(Settings(scrape_interval_s=120.0))
        for rule in group["rules"]
    }
    assert "[8m]" in rules[recording.POWER]


@pytest.mark.parametrize("pair", ["trial", "nothing=1", "trial=0", "trial=x", "idle_part=2"])
def test_settings_that_cannot_be(pair: str) -> None:
    with pytest.raises(ConfigError, match=f"--set {pair}: allowed is"):
        chosen([pair])


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["deploy", *arguments])


def test_deploy_writes_everything(tmp_path: Path) -> None:
    """All files and the alerts' pages; what it wrote is listed."""
    done = run("--out", str(tmp_path / "d"))
    assert done.exit_code == 0, done.output
    assert (tmp_path / "d" / files.ALERTS).read_text() == (DEPLOY / files.ALERTS).read_text()
    assert (tmp_path / "d" / "runbooks" / "MelodiAgentDown.md").exists()
    assert files.RULES in done.output


def test_deploy_with_settings(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path), "--set", "job=llm-.*", "--set", "runbooks=https://docs.example/runbooks")
    assert done.exit_code == 0, done.output
    (group,) = yaml.safe_load((tmp_path / files.ALERTS).read_text())["groups"]
    (down,) = [rule for rule in group["rules"] if rule["alert"] == "MelodiAgentDown"]
    assert down["expr"] == 'up{job=~"llm-.*"} == 0'
    assert down["annotations"]["runbook_url"] == "https://docs.example/runbooks/MelodiAgentDown/"


def test_deploy_lists_its_settings() -> None:
    done = run("--list")
    assert done.exit_code == 0
    for name in ("job=.*melodi.*", "trial=1.0", "idle_kwh=1.0"):
        assert name in done.output


def test_deploy_to_a_place_that_cannot_be(tmp_path: Path) -> None:
    """A file in its place is named."""
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["deploy", "--out", str(tmp_path / "file")])
    assert done.exit_code != 0
    assert "file" in str(done.exception)


def test_the_wheel_ships_the_files() -> None:
    """The folders that the wheel takes up are those that the command copies."""
    text = (ROOT / "pyproject.toml").read_text()
    assert 'deploy = "melodi_otel/deploy/shipped"' in text
    assert '"docs/runbooks" = "melodi_otel/deploy/shipped/runbooks"' in text
    assert importlib.util.find_spec("melodi_otel.deploy") is not None
