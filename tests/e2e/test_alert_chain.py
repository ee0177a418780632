"""A load whose tokens cost more than their budget: endpoint, Prometheus, rules, Alertmanager, and a ticket at the end."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from melodi_otel.deploy import alerts, recording
from melodi_otel.deploy.files import document
from melodi_otel.deploy.settings import Settings

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(150)]
ROOT = Path(__file__).parents[2]
TRIAL = Settings(trial=240.0, scrape_interval_s=0.5)
"""An hour is 15 s."""


class Tickets:
    """A webhook receiver."""

    def __init__(self) -> None:
        self.told: list[dict[str, Any]] = []
        self.came = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.told += json.loads(self.rfile.read(int(self.headers["Content-Length"])))["alerts"]
                outer.came.set()
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def tickets() -> Iterator[Tickets]:
    made = Tickets()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Any]:
    """``started(name, command…)``: a program that is stopped at the end; its output is in a file of that name."""
    running: list[subprocess.Popen[bytes]] = []

    def start(name: str, *command: object) -> subprocess.Popen[bytes]:
        with (tmp_path / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log, cwd=tmp_path)
        running.append(process)
        return process

    yield start
    for process in reversed(running):
        process.terminate()
    for process in running:
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def test_a_budget_that_is_left_becomes_a_ticket(
    tmp_path: Path,
    started: Any,
    tickets: Tickets,
    capsys: pytest.CaptureFixture[str],
    free_port: Callable[[], int],
    system_program: Callable[[str], str],
) -> None:
    """Within a minute: of the model that is over its budget, by both alerts, and not of the one within."""
    prometheus, alertmanager = system_program("prometheus"), system_program("prometheus-alertmanager")
    system_program("gcc")  # of the fake NVML library
    load, rules, routes = free_port(), free_port(), free_port()
    rules_folder = tmp_path / "rules"
    rules_folder.mkdir()
    (rules_folder / "r.yml").write_text(document({"groups": recording.groups(TRIAL)}))
    (rules_folder / "a.yml").write_text(document({"groups": alerts.groups(TRIAL)}))
    (tmp_path / "prometheus.yml").write_text(
        document({
            "global": {"scrape_interval": "500ms", "scrape_timeout": "400ms", "evaluation_interval": "500ms"},
            "rule_files": [str(rules_folder / "*.yml")],
            "alerting": {"alertmanagers": [{"static_configs": [{"targets": [f"127.0.0.1:{routes}"]}]}]},
            "scrape_configs": [
                {"job_name": "melodi_otel", "static_configs": [{"targets": [f"127.0.0.1:{load}"]}]},
            ],
        })
    )  # fmt: skip
    (tmp_path / "alertmanager.yml").write_text(
        document({
            "route": {"receiver": "tickets", "group_by": ["alertname"], "group_wait": "100ms", "group_interval": "1s"},
            "receivers": [{"name": "tickets", "webhook_configs": [{"url": tickets.url}]}],
        })
    )  # fmt: skip
    began = time.monotonic()
    started(
        "load", sys.executable, ROOT / "examples" / "simulated_fleet.py", "--port", load, "--seconds", 120,
        "--budget", "llama-3.1-8b=1,*=1000000",
    )  # fmt: skip
    started(
        "alertmanager", alertmanager, f"--config.file={tmp_path}/alertmanager.yml", f"--storage.path={tmp_path}/am",
        f"--web.listen-address=127.0.0.1:{routes}", "--cluster.listen-address=",
    )  # fmt: skip
    started(
        "prometheus", prometheus, f"--config.file={tmp_path}/prometheus.yml", f"--storage.tsdb.path={tmp_path}/tsdb",
        f"--web.listen-address=127.0.0.1:{rules}",
    )  # fmt: skip
    wanted = {"MelodiEnergyPerTokenOverBudget", "MelodiRequestsOverBudget"}
    found: dict[str, dict[str, Any]] = {}
    while time.monotonic() - began < 60.0 and wanted - found.keys():
        tickets.came.wait(1.0)
        tickets.came.clear()
        for alert in tickets.told:
            found.setdefault(alert["labels"]["alertname"], alert)
    took = time.monotonic() - began
    logs = "\n".join(path.read_text()[-2000:] for path in tmp_path.glob("*.log"))
    assert found.keys() >= wanted, f"{took:.0f} s: {sorted(found)}\n{logs}"
    for name in wanted:
        alert = found[name]
        assert alert["labels"]["gen_ai_request_model"] == "llama-3.1-8b"
        assert alert["labels"]["severity"] == "warning"
        assert alert["annotations"]["runbook_url"] == f"runbooks/{name}.md"
        assert "llama-3.1-8b" in alert["annotations"]["description"]
    models = {a["labels"].get("gen_ai_request_model") for a in tickets.told if a["labels"]["alertname"] in wanted}
    assert models == {"llama-3.1-8b"}
    with capsys.disabled():
        print(
            f"\n  both tickets after {took:.1f} s; all: {sorted({a['labels']['alertname'] for a in tickets.told})}",
            end="",
        )
