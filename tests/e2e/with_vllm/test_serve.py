"""Plain ``vllm serve``: every request has its exact tokens and its own joules, and the books balance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.e2e.with_vllm.books import Mark, Told, check_balance, mark, told
from tests.e2e.with_vllm.clients import Answer, Ask, fire, mixed
from tests.e2e.with_vllm.rig import PACKAGE, VllmServer, gpu

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

LEAVE = 8
"""Clients that ask for four long answers each, one client after the other, and go away at their first token."""
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass(slots=True)
class Day:
    """What a server did, and what was told of it."""

    server: VllmServer
    answers: list[Answer]
    spans: list[Told]
    counted: dict[str, float]
    since: Mark

    def of(self, answer: Answer) -> list[Told]:
        """The spans of an answer: one per prompt."""
        return [span for span in self.spans if str(span.of("gen_ai.response.id")).startswith(answer.id)]


@pytest.fixture(scope="module")
def day(vllm_server: Callable[..., VllmServer]) -> Day:
    """64 requests at once, then one by one: several answers, several prompts, a long prompt twice; then clients that leave."""
    server = vllm_server()
    since = mark(server)
    asks = mixed(64)
    answers = fire(server.url, asks)
    long = "the quick brown fox jumps over the lazy dog " * 16
    single = [
        Ask("a joule is a watt second", max_tokens=5, n=3),
        Ask(["one", "two words", "three words here"], max_tokens=6),
        Ask(long, max_tokens=4),
        Ask(long, max_tokens=4),
        Ask("a traced request", max_tokens=3, headers={"traceparent": f"00-{TRACE}-{SPAN}-01"}),
    ]
    answers += [fire(server.url, [ask])[0] for ask in single]
    leaving = [Ask(f"{n} leaves", 480, n=4, stream=True, leave_after=1) for n in range(LEAVE)]
    answers += [fire(server.url, [ask])[0] for ask in leaving]
    server.rest()
    spans = told(server, 64 + 1 + 3 + 3 + LEAVE)
    kinds = ("prompt", "generation")
    return Day(server, answers, spans, {kind: server.counted(f"{kind}_tokens_total") for kind in kinds}, since)


def test_one_span_per_prompt(day: Day) -> None:
    """64 requests, one with three answers, one with three prompts, the rest: each prompt has one span, and no other."""
    assert len(day.spans) == 64 + 1 + 3 + 3 + LEAVE
    assert [len(day.of(answer)) for answer in day.answers] == [1] * 65 + [3] + [1] * (3 + LEAVE)


def test_tokens_are_the_servers(day: Day) -> None:
    """Each answer's tokens are those of the usage that its client was told."""
    for answer in day.answers:
        if answer.left:
            continue
        found = day.of(answer)
        assert sum(span.of("gen_ai.usage.input_tokens") for span in found) == answer.tokens("prompt")
        assert sum(span.of("gen_ai.usage.output_tokens") for span in found) == answer.tokens("completion")


def test_tokens_are_the_servers_counters(day: Day) -> None:
    """What was produced, the client that left included, is what vLLM itself has counted."""
    assert sum(span.of("gen_ai.usage.output_tokens") for span in day.spans) == day.counted["generation"]


def test_chats_are_chats(day: Day) -> None:
    """The endpoint tells a chat from a completion, and a stream from an answer in one."""
    for answer in day.answers:
        for span in day.of(answer):
            assert span.of("gen_ai.operation.name") == ("chat" if answer.ask.chat else "text_completion")
            assert bool(span.of("gen_ai.request.stream")) == answer.ask.stream
            assert span.of("gen_ai.request.model") == "tiny"


def test_who_leaves_has_used_something(day: Day) -> None:
    """A client that goes away ends its span as an abort, with the tokens and joules that it had used."""
    spans = [day.of(answer)[0] for answer in day.answers[-LEAVE:]]
    early = [span for span in spans if span.of("gen_ai.usage.output_tokens") < 4 * 480]
    assert early, "the server was done before it saw any of them go"
    for span in early:
        assert span.of("gen_ai.usage.output_tokens") >= 1
        assert span.of("gen_ai.response.finish_reasons") in (None, ("abort",), ["abort"])
        assert span.of("melodi.energy.total") is not None, span.attributes


def test_cached_prompt(day: Day) -> None:
    """The second of two equal long prompts says how many of its tokens were in the cache, and paid for fewer."""
    first, second = (day.of(answer)[0] for answer in day.answers[66:68])
    assert first.of("gen_ai.usage.cache_read.input_tokens") == 0
    assert second.of("gen_ai.usage.cache_read.input_tokens") >= 128


def test_trace_context(day: Day) -> None:
    """A request that came with a `traceparent` stands in that trace, under that span; one without is a root."""
    (traced,) = day.of(day.answers[68])
    assert (traced.trace, traced.parent) == (TRACE, SPAN)
    assert all(span.parent == "" for span in day.of(day.answers[0]))


def test_steps(day: Day) -> None:
    """Joules of the accelerator are divided by the engine's own steps."""
    assert {span.of("melodi.energy.method") for span in day.spans} <= {"step", "exclusive"}
    assert "step" in {span.of("melodi.energy.method") for span in day.spans}


def test_first_token(day: Day) -> None:
    """Every request that produced something says when its first token came."""
    assert all(span.of("gen_ai.response.time_to_first_chunk") > 0 for span in day.spans)


def test_says_what_it_does(day: Day) -> None:
    """One line in the server's log says that requests are metered, and how."""
    said = [line for line in day.server.log.splitlines() if "melodi_otel meters the requests" in line]
    assert len(said) == 1
    assert "divided by engine steps" in said[0]


def test_books(day: Day, capsys: pytest.CaptureFixture[str]) -> None:
    """Requests and buckets sum to the counters, to 1e-9, on the package and the GPU; loading the model is in them."""
    figures = check_balance(day.server, day.spans, day.since)
    assert figures[gpu(0)]["loading"] > 0
    with capsys.disabled():
        print(f"\n  {len(day.spans)} requests: { ({name: figures[name] for name in (PACKAGE, gpu(0))}) }", end="")
