"""What a busy server does with requests: prompts in chunks, preemption, drafts, its own tracing. Tokens and joules stay exact."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from melodi_otel.testing.telemetry import plain
from tests.e2e.with_vllm.books import Mark, Told, check_balance, mark, told
from tests.e2e.with_vllm.clients import Answer, Ask, fire, mixed, warm_up
from tests.e2e.with_vllm.rig import VllmServer, gpu

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

FLAGS = (
    *("--max-num-batched-tokens", "64"),  # long prompts are computed in chunks
    *("--num-gpu-blocks-override", "24", "--block-size", "32"),  # and the cache is too small for all
    *("--speculative-config", '{"method":"ngram","num_speculative_tokens":3,"prompt_lookup_max":3}'),
    *("--otlp-traces-endpoint", "{otlp}/v1/traces"),
)
ENVIRON: dict[str, str | None] = {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
LONG = 8


@dataclass(slots=True)
class Day:
    """What the server did, and what was told of it."""

    server: VllmServer
    answers: list[Answer]
    spans: list[Told]
    theirs: list[dict[str, Any]]
    since: Mark


@pytest.fixture(scope="module")
def day(vllm_server: Callable[..., VllmServer]) -> Day:
    """Long prompts that repeat themselves, with long answers, all at once, among short ones."""
    server = vllm_server(*FLAGS, env=ENVIRON)
    first = warm_up(server.url)
    told(server, len(first))
    since = mark(server)
    long = [Ask(f"{n} the fox " * 25, max_tokens=200, more={"temperature": 0.0}) for n in range(LONG)]
    answers = fire(server.url, [*long, *mixed(16)]) + first
    server.rest()
    spans = told(server, len(answers))
    found = server.receiver.spans(len(answers), where=lambda span: span.name == "llm_request")
    return Day(server, answers, spans, [plain(span.attributes) for span in found], since)


def test_tokens_are_the_servers(day: Day) -> None:
    """Prompt and output tokens of each span are those of its answer's usage; the outputs are vLLM's own counter."""
    assert {answer.status for answer in day.answers} == {200}
    for answer in day.answers:
        (span,) = [span for span in day.spans if str(span.of("gen_ai.response.id")).startswith(answer.id)]
        assert span.of("gen_ai.usage.input_tokens") == answer.tokens("prompt")
        assert span.of("gen_ai.usage.output_tokens") == answer.tokens("completion")
    counted = day.server.counted("generation_tokens_total")
    assert sum(span.of("gen_ai.usage.output_tokens") for span in day.spans) == counted


def test_it_was_a_busy_day(day: Day) -> None:
    """Requests were preempted and drafts accepted while these tokens were counted."""
    assert day.server.counted("num_preemptions_total") > 0
    assert day.server.counted("spec_decode_num_accepted_tokens_total") > 0


def test_steps(day: Day) -> None:
    """Chunks, recomputed prompts and drafts are work of steps: joules of the accelerator are divided by them."""
    ids = tuple(answer.id for answer in day.answers[: LONG + 16])
    spans = [span for span in day.spans if str(span.of("gen_ai.response.id")).startswith(ids)]
    assert len(spans) == LONG + 16
    assert {span.of("melodi.energy.method") for span in spans} <= {"step", "exclusive"}


def test_longer_work_costs_more(day: Day) -> None:
    """Each of the long requests used more joules than the mean of the short ones."""
    joules = {str(span.of("gen_ai.response.id")): span.of("melodi.energy.gpu") for span in day.spans}
    of = [next(value for name, value in joules.items() if name.startswith(answer.id)) for answer in day.answers]
    short = of[LONG : LONG + 16]
    assert min(of[:LONG]) > sum(short) / len(short)


def test_vllms_own_span_is_a_rollup(day: Day) -> None:
    """vLLM's `llm_request` still reaches its URL, once a request, and carries the joules of ours as a rollup, never a total."""
    assert len(day.theirs) == len(day.answers)
    totals = {str(span.of("gen_ai.response.id")): span.of("melodi.energy.total") for span in day.spans}
    for found in day.theirs:
        assert "melodi.energy.total" not in found
        assert found["melodi.energy.rollup"] == pytest.approx(totals[found["gen_ai.request.id"]], rel=1e-12)


def test_books(day: Day, capsys: pytest.CaptureFixture[str]) -> None:
    """Requests and buckets sum to the counters, to 1e-9."""
    figures = check_balance(day.server, day.spans, day.since)
    with capsys.disabled():
        preempted = day.server.counted("num_preemptions_total")
        drafts = day.server.counted("spec_decode_num_draft_tokens_total")
        accepted = day.server.counted("spec_decode_num_accepted_tokens_total")
        print(f"\n  {preempted:g} preemptions, {accepted:g} of {drafts:g} drafts accepted: {figures[gpu(0)]}", end="")
