"""What a plain ``vllm serve`` tells beside spans: joules in its answers, requests on its own page, labels of its callers."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.with_vllm.books import Told, told
from tests.e2e.with_vllm.clients import Answer, Ask, fire
from tests.e2e.with_vllm.rig import VllmServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
PER_REQUEST = ("melodi_request_energy_joules", "gen_ai_client_token_usage", "gen_ai_client_operation_duration_seconds")
ENVIRON: dict[str, str | None] = {
    "MELODI_ANSWER_ENERGY": "1",
    "MELODI_LABELS": "tenant=baggage:tenant.id|header:x-tenant-id",
    "MELODI_METRIC_LABELS": "tenant",
}


@dataclass(slots=True)
class Talk:
    """What a server was asked, what it answered, and what was told of it."""

    server: VllmServer
    answers: list[Answer]
    spans: list[Told]

    def of(self, answer: Answer) -> list[Told]:
        """The spans of an answer."""
        return [span for span in self.spans if str(span.of("gen_ai.response.id")).startswith(answer.id)]

    def energy(self, answer: Answer) -> dict[str, Any]:
        """What the answer said of its energy."""
        return (answer.usage or {})["energy"]


@pytest.fixture(scope="module")
def talk(vllm_server: Callable[..., VllmServer]) -> Talk:
    """A short answer, a long one, a long stream, three prompts at once, three answers at once; a trace and two tenants."""
    server = vllm_server(env=ENVIRON, agent=True)
    context = {"traceparent": f"00-{TRACE}-{SPAN}-01", "baggage": "tenant.id=acme"}
    asks = [
        Ask("short", max_tokens=1, chat=True, headers=context),
        Ask("long", max_tokens=480, headers={"x-tenant-id": "bolt"}),
        Ask("long stream", max_tokens=480, chat=True, stream=True),
        Ask(["one", "two words", "three words here"], max_tokens=6),
        Ask("n answers", max_tokens=6, n=3),
    ]
    # On a machine that is busy with its start a server's first request may reach the meter late, which then has no joules of it.
    fire(server.url, [Ask("first", max_tokens=1)])
    server.rest()
    answers = [fire(server.url, [ask])[0] for ask in asks]
    server.rest()
    return Talk(server, answers, told(server, 8))


def ask(server: VllmServer, name: str) -> tuple[int, dict[str, Any]]:
    """The status and the body of an answer's page at the hub."""
    url = f"{server.page_url()}/melodi/requests/{name}"
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as refused:
        return refused.code, {}


def test_an_answer_promises(talk: Talk) -> None:
    """Every usage has an id that nobody can guess, and says that its figure is not final; an estimate has its ±."""
    ids = {talk.energy(answer)["id"] for answer in talk.answers}
    assert len(ids) == len(talk.answers)
    assert all(re.fullmatch(r"[\w-]{32}", one) for one in ids)
    for answer in talk.answers:
        said = talk.energy(answer)
        assert said["final"] is False
        assert ("joules" in said) == ("uncertainty" in said)


def test_a_promise_is_kept(talk: Talk) -> None:
    """The hub's page has the joules of each answer: those of its spans, to the last digit that they have in common."""
    for answer in talk.answers:
        status, said = ask(talk.server, talk.energy(answer)["id"])
        assert (status, said["final"]) == (200, True)
        joules = sum(span.of("melodi.energy.total") for span in talk.of(answer))
        assert said["joules"] == pytest.approx(joules, rel=1e-9)
        assert said["uncertainty"] > 0, [span.attributes for span in talk.of(answer)]


def test_nobody_guesses(talk: Talk) -> None:
    """An id that was never told is not there."""
    assert ask(talk.server, "A" * 32)[0] == 404


def test_requests_are_on_vllms_own_page_alone(talk: Talk) -> None:
    """Per-request families stand on vLLM's ``/metrics``, with every request, and on no other page; the books on the hub's."""
    own = {sample.name for sample in talk.server.samples()}
    hub = talk.server.page()
    for family in PER_REQUEST:
        assert f"{family}_count" in own
        assert f"{family}_count" not in hub
    assert not {name for name in own if name.startswith(("hw_", "melodi_energy", "melodi_requests", "target_info"))}
    assert "melodi_energy_attributed_joules_total" in hub
    counted = sum(s.value for s in talk.server.samples() if s.name == "melodi_request_energy_joules_count")
    assert counted == len(talk.spans)


def test_baggage_and_headers_label(talk: Talk) -> None:
    """A tenant in the baggage or in a header is on the span; the request with a ``traceparent`` stands in its trace."""
    tenants = [talk.of(answer)[0].of("tenant") for answer in talk.answers]
    assert tenants == ["acme", "bolt", None, None, None]
    traced = talk.of(talk.answers[0])[0]
    assert (traced.trace, traced.parent) == (TRACE, SPAN)
