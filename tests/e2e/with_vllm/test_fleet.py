"""Two API servers and two engines with a GPU each, clients that leave: the hub joins requests and steps of four processes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.e2e.with_vllm.books import check_balance, mark, told
from tests.e2e.with_vllm.clients import fire, mixed, warm_up
from tests.e2e.with_vllm.rig import VllmServer, gpu

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

FLAGS = ("--data-parallel-size", "2", "--api-server-count", "2")


def test_two_servers_two_engines(vllm_server: Callable[..., VllmServer], capsys: pytest.CaptureFixture[str]) -> None:
    """64 requests, a third of whose clients leave: tokens are the servers' counters, each GPU's books balance to 1e-9."""
    server = vllm_server(*FLAGS, env={"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, gpus=2)
    first = warm_up(server.url)
    told(server, len(first))
    since = mark(server)
    answers = fire(server.url, mixed(64, leave_every=3))
    server.rest()
    spans = told(server, len(first) + 64)
    assert len(spans) == len(first) + 64
    produced = sum(span.of("gen_ai.usage.output_tokens") for span in spans)
    assert produced == server.counted("generation_tokens_total")
    for answer in (answer for answer in answers if not answer.left):
        (span,) = [span for span in spans if str(span.of("gen_ai.response.id")).startswith(answer.id)]
        assert span.of("gen_ai.usage.output_tokens") == answer.tokens("completion")
    figures = check_balance(server, spans, since, gpus=2)
    # A request is computed by one of the engines, and has joules of that engine's GPU alone.
    warm = tuple(answer.id for answer in first)
    looked_at = [span for span in spans if not str(span.of("gen_ai.response.id")).startswith(warm)]
    assert len(looked_at) == 64
    used = [{name for name in span.of("melodi.energy.devices") or () if name.startswith("GPU-")} for span in looked_at]
    both = [span.attributes for span, names in zip(looked_at, used, strict=True) if len(names) > 1]
    assert {frozenset(names) for names in used if names} == {frozenset({gpu(0)}), frozenset({gpu(1)})}, both
    with capsys.disabled():
        print(f"\n  2 API servers, 2 engines, {server.start_s:.0f} s to start: {figures}", end="")
