"""vLLM never notices us: with methods of other names, and with a plug-in that fails, a server serves as it would."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.with_vllm.books import check_balance, mark, told
from tests.e2e.with_vllm.clients import fire, mixed
from tests.e2e.with_vllm.rig import VllmServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

HERE = Path(__file__).parent


def behind(name: str) -> dict[str, str | None]:
    """Variables of a Python that runs ``NAME/sitecustomize.py`` when it starts."""
    return {"PYTHONPATH": os.pathsep.join([str(HERE / name), str(HERE.parents[2])])}


def test_methods_of_other_names(vllm_server: Callable[..., VllmServer]) -> None:
    """Where no step can be seen, joules are divided by the tokens of each request: spans and the log say so, books balance."""
    server = vllm_server(env=behind("renamed"))
    since = mark(server)
    answers = fire(server.url, mixed(24))
    server.rest()
    spans = told(server, 24)
    assert {answer.status for answer in answers} == {200}
    produced = sum(answer.tokens("completion") for answer in answers)
    assert (
        sum(span.of("gen_ai.usage.output_tokens") for span in spans)
        == produced
        == server.counted("generation_tokens_total")
    )
    methods = {span.of("melodi.energy.method") for span in spans}
    assert methods <= {"slice", "exclusive"}
    assert "slice" in methods
    assert "divided by their tokens, because its steps are not seen from here" in server.log
    check_balance(server, spans, since)


def test_a_plug_in_that_fails(vllm_server: Callable[..., VllmServer]) -> None:
    """A plug-in that cannot be prepared costs the joules and one message, never the server or an answer."""
    server = vllm_server(env=behind("broken"))
    answers = fire(server.url, mixed(8))
    assert {answer.status for answer in answers} == {200}
    assert all(answer.tokens("completion") == answer.ask.max_tokens for answer in answers)
    assert "melodi_otel is off: it could not be prepared" in server.log
    assert server.receiver.spans() == []
