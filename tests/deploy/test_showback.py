"""Fully loaded joules, by promtool's own engine on series of whole numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from melodi_otel.deploy import promql as q
from melodi_otel.deploy.books_dashboards import _fully_loaded
from melodi_otel.deploy.queries import MODEL, increase, unattributed
from tests.deploy.programs import program

TARGET = 'instance="a:9464",job="melodi_otel",cluster="lab",host_id="h"'
PICKED = {"$cluster": ".*", "$job": ".*", "$host": ".*", "$model": ".*", "$__range": "10m"}


def attributed(tenant: str, model: str, joules: int) -> dict[str, str]:
    """J per minute of a tenant's requests to a model."""
    labels = f'{TARGET},hw_id="g",tenant="{tenant}",gen_ai_request_model="{model}"'
    return {"series": f"{q.ATTRIBUTED}{{{labels}}}", "values": f"0+{joules}x30"}


def idle(holder: str, joules: int) -> dict[str, str]:
    """J per minute that a model holds a device idle for; nobody: held by none."""
    held = f',{q.HOLDER_MODEL}="{holder}"' if holder else ""
    labels = f'{TARGET},hw_id="g-{holder}",{q.BUCKET}="idle"{held}'
    return {"series": f"{q.UNATTRIBUTED}{{{labels}}}", "values": f"0+{joules}x30"}


@pytest.mark.parametrize(
    ("by", "loaded"),
    [
        # small: 30 J of acme + 10 J of globex, 40 J idle of its own: doubled. big: 60 J, no idle of its own. Of the other 20 J
        # (10 held by none, 10 by a model that nobody used) everybody has a fifth of their own 100 J.
        ("tenant", {"acme": 30 + 30 + 60 + 18, "globex": 10 + 10 + 2}),
        ("gen_ai_request_model", {"small": 40 + 40 + 8, "big": 60 + 12}),
    ],
)
def test_idle_goes_to_those_who_used_its_holder(by: str, loaded: dict[str, int], tmp_path: Path) -> None:
    """And all of it together is what was measured: 160 J a minute."""
    expression = _fully_loaded(q.sum_of(increase(q.ATTRIBUTED, MODEL), "$by"), unattributed(increase))
    for name, value in (PICKED | {"$by": by}).items():
        expression = expression.replace(name, value)
    assert sum(loaded.values()) == 160
    series = [attributed("acme", "small", 30), attributed("globex", "small", 10), attributed("acme", "big", 60)]
    series += [idle("small", 40), idle("", 10), idle("unused", 10)]
    expected = [{"labels": f'{{{by}="{who}"}}', "value": 10 * joules} for who, joules in loaded.items()]
    case = {"expr": f"round({expression}, 1e-6)", "eval_time": "20m", "exp_samples": expected}
    path = tmp_path / "test.yml"
    path.write_text(yaml.safe_dump({"tests": [{"interval": "1m", "input_series": series, "promql_expr_test": [case]}]}))
    done = program("promtool", "test", "rules", path)
    assert done.returncode == 0, done.stdout + done.stderr
