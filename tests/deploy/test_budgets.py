"""Budgets that are proposed from what a Prometheus has seen."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs

import pytest
from typer.testing import CliRunner

from melodi_otel.cli.app import app
from melodi_otel.deploy.budgets import Proposal, proposals, variable
from melodi_otel.errors import DeployError

ANSWERS = {
    "quantile_over_time(0.5": {"small": "81", "big": "300.4"},
    "quantile_over_time(0.95": {"small": "90.5", "big": "402"},
    "count_over_time": {"small": "5", "big": "168"},
}


@pytest.fixture
def prometheus() -> Iterator[tuple[str, list[str]]]:
    """Its address, and what it was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            (query,) = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())["query"]
            asked.append(query)
            values = next(values for start, values in ANSWERS.items() if query.startswith(start))
            result = [
                {"metric": {"gen_ai_request_model": model}, "value": [0, value]} for model, value in values.items()
            ]
            body = json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}", asked
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("dear", "budget"), [(90.5, 100.0), (402.0, 450.0), (0.0091, 0.011), (100.0, 110.0), (1.0, 1.1)]
)
def test_a_budget_has_a_margin_and_two_digits(dear: float, budget: float) -> None:
    assert Proposal("m", dear, dear, 1).budget == budget


def test_one_per_model(prometheus: tuple[str, list[str]]) -> None:
    url, asked = prometheus
    made = proposals(url)
    assert made == [Proposal("big", 300.4, 402.0, 168), Proposal("small", 81.0, 90.5, 5)]
    assert variable(made) == "MELODI_ENERGY_BUDGET=big=450,small=100"
    assert all(query.endswith("[7d:1h])") for query in asked)


def test_the_command_prints_them_and_writes_them(prometheus: tuple[str, list[str]], tmp_path) -> None:
    """Alone it only prints; a model of few hours is named."""
    url, _ = prometheus
    done = CliRunner().invoke(app, ["deploy", "--budgets-from", url])
    assert done.exit_code == 0, done.output
    assert "MELODI_ENERGY_BUDGET=big=450,small=100" in done.output
    assert "few hours, so take care: small" in done.output
    done = CliRunner().invoke(app, ["deploy", "--budgets-from", url, "--out", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "budgets.env").read_text().splitlines()[-1] == "MELODI_ENERGY_BUDGET=big=450,small=100"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "ftp://x", "127.0.0.1:9090"])
def test_who_cannot_be_asked_is_named(url: str) -> None:
    with pytest.raises(DeployError, match=url):
        proposals(url)


def test_nothing_seen_is_no_budget(prometheus: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for start in ANSWERS:
        monkeypatch.setitem(ANSWERS, start, {})
    with pytest.raises(DeployError, match="knows no request"):
        proposals(prometheus[0])
