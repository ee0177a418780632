"""Scripts: requests begin where they are added and end where a step says so, whatever becomes of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from melodi_otel.instrumentation.vllm.complaints import Complaints
from melodi_otel.instrumentation.vllm.front import FrontEnd
from melodi_otel.instrumentation.vllm.offline import Offline


class Engine:
    """Like ``LLMEngine``, with the output processor that it drives."""

    def __init__(self, front: FrontEnd) -> None:
        self.vllm_config = SimpleNamespace(model_config=SimpleNamespace(model="/m", served_model_name="tiny"))
        self.request_states: dict[str, Any] = {}
        self.note = front.note(type(self).processed)
        self.answers: list[Any] = []
        front.made(self, stepping=True)

    def processed(self, request: Any) -> None:
        self.request_states[request.request_id] = SimpleNamespace(
            prompt_len=3, detokenizer=SimpleNamespace(num_output_tokens=lambda: 4), num_cached_tokens=0, stats=None,
            output_kind=None, request_id=request.request_id,
        )  # fmt: skip

    def add_request(self, request_id: str, prompt: Any, params: Any, *_: Any) -> str:
        if prompt == "too long":
            raise ValueError("too long")
        self.note(self, SimpleNamespace(request_id=f"{request_id}-in"))
        return request_id

    def step(self) -> list[Any]:
        return self.answers

    def abort_request(self, request_ids: list[str], internal: bool = False) -> str:
        return f"aborted {request_ids}"


@pytest.fixture
def front(calls: Any) -> FrontEnd:
    return FrontEnd(calls, Complaints())


@pytest.fixture
def offline(front: FrontEnd) -> Offline:
    return Offline(front)


@pytest.fixture
def engine(front: FrontEnd) -> Engine:
    return Engine(front)


def add(offline: Offline, engine: Engine, name: str = "0", prompt: str = "p") -> str:
    return offline.add(Engine.add_request)(engine, name, prompt, SimpleNamespace(max_tokens=4))


def answered(name: str, *, finished: bool = True) -> Any:
    part = SimpleNamespace(index=0, token_ids=[1], finish_reason="stop" if finished else None)
    return SimpleNamespace(request_id=name, outputs=[part], finished=finished, prompt_token_ids=[1, 2, 3])


def test_from_add_to_the_last_answer(offline: Offline, engine: Engine, calls: Any) -> None:
    """A request begins where it is added and ends with the step that finishes it; the engine's answers pass as they are."""
    assert add(offline, engine) == "0"
    step = offline.step(Engine.step)
    engine.answers = [answered("0", finished=False)]
    assert step(engine) is engine.answers
    assert calls.only.ends == []
    engine.answers = [answered("0"), answered("somebody else's")]
    step(engine)
    assert (calls.only.ended.output_tokens, calls.only.ended.outcome) == (4, "stop")
    assert calls.only.children == ["0-in"]


def test_a_prompt_that_is_refused(offline: Offline, engine: Engine, calls: Any) -> None:
    """What the engine does not take raises as it does, and ends its request as an error."""
    with pytest.raises(ValueError, match="too long"):
        add(offline, engine, prompt="too long")
    assert calls.only.ended.outcome == "error"


@pytest.mark.parametrize("named", ["0", "0-in"])
def test_an_abort(offline: Offline, engine: Engine, calls: Any, named: str) -> None:
    """Aborted by the caller's id or by the engine's own, a request ends as one; others go on."""
    add(offline, engine, "0")
    add(offline, engine, "1")
    assert offline.abort(Engine.abort_request)(engine, [named]) == f"aborted {[named]}"
    assert calls.made[0].ended.outcome == "abort"
    assert calls.made[1].ends == []


def test_a_step_that_fails(offline: Offline, engine: Engine, calls: Any) -> None:
    """Where a step raises, all that ran is over, each as an error."""

    def step(_: Engine) -> Any:
        raise RuntimeError("out of memory")

    add(offline, engine, "0")
    add(offline, engine, "1")
    with pytest.raises(RuntimeError, match="out of memory"):
        offline.step(step)(engine)
    assert [call.ended.outcome for call in calls.made] == ["error", "error"]


def test_chats(offline: Offline, engine: Engine, calls: Any) -> None:
    """What ``chat`` adds are chats; afterwards it is as it was."""

    def chat(engine: Engine) -> str:
        return add(offline, engine)

    assert offline.chat(chat)(engine) == "0"
    add(offline, engine, "1")
    assert [call.begin.operation for call in calls.made] == ["chat", "text_completion"]


def test_a_beam_search_is_one_request(offline: Offline, engine: Engine, calls: Any) -> None:
    """Beams are parts of the search that adds them; it has the tokens of the beams that it returns."""

    def beam_search(script: Any, prompts: list[str], params: Any) -> Any:
        for number in range(3):
            add(offline, script.llm_engine, f"b{number}")
        beam = SimpleNamespace(tokens=[1, 2, 3, 9, 9], orig_prompt={"prompt_token_ids": [1, 2, 3]})
        return [SimpleNamespace(sequences=[beam, beam])]

    script = SimpleNamespace(llm_engine=engine)
    found = offline.beam_search(beam_search)(script, ["p"], SimpleNamespace(max_tokens=2))
    assert len(found[0].sequences) == 2
    assert calls.only.children == ["b0-in", "b1-in", "b2-in"]
    assert calls.only.ended.output_tokens == 4


def test_a_beam_search_that_fails(offline: Offline, engine: Engine, calls: Any) -> None:
    """Its error comes through and ends its request; the next request is one of its own again."""

    def beam_search(*_: Any) -> Any:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        offline.beam_search(beam_search)(SimpleNamespace(llm_engine=engine), ["p"], SimpleNamespace())
    assert calls.only.ended.outcome == "error"
    add(offline, engine)
    assert len(calls.made) == 2


def test_our_failures_are_ours(
    offline: Offline, engine: Engine, calls: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where we fail the script goes on."""

    def fail(_: Any) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr(calls, "begin", fail)
    assert add(offline, engine) == "0"
    engine.answers = [answered("0")]
    assert offline.step(Engine.step)(engine) is engine.answers
    assert len(caplog.records) == 1
