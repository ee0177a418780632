"""The dashboards on a real Prometheus that scrapes simulated servers: every panel shows something, sums are the meter's."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from melodi_otel.deploy import alerts, recording
from melodi_otel.deploy.books_dashboards import _fully_loaded
from melodi_otel.deploy.budgets import proposals
from melodi_otel.deploy.files import document
from melodi_otel.deploy.queries import increase, unattributed
from melodi_otel.deploy.settings import Settings

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]
ROOT = Path(__file__).parents[2]
Ask = Callable[[str], list[Any]]


@pytest.fixture(scope="module")
def ask(live: str) -> Ask:
    """``ask(promql)`` at the newest moment."""

    def query(expression: str) -> list[Any]:
        with urlopen(f"{live}/api/v1/query?{urlencode({'query': expression})}", timeout=10) as answer:
            return json.load(answer)["data"]["result"]

    return query


@pytest.fixture(scope="module")
def live(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int], system_program: Callable[[str], str]
) -> Iterator[str]:
    """The address of a Prometheus: two hosts under load for 25 s, one of them scraped twice as if by two publishers."""
    prometheus = system_program("prometheus")
    system_program("gcc")  # of the fake NVML library
    place = tmp_path_factory.mktemp("live")
    ports, own = (free_port(), free_port()), free_port()
    trial = Settings(trial=240.0, scrape_interval_s=1.0)
    (place / "r.yml").write_text(document({"groups": [*recording.groups(trial), *alerts.groups(trial)]}))
    (place / "p.yml").write_text(
        document({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": ["r.yml"],
            "scrape_configs": [
                {
                    "job_name": "melodi_otel",
                    "static_configs": [
                        {"targets": [f"127.0.0.1:{port}" for port in ports], "labels": {"cluster": "lab"}},
                    ],
                },
                {
                    "job_name": "melodi_otel_again",
                    "static_configs": [{"targets": [f"localhost:{ports[0]}"], "labels": {"cluster": "lab"}}],
                    "metric_relabel_configs": [
                        {"source_labels": ["__name__"], "regex": "hw_.*", "action": "keep"}
                    ],
                },
            ],
        })
    )  # fmt: skip
    running: list[subprocess.Popen[bytes]] = []
    with (place / "log").open("wb") as log:
        for number, port in enumerate(ports):
            command = [sys.executable, ROOT / "examples/simulated_fleet.py", "--port", port, "--seconds", 600]
            # Two fleets of one host each, so that each has its own port; the second one's host has another number.
            command += ["--budget", "llama-3.1-8b=100,*=5000", "--first", number]
            running.append(subprocess.Popen(list(map(str, command)), stdout=log, stderr=log))
        running.append(
            subprocess.Popen(
                [
                    prometheus, f"--config.file={place}/p.yml", f"--storage.tsdb.path={place}/tsdb",
                    f"--web.listen-address=127.0.0.1:{own}", "--enable-feature=exemplar-storage",
                ], stdout=log, stderr=log,
            )
        )  # fmt: skip

    def query(expression: str) -> list[Any]:
        with urlopen(f"http://127.0.0.1:{own}/api/v1/query?{urlencode({'query': expression})}", timeout=10) as answer:
            return json.load(answer)["data"]["result"]

    try:
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                ready = query("count(count_over_time(up[30s]) >= 25) == 3 and count(melodi_requests_total) > 4")
            except OSError:
                ready = []
            if ready:
                break
            time.sleep(0.5)
        else:
            raise TimeoutError((place / "log").read_text()[-3000:])
        yield f"http://127.0.0.1:{own}"
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(timeout=30)


PICKED = {
    "$cluster": ".*",
    "$job": "melodi_otel.*",
    "$host": ".*",
    "$model": ".*",
    "$by": "tenant",
    "$__rate_interval": "8s",
    "$__range": "20s",
}
DASHBOARDS = sorted((ROOT / "deploy" / "grafana" / "dashboards").glob("*.json"))


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_panel_shows_something(ask: Ask, dashboard: Path) -> None:
    """No PromQL error, no empty panel, no panel of nothing but NaN."""
    empty: list[str] = []
    for panel in json.loads(dashboard.read_text())["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"]
            for variable, value in PICKED.items():
                expression = expression.replace(variable, value)
            if not [one for one in ask(expression) if one["value"][1] != "NaN"]:
                empty.append(f"{panel['title']}: {expression}")
    assert empty == []


@pytest.fixture(scope="module")
def shot(system_program: Callable[[str], str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """``shot(dashboard, url, picture, *options)``: draw it with Grafana's own panels; exit code 1: something is wrong."""
    for name in ("npm", "chromium"):
        system_program(name)
    tool = ROOT / "tools/dashview"
    subprocess.run([tool / "setup"], check=True, timeout=220)

    def draw(*words: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [tool / "shot", *map(str, words)], capture_output=True, text=True, timeout=90, check=False
        )

    return draw


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--light",), ("--width", "700")], ids=["dark", "light", "narrow"])
@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_it_is_drawn(
    live: str,
    ask: Ask,
    shot: Callable[..., subprocess.CompletedProcess[str]],
    dashboard: Path,
    options: tuple[str, ...],
    tmp_path: Path,
) -> None:
    """By Grafana's own code, with nothing to complain of: no error, no empty panel, no unknown variable."""
    picture = tmp_path / "picture.png"
    done = shot(dashboard, live, picture, "--minutes", 1, "--scrape", 1, *options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert picture.stat().st_size > 10_000


def test_budgets_are_proposed_from_what_was(live: str) -> None:
    """What a real Prometheus has seen of both models becomes a budget of each, above its median."""
    made = proposals(live, past="1m", step="5s")
    assert {one.model for one in made} == {"llama-3.1-8b", "llama-3.3-70b"}
    for one in made:
        assert one.usual <= one.dear < one.budget
        assert one.hours > 1


def test_showback_adds_up_to_the_meter(ask: Ask) -> None:
    """Σ tenants + unattributed = the meter, to 0.1 %, at the same scrape: the books, not an extrapolation."""
    (ratio,) = ask(
        "(sum(melodi_energy_attributed_joules_total)"
        " + sum(max by (host_id, hw_id, melodi_energy_bucket, melodi_energy_holder_model)"
        " (melodi_energy_unattributed_joules_total)) + sum(max by (host_id, hw_id) (melodi_energy_residual_joules)))"
        ' / sum(max by (host_id, hw_id) (hw_energy_joules_total{job="melodi_otel"}))'
    )
    assert float(ratio["value"][1]) == pytest.approx(1.0, rel=1e-3)
    tenants = {one["metric"]["tenant"] for one in ask("sum by (tenant) (melodi_energy_attributed_joules_total)")}
    assert tenants == {"acme", "globex", "initech"}


@pytest.mark.parametrize("by", ["tenant", "gen_ai_request_model"])
def test_fully_loaded_is_the_meter(ask: Ask, by: str) -> None:
    """Everybody's joules with what nobody used are the requests' and nobody's together."""
    which = 'cluster=~".*",job="melodi_otel",host_id=~".*"'
    nobody = unattributed(increase, which)
    direct = f"sum by ({by}) (increase(melodi_energy_attributed_joules_total{{{which}}}[20s]))"
    loaded = _fully_loaded(direct, nobody)
    for name, value in (PICKED | {"$by": by}).items():
        nobody, direct, loaded = (one.replace(name, value) for one in (nobody, direct, loaded))
    (ratio,) = ask(f"sum({loaded}) / (sum({direct}) + sum({nobody}))")
    assert float(ratio["value"][1]) == pytest.approx(1.0, rel=1e-6)
    assert all(float(one["value"][1]) > 1.0 - 1e-9 for one in ask(f"{loaded} / {direct}"))


def test_two_publishers_leave_the_watts_right(ask: Ask) -> None:
    """A host that is scraped twice draws what its gauge says, not twice that; and the alert fires."""
    twice = 'host_id="simulated-0"'
    (naive,) = ask(f"sum(rate(hw_energy_joules_total{{{twice}}}[10s]))")
    (once,) = ask(f"sum(max by (host_id, hw_id) (rate(hw_energy_joules_total{{{twice}}}[10s])))")
    (alone,) = ask(f'sum(rate(hw_energy_joules_total{{{twice},job="melodi_otel"}}[10s]))')
    assert float(once["value"][1]) == pytest.approx(float(alone["value"][1]), rel=0.1)
    assert float(naive["value"][1]) > 1.7 * float(once["value"][1])
    fires = ask('ALERTS{alertname="MelodiTwoPublishers"}')
    assert {one["metric"]["host_id"] for one in fires} == {"simulated-0"}
