"""The rig itself: the real server and the real engine run here, and what their clients are told is what they counted."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.with_vllm.clients import Ask, fire, mixed
from tests.e2e.with_vllm.rig import ENGINE, PACKAGE, VllmServer, gpu

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

HERE = Path(__file__).parent


def test_one_process(vllm_program: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    """An ``LLM`` in the program's own process gives every prompt as many tokens as it asked for, while the meters count."""
    told = vllm_program(
        HERE / "offline.py", engine=ENGINE, prompts=["the quick brown fox", "a joule"], max_tokens=[7, 12]
    )
    assert [row["completion_tokens"] for row in told["rows"]] == [7, 12]
    assert all(row["prompt_tokens"] > 0 for row in told["rows"])
    assert told["counted"][PACKAGE] > 0
    assert told["counted"][gpu(0)] > 0
    with capsys.disabled():
        print(f"\n  in one process: {told['seconds']}", end="")


def test_usage_is_what_the_server_counted(
    vllm_server: Callable[..., VllmServer], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of eight requests at once, chats and completions, streaming and not, the usage told sums to the server's counters."""
    server = vllm_server()
    asks = mixed(8)
    before = {kind: server.counted(f"{kind}_tokens_total") for kind in ("prompt", "generation")}
    answers = fire(server.url, asks)
    server.rest()
    assert [answer.status for answer in answers] == [200] * 8
    assert [answer.tokens("completion") for answer in answers] == [ask.max_tokens for ask in asks]
    told = {
        "prompt": sum(answer.tokens("prompt") for answer in answers),
        "generation": sum(answer.tokens("completion") for answer in answers),
    }
    assert {kind: server.counted(f"{kind}_tokens_total") - before[kind] for kind in before} == told
    with capsys.disabled():
        print(f"\n  vllm serve: healthy after {server.start_s:.1f} s, {len(server.pids())} processes, {told}", end="")


def test_a_client_leaves(vllm_server: Callable[..., VllmServer]) -> None:
    """Clients that go away in the middle end their requests: the server counts fewer tokens than were asked for."""
    server = vllm_server()
    before = server.counted("generation_tokens_total")
    # One after the other: a server that is busy with all of them may be done before it looks who is still there.
    asks = [Ask(f"{n} leaves", max_tokens=480, stream=True, leave_after=1) for n in range(8)]
    answers = [fire(server.url, [ask])[0] for ask in asks]
    assert all(answer.left and answer.usage is None for answer in answers)
    server.rest()
    assert 8 <= server.counted("generation_tokens_total") - before < 8 * 480


def test_same_flags_same_server(vllm_server: Callable[..., VllmServer]) -> None:
    """Who asks for the same flags gets the same server; its engine is a process of its own, in the group that is stopped."""
    server = vllm_server()
    assert vllm_server() is server
    assert re.search(r"VLLM::EngineCore", "\n".join(server.pids().values()))
    assert len({os.getpgid(pid) for pid in server.pids()}) == 1


def test_stop_leaves_nothing(vllm_server: Callable[..., VllmServer]) -> None:
    """What a server left behind is ended with it: an engine that hears no signal, of a launcher that is dead."""
    server = vllm_server()
    engine = next(pid for pid, title in server.pids().items() if "EngineCore" in title)
    os.kill(engine, signal.SIGSTOP)
    server.process.kill()
    server.process.wait(30)
    assert engine in server.pids()
    server.stop()
    assert server.pids() == {}
