"""Budgets that are proposed from what a Prometheus has seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from urllib.parse import parse_qs

import pytest
from typer.testing import CliRunner

from melodi_otel.cli.app import app
from melodi_otel.deploy.budgets import Proposal, proposals, variable
from melodi_otel.errors import DeployError
from melodi_otel.testing.http import PostServer

ANSWERS = {
    "quantile_over_time(0.5": {"small": "81", "big": "300.4"},
    "quantile_over_time(0.95": {"small": "90.5", "big": "402"},
    "count_over_time": {"small": "5", "big": "168"},
}


@pytest.fixture
def prometheus() -> Iterator[PostServer]:
    """It answers by the beginning of what it is asked."""

    def answer(body: bytes) -> tuple[int, bytes]:
        query = asked(body)
        values = next(values for start, values in ANSWERS.items() if query.startswith(start))
        result = [{"metric": {"gen_ai_request_model": model}, "value": [0, value]} for model, value in values.items()]
        return 200, json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}}).encode()

    with PostServer(answer) as server:
        yield server


def asked(body: bytes) -> str:
    """The query of a POST."""
    return parse_qs(body.decode())["query"][0]


@pytest.mark.parametrize(
    ("dear", "budget"), [(90.5, 100.0), (402.0, 450.0), (0.0091, 0.011), (100.0, 110.0), (1.0, 1.1)]
)
def test_a_budget_has_a_margin_and_two_digits(dear: float, budget: float) -> None:
    assert Proposal("m", dear, dear, 1).budget == budget


def test_one_per_model(prometheus: PostServer) -> None:
    made = proposals(prometheus.url)
    assert made == [Proposal("big", 300.4, 402.0, 168), Proposal("small", 81.0, 90.5, 5)]
    assert variable(made) == "MELODI_ENERGY_BUDGET=big=450,small=100"
    assert all(query.endswith("[7d:1h])") for query in map(asked, prometheus.bodies))


def test_the_command_prints_them_and_writes_them(prometheus: PostServer, tmp_path) -> None:
    """Alone it only prints; a model of few hours is named."""
    url = prometheus.url
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


def test_nothing_seen_is_no_budget(prometheus: PostServer, monkeypatch: pytest.MonkeyPatch) -> None:
    for start in ANSWERS:
        monkeypatch.setitem(ANSWERS, start, {})
    with pytest.raises(DeployError, match="knows no request"):
        proposals(prometheus.url)
